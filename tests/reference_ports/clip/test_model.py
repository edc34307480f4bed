from functools import partial

import pytest
import torch

import refiners.fluxion.layers as fl
from reference_ports.clip.image import CLIPImageNumbers, ImagePositions
from reference_ports.clip.model import (
    CLIPImageEncoder,
    CLIPImageModel,
    CLIPImageModelWithProjection,
    CLIPTextEncoder,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from reference_ports.clip.text import CLIPTextNumbers, FirstId, HighestId
from reference_ports.clip.whole import CLIP
from refiners.errors import InputError

TEXT: CLIPTextNumbers = {
    "vocabulary_size": 50,
    "embedding_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "feedforward_dim": 24,
    "num_positions": 12,
}
IMAGE: CLIPImageNumbers = {
    "embedding_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "feedforward_dim": 24,
    "image_size": 32,
    "patch_size": 8,
}
IDS = torch.tensor([[40, 7, 9, 49, 49], [40, 8, 49, 0, 0]])


def test_the_end_is_the_highest_id_or_the_first_of_its_kind() -> None:
    assert HighestId()(IDS).tolist() == [3, 2]
    assert FirstId(9)(IDS).tolist() == [2, 0]


def test_the_pooled_state_is_that_of_the_end_of_the_text() -> None:
    states, pooled = CLIPTextModel(**TEXT)(IDS)
    assert torch.equal(pooled, torch.stack((states[0, 3], states[1, 2])))
    states, pooled = CLIPTextModel(partial(FirstId, 9), **TEXT)(IDS)
    assert torch.equal(pooled, torch.stack((states[0, 2], states[1, 0])))


def test_a_projection_gives_the_shared_space() -> None:
    states, embedding = CLIPTextModelWithProjection(6, **TEXT)(IDS)
    assert (states.shape, embedding.shape) == ((2, 5, 16), (2, 6))
    states, embedding = CLIPImageModelWithProjection(6, **IMAGE)(torch.randn(2, 3, 32, 32))
    assert (states.shape, embedding.shape) == ((2, 17, 16), (2, 6))


def test_a_text_does_not_look_ahead() -> None:
    encoder = CLIPTextEncoder(**TEXT)
    changed = IDS.clone()
    changed[:, -1] = 5
    assert torch.equal(encoder(IDS)[:, :-1], encoder(changed)[:, :-1])


def test_clip_skip_is_a_slice() -> None:
    encoder = CLIPTextEncoder(**TEXT)
    states = encoder.with_hidden_states()(IDS)
    assert len(states) == 4
    assert torch.equal(encoder[:-2](IDS), states[-2])
    assert torch.equal(encoder[-1](states[-1]), encoder(IDS))
    skipping = encoder.structural_copy()
    skipping.pop(-2)
    assert torch.equal(skipping(IDS), encoder[-1](states[-2]))
    assert len(encoder) == 5


def test_the_penultimate_state_of_a_picture_is_a_slice() -> None:
    encoder = CLIPImageEncoder(**IMAGE)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder[:-1](pixels), encoder.with_hidden_states()(pixels)[-2])


def test_the_knobs_of_a_model_are_those_of_its_encoder() -> None:
    model = CLIPTextModel(**TEXT)
    plain = model(IDS)[0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    model.set_attention_mask(mask)
    masked = model(IDS)[0]
    assert torch.equal(masked[0], plain[0])
    assert not torch.equal(masked[1], plain[1])
    model.set_position_ids(torch.arange(4, 9)[None])
    assert not torch.equal(model(IDS)[0], plain)
    assert torch.equal(model(IDS)[0], plain)


def test_padding_after_the_text_changes_nothing_before_it() -> None:
    model = CLIPTextModel(**TEXT)
    plain, _ = model(IDS)
    model.set_attention_mask(torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]))
    masked, _ = model(IDS)
    assert [f"{x:.4f}" for x in masked[1, :3].flatten()] == [f"{x:.4f}" for x in plain[1, :3].flatten()]


def test_a_picture_of_another_size_is_refused_unless_positions_are_interpolated() -> None:
    pixels = torch.randn(1, 3, 48, 40)
    encoder = CLIPImageEncoder(**IMAGE)
    with pytest.raises(fl.ChainError, match="48x40 pixels and the model 32x32") as caught:
        encoder(pixels)
    assert isinstance(caught.value.__cause__, InputError)
    encoder.ensure_find(ImagePositions).interpolate = True
    assert encoder(pixels).shape == (1, 1 + 6 * 5, 16)


def test_interpolation_leaves_the_own_size_as_it_is() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    encoder = CLIPImageEncoder(**IMAGE)
    plain = encoder(pixels)
    encoder.ensure_find(ImagePositions).interpolate = True
    assert torch.equal(encoder(pixels), plain)


def test_pixels_are_cast_to_the_dtype_of_the_weights() -> None:
    model = CLIPImageModel(**IMAGE, dtype=torch.bfloat16)
    states, pooled = model(torch.randn(1, 3, 32, 32))
    assert (states.dtype, pooled.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_models_are_built_in_one_place_and_dtype(kind: type[CLIPTextModel]) -> None:
    model = kind(**TEXT, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    assert model(IDS.to("meta"))[0].shape == (2, 5, 16)


@pytest.mark.parametrize("kind", [CLIPImageModel, CLIPImageModelWithProjection])
def test_image_models_are_built_in_one_place_and_dtype(kind: type[CLIPImageModel]) -> None:
    model = kind(**IMAGE, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    assert model(torch.empty(1, 3, 32, 32, device="meta"))[0].shape == (1, 17, 16)


def test_the_whole_compares_each_text_with_each_picture() -> None:
    text, image = CLIPTextModelWithProjection(6, **TEXT), CLIPImageModelWithProjection(6, **IMAGE)
    model = CLIP(text, image)
    pixels = torch.randn(3, 3, 32, 32)
    logits = model(IDS, pixels)
    assert logits.shape == (2, 3)
    assert model.text is text
    cosines = torch.cosine_similarity(text(IDS)[1][:, None], image(pixels)[1][None], dim=-1)
    assert [f"{x:.3f}" for x in logits.flatten()] == [f"{x:.3f}" for x in (cosines / 0.07).flatten()]


def test_they_compile_without_a_graph_break() -> None:
    text = CLIPTextModelWithProjection(6, **TEXT).eval()
    image = CLIPImageModelWithProjection(6, **IMAGE, interpolate_positions=True).eval()
    for model, inputs in ((text, IDS), (image, torch.randn(1, 3, 16, 24))):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for output, expected in zip(compiled(inputs), model(inputs), strict=True):
            assert torch.equal(output, expected)


def test_a_function_that_sets_the_mask_and_calls_is_one_graph() -> None:
    model = CLIPTextModelWithProjection(6, **TEXT).eval()
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model.set_attention_mask(mask)
        return model(ids)

    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    for output, expected in zip(compiled(IDS, mask), encode(IDS, mask), strict=True):
        assert torch.equal(output, expected)
