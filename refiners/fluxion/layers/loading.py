"""Weights of a file become the weights of a module, without a copy where none is needed.

`load_state_dict` copies each tensor, so that a model and its file are in memory at once, and changes the weights that
fit before it says that others do not. Here everything is checked first, and a tensor that is already what a weight has
to be is taken over as it is.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from refiners.errors import WeightsError

_MAX_LISTED = 12


def adopt_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True, source: str = "", own_dtype: bool = True
) -> None:
    """Make these tensors the weights of a module. Parameters stay the objects they are, except on the meta device.

    Receives:
        strict: whether every weight needs a tensor and every tensor a weight.
        source: where the tensors come from, for the error.
        own_dtype: whether weights on the meta device keep their dtype; else they take that of the tensors.

    Raises:
        WeightsError: (a RuntimeError) Keys or shapes do not fit. Nothing has changed.
    """
    weights: dict[str, Any] = module.state_dict(keep_vars=True)
    _check(module, weights, tensors, strict, source)
    fitting = {key: tensor for key, tensor in tensors.items() if key in weights}
    rest: dict[str, Tensor] = {}
    on_meta: dict[str, Tensor] = {}
    for key, tensor in fitting.items():
        weight = weights[key]
        if not isinstance(weight, Tensor):
            rest[key] = tensor  # what a module keeps beside its tensors (`get_extra_state`)
        elif weight.is_meta:
            on_meta[key] = tensor.to(weight.dtype) if own_dtype else tensor
        elif tensor.dtype == weight.dtype and tensor.device == weight.device:
            weight.data = tensor
        else:
            rest[key] = tensor
    _bring_to_life(module, weights, on_meta)
    if rest:
        module.load_state_dict(rest, strict=False)


def _bring_to_life(module: nn.Module, weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace weights on the meta device, which cannot take a memory over. One that has several names stays one."""
    alive: dict[int, nn.Parameter] = {}
    owners = _modules_by_path(module) if tensors else {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        owner = owners[path]
        weight = weights[key]
        if isinstance(weight, nn.Parameter):
            parameter = alive.get(id(weight))
            if parameter is None:
                parameter = alive[id(weight)] = nn.Parameter(tensor, requires_grad=weight.requires_grad)
            vars(owner)["_parameters"][name] = parameter
        else:
            setattr(owner, name, tensor)


def _modules_by_path(module: nn.Module) -> dict[str, nn.Module]:
    """What `named_modules` gives of each place, in a fraction of the time."""
    found = {"": module}
    waiting = [("", module)]
    while waiting:
        prefix, above = waiting.pop()
        for name, child in above._modules.items():  # pyright: ignore[reportPrivateUsage] (`named_children` leaves some out)
            if child is not None:
                found[prefix + name] = child
                waiting.append((f"{prefix}{name}.", child))
    return found


def _check(
    module: nn.Module, weights: Mapping[str, Any], tensors: Mapping[str, Tensor], strict: bool, source: str
) -> None:
    problems: list[str] = []
    if strict:
        missing = [key for key in weights if key not in tensors]
        unexpected = [key for key in tensors if key not in weights]
        problems += _listed("missing", [_with_nearest(key, unexpected) for key in missing])
        problems += _listed("unexpected", [_with_nearest(key, missing) for key in unexpected])
    shapes = [
        f"{key}: {tuple(tensor.shape)} instead of {tuple(weights[key].shape)}"
        for key, tensor in tensors.items()
        if isinstance(weights.get(key), Tensor) and tensor.shape != weights[key].shape
    ]
    problems += _listed("of another shape", shapes)
    if problems:
        raise WeightsError(
            f"{source or 'This set of weights'} does not fit {type(module).__name__}. "
            "Nothing was loaded. Convert the file with a KeyMap, or load it into the model it was saved from.\n"
            + "\n".join(problems)
        )


def _listed(what: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    shown = [f"  {line}" for line in lines[:_MAX_LISTED]]
    more = [f"  … and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return [f"{len(lines)} {what}:", *shown, *more]


def _with_nearest(key: str, others: list[str]) -> str:
    nearest = get_close_matches(key, others, n=1)
    return f"{key} (is it {nearest[0]}?)" if nearest else key
