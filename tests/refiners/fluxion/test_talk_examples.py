"""The examples of the talk that defines this project: they stand in docs/examples, and run as they are."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import refiners.fluxion.layers as fl

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
PRINTED = {
    "basic_model": """\
(CHAIN) BasicModel()
    ├── Conv2d(in_channels=1, out_channels=8, kernel_size=(3, 3), device=cpu, dtype=float32)
    ├── ReLU() #1
    ├── MaxPool2d(kernel_size=2, stride=2)
    ├── Flatten(start_dim=1)
    ├── Linear(in_features=1352, out_features=32, device=cpu, dtype=float32) #1
    ├── ReLU() #2
    ├── Linear(in_features=32, out_features=10, device=cpu, dtype=float32) #2
    └── Lambda(softmax(x: torch.Tensor) -> torch.Tensor)
(2, 10)
""",
    "regroup": """\
(CHAIN) BasicModel()
    ├── (CHAIN) ConvLayer()
    │   ├── Conv2d(in_channels=1, out_channels=8, kernel_size=(3, 3), device=cpu, dtype=float32)
    │   ├── ReLU()
    │   └── MaxPool2d(kernel_size=2, stride=2)
    ├── (CHAIN) HiddenLayer()
    │   ├── Flatten(start_dim=1)
    │   ├── Linear(in_features=1352, out_features=32, device=cpu, dtype=float32)
    │   └── ReLU()
    └── (CHAIN) OutputLayer()
        ├── Linear(in_features=32, out_features=10, device=cpu, dtype=float32)
        └── Lambda(softmax(x: torch.Tensor) -> torch.Tensor)
True
""",
    "context": "6\n",
    "adapter": """\
(CHAIN) BasicModel()
    ├── Conv2d(in_channels=1, out_channels=8, kernel_size=(3, 3), device=cpu, dtype=float32)
    ├── ReLU() #1
    ├── MaxPool2d(kernel_size=2, stride=2)
    ├── Flatten(start_dim=1)
    ├── (SUM) MyAdapter() #1
    │   └── Linear(in_features=1352, out_features=32, device=cpu, dtype=float32) (x2)
    ├── ReLU() #2
    ├── (SUM) MyAdapter() #2
    │   └── Linear(in_features=32, out_features=10, device=cpu, dtype=float32) (x2)
    └── Lambda(softmax(x: torch.Tensor) -> torch.Tensor)
False
True True
""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "basic_model", raising=False)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "basic_model", raising=False)
    assert capsys.readouterr().out == PRINTED[name]


def test_every_example_is_run() -> None:
    of_the_pipelines = {"tiny_stable_diffusion"}  # run by docs/stable_diffusion.md and the tests of pipelines
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED) | of_the_pipelines


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


class BasicModel(fl.Chain):
    """The model of the talk, small."""

    def __init__(self) -> None:
        super().__init__(
            fl.Conv2d(1, 2, kernel_size=3),
            fl.ReLU(),
            fl.MaxPool2d(2),
            fl.Flatten(start_dim=1),
            fl.Linear(2 * 13 * 13, 8),
            fl.ReLU(),
            fl.Linear(8, 10),
            fl.Lambda(softmax),
        )


class ConvLayer(fl.Chain):
    """The first group."""


class HiddenLayer(fl.Chain):
    """The second group."""


class OutputLayer(fl.Chain):
    """The third group."""


images = torch.linspace(0, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


def test_the_basic_model_computes_what_torch_computes() -> None:
    model = BasicModel()
    layers = [
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(1), torch.nn.Linear(338, 8),
        torch.nn.ReLU(), torch.nn.Linear(8, 10), torch.nn.Softmax(dim=-1),
    ]  # fmt: skip
    plain = torch.nn.Sequential(*layers)
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    assert torch.equal(model(images), plain(images))


def test_regrouping_keeps_the_outputs_and_the_weights() -> None:
    model = BasicModel()
    outputs, weights = model(images), [id(p) for p in model.parameters()]
    model.insert(0, ConvLayer(model.pop(0), model.pop(0), model.pop(0)))
    model.insert_after_type(ConvLayer, HiddenLayer(model.pop(1), model.pop(1), model.pop(1)))
    model.append(OutputLayer(model.pop(2), model.pop(2)))
    assert list(model._modules) == ["ConvLayer", "HiddenLayer", "OutputLayer"]
    assert [id(p) for p in model.parameters()] == weights
    assert torch.equal(model(images), outputs)


def test_layers_can_also_be_taken_by_key_while_regrouping() -> None:
    model = BasicModel()
    outputs = model(images)
    hidden = HiddenLayer()
    for key in ("Flatten", "Linear_1", "ReLU_2"):
        layer = model.layer(key) if key in model._modules else model.layer(key.split("_")[0])
        position = list(model).index(layer)
        model.pop(position)
        hidden.append(layer)
    model.insert_after_type(fl.MaxPool2d, hidden)
    assert torch.equal(model(images), outputs)


class MyAdapter(fl.Sum, fl.Adapter[fl.Linear]):
    """The adapter of the talk."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(target.in_features, target.out_features))


def snapshot(model: fl.Chain) -> list[Any]:
    return [
        (name, id(weight), weight.detach().numpy().tobytes())
        for name, weight in model.state_dict(keep_vars=True).items()
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_my_adapter_is_found_injected_and_ejected_bit_for_bit(order: int) -> None:
    model = BasicModel()
    before, picture, outputs = snapshot(model), repr(model), model(images)
    for linear, parent in model.walk(fl.Linear):
        MyAdapter(linear).inject(parent)
    adapters = [adapter for adapter, _ in model.walk(MyAdapter)]
    assert len(adapters) == 2
    assert not torch.equal(model(images), outputs)
    for adapter in adapters[::order]:
        adapter.eject()
    assert (snapshot(model), repr(model)) == (before, picture)
    assert torch.equal(model(images), outputs)
