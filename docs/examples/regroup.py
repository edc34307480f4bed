"""A tree can be edited: eight layers become three named groups, which compute the same.

Prints the tree of `BasicModel` after regrouping, and whether its outputs are still the same bits.
"""

import torch
from basic_model import BasicModel

import refiners.fluxion.layers as fl


class ConvLayer(fl.Chain):
    """Finds features, and halves the image."""


class HiddenLayer(fl.Chain):
    """Mixes the features of the whole image."""


class OutputLayer(fl.Chain):
    """Scores each class."""


def regroup(model: BasicModel) -> None:
    """Move the layers of the model into three groups."""
    model.insert(0, ConvLayer(model.pop(0), model.pop(0), model.pop(0)))
    # ConvLayer, Flatten, Linear_1, ReLU, Linear_2, Lambda
    model.insert_after_type(ConvLayer, HiddenLayer(model.pop(1), model.pop(1), model.pop(1)))
    # ConvLayer, HiddenLayer, Linear, Lambda
    model.append(OutputLayer(model.pop(2), model.pop(2)))


if __name__ == "__main__":
    model = BasicModel()
    images = torch.rand(2, 1, 28, 28)
    before = model(images)
    regroup(model)
    print(repr(model))
    print(torch.equal(model(images), before))
