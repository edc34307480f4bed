"""Single files beside diffusers' own converters: the same tensors under the same keys, and back again.

The single files are made by our key maps backwards. A name that diffusers does not know, or takes for another weight,
shows up in what diffusers makes of them.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from parity_tests import tiny_pipelines
from reference_ports import BUNDLES, PORTS
from reference_ports.clip.single_file import OPEN_CLIP_PROJECTION_KEYS, OPEN_CLIP_TEXT_KEYS
from reference_ports.unet.single_file import single_file_keys as unet_keys
from refiners.conversion import (
    KeyMap,
    OpenedModel,
    Part,
    convert_directory,
    convert_file,
    open_directory,
    write_state_dict,
)
from refiners.parity.weights import fill_informative, generator_for

UPSCALER: dict[str, Any] = {
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}
UNCLIP: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2048,
}
ODD: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 11,
    "norm_num_groups": 8,
}


def published() -> dict[str, Part]:
    """The parts of all bundles, by `bundle/part`; parts that several bundles share stand there once."""
    parts: dict[str, Part] = {}
    for bundle in BUNDLES().values():
        parts |= {f"{bundle.name}/{part.name}": part for part in bundle.parts if part not in parts.values()}
    return parts


def build(part: Part, config: Mapping[str, Any]) -> nn.Module:
    """The upstream model of a part."""
    if part.name == "unet":
        return UNet2DConditionModel.from_config(dict(config))
    if part.name == "autoencoder":
        return AutoencoderKL.from_config(dict(config))
    kind = CLIPTextModel if part.name == "text_encoder" else CLIPTextModelWithProjection
    return kind(CLIPTextConfig(**config))


def made_by_diffusers(part: Part, prefix: str, model: nn.Module, single: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a part of a single file."""
    weights = {prefix + key: tensor for key, tensor in single.items()}
    if part.name == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(weights, model.config)
    if part.name == "autoencoder":
        return single_file_utils.convert_ldm_vae_checkpoint(weights, model.config)
    if ".model." in prefix:
        converted = single_file_utils.convert_open_clip_checkpoint(model, weights, prefix=prefix)
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(weights)
    wrapped = hasattr(model, "text_model")
    return {key if wrapped else key.removeprefix("text_model."): tensor for key, tensor in converted.items()}


def keys_of(part: Part, config: Mapping[str, Any]) -> KeyMap:
    assert part.single_file is not None
    return part.single_file(config)


def assert_same(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (made[key].shape, made[key].dtype) == (tensor.shape, tensor.dtype), key
        assert tensor.is_meta or torch.equal(made[key], tensor), key


@pytest.mark.parametrize("name", published())
def test_published_sizes_have_the_keys_of_the_ports_and_those_that_diffusers_reads(name: str) -> None:
    part = published()[name]
    with torch.device("meta"):
        model, port = build(part, part.config), part.build(part.config)
    part.keys(part.config).check_shapes(model, port)
    weights = model.state_dict()
    keys = keys_of(part, part.config)
    single = keys.invert(weights)
    for prefix in part.prefixes:
        made = made_by_diffusers(part, prefix, model, single)
        assert_same(made, weights)
        # Renamed tensors stay the objects they are: here a swap of two weights of one shape shows.
        assert part.name != "unet" or all(made[key] is weights[key] for key in weights)
    assert_same(keys.convert(single, weights), weights)


@pytest.mark.parametrize("config", [UPSCALER, UNCLIP, ODD], ids=["upscaler", "unclip", "eleven layers"])
def test_other_unets_have_the_keys_that_diffusers_reads(config: Mapping[str, Any]) -> None:
    with torch.device("meta"):
        weights = (model := UNet2DConditionModel(**config)).state_dict()
    single = unet_keys(config).invert(weights)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in single.items()}
    made = single_file_utils.convert_ldm_unet_checkpoint(prefixed, model.config)
    assert made.keys() == weights.keys()
    assert all(made[key] is weights[key] for key in weights)


@pytest.mark.parametrize(
    ("keys", "build"),
    [(OPEN_CLIP_TEXT_KEYS, CLIPTextModel), (OPEN_CLIP_PROJECTION_KEYS, CLIPTextModelWithProjection)],
    ids=["text", "projection"],
)
def test_open_clip_s_own_keys_are_read_to_the_bit(keys: KeyMap, build: Callable[[Any], nn.Module]) -> None:
    """The fused projections are cut and the last one is turned, which names alone do not show."""
    model = build(CLIPTextConfig(**{**tiny_pipelines.TEXT, "attn_implementation": "eager"}))
    fill_informative(model, generator_for(0, "open clip"))
    own = keys.invert(model.state_dict())
    fused = own["transformer.resblocks.0.attn.in_proj_weight"]
    width = tiny_pipelines.TEXT["hidden_size"]
    assert fused.shape == (3 * width, width)
    made = single_file_utils.convert_open_clip_checkpoint(model, {f"x.{key}": t for key, t in own.items()}, prefix="x.")
    wrapped = hasattr(model, "text_model")
    assert_same({key if wrapped else key.removeprefix("text_model."): t for key, t in made.items()}, model.state_dict())
    more = {"logit_scale": torch.ones(()), "visual.proj": torch.ones(2), "attn_mask": torch.ones(2, 2)}
    assert_same(keys.convert({**own, **more}, model.state_dict()), model.state_dict())


def test_the_last_layer_of_sd_2_s_text_encoder_has_no_place() -> None:
    """The file has 24 layers and a projection, SD 2 uses 23 and none."""
    part = next(part for part in BUNDLES()["sd21"].parts if part.name == "text_encoder")
    with torch.device("meta"):
        model = build(part, part.config)
        whole = CLIPTextModelWithProjection(
            CLIPTextConfig(**{**part.config, "num_hidden_layers": 24, "projection_dim": 1024})
        )
    single = {**OPEN_CLIP_PROJECTION_KEYS.invert(whole.state_dict()), "logit_scale": torch.ones((), device="meta")}
    assert len(single) == 24 * 12 + 6
    made = made_by_diffusers(part, "cond_stage_model.model.", model, single)
    assert_same(made, model.state_dict())
    assert_same(keys_of(part, part.config).convert(single, model.state_dict()), made)


def test_open_clip_s_own_file_is_converted_for_the_port(tmp_path: Path) -> None:
    config = {**tiny_pipelines.TEXT, "hidden_act": "gelu"}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    fill_informative(model, generator_for(0, "open clip"))
    own = OPEN_CLIP_PROJECTION_KEYS.invert(model.state_dict())
    write_state_dict(tmp_path / "own.safetensors", {**own, "visual.proj": torch.ones(2), "logit_scale": torch.ones(())})
    write_state_dict(tmp_path / "published.safetensors", model.state_dict())
    numbers = {key: value for key, value in config.items() if key != "attn_implementation"}
    for name in ("clip-text-h", "clip-text"):
        port = PORTS()[name]
        for layout in ("own", "published"):
            convert_file(port, tmp_path / f"{layout}.safetensors", tmp_path / f"{name} {layout}", numbers)
        assert (tmp_path / f"{name} own").read_bytes() == (tmp_path / f"{name} published").read_bytes()


PIPELINES: Mapping[str, type[DiffusionPipeline]] = {
    "sd1": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sdxl-refiner": StableDiffusionXLImg2ImgPipeline,
}
KIND_OF = {"sd1": "sd15", "sd2": "sd21"}


@cache
def saved(kind: str, root: Path) -> tuple[Path, DiffusionPipeline]:
    """A tiny pipeline with informative weights, and the folder that diffusers saves it to."""
    pipeline = tiny_pipelines.KINDS[kind]()
    if kind == "sdxl":
        # Of another width than the first: diffusers tells the two text encoders apart by that.
        config = {**tiny_pipelines.TEXT, "hidden_size": 24, "hidden_act": "gelu"}
        pipeline.register_modules(text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config)))
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            fill_informative(part, generator_for(0, f"{kind} {name}"))
            part.save_pretrained(root / kind / name)
    pipeline.scheduler.save_pretrained(root / kind / "scheduler")
    pipeline.save_config(root / kind)
    return root / kind, pipeline


def prefix_of(part: Part, kind: str) -> str:
    """What the keys of a part begin with in a single file of this kind."""
    sdxl = [prefix for prefix in part.prefixes if prefix.startswith("conditioner.")]
    if not sdxl or not kind.startswith("sdxl"):
        return part.prefixes[0]
    return sdxl[-1] if kind == "sdxl-refiner" else sdxl[0]


def single_file_of(model: OpenedModel, path: Path, oddities: bool = False) -> Path:
    weights: dict[str, Tensor] = {}
    for opened in model.parts.values():
        part = opened.part
        own = part.keys(opened.config).invert(opened.state_dict())
        prefix = prefix_of(part, model.kind)
        weights |= {prefix + key: tensor for key, tensor in keys_of(part, opened.config).invert(own).items()}
    if oddities:
        weights |= odd(weights, model.kind)
    write_state_dict(path, weights)
    return path


def odd(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What tools that train and merge leave in single files, or write otherwise, and diffusers reads all the same."""
    places = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    if kind == "sdxl":
        places = "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids"
    changed = {places: torch.arange(77).flip(0)[None].half()}  # such as half precision makes of larger numbers
    for key, weight in weights.items():
        if key.startswith("model.diffusion_model."):
            changed["model_ema." + key.removeprefix("model.").replace(".", "")] = weight * 2
        elif ".mid.attn_1." in key and weight.ndim == 4:
            changed[key] = weight.flatten(1)
    numbers = {"model_ema.decay": 0.999, "global_step": 7.0, "alphas_cumprod": 0.5}
    return {
        **changed,
        **{key: torch.tensor(number) for key, number in numbers.items()},
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.mark.parametrize(("kind", "oddities"), [*((kind, False) for kind in PIPELINES), ("sd1", True), ("sdxl", True)])
def test_a_single_file_gives_the_ports_the_weights_that_it_gives_diffusers(
    kind: str, oddities: bool, root: Path, tmp_path: Path
) -> None:
    folder, pipeline = saved(kind, root)
    model = open_directory(folder, BUNDLES())
    path = single_file_of(model, tmp_path / "model.safetensors", oddities)
    opened = open_directory(path, BUNDLES(), KIND_OF.get(kind, kind), configs=folder)
    ready = {name: part for name, part in pipeline.components.items() if not isinstance(part, nn.Module)}
    loaded = PIPELINES[kind].from_single_file(str(path), config=str(folder), local_files_only=True, **ready)
    for name, part in opened.parts.items():
        upstream = getattr(loaded, part.part.folder)
        assert_same(upstream.state_dict(), getattr(pipeline, part.part.folder).state_dict())
        assert_same(part.state_dict(), model.parts[name].state_dict())
        assert_same(part.part.keys(part.config).convert(upstream.state_dict(), part.state_dict()), part.state_dict())


def test_folder_and_single_file_convert_to_the_same_files(root: Path, tmp_path: Path) -> None:
    folder, _ = saved("sdxl", root)
    path = single_file_of(open_directory(folder, BUNDLES()), tmp_path / "model.safetensors")
    for source, target in ((folder, "one"), (path, "other")):
        convert_directory(source, tmp_path / target, BUNDLES(), configs=folder)
    files = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
