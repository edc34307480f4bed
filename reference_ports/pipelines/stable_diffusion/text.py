"""Text conditioning: what a denoiser reads of a prompt.

Stable Diffusion 1 and 2 read the last states of one CLIP text encoder, normalised. Stable Diffusion XL reads the states
before the last layer of two encoders, side by side and not normalised, and one vector of the second for the whole text.
Clip skip leaves out the last layers of an encoder: an edit of its tree.

Follows: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752); Podell et
al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv:2307.01952). Upstream:
`encode_prompt` of `diffusers.StableDiffusionPipeline` and `StableDiffusionXLPipeline` 0.42.1.

Differs from upstream:
- Clip skip works in Stable Diffusion 1 and 2, where upstream's own fails with transformers 5. As upstream means it, the
  last norm follows the layers that are left.
- A negative prompt that is too long warns as well.
- Prompts have no weights.
"""

import warnings
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.clip import CLIPTextEncoder, CLIPTextModelWithProjection, CLIPTokenizer
from refiners.errors import InputError
from refiners.fluxion.context import Contexts

Prompt = str | Sequence[str]
"""One text, or one for each picture."""


class PromptTooLongWarning(UserWarning):
    """A prompt has more tokens than the text encoder has places: its end was cut off."""


class StatesAndEmbedding(fl.Parallel):
    """The states that were kept on the way, and the vector of the whole text."""


class PenultimateTextEncoder(fl.Chain):
    """CLIP's text model read before its last layers, with the vector that all of its layers make of the whole text.

    It copies the tree of the model and shares its weights.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the states before the last `skipped_layers` layers
        Float[Tensor, "batch projection_dim"], the embedding of each text
    """

    def __init__(self, model: CLIPTextModelWithProjection, skipped_layers: int = 1) -> None:
        self.skipped_layers = skipped_layers
        copy = model.structural_copy()
        # Behind the layers stands the last norm.
        copy.encoder.insert(len(copy.encoder) - 1 - skipped_layers, fl.SetContext("text_conditioning", "states"))
        super().__init__(copy, StatesAndEmbedding(fl.UseContext("text_conditioning", "states"), fl.GetArg(1)))

    def init_context(self) -> Contexts:
        return {"text_conditioning": {"states": None}}


def as_prompts(prompt: Prompt) -> list[str]:
    """The texts of a batch.

    Raises:
        InputError: there are none, or one is no text.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(text, str) for text in prompts):  # pyright: ignore[reportUnnecessaryIsInstance]: users pass None
        raise InputError(f"A prompt is a text, or a list of one text for each picture, got {prompt!r}.")
    return prompts


def negative_prompts(negative_prompt: Prompt | None, num_prompts: int) -> list[str]:
    """One negative prompt for each prompt: a single one counts for all, None is the empty text.

    Raises:
        InputError: there are more or fewer, and not one.
    """
    prompts = as_prompts("" if negative_prompt is None else negative_prompt)
    if len(prompts) not in (1, num_prompts):
        raise InputError(
            f"There are {len(prompts)} negative prompts for {num_prompts} prompts. Give one for each, or one for all."
        )
    return prompts * num_prompts if len(prompts) == 1 else prompts


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], encoder: fl.Chain) -> Int[Tensor, "batch 77"]:
    """The ids of prompts, where their encoder is. Warns of those whose end is cut off."""
    removed = [text for text in map(tokenizer.overflow, prompts) if text]
    if removed:
        warnings.warn(
            f"A prompt may have {tokenizer.max_length} tokens with its two ends. This was cut off: {removed}",
            PromptTooLongWarning,
            stacklevel=3,
        )
    return tokenizer(prompts).ids.to(encoder.device)


def last_states(
    encoder: CLIPTextEncoder, tokenizer: CLIPTokenizer, prompts: Sequence[str], clip_skip: int = 0
) -> Float[Tensor, "batch 77 embedding_dim"]:
    """What Stable Diffusion 1 and 2 read: the last states, normalised, without the last `clip_skip` layers."""
    check_clip_skip(clip_skip, encoder)
    if clip_skip:
        encoder = encoder.structural_copy()
        for _ in range(clip_skip):
            encoder.pop(-2)  # the last layer, in front of the norm
    return encoder(tokenize(tokenizer, prompts, encoder))


def penultimate_states(
    encoder: CLIPTextEncoder, tokenizer: CLIPTokenizer, prompts: Sequence[str], clip_skip: int = 0
) -> Float[Tensor, "batch 77 embedding_dim"]:
    """What Stable Diffusion XL reads of its first encoder: the states before the last `1 + clip_skip` layers."""
    check_clip_skip(clip_skip + 1, encoder)
    return encoder[: -2 - clip_skip](tokenize(tokenizer, prompts, encoder))


def penultimate_states_and_embedding(
    model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, prompts: Sequence[str], clip_skip: int = 0
) -> tuple[Float[Tensor, "batch 77 embedding_dim"], Float[Tensor, "batch projection_dim"]]:
    """What Stable Diffusion XL reads of its second encoder: the same of that one, and its vector of the whole text."""
    check_clip_skip(clip_skip + 1, model.encoder)
    return PenultimateTextEncoder(model, 1 + clip_skip)(tokenize(tokenizer, prompts, model))


def check_clip_skip(skipped_layers: int, encoder: CLIPTextEncoder) -> None:
    """Checks that an encoder has layers left.

    Raises:
        InputError: there are not as many layers.
    """
    if not 0 <= skipped_layers <= encoder.num_layers:
        raise InputError(
            f"The text encoder has {encoder.num_layers} layers: {skipped_layers} of them cannot be skipped. "
            "Choose a smaller clip_skip, 0 or more."
        )
