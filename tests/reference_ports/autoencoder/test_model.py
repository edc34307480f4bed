"""Autoencoders: what they take, what they refuse, and their two ways to save memory."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.autoencoder import (
    Autoencoder,
    AutoencoderKL,
    AutoencoderTiny,
    LatentScaling,
    PointPosterior,
    Posterior,
    RampTilingAdapter,
    SlicingAdapter,
    TilingAdapter,
)
from reference_ports.autoencoder.model import MiddleBlock, PixelAttention
from reference_ports.blocks.residual_block import ResidualBlock
from refiners.errors import AdapterError, ChainError, ConversionError, InputError
from refiners.fluxion.adapters import inject_checkpoints, inject_loras
from refiners.fluxion.selectors import select


def small(**numbers: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{"channels": (8, 16), "num_layers": 1, "num_groups": 4, "tile_size": 8, **numbers})


def tiny(**numbers: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    sizes = {"encoder_width": 8, "decoder_width": 8, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}
    return AutoencoderTiny(**{**sizes, **numbers})


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


BOTH = pytest.mark.parametrize("build", [small, tiny])


@BOTH
def test_called_it_encodes_and_decodes(build: Any) -> None:
    model, x = build(), pixels(2, 3, 12, 20)
    latents = model.encode(x).mode()
    assert latents.shape == (2, 4, 6, 10)
    if isinstance(model, AutoencoderTiny):
        latents = model.ThroughBytes(latents)
    assert torch.equal(model(x), model.decode(latents))


@BOTH
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 8, 8, 3), (8, 8)])
def test_pictures_of_other_axes_are_refused(build: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"encode\(\) takes pixels of the axes \(batch, 3, height, width\)"):
        build().encode(torch.zeros(shape))


@BOTH
def test_latents_of_other_channels_are_refused(build: Any) -> None:
    with pytest.raises(InputError, match=r"decode\(\) takes latents of the axes \(batch, 4, height, width\)"):
        build().decode(torch.zeros(1, 16, 8, 8))


def test_a_picture_that_cannot_be_halved_as_often_shows_where() -> None:
    with pytest.raises(ChainError, match=r">>> Conv2d.*Downsample"):
        small(channels=(8, 8, 8, 8, 8)).encode(torch.zeros(1, 3, 4, 4))


def test_a_sample_is_drawn_from_the_generators() -> None:
    posterior = Posterior(pixels(2, 8, 3, 3))
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    sample = posterior.sample([first, second])
    alone = Posterior(pixels(2, 8, 3, 3)[1:]).sample(torch.Generator().manual_seed(2))
    assert torch.equal(sample[1:], alone)
    assert not torch.equal(sample, posterior.mode())
    with pytest.raises(InputError, match="3 generators for a batch of 2"):
        posterior.sample([first] * 3)


def test_variances_are_held_within_bounds() -> None:
    moments = torch.tensor([0.0, 99.0]).view(1, 2, 1, 1)
    assert Posterior(moments).log_variance.item() == 20
    assert Posterior(-moments).log_variance.item() == -30


def test_latents_that_are_certain_draw_nothing() -> None:
    latents = pixels(1, 4, 2, 2)
    posterior = PointPosterior(latents)
    state = torch.get_rng_state()
    assert posterior.sample() is posterior.mode() is posterior.mean is latents
    assert torch.equal(torch.get_rng_state(), state)
    assert posterior.standard_deviation.unique().tolist() == [0]


@pytest.mark.parametrize(
    "scaling",
    [LatentScaling(0.5), LatentScaling(0.5, shift=0.25), LatentScaling(0.5, None, (0.5, 1, 2, 4), (1, 2, 4, 8))],
)
def test_unscaling_undoes_scaling(scaling: LatentScaling) -> None:
    model, latents = small(scaling=scaling), torch.arange(16.0).view(1, 4, 2, 2)
    assert model.scaling_factor == 0.5
    assert model.shift_factor == scaling.shift
    assert not torch.equal(model.scale(latents), latents)
    assert torch.equal(model.unscale(model.scale(latents)), latents)


def kinds(model: Autoencoder) -> list[str]:
    """The adapters from the outside in, those of the encoder first."""
    adapters = (SlicingAdapter, TilingAdapter)
    return [type(m).__name__ for m, _ in model.walk(lambda m, _: isinstance(m, adapters), recurse=True)]


@BOTH
@pytest.mark.parametrize("order", [("slicing", "tiling"), ("tiling", "slicing")])
def test_slicing_stands_outside_of_tiling_whatever_was_set_first(build: Any, order: tuple[str, str]) -> None:
    model = build()
    before, keys = repr(model), list(model.state_dict())
    for mode in (*order, *order):
        getattr(model, f"set_{mode}")()
    tiling = "RampTilingAdapter" if build is tiny else "TilingAdapter"
    assert kinds(model) == ["SlicingAdapter", tiling] * 2
    model.set_slicing(False)
    assert kinds(model) == [tiling] * 2
    model.set_tiling(False)
    model.set_tiling(False)
    assert repr(model) == before
    assert list(model.state_dict()) == keys


@BOTH
def test_pieces_give_pictures_of_the_same_shape(build: Any) -> None:
    model, x = build(), pixels(2, 3, 12, 36)
    if isinstance(model, AutoencoderTiny):
        model.tile_size, model.tile_scale = 32, 2
    latents = model.encode(x).mode()
    model.set_slicing()
    assert torch.equal(model.encode(x).mode(), torch.cat([model.encode(one).mode() for one in x.split(1)]))
    model.set_tiling()
    assert model.encode(x).mode().shape == latents.shape
    assert model(x).shape == model.decode(latents).shape == x.shape


def test_what_is_no_larger_than_a_tile_is_run_whole() -> None:
    model, x = small(), pixels(2, 3, 8, 8)
    expected = model(x)
    model.set_tiling()
    assert torch.equal(model(x), expected)
    assert not torch.equal(model(pixels(2, 3, 8, 12)), small()(pixels(2, 3, 8, 12)))


def test_tiles_hold_other_adapters_too() -> None:
    model, x = small(), pixels(1, 3, 12, 12)
    model.set_tiling()
    expected = model(x)
    loras = inject_loras(select(model).of(fl.Conv2d).inside(MiddleBlock), name="style", rank=2)
    assert torch.equal(model(x), expected)
    loras.eject()
    checkpoints = inject_checkpoints(select(model).of(ResidualBlock, PixelAttention))
    assert torch.equal(model(x), expected)
    checkpoints.eject()


def test_gradients_are_the_same_with_checkpoints() -> None:
    model, x = small(), pixels(2, 3, 12, 20)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), [*model.parameters()], allow_unused=True))

    expected = gradients()
    inject_checkpoints(select(model).of(ResidualBlock, PixelAttention))
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True) if a is not None)


@BOTH
def test_copies_have_sides_of_their_own(build: Any) -> None:
    model, x = build(), pixels(1, 3, 8, 8)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model)), model.structural_copy()):
        assert copied.encoder is copied[0]
        assert copied.encoder is not model.encoder
        assert torch.equal(copied(x), model(x))
        copied.set_tiling()
        assert kinds(model) == []


def test_a_structural_copy_with_tiles_is_refused() -> None:
    model = small()
    model.set_tiling()
    with pytest.raises(AdapterError, match="eject them first"):
        model.structural_copy()


def test_half_precision_bytes_go_on_in_it() -> None:
    model, x = tiny().to(dtype=torch.bfloat16), pixels(1, 3, 8, 8).to(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16


def test_a_tiny_autoencoder_without_sizes_is_refused() -> None:
    with pytest.raises(ConversionError, match="at least one size"):
        tiny(encoder_blocks=())


def test_ramps_rise_over_the_overlap() -> None:
    model = tiny()
    model.tile_size, model.tile_scale = 64, 8
    model.set_tiling()
    assert isinstance(adapter := model[0], RampTilingAdapter)
    assert (adapter.out_tile_size, adapter.scale) == (8, (1, 8))


@BOTH
def test_it_compiles_to_one_graph(build: Any) -> None:
    model, x = build().eval(), pixels(1, 3, 8, 8)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    torch.compiler.reset()
