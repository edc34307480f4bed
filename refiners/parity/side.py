"""One side of a case: its outputs, its taps, its gradients, and how it behaved while it computed them.

Forward hooks watch which leaves ran and keep the tapped outputs. One backward pass from random cotangents, the same on
both sides, gives the gradients of every parameter and of every floating input.
"""

import difflib
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from refiners.errors import ParityError
from refiners.parity.bits import as_integers
from refiners.parity.case import Inputs, Outputs
from refiners.parity.influence import some
from refiners.parity.inputs import copy_for_one_side, mutated, named_tensors
from refiners.parity.modules import modules, named_modules
from refiners.parity.torch_state import default_dtype, seed_torch
from refiners.parity.weights import floating_entries, generator_for


@dataclass
class Observed:
    """What one side computed. Tensors are detached; gradients are None where nothing flowed back."""

    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    differentiable: set[str] = field(default_factory=set[str])
    """Outputs that asked for a gradient."""
    taps: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    """Tap name → the first tensor of each call's output."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict[str, Tensor | None])
    """By the side's own keys, every name of a tied parameter included."""
    input_gradients: dict[str, Tensor | None] = field(default_factory=dict[str, Tensor | None])
    leaves: set[str] = field(default_factory=set[str])
    """Paths of the modules that hold parameters of their own."""
    silent_leaves: set[str] = field(default_factory=set[str])
    """Those of them that neither ran nor got a gradient."""
    faults: list[str] = field(default_factory=list[str])
    """What it did that no side may do, a sentence each."""


def observe(
    model: nn.Module,
    run: Callable[[nn.Module, Inputs], Outputs],
    inputs: Inputs,
    *,
    taps: Mapping[str, str],
    gradients: bool,
    seed: int,
    rounded_to: torch.dtype,
    foreign: Collection[type[nn.Module]] = (),
    backward: bool = True,
) -> Observed:
    """Runs one side once, forward and backward.

    Receives:
        model: in eval mode, with its weights.
        run: the case's function for this side.
        inputs: the lane's; the side works on a copy.
        taps: tap name → path of a submodule.
        gradients: whether to run the backward pass.
        seed: of the cotangents and of whatever the model draws.
        rounded_to: dtype to which cotangents are rounded before they take the outputs' dtype.
        foreign: classes of the other side, which may not run here unless they stand in this model's own tree.
        backward: False leaves the backward pass out, and all else as it is with `gradients`: attention takes another
            kernel for a mask that asks for a gradient.

    Raises:
        ParityError: a tapped path does not exist, the case's function returns no mapping of tensors, or the side
            writes into its inputs.
    """
    seen = Observed(faults=_training(model))
    before = weight_states(model)
    own = copy_for_one_side(inputs, gradients=gradients)
    ran: set[nn.Module] = set()
    if gradients:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    seed_torch(seed)
    with torch.set_grad_enabled(gradients), _hooks(model, taps, ran, seen), _same_default_dtype(seen):
        with _watch_for(foreign, model, seen):
            outputs = _checked(run(model, own))
    written = mutated(own, inputs)
    if written:
        raise ParityError(f"A forward may not write into its inputs, and this one changes {some(written)}.")
    seen.faults += [fault for fault in _training(model) if fault not in seen.faults]
    rewritten = changed_weights(before, model)
    seen.faults += [f"its forward writes into its weights {some(rewritten)}"] if rewritten else []
    seen.outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    seen.differentiable = {name for name, tensor in outputs.items() if tensor.requires_grad}
    if gradients and backward:
        _backward({name: outputs[name] for name in seen.differentiable}, seed, rounded_to)
        seen.gradients = {name: _dense(p.grad) for name, p in model.named_parameters(remove_duplicate=False)}
        seen.input_gradients = {name: t.grad for name, t in named_tensors(own) if t.requires_grad and t.is_leaf}
    _list_leaves(model, ran, seen)
    return seen


def weight_states(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What changes when a weight is written to: autograd's count, and for writers that evade it the sum of its bits.

    Both sides read one storage, so nobody may write.
    """
    return {e.key: (e.tensor._version, int(as_integers(e.tensor).sum())) for e in floating_entries(model)}


def changed_weights(before: Mapping[str, tuple[int, int]], model: nn.Module) -> list[str]:
    """The keys whose weights were written to since `weight_states`."""
    after = weight_states(model)
    return [key for key in before if after.get(key) != before[key]]


@contextmanager
def _same_default_dtype(seen: Observed) -> Generator[None, None, None]:
    before = torch.get_default_dtype()
    with default_dtype(before):
        yield
        after = torch.get_default_dtype()
    if after != before:
        seen.faults.append(f"it changes torch's default dtype to {after}")


@contextmanager
def _watch_for(foreign: Collection[type[nn.Module]], model: nn.Module, seen: Observed) -> Generator[None, None, None]:
    """Notices modules of these classes that run although no tree shows them."""
    own, found = set(modules(model)), dict[str, None]()

    def note(module: nn.Module, _: Any) -> None:
        if type(module) in foreign and module not in own:
            found[type(module).__name__] = None

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
    if found:
        seen.faults.append(f"it runs modules of the other side that its own tree does not hold: {some(list(found))}")


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _training(model: nn.Module) -> list[str]:
    names = [name or "the model" for name, module in named_modules(model) if module.training]
    return [f"it is in training mode at {some(names, limit=3)}"] if names else []


def _checked(outputs: Any) -> dict[str, Tensor]:
    if not isinstance(outputs, Mapping):
        raise ParityError(f"The case's function must return a dict of tensors, got {type(outputs).__name__}.")
    found = dict(cast(Mapping[str, Any], outputs))
    # A subclass may answer for itself when it is compared.
    wrong = [f"`{name}` is {type(v).__name__}" for name, v in found.items() if type(v) not in (Tensor, nn.Parameter)]
    if wrong:
        raise ParityError(f"The case's function must return a dict of tensors, but {', '.join(wrong)}.")
    unreadable = [f"`{name}` {told}" for name, tensor in found.items() if (told := _unreadable(tensor))]
    if unreadable:
        raise ParityError(f"An output must be a tensor whose elements can be compared, but {'; '.join(unreadable)}.")
    return found


def _unreadable(tensor: Tensor) -> str:
    """Why the elements of a tensor cannot be compared, and what to do; "" if they can."""
    if tensor.is_meta:
        return "is on the meta device, which holds no numbers: build the model on a real one"
    if tensor.is_nested:
        return "is a nested tensor: return its rows one by one, or `to_padded_tensor`"
    if tensor.is_quantized:
        return "is quantized: return `dequantize()`"
    if tensor.layout != torch.strided:
        return f"is a {str(tensor.layout).removeprefix('torch.')} tensor: return `to_dense()`"
    return ""


@contextmanager
def _hooks(
    model: nn.Module, taps: Mapping[str, str], ran: set[nn.Module], seen: Observed
) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for module in modules(model):

            def note(module: nn.Module, _: Any) -> None:
                ran.add(module)

            stack.callback(module.register_forward_pre_hook(note).remove)
        for name, path in taps.items():
            calls = seen.taps.setdefault(name, [])

            def keep(module: nn.Module, _: Any, output: Any, calls: list[Tensor] = calls) -> None:
                tensors = [tensor for _, tensor in named_tensors(output)]
                calls.extend(tensor.detach().clone() for tensor in tensors[:1])

            stack.callback(submodule(model, path).register_forward_hook(keep).remove)
        yield


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a path.

    Raises:
        ParityError: there is none; the message shows the nearest paths.
    """
    found = dict(named_modules(model, every_name=True))
    if path not in found:
        near = difflib.get_close_matches(path, found, n=3, cutoff=0.3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ParityError(f"{type(model).__name__} has no submodule `{path}`, which a tap asks for.{hint}")
    return found[path]


def _backward(outputs: Mapping[str, Tensor], seed: int, rounded_to: torch.dtype) -> None:
    ordered = sorted(outputs)
    cotangents = [_cotangent(name, outputs[name], seed, rounded_to) for name in ordered]
    if ordered:
        torch.autograd.backward([outputs[name] for name in ordered], cotangents)


def _cotangent(name: str, output: Tensor, seed: int, rounded_to: torch.dtype) -> Tensor:
    wide = torch.complex128 if output.is_complex() else torch.float64
    values = torch.randn(output.shape, generator=generator_for(seed, f"cotangent of {name}"), dtype=wide)
    if not output.is_complex():
        values = values.to(rounded_to)
    return values.to(device=output.device, dtype=output.dtype)


def _list_leaves(model: nn.Module, ran: set[nn.Module], seen: Observed) -> None:
    """A leaf counts as run when it was called, or when the backward pass reached one of its own parameters."""
    for path, module in named_modules(model):
        own = list(module.parameters(recurse=False))
        if own:
            seen.leaves.add(path)
            if module not in ran and all(parameter.grad is None for parameter in own):
                seen.silent_leaves.add(path)
