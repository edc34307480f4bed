"""Loading weights: how long it takes, and how many bytes it copies. None, where the file can be mapped into memory.

The files of these benchmarks lie in the page cache, so what is timed is our own work and not a disk.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from benchmarks.conftest import Record, Tell
from benchmarks.engine.contestants import Pair
from benchmarks.engine.figures import exact
from benchmarks.engine.memory import MEBIBYTE, Memory, mapped_bytes, memory_of
from reference_ports.pipelines.stable_diffusion.checkpoints import BUNDLES
from refiners.conversion import open_directory
from refiners.conversion.files import read_state_dict
from refiners.fluxion.utils import load_from_safetensors, save_to_safetensors

Loader = Callable[[Path], Mapping[str, Tensor]]

LAYERS, WIDTH = 64, 512
# What Python itself takes to load 64 MiB: objects, and the pages of the libraries it touches first.
SMALL = 8
OURS = "model.load_from_safetensors({path!r})"
only_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")


def stack(device: str = "cpu") -> fl.Chain:
    """A model of 64 MiB."""
    return fl.Chain(*[fl.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(LAYERS)])


STACK = f"""
import refiners.fluxion.layers as fl
model = fl.Chain(*[fl.Linear({WIDTH}, {WIDTH}, bias=False, device=DEVICE) for _ in range({LAYERS})])
"""


class UpstreamStack(ModelMixin, ConfigMixin):
    """The same model as diffusers builds and loads its own."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        for i in range(LAYERS):
            self.add_module(f"Linear_{i + 1}", nn.Linear(WIDTH, WIDTH, bias=False))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_to_safetensors(path, stack().state_dict())
    return path


@pytest.mark.parametrize("load", [load_from_safetensors, read_state_dict], ids=["fluxion", "conversion"])
@only_on_linux
def test_bytes_copied_by_reading_a_file(tell: Tell, file: Path, load: Loader) -> None:
    tell(exact(copied_bytes(load, file), limit=0, unit="bytes"))


def copied_bytes(load: Loader, file: Path) -> int:
    """How many bytes of the loaded tensors are not those of the file, mapped into memory."""
    tensors = load(file).values()
    return sum(tensor.nbytes for tensor in tensors) - mapped_bytes(tensors, file)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@only_on_linux
def test_bytes_copied_by_loading_a_model(tell: Tell, file: Path, device: str) -> None:
    def load(path: Path) -> Mapping[str, Tensor]:
        return stack(device).load_from_safetensors(path).state_dict()

    tell(exact(copied_bytes(load, file), limit=0, unit="bytes"))


@only_on_linux
def test_own_memory_of_a_loaded_model_in_mebibytes(tell: Tell, file: Path) -> None:
    tell(exact(memory(file, "meta").own / MEBIBYTE, limit=SMALL, unit="MiB"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@only_on_linux
def test_peak_of_loading_and_reading_a_model_beyond_its_size(tell: Tell, file: Path, device: str) -> None:
    tell(exact(peak_beyond(file, device) / MEBIBYTE, limit=SMALL, unit="MiB"))


def peak_beyond(file: Path, device: str, load: str = OURS) -> int:
    """By how much the peak is above one model in memory, once every weight was used.

    On the CPU the model is resident before it is loaded, with the random weights that loading replaces.
    """
    model = file.stat().st_size if device == "meta" else 0
    return memory(file, device, load, use=True).peak - model


def memory(file: Path, device: str, load: str = OURS, use: bool = False) -> Memory:
    prepare = STACK.replace("DEVICE", repr(device)) + "import refiners.fluxion.layers.loading, safetensors.torch"
    act = load.format(path=str(file)) + ("\nsum(float(p.data.sum()) for p in model.parameters())" if use else "")
    return memory_of(prepare, act)


def test_reading_against_safetensors_own(record: Record, file: Path) -> None:
    record(against(load_file, load_from_safetensors, file, limit=1.25))


def test_reading_against_copying_the_bytes(record: Record, file: Path) -> None:
    record(against(Path.read_bytes, load_from_safetensors, file, limit=1.00))


def against(reference: Callable[[Path], object], load: Loader, file: Path, limit: float) -> Pair:
    return Pair(contestant=lambda: partial(load, file), reference=lambda: partial(reference, file), limit=limit)


def test_a_ready_model_against_diffusers(record: Record, file: Path, tmp_path: Path) -> None:
    def theirs() -> object:
        return UpstreamStack.from_pretrained(tmp_path)

    def ours() -> object:
        return stack("meta").load_from_safetensors(file)

    UpstreamStack().save_pretrained(tmp_path)
    record(Pair(contestant=lambda: ours, reference=lambda: theirs, limit=1.00))


# A port, from the files that diffusers publishes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of about 300 MiB as diffusers saves it. Nobody looks at its values."""
    folder = tmp_path_factory.mktemp("published")
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(128, 256, 384, 384))
    unet.to_empty(device="cpu").save_pretrained(folder / "unet")
    return folder


def load_unet(folder: Path) -> nn.Module:
    return open_directory(folder, {"unet": UNET}, "unet").load("unet")


UNET = replace(
    BUNDLES["sd15"],
    name="unet",
    parts=tuple(part for part in BUNDLES["sd15"].parts if part.name == "unet"),
    recognises=lambda shapes: True,
)
LOAD_UNET = """
model = load_unet(Path({path!r}))
sum(float(p.sum()) for p in model.parameters())
"""


@pytest.mark.told
def test_a_ready_unet_against_diffusers(record: Record, folder: Path) -> None:
    def theirs() -> object:
        return UNet2DConditionModel.from_pretrained(folder / "unet")

    record(Pair(contestant=lambda: partial(load_unet, folder), reference=lambda: theirs, limit=1.2))


@only_on_linux
def test_peak_of_loading_and_reading_a_unet_for_each_byte_of_its_weights(tell: Tell, folder: Path) -> None:
    tell(exact(peak_of_unet(folder), limit=1.05, unit="×"))


def peak_of_unet(folder: Path, load: str = LOAD_UNET) -> float:
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    prepare = "from pathlib import Path\nfrom benchmarks.test_loading import load_unet"
    return memory_of(prepare, load.format(path=str(folder))).peak / weights


@only_on_linux
def test_a_unet_that_is_copied_has_twice_the_peak(folder: Path) -> None:
    assert peak_of_unet(folder, LOAD_UNET + "copies = [p.clone() for p in model.parameters()]") > 1.9
