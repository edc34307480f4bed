"""Weights that are read or made one by one, when they are asked for: what a large checkpoint is converted through.

Keys, shapes and types are known at once, so all that does not fit is told before the first tensor is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy

import torch
from torch import Tensor

from refiners.conversion.key_map import KeyMap
from refiners.conversion.transfer import check_upstream
from refiners.conversion.weights import Entries, Weights


class LazyWeights(Mapping[str, Tensor], ABC):
    """Tensors that are read or made when they are asked for, and known on the meta device before."""

    @abstractmethod
    def meta(self) -> dict[str, Tensor]:
        """All tensors on the meta device."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.meta().items()}

    def origin(self, key: str) -> tuple[str, ...]:
        """The keys of the file that a tensor is made of."""
        return (key,)

    def over(self, stored: "LazyWeights") -> "LazyWeights":
        """The same, made of other tensors of the same keys and shapes: what was checked is not checked again."""
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta())

    def __len__(self) -> int:
        return len(self.meta())

    def __contains__(self, key: object) -> bool:
        return key in self.meta()


class WeightsBelow(LazyWeights):
    """Those of some weights whose keys begin with a prefix, without it.

    Example:
        >>> len(WeightsBelow(WeightsInMemory({"unet.bias": torch.ones(1), "vae.bias": torch.ones(1)}), "unet."))
        1
    """

    def __init__(self, source: LazyWeights, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self._meta = {key.removeprefix(prefix): t for key, t in source.meta().items() if key.startswith(prefix)}

    def meta(self) -> dict[str, Tensor]:
        return self._meta

    def over(self, stored: LazyWeights) -> "WeightsBelow":
        other = copy(self)
        other._source = self._source.over(stored)
        return other

    def origin(self, key: str) -> tuple[str, ...]:
        return self._source.origin(self._prefix + key)

    def __getitem__(self, key: str) -> Tensor:
        return self._source[self._prefix + key]


class WeightsInMemory(LazyWeights):
    """Weights that are there already, as lazy ones."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def meta(self) -> dict[str, Tensor]:
        return {key: tensor.to("meta") for key, tensor in self._tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]


class ConvertedWeights(LazyWeights):
    """A port's weights, each made of upstream's when it is asked for. The same tensors as `KeyMap.convert` gives.

    Receives:
        source: upstream's weights.
        key_map: the correspondence.
        target: the port, or its keys with tensors or shapes.

    Raises:
        ConversionError: anything is missing, unexpected, of another shape or given twice. Lists it all.

    Example:
        >>> source = WeightsInMemory({"fc.bias": torch.ones(2)})
        >>> ConvertedWeights(source, KeyMap({"fc": "Linear"}), {"Linear.bias": (2,)})["Linear.bias"]
        tensor([1., 1.])
    """

    def __init__(self, source: LazyWeights, key_map: KeyMap, target: Weights) -> None:
        self._source = source
        self._key_map = key_map
        wanted = Entries.read(target).on_meta()
        self._plan, self._meta = key_map.plan_and_convert(Entries(source.meta(), frozenset(), {}), wanted)
        self._ties = wanted.ties
        self._made_by = {key: pairing for pairing in self._plan.pairings for key in pairing.port}

    def meta(self) -> dict[str, Tensor]:
        return self._meta

    def over(self, stored: LazyWeights) -> "ConvertedWeights":
        other = copy(self)
        other._source = self._source.over(stored)
        return other

    def check_values(self) -> list[str]:
        """Reads the tensors that have no place because their values are known, and checks that they are those.

        Returns:
            a line for each that is not, but that upstream does not read either.

        Raises:
            ConversionError: a tensor has other values.
        """
        odd = check_upstream(self._plan, Entries(self._source, frozenset(), {}))
        self._plan.problems.raise_if_any(f"{self._key_map.name} cannot be converted", "Nothing was converted.")
        if isinstance(self._source, ConvertedWeights):
            odd += self._source.check_values()
        return odd

    def origin(self, key: str) -> tuple[str, ...]:
        return tuple(name for given in self._made_by[self._twin(key)].upstream for name in self._source.origin(given))

    def _twin(self, key: str) -> str:
        """The key itself, or that of the same parameter which upstream's weights fill."""
        if key in self._made_by:
            return key
        first = self._ties.get(key, key)
        return next(name for name in self._made_by if self._ties.get(name, name) == first)

    def __getitem__(self, key: str) -> Tensor:
        made = self._twin(key)
        pairing = self._made_by[made]
        results = pairing.to_port([self._source[name].detach() for name in pairing.upstream])
        return results[pairing.port.index(made)]
