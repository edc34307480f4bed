"""What is measured of ports and adapters: one row each. A new port or adapter joins every suite by its row here.

A workload is a model at toy size, where calls count and not kernels, and an act: a forward, a denoising step, a step of
training. Ports are those of the cases of `parity_tests`, so what is measured is what is proved to equal upstream, which
runs on the same weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.adapter_rows import ADAPTERS, AdapterRow, attention_projections
from reference_ports import unet
from reference_ports.pipelines.stable_diffusion import StableDiffusion_1
from refiners.fluxion.adapters import inject_loras
from refiners.parity import Case

Act = Callable[[], Any]
Prepare = Callable[[Any], Act]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and what is done with it."""

    name: str
    what: str
    """One line for people."""
    case: Case
    """The parity case that builds both sides."""
    port: Prepare
    """Draws the inputs, and gives what runs the port on them."""
    upstream: Prepare | None = None
    """The same for upstream; None where upstream has no such act."""
    compiled: Callable[[Any], nn.Module] | None = None
    """The part of the port that `torch.compile` is given; None where the act is no forward of a model."""
    gradients: bool = False
    dtype: torch.dtype | None = None
    """Of the weights; the inputs are drawn in it too."""

    def build(self) -> nn.Module:
        """The port, with weights that are drawn anew but always alike."""
        return self._built(self.case.port)

    def build_upstream(self) -> nn.Module:
        """What the port is held against, likewise."""
        return self._built(self.case.upstream)

    def ready(self) -> tuple[nn.Module, Act]:
        """The port and the act."""
        model = self.build()
        return model, self._with_gradients(self.port(model))

    def pair(self, backend: str | None = None) -> tuple[Act, Act]:
        """The act of the port and that of upstream, on the same weights.

        Given a backend, each is compiled whole, as its user would: a function that takes all that upstream's `forward`
        takes. Of the port, it sets the contexts and calls.
        """
        assert self.upstream is not None, f"{self.name} has no upstream."
        upstream, port = self.build_upstream(), self.build()
        port.load_state_dict(self.case.key_map.convert(upstream.state_dict(), port), assign=True)
        acts = self.port(port), self.upstream(upstream)
        if backend is not None:
            acts = tuple(torch.compile(_function(act), backend=backend, fullgraph=True) for act in acts)
        ours, theirs = map(self._with_gradients, acts)
        return ours, theirs

    def _built(self, builder: Callable[[], nn.Module]) -> nn.Module:
        """On torch's default device, with the same weights everywhere; those of published sizes are drawn there."""
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype or dtype)
        try:
            with torch.device(device if self.dtype else "cpu"):
                return builder().train(self.gradients).to(device)
        finally:
            torch.set_default_dtype(dtype)

    def _with_gradients(self, act: Act) -> Act:
        return torch.set_grad_enabled(self.gradients)(act)


def _function(act: Act) -> Act:
    """A plain function, which is what `torch.compile` takes."""
    return lambda: act()


@cache
def case(name: str) -> Case:
    """A case of parity_tests by its id."""
    module = import_module(f"parity_tests.cases.{name.partition('/')[0]}")
    return next(case for case in module.CASES if case.id == name)


def draw(case: Case, dtype: torch.dtype | None = None) -> Mapping[str, Any]:
    """The inputs of a case, drawn on the CPU, on torch's default device."""
    with torch.device("cpu"):
        drawn = case.inputs(torch.Generator().manual_seed(0))
    return {name: placed(value, dtype) for name, value in drawn.items()}


def placed(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.get_default_device(), dtype if value.is_floating_point() else None)


# Forwards of cases


def forward_of(name: str, case_name: str) -> Workload:
    """The forward of a parity case."""
    found = case(case_name)
    return Workload(
        name=name,
        what=f"one forward of {case_name}: {found.summary}",
        case=found,
        port=lambda model: partial(found.run_port, model, draw(found)),
        upstream=lambda model: partial(found.run_upstream, model, draw(found)),
        compiled=lambda model: model,
    )


def encoding() -> Workload:
    found = case("autoencoder/tiny")
    pixels = draw(found)["pixels"]
    return Workload(
        name="autoencoder-encode",
        what="pixels to latents, without drawing them",
        case=found,
        port=lambda model: lambda: model.encode(pixels).mode(),
        upstream=lambda model: lambda: model.encode(pixels).latent_dist.mode(),
        compiled=lambda model: model[0],
    )


def decoding() -> Workload:
    found = case("autoencoder/tiny")
    latents = draw(found)["latents"]
    return Workload(
        name="autoencoder-decode",
        what="latents to pixels",
        case=found,
        port=lambda model: lambda: model.decode(latents),
        upstream=lambda model: lambda: model.decode(latents).sample,
        compiled=lambda model: model[-1],
    )


# A denoising step


def latents_and_text() -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(2, 77, 32, generator=generator)
    return placed(drawn[0]), placed(drawn[1])


def port_step(model: StableDiffusion_1) -> Act:
    latents, text = latents_and_text()
    model.set_inference_steps(10)
    return lambda: model(latents, 3, condition_scale=5.0, clip_text_embedding=text)


def upstream_step(model: Any) -> Act:
    """What the loop of diffusers' pipeline does in one step."""
    latents, text = latents_and_text()
    pipeline = model.pipeline
    pipeline.scheduler.set_timesteps(10)
    timestep = pipeline.scheduler.timesteps[3]

    def step() -> Tensor:
        inputs = pipeline.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        without, given = pipeline.unet(inputs, timestep, encoder_hidden_states=text, return_dict=False)[0].chunk(2)
        prediction = without + 5.0 * (given - without)
        return pipeline.scheduler.step(prediction, timestep, latents, return_dict=False)[0]

    return step


def denoising() -> Workload:
    return Workload(
        name="step-sd1",
        what="one denoising step of Stable Diffusion 1: guidance and solver around the UNet",
        case=case("pipelines/sd1-text"),
        port=port_step,
        upstream=upstream_step,
        compiled=lambda model: model.unet,
    )


# A training step


def training_of(name: str, case_name: str) -> Workload:
    """Forward, backward and a step of plain gradient descent."""
    found = case(case_name)

    def prepare(run: Callable[..., Mapping[str, Tensor]]) -> Prepare:
        def prepare(model: nn.Module) -> Act:
            inputs = draw(found)
            noise = torch.zeros_like(inputs["sample"])
            parameters = [*model.parameters()]

            def train() -> None:
                nn.functional.mse_loss(run(model, inputs)["prediction"], noise).backward()
                # By hand: an optimizer of torch asks about CUDA, so its calls depend on the build.
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.sub_(parameter.grad, alpha=1e-4)
                        parameter.grad = None

            return train

        return prepare

    return Workload(
        name=name,
        what="one training step of the UNet: forward, backward, gradient descent",
        case=found,
        port=prepare(found.run_port),
        upstream=prepare(found.run_upstream),
        gradients=True,
    )


# Adapters


def with_adapter(row: AdapterRow) -> Workload:
    """A forward with the adapter in."""
    base = PORTS[row.host]()

    def prepare(model: nn.Module) -> Act:
        row.inject(model)
        act = base.port(model)

        def forward() -> Any:
            with row.around(model):
                return act()

        return forward

    compiled: Callable[[Any], nn.Module] | None = (lambda model: model) if row.is_compiled else None
    return Workload(name=f"{row.host}+{row.name}", what=row.what, case=base.case, port=prepare, compiled=compiled)


def injecting(row: AdapterRow) -> Workload:
    """An injection and an ejection."""
    return Workload(
        name=f"{row.host}+{row.name}.inject-and-eject",
        what=f"injecting and ejecting: {row.what}",
        case=PORTS[row.host]().case,
        port=lambda model: lambda: row.inject(model)(),
    )


def swapping() -> Workload:
    """Other weights for LoRAs that are in."""

    def prepare(model: nn.Module) -> Act:
        loras = inject_loras(attention_projections(model), name="style", rank=4)
        specs = loras.specs()
        return lambda: loras.swap(specs)

    return Workload(
        name="clip-text+lora.swap", what="other weights for LoRAs that are in", case=case("clip/text-l"), port=prepare
    )


PORTS: dict[str, Callable[[], Workload]] = {
    "bert": lambda: forward_of("bert", "bert/tiny"),
    "clip-text": lambda: forward_of("clip-text", "clip/text-l"),
    "clip-image": lambda: forward_of("clip-image", "clip/image-l"),
    "vit": lambda: forward_of("vit", "vit/tiny"),
    "unet-sd1": lambda: forward_of("unet-sd1", "unet/sd1"),
    "unet-sdxl": lambda: forward_of("unet-sdxl", "unet/sdxl"),
    "autoencoder-encode": encoding,
    "autoencoder-decode": decoding,
    "step-sd1": denoising,
    "train-sd1": lambda: training_of("train-sd1", "unet/sd1"),
}
ADAPTED: dict[str, Callable[[], Workload]] = {
    f"{row.host}+{row.name}{suffix}": partial(make, row)
    for row in ADAPTERS.values()
    for suffix, make in (("", with_adapter), (".inject-and-eject", injecting))
}
WORKLOADS = {**PORTS, **ADAPTED, "clip-text+lora.swap": swapping}


# Published sizes, for a GPU


def full_size(name: str, config: Mapping[str, Any], inputs: Callable[[torch.Generator], Any]) -> Workload:
    """A UNet of published size in bfloat16, on latents of 64 × 64."""
    found = replace(
        case("unet/sd1"),
        upstream=lambda: UNet2DConditionModel(**config),
        port=lambda: unet.from_config(config),
        key_map=unet.key_map_for(config),
        inputs=inputs,
    )
    dtype = torch.bfloat16
    return Workload(
        name=name,
        what=f"one forward of {name}, bfloat16, latents of 64 × 64, batch 2",
        case=found,
        port=lambda model: partial(found.run_port, model, draw(found, dtype)),
        upstream=lambda model: partial(found.run_upstream, model, draw(found, dtype)),
        dtype=dtype,
    )


def published_sd1() -> Workload:
    cases = import_module("parity_tests.cases.unet")
    inputs = partial(cases.latents, height=64, width=64, words=77, text_dim=768)
    return full_size("unet-sd1-published", cases.SD1_SIZE, inputs)


def published_sdxl() -> Workload:
    cases = import_module("parity_tests.cases.unet")

    def inputs(generator: torch.Generator) -> Mapping[str, Any]:
        given = cases.latents(generator, height=64, width=64, words=77, text_dim=2048)
        pooled = torch.randn(2, 1280, generator=generator)
        return {**given, "text_embeds": pooled, "time_ids": torch.full((2, 6), 512.0)}

    return full_size("unet-sdxl-published", cases.XL_SIZE, inputs)


PUBLISHED: dict[str, Callable[[], Workload]] = {
    "unet-sd1-published": published_sd1,
    "unet-sdxl-published": published_sdxl,
}
