"""One leaf of a port once more: it is given what upstream's leaf was given, and both outputs are shown.

It is what an explanation rests on, small enough to be looked at: `refiners parity explain CASE --leaf PATH`. Of all
activations, only those of this one leaf are kept.
"""

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity.bits import find_worst, same_bits
from refiners.parity.explain import runs_of, warmed_up
from refiners.parity.fingerprint import Values
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.leaves import Pairing, keys_of_same, pairings
from refiners.parity.modules import named_modules
from refiners.parity.reasons.teacher import Call, Point, Run, Teacher
from refiners.parity.reasons.wholes import wholes
from refiners.parity.runner import CaseRunner

MAX_CALLS = 3


def leaf_of_case(runner: CaseRunner, lane: Lane, path: str) -> str:
    """What a leaf of a case's port returns for upstream's inputs, beside what upstream's returns.

    Receives:
        runner: of the case.
        lane: where to run it.
        path: of a leaf of the port that is paired with one of upstream's by its weights.

    Raises:
        ParityError: no leaf of that path is paired, or it never runs.
    """
    with held_equal(lane, threads=runner.threads):
        upstream, port, _ = runner.sides(lane)
        right = runner.case.key_map.convert(upstream.state_dict(), port)
        run_upstream, run_port = runs_of(runner.case, lane, upstream, port)
        told = leaf_of_modules(upstream, port, run_upstream, run_port, path, right_weights=right)
        return f"{runner.case.id}[{lane.name}]\n{told}"


def leaf_of_modules(
    upstream: nn.Module,
    port: nn.Module,
    run_upstream: Run,
    run_port: Run,
    path: str,
    *,
    right_weights: Mapping[str, Tensor] | None = None,
) -> str:
    """The same of any two modules, as `refiners.parity.explain.explain_modules` takes them."""
    run_upstream, run_port = warmed_up(run_upstream, run_port)
    found = pairings(upstream, port, keys_of_same(upstream, right_weights or {}))
    pairing = next((p for p in (*found, wholes(upstream, port, found[0])) if path in p), None)
    if pairing is None:
        raise ParityError(_no_such_leaf(path, port, found[0]))
    other = pairing[path]
    teacher = Teacher.listen(upstream, {other: upstream.get_submodule(other)}, run_upstream, Values())
    seen: list[Call] = []
    points: list[Point] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        seen.append(Call.of(args, output))

    # Behind the hooks that teach: what arrives here is upstream's.
    with torch.no_grad(), teacher.forcing(port, {path: other}, points, after=keep):
        run_port()
    if not seen:
        raise ParityError(f"The leaf `{path}` of the port never runs in this case.")
    module, theirs = port.get_submodule(path), upstream.get_submodule(other)
    lines = [f"port      {path}: {_one_line(module)}", f"upstream  {other}: {_one_line(theirs)}"]
    for index, (right, call) in enumerate(zip(teacher.calls[other], seen, strict=False)):
        if index == MAX_CALLS:
            lines.append(f"and {len(seen) - MAX_CALLS} more calls")
            break
        lines += _call(index, right, call)
    if len(teacher.calls[other]) != len(seen):
        lines.append(f"it runs {len(seen)} times, upstream's {len(teacher.calls[other])} times")
    return "\n".join(lines)


def _no_such_leaf(path: str, port: nn.Module, pairing: Pairing) -> str:
    near = difflib.get_close_matches(path, pairing, n=3, cutoff=0.3)
    exists = any(path == name for name, _ in named_modules(port))
    what = "holds no weights of a leaf of upstream" if exists else "does not exist"
    hint = f" Nearest leaves: {', '.join(near)}." if near else ""
    return f"The leaf `{path}` of {type(port).__name__} {what}, so there is nothing to feed it.{hint}"


def _one_line(module: nn.Module) -> str:
    return " ".join(repr(module).split())[:160]


def _call(index: int, right: Call, call: Call) -> list[str]:
    lines = [f"call {index + 1}"]
    lines += [f"  input     {_told(tensor)}" for tensor in right.received]
    for ours, theirs in zip(right.returned, call.returned, strict=False):
        lines += [f"  upstream  {_told(ours)}", f"  port      {_told(theirs)}", f"  {_apart(ours, theirs)}"]
    return lines


def _told(tensor: Tensor) -> str:
    flat = tensor.flatten()
    shown = [] if tensor.is_complex() else [f"{float(flat[i]):.6g}" for i in range(min(6, flat.numel()))]
    more = ", …" if tensor.numel() > len(shown) else ""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} [{', '.join(shown)}{more}]"


def _apart(ours: Tensor, theirs: Tensor) -> str:
    if ours.dtype != theirs.dtype or ours.numel() != theirs.numel():
        return "differ in dtype or shape"
    theirs = theirs.reshape(ours.shape)
    if same_bits(ours, theirs):
        return "equal, bit for bit"
    worst = find_worst("", ours, theirs)
    count = int((ours != theirs).sum())
    return f"differ in {count} of {ours.numel()} elements, worst {worst}"
