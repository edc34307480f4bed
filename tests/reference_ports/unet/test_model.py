from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports import unet
from reference_ports.unet import CrossAttention, CrossAttention2d, StoreSkip, TimedResidualBlock, UNet, UpBlocks
from reference_ports.unet.stages import ConcatenateSkip
from refiners.errors import ContextError, ConversionError, InputError
from refiners.fluxion.adapters import inject_checkpoints, inject_loras
from refiners.fluxion.selectors import select

CONFIG = {
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 10,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    **CONFIG,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 14 + 6 * 6,
}


@pytest.fixture
def model() -> UNet:
    return unet.from_config(CONFIG).eval()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 4, 8, 6)


@pytest.fixture
def text() -> Tensor:
    return torch.randn(2, 5, 10)


def predict(model: UNet, latents: Tensor, text: Tensor, timestep: float | Tensor = 981) -> Tensor:
    model.set_timestep(timestep)
    model.set_clip_text_embedding(text)
    with torch.no_grad():
        return model(latents)


# --- the tree ----------------------------------------------------------------------------------------------------


def test_one_line_finds_the_cross_attentions_of_the_up_blocks(model: UNet) -> None:
    found = select(model).of(CrossAttention).inside(UpBlocks).expect(2)
    assert [path.split(".")[:2] for path in found.paths] == [["UpBlocks", "UpBlock_2"]] * 2


def test_every_skip_that_is_stored_is_taken_once() -> None:
    for build in (unet.SD1UNet, unet.SD2UNet, unet.SDXLUNet, unet.SDXLRefinerUNet):
        model = build(device="meta")
        count = select(model).of(StoreSkip).count
        assert count == select(model).of(ConcatenateSkip).count
        assert count == (9 if build is unet.SDXLUNet else 12)


def test_no_skip_and_no_size_is_left_behind(model: UNet, latents: Tensor, text: Tensor) -> None:
    seen: list[tuple[int, int]] = []

    def look(*_: object) -> None:
        contexts = model.provider.contexts
        seen.append((len(contexts["unet"]["residuals"]), len(contexts["sampling"]["shapes"])))

    model.ensure_find(UpBlocks).register_forward_hook(look)
    predict(model, latents, text)
    assert seen == [(0, 0)]


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1), (1, 9)])
def test_any_size_comes_back(model: UNet, text: Tensor, size: tuple[int, int]) -> None:
    assert predict(model, torch.randn(2, 4, *size), text).shape == (2, 4, *size)


@pytest.mark.parametrize("build", [unet.SD1UNet, unet.SD2UNet, unet.SDXLUNet, unet.SDXLRefinerUNet])
def test_models_are_built_in_one_place_and_dtype(build: Callable[..., UNet]) -> None:
    model = build(in_channels=9, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    assert model.in_channels == 9


# --- knobs -------------------------------------------------------------------------------------------------------


def test_a_timestep_is_the_same_in_every_form(model: UNet, latents: Tensor, text: Tensor) -> None:
    forms = [981, 981.0, torch.tensor(981), torch.tensor([981]), torch.tensor([981.0, 981.0], dtype=torch.float64)]
    first, *others = [predict(model, latents, text, form) for form in forms]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, predict(model, latents, text, 980))


def test_a_timestep_holds_for_one_forward_and_a_text_until_the_next(model: UNet, latents: Tensor, text: Tensor) -> None:
    first = predict(model, latents, text)
    model.set_timestep(981)
    with torch.no_grad():
        assert torch.equal(model(latents), first)
    with pytest.raises(fl.ChainError, match=r"set_timestep\(\) first") as caught:
        model(latents)
    assert isinstance(caught.value.__cause__, ContextError)


def test_a_text_that_was_never_set_is_named(model: UNet, latents: Tensor) -> None:
    model.set_timestep(1)
    with pytest.raises(fl.ChainError, match=r"set_clip_text_embedding\(\) first"):
        model(latents)


def test_a_hidden_word_has_no_influence_until_the_mask_is_taken_off(model: UNet, latents: Tensor, text: Tensor) -> None:
    other = text.clone()
    other[:, 2] += 1
    model.set_text_mask(torch.tensor([[1, 1, 0, 1, 1]] * 2))
    assert torch.equal(predict(model, latents, text), predict(model, latents, other))
    model.set_text_mask(None)
    assert not torch.equal(predict(model, latents, text), predict(model, latents, other))


def test_additional_residuals_hold_for_one_forward(model: UNet, latents: Tensor, text: Tensor) -> None:
    plain = predict(model, latents, text)
    shapes = [(8, 8, 6), (8, 8, 6), (8, 4, 3), (12, 4, 3)]
    model.set_additional_residuals([torch.ones(2, *shape) for shape in shapes], torch.ones(2, 12, 4, 3))
    assert not torch.equal(predict(model, latents, text), plain)
    assert torch.equal(predict(model, latents, text), plain)
    model.set_additional_residuals([torch.zeros(2, *shape) for shape in shapes])
    assert torch.equal(predict(model, latents, text), plain)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 9, 8, 6), (4, 8, 6), (2, 4, 8)])
def test_latents_of_another_shape_are_refused(model: UNet, text: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(fl.ChainError, match=r"this UNet takes \(batch, 4, height, width\)") as caught:
        predict(model, torch.randn(shape), text)
    assert isinstance(caught.value.__cause__, InputError)


@pytest.mark.parametrize("shape", [(2, 5, 768), (5, 10), (10,)])
def test_a_text_of_another_shape_is_refused_when_it_is_set(model: UNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"takes \(batch, sequence_length, 10\)"):
        model.set_clip_text_embedding(torch.randn(shape))


def test_a_model_without_cross_attention_reads_no_text(latents: Tensor) -> None:
    kinds = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    model = unet.from_config({**CONFIG, **kinds, "mid_block_type": None})
    assert torch.equal(predict(model, latents, torch.randn(2, 5, 10)), predict(model, latents, torch.randn(2, 3, 7)))


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_for_other_latents_are_refused(model: UNet, latents: Tensor, texts: int) -> None:
    with pytest.raises(fl.ChainError, match=f"There are 2 latents and {texts} texts"):
        predict(model, latents, torch.randn(texts, 5, 10))


def test_timesteps_for_other_latents_are_refused(model: UNet, latents: Tensor, text: Tensor) -> None:
    with pytest.raises(fl.ChainError, match="There are 3 timesteps and 2 latents"):
        predict(model, latents, text, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"The timestep has the shape \(2, 1\)"):
        model.set_timestep(torch.ones(2, 1))


def test_a_mask_of_another_shape_is_refused(model: UNet) -> None:
    with pytest.raises(InputError, match=r"Give \(batch, sequence_length\)"):
        model.set_text_mask(torch.ones(2, 1, 5))


def test_too_few_residuals_are_refused(model: UNet, latents: Tensor, text: Tensor) -> None:
    model.set_additional_residuals([torch.ones(2, 8, 8, 6)])
    with pytest.raises(fl.ChainError, match="There are 1 additional residuals and 4 skips"):
        predict(model, latents, text)


def test_the_refiners_time_ids_are_refused_by_the_base_model(latents: Tensor, text: Tensor) -> None:
    model = unet.from_config(XL)
    model.set_pooled_text_embedding(torch.randn(2, 14))
    model.set_time_ids(torch.ones(2, 5))
    with pytest.raises(fl.ChainError, match="make 44 numbers, and this UNet takes 50"):
        predict(model, latents, text)


def test_a_knob_of_another_model_is_named_when_it_is_missing(latents: Tensor, text: Tensor) -> None:
    with pytest.raises(fl.ChainError, match=r"set_pooled_text_embedding\(\) first"):
        predict(unet.from_config(XL), latents, text)
    with pytest.raises(fl.ChainError, match=r"set_class_labels\(\) first"):
        predict(unet.from_config({**CONFIG, "num_class_embeds": 3}), latents, text)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ConversionError, match="channels=8 cannot be cut into num_heads=3"):
        unet.from_config({**CONFIG, "attention_head_dim": 3})


# --- training and compilation ------------------------------------------------------------------------------------


def gradients(model: UNet, latents: Tensor, text: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.set_timestep(torch.tensor([1, 2]))
    model.set_clip_text_embedding(text)
    model(latents).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_when_activations_are_computed_again(model: UNet, latents: Tensor, text: Tensor) -> None:
    expected = gradients(model, latents, text)
    assert len(expected) == len(list(model.parameters()))
    checkpoints = inject_checkpoints(select(model).of(TimedResidualBlock, CrossAttention2d).expect(12))
    found = gradients(model, latents, text)
    checkpoints.eject()
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), found.values(), strict=True))


@pytest.mark.parametrize("has_lora", [False, True], ids=["plain", "lora"])
def test_it_compiles_to_one_graph_whatever_the_timestep_and_the_prompt(
    model: UNet, latents: Tensor, text: Tensor, has_lora: bool
) -> None:
    if has_lora:
        inject_loras(select(model).of(fl.Linear).inside(CrossAttention2d), name="style", rank=2)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    expected = [predict(model, latents, text + i, timestep) for i, timestep in enumerate((981, 1, 2.5))]
    model.compile(fullgraph=True, backend=count)
    for i, timestep in enumerate((981, 1, 2.5)):
        assert torch.equal(predict(model, latents, text + i, timestep), expected[i])
    assert len(graphs) == 1
