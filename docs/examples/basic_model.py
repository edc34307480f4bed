"""A model is a tree of layers: the tree that is printed is the program that runs.

Prints the tree of a small classifier of handwritten digits, then the shape of what it returns.
"""

import torch

import refiners.fluxion.layers as fl


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=-1)


class BasicModel(fl.Chain):
    """Images of 28 × 28 pixels in, probabilities of ten digits out."""

    def __init__(self) -> None:
        super().__init__(
            fl.Conv2d(in_channels=1, out_channels=8, kernel_size=3),
            fl.ReLU(),
            fl.MaxPool2d(kernel_size=2),
            fl.Flatten(start_dim=1),
            fl.Linear(in_features=8 * 13 * 13, out_features=32),
            fl.ReLU(),
            fl.Linear(in_features=32, out_features=10),
            fl.Lambda(softmax),
        )


if __name__ == "__main__":
    model = BasicModel()
    print(repr(model))
    print(tuple(model(torch.zeros(2, 1, 28, 28)).shape))
