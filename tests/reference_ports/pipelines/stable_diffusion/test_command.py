"""`refiners generate`: what it writes, what it says, and what it refuses before it loads anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import refiners.fluxion.layers as fl
from reference_ports.pipelines.stable_diffusion import command
from reference_ports.pipelines.stable_diffusion.command import generate
from reference_ports.pipelines.stable_diffusion.directory import from_directory
from refiners import cli
from refiners.errors import ChainError, FileFormatError, InputError


@pytest.fixture
def options(directory: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": directory, "prompt": "a cat", "output": tmp_path / "cat.png", "steps": 1, "seed": 5}


def test_a_picture_is_written_and_told(options: dict[str, Any], tmp_path: Path) -> None:
    assert generate(**options, width=48) == f"{tmp_path}/cat.png: 48x32 pixels, 1 step of DDIM, seed 5."
    with Image.open(tmp_path / "cat.png") as image:
        assert (image.format, image.size, image.mode) == ("PNG", (48, 32), "RGB")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


def test_a_seed_that_is_not_given_is_told(options: dict[str, Any], tmp_path: Path) -> None:
    told = generate(**{**options, "seed": None})
    seed = int(told.rpartition("seed ")[2].rstrip("."))
    again = generate(**{**options, "seed": seed, "output": tmp_path / "again.png"})
    assert again.endswith(f"seed {seed}.")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "cat.png").read_bytes()


def test_pictures_and_masks_are_read_from_files(options: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (50, 41), "red").save(tmp_path / "red.png")
    Image.new("L", (50, 41), 255).save(tmp_path / "mask.png")
    assert "50x40 pixels" in generate(**options, image=tmp_path / "red.png", strength=1.0)
    both = {"image": tmp_path / "red.png", "mask": tmp_path / "mask.png", "overwrite": True}
    assert "48x40 pixels" in generate(**options, **both)


def test_several_pictures_are_numbered(options: dict[str, Any], tmp_path: Path) -> None:
    told = generate(**options, count=2)
    assert told == f"{tmp_path}/cat-1.png to cat-2.png: 2 pictures of 32x32 pixels, 1 step of DDIM, seed 5."
    first, second = ((tmp_path / f"cat-{number}.png").read_bytes() for number in (1, 2))
    assert first != second
    with pytest.raises(FileFormatError, match="cat-1.png exists"):
        generate(**options, count=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-1.png", "cat-2.png"]


def test_what_a_mask_hides_is_worked_on_alone(options: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (51, 41), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (51, 41))
    mask.paste(255, (10, 10, 20, 20))
    mask.save(tmp_path / "mask.png")
    told = generate(**options, image=tmp_path / "red.png", mask=tmp_path / "mask.png", mask_crop=4)
    assert "51x41 pixels" in told
    with Image.open(tmp_path / "cat.png") as made:
        assert made.crop((20, 0, 51, 41)).getcolors() == [(31 * 41, (255, 0, 0))]
        assert len(made.crop((10, 10, 20, 20)).getcolors()) > 1


def test_the_command_line_hands_its_options_over(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", options["model"], "--prompt", "a cat", "--steps", 1, "--seed", 5, "-o", options["output"]]
    monkeypatch.setattr("sys.argv", ["refiners", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert not end.value.code
    assert shown.out == f"{options['output']}: 32x32 pixels, 1 step of DDIM, seed 5.\n"
    assert "Denoising" in shown.err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, InputError, "--steps is 0"),
        ({"solver": "fast"}, InputError, "no solver 'fast'. There are ddim, "),
        ({"width": 33}, InputError, "--width is 33: it must be a multiple of 8"),
        ({"height": 0}, InputError, "--height is 0"),
        ({"dtype": "int64"}, InputError, "--dtype is int64"),
        ({"dtype": "float31"}, InputError, 'Unknown dtype "float31"'),
        ({"device": "abacus"}, InputError, "The device 'abacus' cannot be used"),
        ({"mask": "x.png"}, InputError, "give the picture with --image"),
        ({"mask_crop": 4}, InputError, "--mask-crop works on what a mask hides"),
        ({"mask_crop": -4, "image": "x.png", "mask": "y.png"}, InputError, "--mask-crop is -4"),
        ({"count": 0}, InputError, "--count is 0: at least one picture"),
        ({"strength": 0.5}, InputError, "give the picture with --image"),
        ({"image": "x.png", "width": 64}, InputError, "leave --height and --width out"),
        ({"image": "nowhere.png"}, FileNotFoundError, "nowhere.png"),
        ({"image": __file__}, FileFormatError, "holds no picture"),
        ({"output": "cat.gif"}, FileFormatError, "has to end with .png"),
        ({"output": "no/folder/cat.png"}, FileNotFoundError, "Create it first"),
        ({"output": __file__}, FileFormatError, "exists. Nothing was made.*--force"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "from_directory", None)
    paths = {key: Path(value) for key, value in changes.items() if key in ("image", "mask", "output")}
    with pytest.raises(error, match=message):
        generate(**{**options, **changes, **paths})
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_is_a_warning(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    generate(**{**options, "prompt": "a cat and " * 40})
    assert "Warning: A prompt may have 77 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_is_told_with_what_helps(
    error: Exception, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ChainError("a leaf failed") from error

    monkeypatch.setattr(command, "from_directory", load)
    with pytest.raises(InputError, match="memory of cpu does not suffice.*this was float32"):
        generate(**options)
    assert not options["output"].exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.unet.find(fl.Conv2d).weight.data[0].fill_(torch.nan), "After step 1 .* weights .*unet"),
        (lambda model: model.unet.find(fl.Conv2d).weight.data.fill_(3e38), "After step 1 .*another precision"),
    ],
    ids=["weight", "overflow"],
)
def test_a_picture_that_would_be_black_is_told_with_its_cause(
    spoil: Any, message: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **more: Any) -> Any:
        model = from_directory(*args, **more)
        spoil(model)
        return model

    monkeypatch.setattr(command, "from_directory", load)
    with pytest.raises(InputError, match=message):
        generate(**options)
    assert not options["output"].exists()
