"""One layer's adapter as data: what files hold, what is swapped, what is combined.

A `DeltaSpec` names its tensors by role, so that nothing depends on the names or the order of a file:

| method | roles |
|---|---|
| `lora` | `down`, `up`, and `up_bias` if it has one |
| `dora` | the same without a bias, and `magnitude` |
| `locon` | `down`, `mid`, `up` |
| `loha` | `w1_a`, `w1_b`, `w2_a`, `w2_b`, and both or none of `t1`, `t2` |
| `lokr` | `w1`, or `w1_a` and `w1_b`; `w2`, or `w2_a` and `w2_b`, perhaps with `t2` |

Shapes are those of peft's files. `down` is [rank, in, *kernel] and `up` is [out, rank, *ones]; of an Embedding they are
[rank, num_embeddings] and [embedding_dim, rank]. `mid` is [rank, rank, *kernel]; then `down` and `up` are of one pixel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# What a spec of each method may consist of: sets of roles that are complete, and roles that may be added to it.
_FORMS: dict[str, list[frozenset[str]]] = {
    "lora": [frozenset({"down", "up"}), frozenset({"down", "up", "up_bias"})],
    "dora": [frozenset({"down", "up", "magnitude"})],
    "locon": [frozenset({"down", "mid", "up"})],
    "loha": [
        frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),
        frozenset({"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    ],
    "lokr": [
        frozenset(first) | frozenset(second)
        for first in (("w1",), ("w1_a", "w1_b"))
        for second in (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
    ],
}
# Pairs of roles and their axes that are as long as the rank, where the tensors are no Tucker tensors.
_PAIRS = {
    "lora": (("down", "up"),),
    "dora": (("down", "up"),),
    "locon": (("down", "up"),),
    "loha": (("w1_b", "w1_a"), ("w2_b", "w2_a")),
    "lokr": (("w1_b", "w1_a"), ("w2_b", "w2_a")),
}


@dataclass(frozen=True)
class DeltaSpec:
    """One layer's adapter as data.

    Args:
        method: "lora", "dora", "locon", "loha" or "lokr".
        tensors: By role, see the top of this file.
        alpha: The strength it was trained with; None if the scale alone counts.
        rank_stabilized: Whether the strength is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        declared_rank: The rank where no tensor tells it: of a LoKr that consists of two full matrices.
    """

    method: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    rank_stabilized: bool = False
    declared_rank: int | None = None

    @property
    def rank(self) -> int | None:
        """How many values the low-rank products have in between; None if nothing tells."""
        for inner, outer in _PAIRS.get(self.method, ()):
            if inner in self.tensors and self.tensors[inner].ndim:
                return self.tensors[inner].shape[0]
            if outer in self.tensors and self.tensors[outer].ndim > 1:
                return self.tensors[outer].shape[1]
        return self.declared_rank

    def validate(self, with_values: bool = True) -> list[str]:
        """What is wrong with this spec by itself, whatever the layer. Empty if it is sound.

        Args:
            with_values: Whether each value is looked at; see `are_finite`, which does so for many specs at once.
        """
        forms = _FORMS.get(self.method)
        if forms is None:
            return [f"the method {self.method!r} is unknown: choose from {', '.join(_FORMS)}"]
        roles = frozenset(self.tensors)
        if roles not in forms:
            nearest = min(forms, key=lambda form: (len(form ^ roles), len(form)))
            missing, extra = sorted(nearest - roles), sorted(roles - nearest)
            return [f"misses {role}" for role in missing] + [f"{role} is no part of it" for role in extra]
        problems = [
            f"{role} is {tensor.dtype}, which is no floating dtype"
            for role, tensor in self.tensors.items()
            if not tensor.is_floating_point()
        ]
        problems += [
            f"{role} holds values that are not finite"
            for role, tensor in self.tensors.items()
            if with_values and not is_finite(tensor)
        ]
        sizes = {role: list(tensor.shape) for role, tensor in self.tensors.items() if not tensor.numel()}
        empty = [f"{role} {size} holds no values" for role, size in sizes.items()]
        return problems + (empty or self._shape_problems())

    def _shape_problems(self) -> list[str]:
        problems: list[str] = []
        for inner, outer in _PAIRS[self.method]:
            if inner not in self.tensors:
                continue
            a, b = self.tensors[inner], self.tensors[outer]
            tucker = "t1" in self.tensors or ("t2" in self.tensors and inner != "w1_b")
            axis = 0 if tucker else 1
            groups_divide = self.method in ("lora", "dora") and a.ndim > 2 and b.ndim == a.ndim
            if a.ndim < 2 or b.ndim < 2:
                fits = False
            elif groups_divide:
                fits = b.shape[1] > 0 and a.shape[0] % b.shape[1] == 0
            else:
                fits = a.shape[0] == b.shape[axis] and ("down" not in self.tensors or a.ndim == b.ndim)
            if not fits:
                problems.append(f"{inner} {list(a.shape)} and {outer} {list(b.shape)} are no pair")
        rank = self.rank
        for role in ("t1", "t2"):
            if role in self.tensors:
                t = self.tensors[role]
                if t.ndim != 4 or t.shape[0] != rank or t.shape[1] != rank:
                    problems.append(f"{role} {list(t.shape)} does not begin with the rank {rank} twice")
        if "mid" in self.tensors:
            mid, ndim = self.tensors["mid"], self.tensors["down"].ndim
            if mid.ndim != ndim or mid.ndim < 3 or mid.shape[:2] != (rank, rank):
                problems.append(f"mid {list(mid.shape)} does not begin with the rank {rank} twice")
            pixels = [role for role in ("down", "up") if self.tensors[role][0, 0].numel() != 1]
            problems += [f"{role} {list(self.tensors[role].shape)} is not of one pixel" for role in pixels]
        if "up_bias" in self.tensors and self.tensors["up_bias"].shape != self.tensors["up"].shape[:1]:
            problems.append(f"up_bias {list(self.tensors['up_bias'].shape)} has not one value for each row of up")
        return problems

    def changes_nothing(self) -> bool:
        """Whether the layer computes the same with it, because a factor of each product is zero.

        A DoRA rescales the layer, and is never taken for one that changes nothing.
        """
        if self.method == "dora" or any(tensor.is_meta for tensor in self.tensors.values()):
            return False
        zero = {role for role, tensor in self.tensors.items() if not bool(tensor.any())}
        if self.method == "lora":
            return bool(zero & {"down", "up"}) and ("up_bias" not in self.tensors or "up_bias" in zero)
        return bool(zero)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether many tensors hold no NaN and no infinity, quickly. False is not certain: then ask `is_finite` of each."""
    totals: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            total = _total(tensor)
            totals.setdefault((total.device, total.dtype), []).append(total)
    return all(bool(torch.isfinite(torch.stack(sums)).all()) for sums in totals.values())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; true of one without values and of one of whole numbers."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(_total(tensor))) or bool(torch.isfinite(tensor).all())


def _total(tensor: Tensor) -> Tensor:
    """The sum: a NaN or an infinity makes it one too. It may also be too large by itself.

    It takes a thirtieth of the time of `isfinite`.
    """
    return tensor.sum(dtype=torch.float64 if tensor.itemsize > 4 else torch.float32)
