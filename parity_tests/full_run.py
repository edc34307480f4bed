"""Published sizes, run in full beside upstream: `nox -s parity_full`. Not part of `nox -s parity`: it takes minutes.

Both models read the same storages, so a pair needs the memory of one. Upstream and port take turns, on one thread. For
each size are compared the bits of the prediction, the time of a forward, and the memory that a forward needs beside the
weights. Linux only: memory is read from /proc.
"""

import gc
import statistics
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from parity_tests.cases.autoencoder import FULL
from parity_tests.cases.unet import SD1_SIZE, XL_SIZE, Config
from reference_ports import autoencoder, unet
from refiners.conversion import KeyMap

ROUNDS = 3
# The aim is 1. Three rounds cannot tell a hundredth from noise, so this finds a port that is plainly slower.
SLOWEST = 1.03
MEBIBYTE = 2**20

Forward = Callable[[], Tensor]


def status(key: str) -> int:
    """Bytes that the kernel counts for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def build_on_meta_and_fill(upstream: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model without the minutes that upstream's initialisation takes; norms and small matrices stay useful."""
    with torch.device("meta"):
        model = upstream().to(dtype).eval()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            is_matrix = parameter.ndim > 1
            scale = (parameter.numel() / len(parameter)) ** -0.5 if is_matrix else 0.25
            mean = 1.0 if not is_matrix and name.endswith("weight") else 0.0
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                # A prime step, so that no two rows of a matrix are alike.
                part.copy_(mean + scale * block.roll(7919 * (start // len(block)) + len(name))[: len(part)])
    return model


def share_weights(upstream: nn.Module, port: nn.Module, key_map: KeyMap) -> None:
    """Lets the port read upstream's storages."""
    port.load_state_dict(key_map.convert(upstream.state_dict(), port), assign=True)
    ours = {parameter.data_ptr() for parameter in port.parameters()}
    assert ours == {parameter.data_ptr() for parameter in upstream.parameters()}


def peak_of(forward: Forward) -> int:
    """By how many bytes a forward raises the memory of the process at its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = status("VmRSS")
    forward()
    return status("VmHWM") - before


def compare(name: str, upstream: Forward, port: Forward) -> str:
    """Runs both in turns; fails unless all bits are equal, and time and memory are at most `SLOWEST` of upstream's."""
    assert torch.equal(upstream(), port())
    peaks = [peak_of(forward) for forward in (upstream, port)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(ROUNDS):
        for k in (0, 1) if i % 2 else (1, 0):
            started = time.process_time()
            (upstream, port)[k]()
            seconds[k].append(time.process_time() - started)
    theirs, ours = (statistics.median(times) for times in seconds)
    resident = status("VmRSS") / MEBIBYTE
    told = (
        f"{name}: bitwise; {ours:.2f} s for {theirs:.2f} s ({ours / theirs:.3f}×); peak beside the weights "
        f"{peaks[1] / MEBIBYTE:.0f} MiB for {peaks[0] / MEBIBYTE:.0f} MiB; resident {resident:.0f} MiB"
    )
    assert ours / theirs <= SLOWEST, told
    assert peaks[1] <= peaks[0] * SLOWEST, told
    return told


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """One thread and no gradients; what a test built is gone after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    gc.collect()


UNETS: dict[str, tuple[Config, Callable[..., unet.UNet], torch.dtype]] = {
    "SD1.5 UNet, float32, 64x64": (SD1_SIZE, unet.SD1UNet, torch.float32),
    "SDXL UNet, bfloat16, 64x64": (XL_SIZE, unet.SDXLUNet, torch.bfloat16),
}


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_of_published_size_equals_upstream(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, build, dtype = UNETS[name]
    upstream = build_on_meta_and_fill(lambda: UNet2DConditionModel(**config), dtype)
    port = build(device="meta", dtype=dtype).eval()
    share_weights(upstream, port, unet.key_map_for(config))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    latents, text = draw(1, 4, 64, 64), draw(1, 77, config["cross_attention_dim"])
    pooled, time_ids = draw(1, 1280), torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 512.0, 512.0]])
    given: dict[str, Any] = {}
    if "addition_embed_type" in config:
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        port.set_pooled_text_embedding(pooled)
        port.set_time_ids(time_ids)
    port.set_clip_text_embedding(text)

    def run_port() -> Tensor:
        port.set_timestep(981)
        return port(latents)

    told = compare(name, lambda: upstream(latents, 981, text, **given).sample, run_port)
    with capsys.disabled():
        print(f"\n{told}")


def test_the_decoder_of_an_autoencoder_of_published_size_equals_upstream(capsys: pytest.CaptureFixture[str]) -> None:
    upstream: Any = build_on_meta_and_fill(lambda: AutoencoderKL(**FULL), torch.float32)
    port = autoencoder.SD1Autoencoder(device="meta", dtype=torch.float32).eval()
    share_weights(upstream, port, autoencoder.KEYS)
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    name = "SD1.5 decoder, float32, 512x512 pixels"
    told = compare(name, lambda: upstream.decode(latents).sample, lambda: port.decode(latents))
    with capsys.disabled():
        print(f"\n{told}")
