from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refiners.conversion import read_state_dict
from refiners.conversion.model_converter import ModelConverter
from refiners.conversion.proposal import propose_lines
from refiners.errors import ConversionError


class Block(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=eps)
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Source(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block(eps) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def target(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    model = nn.Sequential()
    for index in range(3):
        block = Residual()
        for name, child in {
            "Norm": nn.LayerNorm(4),
            "Linear_1": nn.Linear(4, 8),
            "Act": activation(),
            "Linear_2": nn.Linear(8, 4),
        }.items():
            block.add_module(name, child)
        model.add_module(f"Block_{index + 1}", block)
    model.add_module("Linear", nn.Linear(4, 2))
    return model


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_a_key_map_is_proposed_from_the_order_of_execution(capsys: pytest.CaptureFixture[str]) -> None:
    port = target()
    converter = ModelConverter(Source(), port)
    assert converter.run((X,))
    assert converter.key_map.lines == {
        "blocks.{i}.norm": "Block_{i+1}.Norm",
        "blocks.{i}.fc1": "Block_{i+1}.Linear_1",
        "blocks.{i}.fc2": "Block_{i+1}.Linear_2",
        "head": "Linear",
    }
    assert converter.map_state_dicts((X,), {"input": X}) is not None
    assert '"blocks.{i}.fc1": "Block_{i+1}.Linear_1",' in capsys.readouterr().out


def test_the_converted_weights_are_loaded_and_saved(tmp_path: Path) -> None:
    source, port = Source(), target()
    converter = ModelConverter(source, port, verbose=False)
    with pytest.raises(ConversionError, match="nothing to save"):
        converter.save_to_safetensors(tmp_path / "a.safetensors")
    assert converter.run(X)
    assert torch.equal(port(X), source(X)["logits"])
    converter.save_to_safetensors(tmp_path / "a.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "a.safetensors")["Linear.bias"], source.head.bias)


@pytest.mark.parametrize(
    ("source", "port", "options", "problem"),
    [
        (Source(eps=1e-6), target(), {}, "eps of blocks.0.norm is 1e-06, of Block_1.Norm 1e-05."),
        (Source(), target(nn.GELU), {}, "Output 0 differs by up to"),
        (nn.Linear(4, 3), nn.Linear(4, 2), {}, "has no layer of its shapes in the source"),
        (Source(), target(), {"source_keys_to_skip": ("head",)}, "Linear of the target"),
    ],
    ids=["numbers", "outputs", "shapes", "skipped"],
)
def test_what_differs_is_told_and_the_target_keeps_its_weights(
    source: nn.Module, port: nn.Module, options: dict[str, Any], problem: str
) -> None:
    before = {key: value.clone() for key, value in port.state_dict().items()}
    converter = ModelConverter(source, port, verbose=False, **options)
    assert not converter.run(X)
    assert any(problem in text for text in converter.problems)
    assert all(torch.equal(before[key], value) for key, value in port.state_dict().items())


def test_checks_can_be_skipped_one_by_one() -> None:
    assert ModelConverter(Source(), target(nn.GELU), skip_output_check=True, verbose=False).run(X)
    assert ModelConverter(Source(), target(nn.GELU), threshold=1e3, verbose=False).run(X)
    source = Source(eps=1e-3)
    assert ModelConverter(source, target(), skip_init_check=True, skip_output_check=True, verbose=False).run(X)
    both: dict[str, Any] = {
        "source_keys_to_skip": ("head",),
        "target_keys_to_skip": ("Linear",),
        "skip_output_check": True,
    }
    converter = ModelConverter(Source(), target(), verbose=False, **both)
    assert converter.run(X)
    assert "head" not in converter.key_map.lines


def test_running_a_model_leaves_it_as_it_was() -> None:
    source, port = Source().train(), target().eval()
    source.blocks[1].eval()
    state = torch.random.get_rng_state()
    ModelConverter(source, port, verbose=False).run(X)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [source.training, source.blocks[0].training, source.blocks[1].training] == [True, True, False]
    assert not port.training
    assert all(not module._forward_pre_hooks for module in source.modules())


def test_numbers_that_no_offset_explains_become_lines_of_their_own() -> None:
    pairs = [(f"l.{i}.mlp.{j}", f"L_{i + 1}.Linear_{1 + j // 2}") for i in range(3) for j in (0, 2)]
    assert propose_lines(pairs) == {"l.{i}.mlp.0": "L_{i+1}.Linear_1", "l.{i}.mlp.2": "L_{i+1}.Linear_2"}
    assert propose_lines([("a.0", "X_2"), ("a.1", "X_1")]) == {"a.0": "X_2", "a.1": "X_1"}
