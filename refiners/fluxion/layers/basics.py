"""The small words of the grammar: leaves that select, reshape or move values and compute next to nothing.

They turn what a model would do between two layers (`x[:, 0]`, `x.transpose(1, 2)`, `2 * x`) into nodes of the tree,
which can be seen, found and replaced like any other.
"""

from numbers import Real
from typing import Any, Unpack

import torch
from jaxtyping import Num, Shaped
from torch import Size, Tensor

from refiners.errors import InputError, TreeIndexError
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import Module, WeightedModule


class Identity(Module):
    """Returns what it receives.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        The same tensor object.
    """

    def forward(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        return x


class GetArg(Module):
    """Returns one of its inputs, by position; a negative index counts from the last.

    Receives:
        *args: any number of tensors

    Returns:
        `args[index]`

    Raises:
        TreeIndexError: (an IndexError) there is no input at that position.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, *args: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if not -len(args) <= self.index < len(args):
            raise TreeIndexError(
                f"GetArg(index={self.index}) got {len(args)} inputs. Choose an index below that, or let the layer "
                "before it return more values."
            )
        return args[self.index]


class Flatten(Module):
    """Joins the axes from `start_dim` to `end_dim`, both included. By default all of them, the batch too.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view where one is possible
    """

    def __init__(self, start_dim: int = 0, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return torch.flatten(x, start_dim=self.start_dim, end_dim=self.end_dim)


class Unflatten(Module):
    """Splits the axis `dim` into several. The sizes are an input, so that a Context can provide them.

    Receives:
        x: `Shaped[Tensor, "*shape"]`
        sizes: their product is `x.shape[dim]`; one of them may be -1

    Returns:
        `Shaped[Tensor, "..."]`, a view
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."], sizes: Size | tuple[int, ...]) -> Shaped[Tensor, "..."]:
        return torch.unflatten(x, self.dim, sizes)


class Reshape(Module):
    """Gives all axes but the first, the batch, a new shape. One size may be -1.

    Receives:
        x: `Shaped[Tensor, "batch ..."]`

    Returns:
        `Shaped[Tensor, "batch *shape"]`, a view where one is possible
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        return x.reshape(x.shape[0], *self.shape)


class Transpose(Module):
    """Exchanges two axes.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view
    """

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dim0 = dim0
        self.dim1 = dim1

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return x.transpose(self.dim0, self.dim1)


class Permute(Module):
    """Orders the axes anew: axis i of the output is axis `dims[i]` of the input.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view
    """

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return x.permute(*self.dims)


class Slicing(Module):
    """Takes `start:end:step` of one axis, with the meaning Python gives a slice.

    `end=None` is the end of the axis; `end=0` takes nothing. Bounds out of range are clamped, and an empty result
    keeps the dtype and the device of its input.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view

    Raises:
        InputError: (an AssertionError) `step` is below 1.

    Example:
        >>> fl.Slicing(dim=1, start=1, end=-1)(torch.tensor([[1, 2, 3, 4]]))
        tensor([[2, 3]])
    """

    def __init__(self, dim: int = 0, start: int = 0, end: int | None = None, step: int = 1) -> None:
        super().__init__()
        if step < 1:
            raise InputError(f"Slicing(dim={dim}, step={step}): step must be 1 or more; torch has no reversed views.")
        self.dim = dim
        self.start = start
        self.end = end
        self.step = step

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        index = [slice(None)] * x.ndim
        index[self.dim] = slice(self.start, self.end, self.step)
        return x[tuple(index)]


class Squeeze(Module):
    """Removes the axis `dim` if its size is 1.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return x.squeeze(self.dim)


class Unsqueeze(Module):
    """Inserts an axis of size 1 at `dim`.

    Receives:
        x: `Shaped[Tensor, "*shape"]`

    Returns:
        `Shaped[Tensor, "..."]`, a view
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return x.unsqueeze(self.dim)


class Sin(Module):
    """The sine of each element.

    Receives:
        x: `Num[Tensor, "*shape"]`, in radians

    Returns:
        `Num[Tensor, "*shape"]`
    """

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        return torch.sin(x)


class Cos(Module):
    """The cosine of each element.

    Receives:
        x: `Num[Tensor, "*shape"]`, in radians

    Returns:
        `Num[Tensor, "*shape"]`
    """

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        return torch.cos(x)


class Multiply(Module):
    """Computes scale · x + bias with two numbers. Both may be set at any time.

    Setting them recompiles nothing under `torch.compile`: a Python number would be burnt into the compiled code, so
    the forward reads them from tensors of one element. These live on the CPU in float64, are not part of the
    `state_dict`, and act in the arithmetic exactly as the Python numbers would. A bias of 0 is not added at all, so
    that -0.0 stays -0.0.

    Receives:
        x: `Num[Tensor, "*shape"]`

    Returns:
        `Num[Tensor, "*shape"]`, of the same dtype if that is a floating one

    Raises:
        InputError: (a TypeError) `scale` or `bias` is set to something that is no number.
    """

    scale: float
    bias: float
    _scale_tensor: Tensor
    _bias_tensor: Tensor

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("scale", "bias"):
            return super().__setattr__(name, value)
        if type(value) is not float and not isinstance(value, Real):  # the second takes its time
            raise InputError(
                f"Multiply.{name} is a number, got {type(value).__name__}. For a tensor with one element use "
                f"{name}.item(); for a learned factor use fl.Parameter."
            )
        # A new tensor rather than a new value in the old one, which a copy or another thread may be reading. On the
        # CPU whatever the default device, and past torch's __setattr__: to torch it is no part of the module.
        own = self.__dict__
        if name == "scale":
            own["_scale_tensor"] = torch.scalar_tensor(float(value), dtype=torch.float64, device="cpu")
        elif value:
            own["_bias_tensor"] = torch.scalar_tensor(float(value), dtype=torch.float64, device="cpu")
        own[name] = value

    @property
    def number(self) -> Tensor:
        """`scale` as a tensor of one element, on the CPU and in float64: compiled code reads it anew in each call."""
        return self._scale_tensor

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        if x.ndim == 0 or not x.is_floating_point():
            # Here a tensor of one element would take part in type promotion, unlike a Python number.
            return x * self.scale + self.bias if self.bias else x * self.scale
        x = x * self._scale_tensor
        return x + self._bias_tensor if self.bias else x


class Parameter(WeightedModule):
    """A learned tensor, drawn from N(0, 1) at construction, that ignores its input but for the size of its batch.

    Receives:
        x: `Shaped[Tensor, "batch ..."]`

    Returns:
        `Float[Tensor, "batch *dims"]`, a view of `weight`

    Example:
        >>> fl.Parameter(1, 768)(torch.randn(2, 3)).shape
        torch.Size([2, 1, 768])
    """

    def __init__(self, *dims: int, requires_grad: bool = True, **factory: Unpack[Factory]) -> None:
        super().__init__()
        self.dims = dims
        self.weight = torch.nn.Parameter(torch.randn(*dims, **factory), requires_grad=requires_grad)

    @property
    def requires_grad(self) -> bool:
        """Whether the tensor is trained."""
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weight.requires_grad = value

    def forward(self, x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        return self.weight.expand(x.shape[0], *self.dims)
