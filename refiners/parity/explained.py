"""An explanation as people read it: what, where on both sides, why, and the tree marked as in a ChainError."""

from collections import Counter
from typing import Any

from torch import nn

from refiners.fluxion.layers.tree import ModuleTree
from refiners.parity.case import Case
from refiners.parity.explain import Explanation, explain
from refiners.parity.lanes import Lane
from refiners.parity.operations import Operation
from refiners.parity.reasons.alike import Alike, Look, alike
from refiners.parity.reasons.faults import Fault
from refiners.parity.reasons.teacher import Where
from refiners.parity.runner import CaseRunner
from refiners.parity.time_limit import time_limit

MAX_FAULTS = 10
MAX_TREE_LINES = 20


def try_to_explain(case: Case | CaseRunner, lane: Lane, *, seconds: float) -> Any:
    """The explanation of a case in a lane as something to print; one line where it cannot be had.

    Whatever goes wrong, the verdict stands without it.
    """
    try:
        with time_limit(2 * seconds):
            return explain(case, lane, seconds=seconds)
    except Exception as error:
        first = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
        return f"No explanation: {type(error.__cause__ or error).__name__}: {first}"


def plain(explanation: Explanation) -> str:
    """The explanation as text."""
    return "\n".join(line for line, _ in _lines(explanation))


def rich(explanation: Explanation) -> Any:
    """The explanation in colours."""
    from rich.text import Text

    text = Text()
    for i, (line, style) in enumerate(_lines(explanation)):
        text.append(("\n" if i else "") + line, style=style)
    return text


def _lines(explanation: Explanation) -> list[tuple[str, str]]:
    faults = explanation.faults
    counts = Counter(explanation.marks.values())
    told = ", ".join(f"{counts[mark]} {mark}" for mark in ("equal", "introduces", "propagates") if counts[mark])
    what = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}" if faults else "no fault found"
    groups = alike(faults, _look)
    what += f" of {len(groups)} kind{'s' if len(groups) != 1 else ''}" if len(groups) < len(faults) else ""
    lines = [(f"{explanation.title}: {what}" + (f"; leaves: {told}" if told else ""), "bold")]
    for number, group in enumerate(groups[:MAX_FAULTS], 1):
        lines.append(("", ""))
        lines += _fault(number, group, explanation)
    if len(groups) > MAX_FAULTS:
        more = ", ".join(group.where for group in groups[MAX_FAULTS:][:10])
        lines.append((f"and {len(groups) - MAX_FAULTS} more: {more}", "red"))
    if faults:
        lines += [("", ""), *((line, _style(line)) for line in marked_tree(explanation).splitlines())]
    lines += [(f"note: {note}", "yellow") for note in explanation.notes]
    if explanation.command:
        lines.append((f"again: {explanation.command}", "dim"))
    return lines


def _style(line: str) -> str:
    return "bold red" if ">>> " in line else "dim"


def _name(path: str, root: nn.Module) -> str:
    return f"{type(root).__name__}.{path}" if path else type(root).__name__


def _look(fault: Fault) -> Look:
    finding = fault.finding
    operations = (*finding.upstream_operations[:2], *finding.port_operations[:2])
    lines = () if fault.diagnosis else tuple(f"{operation.name} {operation.source}" for operation in operations)
    kind = fault.was_run, finding.is_leaf, finding.point.agrees, bool(finding.port_operations), lines
    return Look(finding.port, fault.diagnosis, kind)


def _fault(number: int, group: Alike[Fault], explanation: Explanation) -> list[tuple[str, str]]:
    fault = group.first
    finding, point = fault.finding, fault.finding.point
    path = _name(finding.port, explanation.port)
    if point.agrees:
        what = "computes the same values as upstream in other dtypes"
    elif finding.is_leaf:
        what = "introduces a difference: it receives what upstream's leaf receives, and returns something else"
    elif finding.port_operations:
        what = "computes something else than upstream from the same values"
    elif not finding.upstream_operations:
        what = "is connected in another way: both sides have the value that arrives and the one that should"
    else:
        what = "passes on a value that upstream changes first"
    lines = [(f"{number}. {_name(group.where, explanation.port)} {what}", "bold red")]
    if len(group.paths) > 1:
        lines.append((f"   alike      {len(group.paths)} faults, of which the first is shown", "yellow"))
    if fault.diagnosis:
        source = "" if fault.was_run else " (from the values of both sides; the model was not run with it)"
        lines.append((f"   equal      {fault.diagnosis}{source}", "bold green"))
    else:
        lines.append(("   equal      by no hypothesis that was tried", "yellow"))
    lines += _side("upstream", finding.upstream or "outside of its modules", finding.upstream_operations[:2])
    lines += _side("port", path, finding.port_operations[:2])
    if finding.suspects:
        lines.append((f"   suspects   {', '.join(finding.suspects[:4])}", ""))
    shown = f"what {point.port} {point.where}" if point.where is not Where.OUTPUT else f"the output `{point.port}`"
    lines.append((f"   shows in   {'no bit here' if point.agrees else shown}", ""))
    if point.shapes[0] != point.shapes[1]:
        lines.append((f"   shapes     upstream {point.shapes[0]}, port {point.shapes[1]}", ""))
    elif point.shapes[0]:
        lines.append((f"   shapes     {point.shapes[0]}", ""))
    if point.worst:
        lines.append((f"   worst      {str(point.worst).removeprefix(point.worst.tensor)}", ""))
    lines.append((f"   again      {_again(fault, explanation)}", "dim"))
    return lines


def _again(fault: Fault, explanation: Explanation) -> str:
    """One line that shows the fault alone: the leaf at which it shows is fed upstream's inputs."""
    point, command = fault.finding.point, explanation.command.replace("parity show ", "parity explain ")
    if not command:
        call = "(upstream, port, run_upstream, run_port"
        if point.where is Where.OUTPUT:
            return f"print(refiners.parity.explain.explain_modules{call}))"
        return f"print(refiners.parity.leaf_again.leaf_of_modules{call}, {point.port!r}))"
    return command if point.where is Where.OUTPUT else f"{command} --leaf {point.port}"


def _side(name: str, path: str, operations: tuple[Operation, ...]) -> list[tuple[str, str]]:
    lines = [(f"   {name:<10} {path}", "cyan")]
    for operation in operations:
        where = f"   {operation.source}" if operation.source else ""
        lines.append((f"              {_shortened(str(operation))}{where}", ""))
        if operation.source and operation.source.code:
            lines.append((f"              | {_shortened(operation.source.code)}", "dim"))
    return lines


def _shortened(text: str, limit: int = 140) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def marked_tree(explanation: Explanation, max_lines: int = MAX_TREE_LINES) -> str:
    """The port's tree with `>>>` at the nodes to blame, shortened around the first."""
    blamed = set(explanation.leaves)

    def mark(module: nn.Module, path: str) -> str | None:
        return (path or type(module).__name__) if path in blamed else None

    tree = ModuleTree(explanation.port, mark)
    picture = tree.generate_tree_repr(tree.root)
    lines = picture.splitlines()
    first = next((i for i, line in enumerate(lines) if ">>> " in line), 0)
    return tree.shorten_tree_repr(picture, line_index=first, max_lines=max_lines)
