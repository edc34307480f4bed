"""Where gradients part, when both sides compute the same forward.

On the way back, the gradient that arrives at each leaf is compared with the one that arrives at upstream's. The last
leaf of the forward at which they differ is the first on the way back: what lies behind it sends another gradient
(a detach, a value computed without autograd). A leaf that receives upstream's gradient and gives its own weights
another one is wrong by itself (frozen, or told to skip a row).
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from refiners.parity.fingerprint import Values
from refiners.parity.leaves import Pairing, weight_leaves
from refiners.parity.trace import tensors_in

Arrived = dict[str, list[int]]
"""Path of a leaf → the numbers of the gradients of its outputs, in the order in which they came."""


@contextmanager
def listening(model: nn.Module, values: Values, arrived: Arrived, order: list[str]) -> Generator[None, None, None]:
    """Inside, what arrives at the leaves of a model during a backward pass is noted."""
    with ExitStack() as stack:
        for path, leaf in weight_leaves(model).items():

            def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                order.append(path)
                for tensor in tensors_in(output):
                    if tensor.requires_grad:
                        cast(Any, tensor).register_hook(_noting(values, arrived.setdefault(path, [])))

            stack.callback(leaf.register_forward_hook(leave).remove)
        yield


def _noting(values: Values, numbers: list[int]) -> Callable[[Tensor], None]:
    def note(gradient: Tensor) -> None:
        numbers.append(values.number_of(gradient))

    return note


def _of_weights(leaf: nn.Module, values: Values) -> list[int]:
    given = [parameter.grad for parameter in leaf.parameters(recurse=False)]
    return [values.number_of(gradient) for gradient in given if gradient is not None and bool(gradient.any())]


def explain_gradients(
    upstream: nn.Module,
    port: nn.Module,
    run_upstream: Callable[[], object],
    run_port: Callable[[], object],
    pairing: Pairing,
) -> list[str]:
    """What is wrong with the gradients of a port whose forward is right, a sentence each.

    Receives:
        upstream, port: both sides.
        run_upstream, run_port: a forward and a backward of each, from the same cotangents.
        pairing: of the leaves.
    """
    values, order = Values(), list[str]()
    there: Arrived = {}
    here: Arrived = {}
    with listening(upstream, values, there, []):
        run_upstream()
    with listening(port, values, here, order):
        run_port()
    ours, theirs = weight_leaves(upstream), weight_leaves(port)
    unlike = {path for path, other in pairing.items() if here.get(path, []) != there.get(other, [])}
    last = next((path for path in reversed(order) if path in unlike), None)
    told: list[str] = []
    if last is not None:
        told.append(f"gradients part behind `{last}`: it gets another one than upstream's `{pairing[last]}`")
    for path, other in pairing.items():
        if path in unlike or path not in theirs or other not in ours:
            continue
        if _of_weights(theirs[path], values) != _of_weights(ours[other], values):
            told.append(f"`{path}` gets the gradient of upstream's `{other}` and gives its weights another one")
    _clear(ours, theirs)
    return told


def _clear(*sides: Mapping[str, nn.Module]) -> None:
    for side in sides:
        for leaf in side.values():
            leaf.zero_grad(set_to_none=True)
