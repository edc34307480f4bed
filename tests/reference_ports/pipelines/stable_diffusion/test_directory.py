"""Models told apart by their weights and configurations, and tokenizers by their files."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, rmtree

import pytest

from reference_ports.pipelines.stable_diffusion import (
    ClassifierFreeGuidance,
    EditGuidance,
    EmbeddedGuidance,
    StableDiffusion_1,
    StableDiffusion_1_Editing,
    StableDiffusion_1_Inpainting,
    from_directory,
    read_tokenizer,
)
from reference_ports.solvers import DDIM
from refiners.errors import ConversionError, FileFormatError, InputError


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(directory: Path, tmp_path: Path) -> Path:
    """A model to be spoilt."""
    return Path(copytree(directory, tmp_path / "copied"))


def test_a_model_is_ready_to_be_used(directory: Path) -> None:
    model = from_directory(directory)
    assert type(model) is StableDiffusion_1
    assert model.default_size == (32, 32)
    assert type(model.solver) is DDIM
    assert type(model.guidance) is ClassifierFreeGuidance
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("channels", "kind", "guidance"),
    [(9, StableDiffusion_1_Inpainting, ClassifierFreeGuidance), (8, StableDiffusion_1_Editing, EditGuidance)],
)
def test_the_channels_tell_what_a_model_was_trained_for(
    channels: int, kind: type, guidance: type, write: Callable[..., Path], tmp_path: Path
) -> None:
    model = from_directory(write(tmp_path, in_channels=channels))
    assert type(model) is kind
    assert type(model.guidance) is guidance


def test_a_denoiser_that_knows_the_scale_is_guided_by_it(write: Callable[..., Path], tmp_path: Path) -> None:
    assert type(from_directory(write(tmp_path, time_cond_proj_dim=16)).guidance) is EmbeddedGuidance


def test_outdated_solvers_are_corrected_as_upstream_does(copied: Path) -> None:
    rewrite(copied / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    params = from_directory(copied).solver.params
    assert (params.steps_offset, params.clip_sample) == (1, False)


def test_another_solver_may_be_named(directory: Path) -> None:
    assert type(from_directory(directory, solver="dpm++2m").solver).__name__ == "DPMMultistep"
    with pytest.raises(InputError, match="no solver 'fast'. There are ddim, "):
        from_directory(directory, solver="fast")


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        from_directory(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        from_directory(tmp_path)


def test_a_part_that_cannot_be_honoured_is_named(copied: Path) -> None:
    rewrite(copied / "unet" / "config.json", act_fn="gelu", unheard_of=1)
    with pytest.raises(ConversionError, match="(?s)unet: .*act_fn.*unheard_of"):
        from_directory(copied)


@pytest.mark.parametrize(
    ("folder", "other", "message"),
    [
        ("unet", "vae", "no model that can be converted .*unet looks like an autoencoder, vae looks like an autoenc"),
        ("unet", "text_encoder", "no model that can be converted .*unet looks like a text encoder, vae looks like"),
        ("vae", "unet", "autoencoder: .*vae/model.safetensors looks like a UNet, not an autoencoder"),
        ("text_encoder", "vae", "text_encoder: .*model.safetensors looks like an autoencoder, not a text encoder"),
    ],
)
def test_a_folder_that_holds_another_part_is_told_for_what_it_looks_like(
    folder: str, other: str, message: str, copied: Path
) -> None:
    rmtree(copied / folder)
    copytree(copied / other, copied / folder)
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        from_directory(copied)


def test_a_part_that_is_not_there_is_named(copied: Path) -> None:
    rmtree(copied / "unet")
    with pytest.raises(ConversionError, match="vae looks like an autoencoder; it lacks the folder unet"):
        from_directory(copied)


def test_one_part_alone_is_sent_to_the_ports(directory: Path) -> None:
    with pytest.raises(ConversionError, match="looks like an autoencoder alone.*`refiners ports` lists the ports"):
        from_directory(directory / "vae")


def test_a_model_without_its_scheduler_needs_a_solver_by_name(copied: Path) -> None:
    (copied / "scheduler").rename(copied / "elsewhere")
    with pytest.raises(FileFormatError, match="lacks scheduler/scheduler_config.json"):
        from_directory(copied)
    assert from_directory(copied, solver="ddim").solver.params.eta == 0.0


def test_a_model_without_its_tokenizer_is_refused(copied: Path) -> None:
    (copied / "tokenizer").rename(copied / "elsewhere")
    with pytest.raises(FileFormatError, match="lacks the folder tokenizer"):
        from_directory(copied)


def test_merges_are_read_from_either_kind_of_file(directory: Path, tmp_path: Path) -> None:
    old = directory / "tokenizer"
    lines = (old / "merges.txt").read_text().splitlines()[1:]
    for name, merges in (("strings", lines), ("pairs", [line.split(" ") for line in lines])):
        new = tmp_path / name
        new.mkdir()
        (new / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
        (new / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 40, "pad_token": {"content": "!"}}))
        tokenizer = read_tokenizer(new)
        assert tokenizer.encode("a cat") == read_tokenizer(old).encode("a cat")
        assert (tokenizer.max_length, tokenizer.pad_id) == (40, 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither merges.txt nor tokenizer.json"),
        ({"tokenizer.json": {"model": {}}}, "holds no list of merges"),
        ({"tokenizer.json": {"model": {"merges": ["a b c"]}}}, "holds no list of merges"),
        ({"tokenizer_config.json": {"model_max_length": "long"}}, "model_max_length is 'long'"),
        ({"added_tokens.json": {"<cat>": 49408}}, "added tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tokenizer_files_that_cannot_be_read_are_refused(
    files: dict[str, object], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=message):
        read_tokenizer(tmp_path)
