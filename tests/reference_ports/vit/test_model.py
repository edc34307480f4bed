import pytest
import torch

import refiners.fluxion.layers as fl
from reference_ports.blocks.images import GridPositions
from reference_ports.blocks.pooling import Pooler
from reference_ports.vit.model import MaskedViTEncoder, MaskToken, ViT, ViTArguments, ViTEncoder
from refiners.errors import InputError

NUMBERS: ViTArguments = {
    "embedding_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "feedforward_dim": 24,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def test_the_pooler_has_the_width_that_is_asked_for(pixels: torch.Tensor) -> None:
    assert [x.shape for x in ViT(**NUMBERS)(pixels)] == [(2, 17, 16), (2, 16)]
    assert [x.shape for x in ViT(5, **NUMBERS)(pixels)] == [(2, 17, 16), (2, 5)]


def test_the_pooler_reads_the_class_token_after_the_norm(pixels: torch.Tensor) -> None:
    model = ViT(pooler_activation=fl.Identity, **NUMBERS)
    states, pooled = model(pixels)
    assert torch.equal(pooled, model.ensure_find(Pooler).ensure_find(fl.Linear)(states[:, 0]))


def test_hidden_states_come_before_the_norm(pixels: torch.Tensor) -> None:
    encoder = ViTEncoder(**NUMBERS)
    states = encoder.with_hidden_states()(pixels)
    assert len(states) == 4
    assert torch.equal(states[1], encoder[:2](pixels))
    assert torch.equal(encoder[-1](states[-1]), encoder(pixels))


def test_a_picture_of_another_size_is_refused_unless_positions_are_interpolated() -> None:
    pixels = torch.randn(1, 3, 48, 40)
    encoder = ViTEncoder(**NUMBERS)
    with pytest.raises(fl.ChainError, match="48x40 pixels and the model 32x32") as caught:
        encoder(pixels)
    assert isinstance(caught.value.__cause__, InputError)
    encoder.ensure_find(GridPositions).interpolate = True
    assert encoder(pixels).shape == (1, 1 + 6 * 5, 16)


def test_pixels_are_cast_to_the_dtype_of_the_weights() -> None:
    model = ViT(**NUMBERS, dtype=torch.bfloat16)
    states, pooled = model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert (states.dtype, pooled.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_masked_patch_has_no_influence_for_one_forward(pixels: torch.Tensor) -> None:
    encoder = MaskedViTEncoder(**NUMBERS)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 0] = True
    changed = pixels.clone()
    changed[:, :, :8, :8] += 1
    outputs: list[torch.Tensor] = []
    for picture in (pixels, changed):
        encoder.set_masked_patches(masked)
        outputs.append(encoder(picture))
    assert torch.equal(*outputs)
    assert not torch.equal(encoder(pixels), encoder(changed))


def test_a_patch_that_no_token_may_attend_to_does_not_reach_the_others(pixels: torch.Tensor) -> None:
    encoder = ViTEncoder(**NUMBERS)
    mask = torch.ones(2, 17)
    mask[:, 1] = 0
    changed = pixels.clone()
    changed[:, :, :8, :8] += 1
    outputs: list[torch.Tensor] = []
    for picture in (pixels, changed):
        encoder.set_attention_mask(mask)
        outputs.append(encoder(picture))
    assert torch.equal(outputs[0][:, 2:], outputs[1][:, 2:])
    assert not torch.equal(outputs[0][:, 1], outputs[1][:, 1])


def test_a_mask_of_patches_of_another_shape_is_refused(pixels: torch.Tensor) -> None:
    encoder = MaskedViTEncoder(**NUMBERS)
    encoder.set_masked_patches(torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(fl.ChainError, match=r"the shape \(1, 16\). Give one value a patch"):
        encoder(pixels)


def test_the_mask_token_replaces_exactly_what_is_masked() -> None:
    token = MaskToken(4)
    torch.nn.init.normal_(token.weight)
    patches = torch.randn(1, 3, 4)
    output = token(patches, torch.tensor([[0, 1, 0]]))
    assert torch.equal(output[0, 1], token.weight)
    assert torch.equal(output[0, ::2], patches[0, ::2])
    assert token(patches, None) is patches


@pytest.mark.parametrize("kind", [ViTEncoder, ViT, MaskedViTEncoder])
def test_models_are_built_in_one_place_and_dtype(kind: type[ViTEncoder]) -> None:
    model = kind(**NUMBERS, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


def test_they_compile_without_a_graph_break() -> None:
    model = ViT(**NUMBERS, interpolate_positions=True).eval()
    masked = MaskedViTEncoder(**NUMBERS).eval()
    for encoder, inputs in ((model, torch.randn(1, 3, 16, 24)), (masked, torch.randn(1, 3, 32, 32))):
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")
        for output, expected in zip(compiled(inputs), encoder(inputs), strict=True):
            assert torch.equal(output, expected)
