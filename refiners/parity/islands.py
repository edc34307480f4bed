"""Islands of float32 in the float64 lane, computed in float64 instead: a truth that they do not round.

An island is what a model computes in float32 on purpose: a norm, a softmax, sinusoids, the step of a scheduler. In the
float64 lane its rounding is 1e-7, far above that of float64, so two right programs that compute an island in another
order of operations look like a fault there. Inside `widened`, whatever asks for float32 gets float64. What differs then
is no rounding. See docs/decisions/0007: it never excuses a cast that only one side makes.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from refiners.parity.operations import draws, fill_template, tensors_in

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}

_CONSTANTS: tuple[Callable[..., Any], ...] = (torch.tensor, torch.as_tensor)
"""Functions that round numbers of Python, which no operation does."""


class _WideOperations(TorchDispatchMode):
    """Every operation takes and makes float64 where it would take and make float32."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds, for code that is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if draws(func):  # a generator draws other numbers in float64
            result = func(*args, **kwargs)
            return result if func._schema.is_mutable else fill_template(result, Tensor, _wide)
        args, kwargs = cast(tuple[Any, Any], fill_template((args, kwargs), torch.dtype, _wide_dtype))
        if not func._schema.is_mutable and any(tensor.dtype in _WIDER for tensor in tensors_in((args, kwargs))):
            args, kwargs = cast(tuple[Any, Any], fill_template((args, kwargs), Tensor, _wide))
        return func(*args, **kwargs)


class _WideConstants(TorchFunctionMode):
    """Numbers of Python that are put into tensors keep all of their digits."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _CONSTANTS and given.get("dtype") in _WIDER:
            given = {**given, "dtype": _wide_dtype(given["dtype"])}
        return func(*args, **given)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return _WIDER.get(dtype, dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor


@contextmanager
def widened() -> Generator[None, None, None]:
    """Inside, models that are built and run compute in float64 what they would compute in float32."""
    with _WideConstants(), _WideOperations():
        yield
