"""An adapter takes the place of a layer, and gives it back without a trace.

Prints the tree with an adapter on each Linear, then whether ejecting them restored names, weights and outputs.
"""

from typing import Any

import torch
from basic_model import BasicModel

import refiners.fluxion.layers as fl


class MyAdapter(fl.Sum, fl.Adapter[fl.Linear]):
    """Adds the output of a second, new Linear to that of its target."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(target.in_features, target.out_features))


def adapt(model: fl.Chain) -> list[MyAdapter]:
    """Adapt every Linear of the model."""
    return [MyAdapter(linear).inject(parent) for linear, parent in model.walk(fl.Linear)]


def identity_of(model: fl.Chain) -> list[tuple[str, Any]]:
    return [(name, id(weight)) for name, weight in model.state_dict(keep_vars=True).items()]


if __name__ == "__main__":
    model = BasicModel()
    images = torch.rand(2, 1, 28, 28)
    outputs, weights = model(images), identity_of(model)

    adapters = adapt(model)
    print(repr(model))
    print(torch.equal(model(images), outputs))

    for adapter in adapters:
        adapter.eject()
    print(torch.equal(model(images), outputs), identity_of(model) == weights)
