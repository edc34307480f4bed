"""Which file of a folder is read."""

import json
from pathlib import Path

import pytest
import torch

from refiners.conversion import open_weights, write_state_dict
from refiners.errors import FileFormatError


def write(path: Path, value: float = 0.0) -> None:
    if path.suffix == ".bin":
        torch.save({"a": torch.tensor(value)}, path)
    else:
        write_state_dict(path, {"a": torch.tensor(value)})


def fill(folder: Path, *names: str) -> None:
    """Writes weights under these names; each index names a shard of its own."""
    for number, name in enumerate(names):
        if name.endswith(".json"):
            kind = "bin" if ".bin." in name else "safetensors"
            variant = ".fp16" if "fp16" in name else ""
            shard = f"{name.partition('.')[0]}{variant}-00001-of-00001.{kind}"
            write(folder / shard, number)
            (folder / name).write_text(json.dumps({"weight_map": {"a": shard}}))
        else:
            write(folder / name, number)


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (("model.safetensors", "model.fp16.safetensors"), None, 0),
        (("model.safetensors", "model.fp16.safetensors"), "fp16", 1),
        (("model.safetensors", "pytorch_model.bin"), None, 0),
        (("pytorch_model.fp16.bin", "model.safetensors"), "fp16", 0),
        (("pytorch_model.bin", "openvino_model.bin"), None, 0),
        (("diffusion_pytorch_model.fp16.safetensors",), None, 0),
        (("diffusion_pytorch_model.safetensors",), "fp16", 0),
        (("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"), "non_ema", 1),
        (("diffusion_pytorch_model.safetensors.index.json",), None, 0),
        (("diffusion_pytorch_model.safetensors.index.json", "x.safetensors.index.json"), None, 0),
        (("model.safetensors", "model.safetensors.index.fp16.json"), "fp16", 1),
        (("model.safetensors", "model.safetensors.index.fp16.json"), None, 0),
        (("model.safetensors.fp16.index.json",), "fp16", 0),
        (("pytorch_model.bin.index.json", "pytorch_model.bin.index.fp16.json"), "fp16", 1),
        (("own_name.safetensors",), None, 0),
    ],
)
def test_the_weights_that_are_asked_for_are_read(
    names: tuple[str, ...], variant: str | None, chosen: int, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    assert open_weights(tmp_path, variant)["a"].item() == chosen


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        (("model.fp16.safetensors", "model.bf16.safetensors"), None, "holds the variants bf16, fp16, which one is not"),
        (("model.fp16.safetensors",), "bf16", 'holds the variants fp16, not of the variant "bf16".*--variant fp16'),
        (("model.safetensors", "diffusion_pytorch_model.safetensors"), None, "holds several models"),
        ((), None, "holds no safetensors file"),
    ],
)
def test_a_choice_that_cannot_be_made_is_an_error(
    names: tuple[str, ...], variant: str | None, message: str, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(FileFormatError, match=message):
        open_weights(tmp_path, variant)
