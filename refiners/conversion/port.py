"""A port, as the command line and other tools know it: a name, how to build it, and where its weights come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from refiners.conversion.key_map import KeyMap
from refiners.conversion.lazy import ConvertedWeights, LazyWeights


@dataclass(frozen=True, kw_only=True)
class Port:
    """One published model written as a tree.

    A package that holds ports declares a mapping of them, or a function that returns one, in the entry-point group
    `refiners.ports` (see `refiners.ports`).

    Attributes:
        name: what the command line calls it, such as `clip-text-l`.
        build: builds the tree in the published configuration, on torch's default device (`meta` included).
        key_map: from the published file's keys to those of the tree.
        from_config: builds the tree of another configuration of the family from a published config.json. Refuses
            attributes that the port does not handle.
        summary: one line for lists.
        layouts: key maps to the published keys from those of other layouts in which the same weights are published.

    Example:
        >>> port = Port(
        ...     name="toy",
        ...     build=lambda: nn.Sequential(nn.Linear(2, 3)),
        ...     key_map=KeyMap({"fc": "0"}),
        ...     from_config=lambda config: nn.Sequential(nn.Linear(config["width"], 3)),
        ...     summary="one linear layer",
        ... )
        >>> port.from_config({"width": 5})[0].in_features
        5
    """

    name: str
    build: Callable[[], nn.Module]
    key_map: KeyMap
    from_config: Callable[[Mapping[str, Any]], nn.Module]
    summary: str
    layouts: tuple[KeyMap, ...] = ()

    def weights(self, stored: LazyWeights, model: nn.Module) -> ConvertedWeights:
        """The weights of the tree, made of published ones in any of the layouts when they are asked for.

        Receives:
            stored: the published weights.
            model: the tree, which may be on the meta device.

        Raises:
            ConversionError: they do not fit. Lists all that does not.
        """
        if self.key_map.covers(stored):
            return ConvertedWeights(stored, self.key_map, model)
        for layout in self.layouts:
            if layout.covers(stored):
                published = self.key_map.invert(model.state_dict())
                return ConvertedWeights(ConvertedWeights(stored, layout, published), self.key_map, model)
        return ConvertedWeights(stored, self.key_map, model)
