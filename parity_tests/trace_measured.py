"""What tracing costs: the time of a traced forward over that of a plain one, and how much more memory it takes.

    python -m parity_tests.trace_measured                    the UNet of Stable Diffusion 1.5, float32, 32x32 latents
    python -m parity_tests.trace_measured --latents 64       as it is used for 512x512 pixels
    python -m parity_tests.trace_measured --backward         forward and backward

Weights are random. Runs alternate, plain and traced, and the fastest of each counts, in seconds of the processor, so
that what else runs on the machine counts little. Memory is the peak of the resident set over that before the run, as
Linux counts it, so it holds what the allocator keeps as well; it is set beside the largest activation.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from refiners.parity.fingerprint import Values
from refiners.parity.operations import Trace
from refiners.parity.trace import record

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
"""The published configuration; all else is the default of the class."""
MEGABYTE = 1 << 20


@dataclass
class Cost:
    """Of one run."""

    seconds: float
    extra: float
    """Bytes above what the process held before."""


def build() -> nn.Module:
    with torch.device("meta"):
        model = UNet2DConditionModel(**SD15)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.normal_(generator=generator)
            parameter.mul_(fan**-0.5 if fan else 0.1)
    return model


def cost_of(run: Callable[[], object]) -> Cost:
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.process_time()
    run()
    return Cost(time.process_time() - started, resident("VmHWM") - before)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def largest_activation(model: nn.Module, run: Callable[[], object]) -> int:
    sizes = [0]

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    run()
    for handle in handles:
        handle.remove()
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, options.latents, options.latents, generator=generator)
    text, step = torch.randn(1, 77, 768, generator=generator), torch.tensor([500])
    traces: list[Trace] = []

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(options.backward):
            found = model(sample, step, encoder_hidden_states=text).sample
            if options.backward:
                model.zero_grad(set_to_none=True)
                found.sum().backward()
        return {"sample": found}

    def traced() -> None:
        traces[:] = [record(model, run, Values(), gradients=options.backward)[0]]

    largest = largest_activation(model, run)
    traced()
    plain, told = [], []
    for _ in range(options.rounds):
        plain.append(cost_of(run))
        told.append(cost_of(traced))
    fastest, slowed = min(c.seconds for c in plain), min(c.seconds for c in told)
    more = min(c.extra for c in told) - min(c.extra for c in plain)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights / 1e6:.0f} M weights, {options.latents}x{options.latents} latents, {options.threads} threads")
    print(f"operations {len(traces[0].operations)}, largest activation {largest / MEGABYTE:.1f} MiB")
    print(f"plain  {fastest:.2f} s, peak {min(c.extra for c in plain) / MEGABYTE:.0f} MiB above the weights")
    print(f"traced {slowed:.2f} s, peak {min(c.extra for c in told) / MEGABYTE:.0f} MiB above the weights")
    print(f"ratio {slowed / fastest:.2f}, more memory {more / MEGABYTE:.1f} MiB = {more / largest:.2f} activations")


if __name__ == "__main__":
    main()
