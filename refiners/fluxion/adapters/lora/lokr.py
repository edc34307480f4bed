"""LoKr: the change of a weight is the Kronecker product of a small matrix and a larger one.

Follows LyCORIS (arXiv 2309.14859) and `peft.tuners.lokr.layer` of peft 0.21.2. With out = a · b and in = c · d,

    ΔW = s · w1 ⊗ w2,   w1: [a, c],   w2: [b, d, *kernel]

Each of the two is a full matrix, or a product of low rank where that is smaller: w1 = w1_a w1_b, w2 = w2_a w2_b. With
`tucker` the second one of a convolution is a Tucker decomposition with a core `t2` of [r, r, *kernel].

Differs from upstream: borders other than zeros are padded as the layer pads them, which peft leaves out. Of a Conv1d
with a full w2, peft 0.21.2 takes the product along the wrong axes (its w1 lacks the axis of the kernel); here it is the
product of the paper.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from refiners.fluxion.adapters.lora.building import Strength
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.adapters.lora.weighted import WeightChange, WeightDelta


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is the size: the factor and the rest if it divides, else the most even pair below it.

    Example:
        >>> factorization(256), factorization(128), factorization(127), factorization(128, 4)
        ((16, 16), (8, 16), (1, 127), (4, 32))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    divisors = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0 and number <= max(limit, 1)]
    return divisors[-1], size // divisors[-1]


class KroneckerProduct(WeightChange):
    """A Kronecker product, see `WeightChange`.

    Args:
        layer: The layer, which gives shape and geometry.
        blocks: The shape of w1: how many blocks the weight has, along outputs and inputs.
        rank: Of the factors that are products.
        full_first: Whether w1 is a full matrix.
        full_second: Whether w2 is.
        tucker: Whether w2 is a Tucker decomposition.
        **factory: The device and the dtype.
    """

    def __init__(
        self,
        layer: Any,
        blocks: tuple[int, int],
        rank: int,
        full_first: bool,
        full_second: bool,
        tucker: bool,
        **factory: Any,
    ) -> None:
        out, in_channels, *kernel = layer.weight.shape
        b, d = out // blocks[0], in_channels // blocks[1]
        shapes: dict[str, tuple[int, ...]] = {"w1": blocks}
        if not full_first:
            shapes = {"w1_a": (blocks[0], rank), "w1_b": (rank, blocks[1])}
        if full_second:
            shapes |= {"w2": (b, d, *kernel)}
        elif tucker:
            shapes |= {"w2_a": (rank, b), "w2_b": (rank, d), "t2": (rank, rank, *kernel, *(1,) * (2 - len(kernel)))}
        else:
            shapes |= {"w2_a": (b, rank), "w2_b": (rank, d * math.prod(kernel))}
        super().__init__(layer, shapes, **factory)
        self.blocks = blocks

    def change(self) -> Tensor:
        w1 = self.w1 if self.has("w1") else self.w1_a @ self.w1_b
        if self.has("w2"):
            w2 = self.w2
        elif self.has("t2"):
            w2 = torch.einsum("ijkl,ip,jr->prkl", self.t2, self.w2_a, self.w2_b)
        else:
            w2 = self.w2_a @ self.w2_b
        return self.factor(_kronecker(w1, w2.contiguous())).reshape(self.geometry.weight_shape)


def _kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """Each number of a matrix times a whole kernel. `torch.kron` fails on some kernels that have axes of length 1."""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    blocks = w1.reshape(a, 1, c, 1, *(1,) * len(kernel)) * w2.reshape(1, b, 1, d, *kernel)
    return blocks.reshape(a * b, c * d, *kernel)


class Lokr(WeightDelta[Any]):
    """The LoKr of a layer. Abstract: a kind of layer is a subclass.

    A new one changes nothing, since its first factor is zero.

    Args:
        name: See `Delta`.
        layer: The layer, which gives shape and geometry.
        rank: See `Delta`.
        scale: See `Delta`.
        alpha: See `Delta`.
        rank_stabilized: See `Delta`.
        factor: Into how many blocks inputs and outputs are split, as near as their sizes allow; peft's
            `decompose_factor`. -1: as even as possible.
        decompose_both: Whether w1 may be a product as well.
        tucker: Whether w2 of a convolution with a kernel is a Tucker decomposition; peft's `use_effective_conv2d`.
        blocks: The shape of w1 instead of a `factor`.
        full: Whether w1 and w2 are full matrices. By default each is one where the rank is no less than half of its
            longer side, and w1 always without `decompose_both`.
        **factory: The device and the dtype.
    """

    method = "lokr"

    def __init__(
        self,
        name: str,
        /,
        layer: Any,
        rank: int = 16,
        scale: float = 1.0,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        factor: int = -1,
        decompose_both: bool = False,
        tucker: bool = False,
        blocks: tuple[int, int] | None = None,
        full: tuple[bool, bool] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out, in_channels = layer.weight.shape[:2]
        if blocks is None:
            blocks = (factorization(out, factor)[0], factorization(in_channels, factor)[0])
        if full is None:
            rest = (out // blocks[0], in_channels // blocks[1])
            full = (not decompose_both or rank >= max(blocks) / 2, rank >= max(rest) / 2)
        self.name = name
        self.rank = rank
        self.blocks = blocks
        self.tucker = tucker and not full[1] and layer.weight[0, 0].numel() > 1
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        change = KroneckerProduct(layer, blocks, rank, *full, self.tucker, device=device, dtype=dtype)
        super().__init__(name, change, rank=rank, **strength)

    def reset_parameters(self) -> None:
        for role, weight in self.weights().items():
            if not weight.tensor.is_meta:
                nn.init.kaiming_uniform_(weight.tensor, a=math.sqrt(5))
                if role in ("w1", "w1_a"):
                    nn.init.zeros_(weight.tensor)

    def _rank_axes_of(self, role: str) -> tuple[int, ...]:
        if role in ("w1", "w2"):
            return ()
        if role == "t2":
            return (0, 1)
        return (1,) if role == "w1_a" or (role == "w2_a" and not self.tucker) else (0,)

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "Lokr":
        return cls(name, layer, **settings)

    @classmethod
    def settings_of(cls, spec: DeltaSpec, layer: nn.Module) -> dict[str, Any]:
        tensors = spec.tensors
        first = tensors["w1"].shape if "w1" in tensors else (tensors["w1_a"].shape[0], tensors["w1_b"].shape[1])
        blocks = (first[0], first[1])
        return {"blocks": blocks, "full": ("w1" in tensors, "w2" in tensors), "tucker": "t2" in tensors}


class LinearLokr(Lokr):
    """The LoKr of a Linear, see `Lokr`."""

    layer_type = nn.Linear


class Conv1dLokr(Lokr):
    """The LoKr of a Conv1d, see `Lokr`."""

    layer_type = nn.Conv1d


class Conv2dLokr(Lokr):
    """The LoKr of a Conv2d, see `Lokr`."""

    layer_type = nn.Conv2d
