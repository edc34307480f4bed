"""Conversion of inputs to where, and in which precision, the weights around them are."""

from jaxtyping import Shaped
from torch import Tensor

from refiners.errors import ParentError
from refiners.fluxion.layers.module import ContextModule


class Converter(ContextModule):
    """Casts its inputs to the device and the dtype of the Chain it lives in.

    Receives:
        *inputs: any number of tensors

    Returns:
        A tuple of as many tensors; those that need no cast are the same objects.

    Raises:
        ParentError: (an AssertionError) the Converter has no parent, or the parent has no weights to follow.
    """

    def __init__(self, set_device: bool = True, set_dtype: bool = True) -> None:
        super().__init__()
        self.set_device = set_device
        self.set_dtype = set_dtype

    def forward(self, *inputs: Shaped[Tensor, "..."]) -> tuple[Tensor, ...]:
        parent = self.ensure_parent
        device = parent.device if self.set_device else None
        dtype = parent.dtype if self.set_dtype else None
        if (self.set_device and device is None) or (self.set_dtype and dtype is None):
            raise ParentError(
                f"Converter in {parent.get_path()}: the chain holds no layer with weights, so it has no device and "
                "no dtype to cast to. Put the Converter into the chain that holds the weights."
            )
        return tuple(x.to(device=device, dtype=dtype) for x in inputs)
