"""Where the time of an act goes, for the figures of docs/benchmarks.md that miss their goal or are near it.

    python -m benchmarks.profiles swap|inject|eject|load|compiled|lora

Each row is a stage alone, the fastest of some turns, on one thread, in processor time. Stages may hold one another.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional

from benchmarks.adapter_rows import attention_projections, inject_several
from benchmarks.test_adapters import full_size, weights_of_rank_16
from benchmarks.test_loading import UNET, load_unet
from benchmarks.workloads import PORTS, forward_of
from refiners.conversion import open_directory
from refiners.conversion.files import WeightFiles
from refiners.conversion.lazy import ConvertedWeights
from refiners.fluxion.adapters import FusedLoras, LoraAdapter, inject_loras
from refiners.fluxion.adapters.lora.spec import are_finite
from refiners.fluxion.layers.loading import adopt_weights

Act = Callable[[], object]
TURNS = 10


def fastest(act: Act, prepare: Act | None = None, turns: int = TURNS) -> float:
    """Milliseconds of an act, with `prepare` before each turn."""
    found: list[float] = []
    gc.freeze()
    for _ in range(turns):
        if prepare is not None:
            prepare()
        gc.collect()
        gc.disable()
        start = time.process_time()
        kept = act()
        found.append(time.process_time() - start)
        gc.enable()
        del kept
    gc.unfreeze()
    return min(found) * 1000


def swap() -> dict[str, float]:
    model = full_size()
    given = [weights_of_rank_16(model) for _ in range(2)]
    loras = inject_loras(model, given[0], name="style", device="cpu")
    new = [tensor for spec in given[1].values() for tensor in spec.tensors.values()]
    old = [parameter.detach() for parameter in loras.parameters()]
    rows = {
        "all": fastest(lambda: loras.swap(given[0]), given.reverse),
        "the layers by their paths": fastest(loras.by_path),
        "whether all values are finite": fastest(lambda: are_finite(new)),
        "keeping the old values": fastest(lambda: torch.cat([tensor.view(-1) for tensor in old])),
        "writing the new ones": fastest(lambda: [a.copy_(b) for a, b in zip(old, new, strict=True)]),
    }
    loras.eject()
    return rows


def inject() -> dict[str, float]:
    model = full_size()
    specs = weights_of_rank_16(model)
    tensors = [tensor for spec in specs.values() for tensor in spec.tensors.values()]
    held: list[Any] = []

    def eject() -> None:
        while held:
            held.pop().eject()

    rows = {
        "all, weights in memory": fastest(
            lambda: held.append(inject_loras(model, specs, name="style", device="cpu")), eject
        ),
        "all, weights to be trained": fastest(
            lambda: held.append(inject_loras(attention_projections(model), name="style", rank=4)), eject
        ),
        "whether all values are finite": fastest(lambda: are_finite(tensors)),
        "copying the values": fastest(lambda: [tensor.clone() for tensor in tensors]),
    }
    eject()
    return rows


def eject() -> dict[str, float]:
    model, held = full_size(), list[Any]()

    def put() -> None:
        held.append(inject_loras(attention_projections(model), name="style", rank=4))

    cold = fastest(lambda: held.pop().eject(), put)
    warm: list[float] = []
    gc.disable()
    for _ in range(TURNS):
        put()
        start = time.process_time()
        held.pop().eject()
        warm.append(time.process_time() - start)
    gc.enable()
    return {"after a collection of garbage": cold, "with warm caches": min(warm) * 1000}


def load() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(128, 256, 384, 384))
        unet.to_empty(device="cpu").save_pretrained(folder / "unet")
        part = open_directory(folder, {"unet": UNET}, "unet").parts["unet"]
        stored, keys = WeightFiles(part.stored.path), UNET.parts[0].keys(part.config)
        weights, ports = part.state_dict(), list[nn.Module]()

        def build() -> nn.Module:
            with torch.device("meta"):
                return part.build()

        port = build()
        return {
            "all": fastest(lambda: load_unet(folder)),
            "from_pretrained of diffusers": fastest(lambda: UNet2DConditionModel.from_pretrained(folder / "unet")),
            "building the tree": fastest(build),
            "reading the header": fastest(lambda: WeightFiles(part.stored.path)),
            "checking every key and shape": fastest(lambda: ConvertedWeights(stored, keys, port)),
            "mapping the file": fastest(part.state_dict),
            "giving the weights to the tree": fastest(
                lambda: adopt_weights(ports.pop(), weights, own_dtype=False), lambda: ports.append(build())
            ),
        }


def compiled() -> dict[str, float]:
    """What is outside of the graph: guards, contexts, and what torch does around a call. The graph gives a constant."""

    def constant(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        outputs: list[Any] = []

        def run(*args: Any) -> Any:
            if not outputs:
                outputs.append(graph.forward(*args))
            return outputs[0]

        return run

    rows: dict[str, float] = {}
    for name in ("bert", "clip-text", "unet-sd1"):
        torch.compiler.reset()
        acts = PORTS[name]().pair(constant)  # pyright: ignore[reportArgumentType] (a backend may be a function)
        for who, act in zip(("ours", "upstream"), acts, strict=True):
            act()
            rows[f"{name}, {who}"] = fastest(lambda act=act: [act() for _ in range(100)]) / 100
    return rows


def lora() -> dict[str, float]:
    """A forward of the tiny UNet, and the same with the calls of torch that LoRAs make written flat."""

    def ready(count: int, *, fused: bool = False, is_flat: bool = False) -> Act:
        workload = forward_of("unet-sd1", "unet/sd1")
        model = workload.build()
        inject_several(model, count, fused=fused)
        for adapter in [module for module in model.modules() if isinstance(module, LoraAdapter)] if is_flat else ():
            adapter.__dict__["forward"] = _flat(adapter)
        return torch.no_grad()(workload.port(model))

    acts = {"base": ready(0)}
    for count in (1, 4):
        for fused in (False, True):
            name = f"{count} LoRA{'s' * (count > 1)}{', fused' * fused}"
            acts[name] = ready(count, fused=fused)
            acts[f"{name}, flat"] = ready(count, fused=fused, is_flat=True)
    rows = dict.fromkeys(acts, float("inf"))
    for _ in range(3):  # in turns, as neighbours come and go
        for name, act in acts.items():
            rows[name] = min(rows[name], fastest(act, turns=TURNS))
    return rows


def _flat(adapter: LoraAdapter) -> Callable[..., Any]:
    target: Any = adapter.target
    fused = next((module for module in adapter if isinstance(module, FusedLoras)), None)
    if fused is None:
        pairs = [(lora.down.weight, lora.up.weight) for lora in adapter.loras.values()]

        def one_by_one(x: torch.Tensor) -> torch.Tensor:
            y = functional.linear(x, target.weight, target.bias)
            for down, up in pairs:
                y = y + functional.linear(functional.linear(x, down), up)
            return y

        return one_by_one
    down, up = (
        torch.cat([getattr(lora, part).weight for lora in fused.loras], dim) for part, dim in (("down", 0), ("up", 1))
    )
    down, up = down.t(), up.t()

    def together(x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, target.weight, target.bias)
        y.view(-1, up.shape[1]).addmm_(torch.mm(x.reshape(-1, down.shape[0]), down), up)
        return y

    return together


PROFILES = {act.__name__: act for act in (swap, inject, eject, load, compiled, lora)}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PROFILES]
    if unknown or not names:
        print(f"Choose from {', '.join(PROFILES)}.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name in names:
        rows = PROFILES[name]()
        print(f"{name}, milliseconds")
        for row, milliseconds in rows.items():
            print(f"  {row:<36} {milliseconds:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
