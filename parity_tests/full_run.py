"""Published sizes, run in full beside upstream: `nox -s parity_full`. Not part of `nox -s parity`: it takes minutes.

Both models read the same storages, so a pair needs the memory of one. Upstream and port take turns, on one thread. For
each size are compared the bits of the prediction, the time of a forward, and the memory that a forward needs beside the
weights: bytes of tensors that are alive, for what the process holds besides is a matter of chance. No profiler counts
them: while one is open, all calls go through `Module.__call__`, which holds on to inputs. Linux only: /proc tells what
is resident.

Times are those of the processor, in pairs, one after the other; the median of the pairs' ratios is told, with half of
them lying between the two numbers behind it. While times are taken the allocator keeps what is freed: else each large
tensor is mapped anew, and the kernel clears its pages, for as long as it takes on that day.
"""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.engine.watch import Watch
from parity_tests.cases.autoencoder import FULL
from parity_tests.cases.unet import SD1_SIZE, XL_SIZE, Config
from reference_ports import autoencoder, unet
from refiners.conversion import KeyMap

PAIRS = int(os.environ.get("REFINERS_FULL_PAIRS", "5"))
# The aim is 1. A few pairs hardly tell a hundredth from noise, so this finds a port that is plainly slower.
SLOWEST = 1.03
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h, with the values it begins with
TRIM_AT_FIRST, MMAPS_AT_FIRST = 2**17, 2**16
LIBC = ctypes.CDLL(None)
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
    """How many bytes of tensors are alive at the highest moment of a forward, beyond those before it."""
    with Watch() as watch:
        forward()
    return watch.peak


@contextmanager
def memory_kept() -> Iterator[None]:
    """Lets glibc's allocator keep what is freed."""
    LIBC.mallopt(M_MMAP_MAX, 0)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    yield
    LIBC.mallopt(M_MMAP_MAX, MMAPS_AT_FIRST)
    LIBC.mallopt(M_TRIM_THRESHOLD, TRIM_AT_FIRST)
    LIBC.malloc_trim(0)


def seconds_of(forward: Forward) -> float:
    """The time of the processor that a forward takes."""
    started = time.process_time()
    forward()
    return time.process_time() - started


def compare(name: str, upstream: Forward, port: Forward) -> str:
    """Runs both in turns; fails unless all bits are equal, and time and memory are at most `SLOWEST` of upstream's."""
    assert torch.equal(upstream(), port())
    peaks = [peak_of(forward) for forward in (upstream, port)]
    resident = status("VmRSS") / MEBIBYTE
    both: tuple[list[float], list[float]] = ([], [])
    with memory_kept():
        for forward in (upstream, port):
            forward()  # what the allocator keeps is there from now on
        for i in range(PAIRS):
            for k in (0, 1) if i % 2 else (1, 0):
                both[k].append(seconds_of((upstream, port)[k]))
    theirs, ours = (statistics.median(times) for times in both)
    low, ratio, high = statistics.quantiles([one / other for other, one in zip(*both, strict=True)], n=4)
    told = (
        f"{name}: bitwise; {ours:.2f} s for {theirs:.2f} s; {ratio:.3f}× ({low:.3f} to {high:.3f}, {PAIRS} pairs); "
        f"peak beside the weights {peaks[1] / MEBIBYTE:.0f} MiB for {peaks[0] / MEBIBYTE:.0f} MiB; "
        f"resident {resident:.0f} MiB"
    )
    assert ratio <= SLOWEST, told
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
