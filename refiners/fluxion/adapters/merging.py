"""Layers that show other parameters than their own, as long as adapters are merged into them.

The own parameters are kept aside, untouched: they are what a base checkpoint holds, and what unmerging puts back.
"""

from typing import cast

from torch import nn

from refiners.fluxion.layers.journal import note_undo

Parameters = dict[str, nn.Parameter | None]

# How a layer knows what it keeps.
_KEY = "_merge"


class Merging:
    """What one layer keeps, and how what it shows is computed anew. All edits are undone by a failing transaction."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.parameters: Parameters = dict(parameters_of(layer))

    def fold(self) -> None:
        """Compute what the layer shows anew."""
        raise NotImplementedError

    def begin(self) -> None:
        """Let the layer know."""
        note_undo(lambda: self.layer.__dict__.pop(_KEY, None))
        self.layer.__dict__[_KEY] = self

    def end(self) -> None:
        """Let the layer forget. What it shows has to be its own by now."""
        note_undo(lambda: self.layer.__dict__.update({_KEY: self}))
        del self.layer.__dict__[_KEY]

    def kept(self) -> Parameters:
        """The own parameters, in the order the layer has them, on its device and in its dtype.

        Those that it shows may have been moved or converted meanwhile, and the kept ones follow.
        """
        shown = parameters_of(self.layer)
        for name, own in self.parameters.items():
            now = shown.get(name)
            if own is None or now is None or now is own:
                continue
            if (now.device, now.dtype) != (own.device, own.dtype):
                own.data = own.data.to(now.device, now.dtype)
        return self.parameters

    def show(self, parameters: Parameters) -> None:
        """Let the layer show these."""
        shown = parameters_of(self.layer)
        before = dict(shown)
        note_undo(lambda: shown.update(before))
        shown.update(parameters)


def merge_of(layer: nn.Module) -> Merging | None:
    """What a layer keeps aside; None if it shows its own parameters."""
    return layer.__dict__.get(_KEY)


def parameters_of(layer: nn.Module) -> Parameters:
    """The parameters that a module itself shows, by name."""
    return cast(Parameters, vars(layer)["_parameters"])
