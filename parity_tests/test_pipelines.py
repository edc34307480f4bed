"""Whole pipelines beside those of diffusers, on the verified tiny configurations and on rarer options."""

from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from parity_tests.cases.pipelines import MORE
from reference_ports.pipelines import stable_diffusion as port
from refiners.parity import Case, CaseRunner, Lane
from refiners.parity.bits import same_bits
from refiners.parity.inputs import place_inputs
from refiners.parity.lanes import held_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, for what diffusers does
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, for what it will drop
]
RUNS = [(case, lane) for case in MORE for lane in case.lanes]


@pytest.mark.parametrize(("case", "lane"), RUNS, ids=[f"{case.id}-{lane}" for case, lane in RUNS])
def test_every_latent_and_the_picture_have_the_bits_of_upstream(case: Case, lane: str) -> None:
    runner, chosen = CaseRunner(case), Lane(lane)
    with held_equal(chosen, threads=1), torch.no_grad():
        upstream, port, _ = runner.sides(chosen)
        inputs = place_inputs(case.inputs(torch.Generator().manual_seed(0)), chosen.dtype, chosen.device)
        ours, theirs = case.run_upstream(upstream, inputs), case.run_port(port, inputs)
    assert list(theirs) == list(ours)
    assert [name for name, tensor in ours.items() if not same_bits(tensor, theirs[name])] == []


@pytest.mark.parametrize(
    ("model", "upstream"),
    [
        (port.StableDiffusion_1, StableDiffusionPipeline),
        (port.StableDiffusion_1, StableDiffusionImg2ImgPipeline),
        (port.StableDiffusion_2, StableDiffusionInpaintPipeline),
        (port.StableDiffusion_XL, StableDiffusionXLPipeline),
        (port.StableDiffusion_XL_Refiner, StableDiffusionXLImg2ImgPipeline),
    ],
)
def test_guidance_goes_as_far_as_upstream_unless_it_is_said(model: Any, upstream: Any) -> None:
    assert model.default_condition_scale == signature(upstream.__call__).parameters["guidance_scale"].default
