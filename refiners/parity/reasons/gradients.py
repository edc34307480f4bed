"""Where gradients part, when both sides compute the same forward.

Both sides are traced forwards and backwards. From a gradient that is another one, the way leads back through values
that upstream does not have to the operations that made them of values it has, as in `localise`: each of these goes back
through one operation of the forward, whose module and line are named. A gradient that only upstream has says that
nothing came back so far: something is detached, frozen, or computed without autograd.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from refiners.parity.fingerprint import Values
from refiners.parity.leaves import Pairing, weight_leaves
from refiners.parity.operations import Operation, Trace
from refiners.parity.reasons.ways import Walk, producers, walk
from refiners.parity.trace import record

MAX_TOLD = 6


def explain_gradients(
    upstream: nn.Module,
    port: nn.Module,
    run_upstream: Callable[[], Mapping[str, Tensor]],
    run_port: Callable[[], Mapping[str, Tensor]],
    pairing: Pairing,
) -> list[str]:
    """What is wrong with the gradients of a port whose forward is right, a sentence each.

    Receives:
        upstream, port: both sides.
        run_upstream, run_port: a forward and a backward of each, from the same cotangents; they return the outputs.
        pairing: of the leaves.
    """
    values = Values()
    ours, theirs = (_traced(model, run, values) for model, run in ((upstream, run_upstream), (port, run_port)))
    told = _Told(ours, theirs).all_of(_weights(upstream, port, pairing))
    _clear(upstream)
    _clear(port)
    return told


def _traced(model: nn.Module, run: Callable[[], Mapping[str, Tensor]], values: Values) -> Trace:
    _clear(model)
    trace, _ = record(model, run, values, gradients=True)
    given = dict(model.named_parameters())
    zero = [name for name in trace.gradients if not bool(given[name].grad.any())]  # pyright: ignore[reportOptionalMemberAccess]  # those of the trace have one
    for name in zero:  # a gradient of zeros is none
        del trace.gradients[name]
    return trace


def _clear(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def _weights(upstream: nn.Module, port: nn.Module, pairing: Pairing) -> list[tuple[str, str]]:
    """Names of weights of the port and of upstream that stand for each other."""
    ours, theirs = weight_leaves(upstream), weight_leaves(port)
    found: list[tuple[str, str]] = []
    for path, other in pairing.items():
        if path in theirs and other in ours:
            there = {name: p.shape for name, p in ours[other].named_parameters(recurse=False)}
            here = {name: p.shape for name, p in theirs[path].named_parameters(recurse=False)}
            same = [name for name in here if there.get(name) == here[name]]
            found += [(_join(path, name), _join(other, name)) for name in same]
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Told:
    """The walks back from gradients that differ."""

    def __init__(self, upstream: Trace, port: Trace) -> None:
        self.upstream, self.port = upstream, port
        self._made = producers(upstream), producers(port)
        self._known = upstream.known() | upstream.weights, port.known() | port.weights

    def all_of(self, weights: list[tuple[str, str]]) -> list[str]:
        """A sentence for each operation at which gradients part, and for what gets none."""
        parted: dict[tuple[str, str], tuple[int, Operation, Walk, str]] = {}
        without: list[str] = []
        extra: list[str] = []
        for name, other in weights:
            here, there = self.port.gradients.get(name), self.upstream.gradients.get(other)
            if here == there:
                continue
            if here is None:
                without.append(f"`{name}`")
            elif there is None:
                extra.append(f"`{name}`")
            else:
                self._add(parted, name, here, there)
        ordered = sorted(parted.values(), key=lambda item: item[0])
        told = [self._sentence(operation, there, name) for _, operation, there, name in ordered[:MAX_TOLD]]
        told += [f"no gradient arrives at {_some(without)}, and one does upstream{self._stopped()}"] if without else []
        return told + ([f"a gradient arrives at {_some(extra)}, and none does upstream"] if extra else [])

    def _stopped(self) -> str:
        """The last operation of the forward through which upstream goes back and the port does not."""
        ours, theirs = _gone_through(self.upstream), _gone_through(self.port)
        stopped = [
            op
            for op in self.port.operations
            if op.backward_of is None and set(op.outputs) & (ours - theirs) and not set(op.outputs) & set(op.inputs)
        ]
        if not stopped:
            return ""
        last = stopped[-1]
        return f": it stops at `{last.name.removeprefix('aten.')}` in {self.port.place_of(last)}"

    def _add(
        self, parted: dict[tuple[str, str], tuple[int, Operation, Walk, str]], name: str, here: int, there: int
    ) -> None:
        way = walk(self._made[1], here, self._known[0])
        right = walk(self._made[0], there, self._known[1])
        for operation in way.frontier:
            key = self.port.path_of(operation), str(operation.source)
            parted.setdefault(key, (operation.index, operation, right, name))

    def _sentence(self, operation: Operation, right: Walk, name: str) -> str:
        told = f"gradients part at {self.port.place_of(operation)}: `{operation.name.removeprefix('aten.')}`"
        related = [op for op in right.frontier if set(op.inputs) & set(operation.inputs)] or right.frontier
        if related:
            there = related[0]
            place = self.upstream.place_of(there)
            told += f" gives another one than upstream's `{there.name.removeprefix('aten.')}` at {place}"
        else:
            told += " makes one that upstream does not"
        return f"{told}; it shows in that of `{name}`"


def _gone_through(trace: Trace) -> set[int | None]:
    """What the operations return that the way back leads through."""
    indices = {op.backward_of for op in trace.operations if op.backward_of is not None}
    return {number for index in indices for number in trace.operations[index].outputs}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return f"{', '.join(names[:MAX_TOLD])}{more}"
