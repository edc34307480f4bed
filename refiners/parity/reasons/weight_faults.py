"""How two weights differ that should be one: dropped, transposed, scaled, of another layer, in another order."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from refiners.parity.bits import same_bits

_HEADS = (2, 3, 4, 6, 8, 12, 16, 20, 24, 25, 32)


def how_weights_differ(name: str, right: Tensor, held: Tensor | None, weights: Mapping[str, Tensor]) -> str:
    """What would make a weight equal, completing "equal …"; "" when it is.

    Receives:
        name: of the weight in its leaf.
        right: upstream's.
        held: the port's; None where it has none.
        weights: all of upstream's, to tell a weight of another layer.
    """
    if held is None:
        return f"with `{name}`, which the port drops"
    if same_bits(right, held):
        return ""
    if held.ndim == 2 and _is(held.T.contiguous(), right):
        return f"when `{name}` is transposed"
    found = [f"`{key}`" for key, other in weights.items() if _is(other, held) and not same_bits(other, right)]
    if found:
        return f"when `{name}` is upstream's: the port holds {found[0]}"
    for text, change in _changes(held):
        if _is(change(), right):
            return f"when `{name}` is {text}"
    return f"with upstream's `{name}`"


def _is(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and same_bits(first, second)


def _changes(held: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    if held.ndim >= 2:
        yield "transposed", lambda: held.transpose(0, 1).contiguous()
        yield "transposed in its last axes", lambda: held.transpose(-1, -2).contiguous()
    if held.ndim == 4:
        yield "flipped in height and width", lambda: held.flip(-1, -2)
    for factor in (0.5, 2.0, -1.0, 0.25, 4.0, 0.1, 10.0):
        yield f"times {factor:g}", lambda k=factor: held * k
    for term in (-1.0, 1.0):
        yield f"{term:+g}", lambda k=term: held + k
    for axis, what in enumerate(("rows", "columns")[: held.ndim]):
        size = held.shape[axis]
        yield f"reversed in its {what}", lambda d=axis: held.flip(d)
        for count in (n for n in _HEADS if size % n == 0):
            width = size // count

            def split(counts: tuple[int, int], d: int = axis) -> Tensor:
                cut: Tensor = torch.unflatten(held, d, counts)
                return cut.transpose(d, d + 1).flatten(d, d + 1).contiguous()

            yield f"cut into {count} interleaved heads of {what}", lambda c=(width, count), f=split: f(c)
            yield f"cut into {count} heads of {what} that are not interleaved", lambda c=(count, width), f=split: f(c)
            for shift in (-width, width):
                text = f"rolled by {shift} {what}"
                yield text, lambda k=shift, d=axis: torch.roll(held, k, dims=d)
        for shift in (-1, 1):
            yield f"rolled by {shift} {what}", lambda k=shift, d=axis: torch.roll(held, k, dims=d)
        for count in (2, 3):
            if size % count == 0:
                chunks = held.chunk(count, axis)
                for order in ((1, 0),) if count == 2 else ((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
                    told = ", ".join(str(i + 1) for i in order)
                    yield (
                        f"in other {what}: parts {told} of {count}",
                        lambda c=chunks, o=order, d=axis: torch.cat([c[i] for i in o], d),
                    )
