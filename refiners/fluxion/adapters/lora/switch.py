"""Whether an adapter takes part in what its layer computes, and where else its weights are in use."""

from collections.abc import Callable


class Switch:
    """The state of one adapter of one layer. Structural copies share it, as they share the weights.

    An adapter that is disabled, merged into the weights of its layer, or fused with others is not run by itself.
    """

    __slots__ = ("enabled", "fused", "is_on", "merged", "on_change")

    def __init__(self) -> None:
        self.enabled = True
        self.merged = False
        self.fused = False
        self.is_on = True
        self.on_change: tuple[Callable[[], None], ...] = ()

    def set(self, name: str, value: bool) -> None:
        """Set `enabled`, `merged` or `fused`."""
        setattr(self, name, value)
        self.is_on = self.enabled and not self.merged and not self.fused

    def changed(self) -> None:
        """Tell whoever holds something computed from the weights or the scale that these are others now."""
        for act in self.on_change:
            act()
