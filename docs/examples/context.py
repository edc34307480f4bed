"""Context: a value reaches a layer from far away, without passing through the layers between.

Prints 6.
"""

import refiners.fluxion.layers as fl

model = fl.Chain(
    fl.UseContext("numbers", "four"),
    fl.Lambda(lambda x: x + 2),
)

if __name__ == "__main__":
    model.set_context("numbers", {"four": 4})
    print(model())
