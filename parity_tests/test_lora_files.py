"""LoRA files of diffusers and peft beside ours: read here, written there, and the other way round.

Whole pipelines with both text encoders, and text encoders through peft. Files are compared byte by byte, what is
computed with them bit by bit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel, CLIPTextConfig, CLIPTextModel

import refiners.fluxion.layers as fl
from parity_tests import tiny_pipelines
from parity_tests.cases import bert as bert_cases
from reference_ports import bert, clip
from reference_ports.pipelines.stable_diffusion import LatentDiffusionModel, from_directory, text_to_image
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraFile, inject_tuning, read_loras, write_loras
from refiners.errors import ConversionError
from refiners.fluxion.adapters import inject_loras
from refiners.parity.bits import same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, for what diffusers does
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, for what it will drop
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of peft, for weights it cannot look up offline
]

KINDS = ("sd1", "sdxl")
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "linear_1", "conv"]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ENCODERS = ("text_encoder", "text_encoder_2")
CALL = {"num_inference_steps": 2, "height": 16, "width": 16}


def randomise(model: nn.Module, seed: int) -> None:
    """Draws all weights of adapters anew, since upstream's begin with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_", "ia3_", "ln_tuning")):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def layers_of(pipeline: DiffusionPipeline, unet: LoraConfig, encoder: LoraConfig) -> dict[str, dict[str, Tensor]]:
    """Injects LoRAs into all parts of a pipeline, and gives their weights as `save_lora_weights` takes them."""
    layers: dict[str, dict[str, Tensor]] = {}
    for number, part in enumerate(("unet", *ENCODERS)):
        model = getattr(pipeline, part, None)
        if model is not None:
            model.add_adapter(unet if part == "unet" else encoder, adapter_name="default")
            randomise(model, number)
            layers[part] = get_peft_model_state_dict(model)
    return layers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of tiny models, one thread is faster than several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as diffusers writes them, each with a LoRA file of diffusers and one in kohya's layout."""
    root = tmp_path_factory.mktemp("loras")
    small: Mapping[str, Callable[[], DiffusionPipeline]] = {
        "sd1": lambda: tiny_pipelines.sd(unet={**tiny_pipelines.SD1, **tiny_pipelines.SMALL}),
        "sdxl": lambda: tiny_pipelines.xl(unet={**tiny_pipelines.XL, **tiny_pipelines.SMALL_XL}),
    }
    for kind in KINDS:
        torch.manual_seed(0)
        small[kind]().save_pretrained(root / kind)
        pipeline = upstream(root / kind)
        # The LoRA's convolutions have another rank: diffusers tells it from the tensors.
        ranks = dict.fromkeys(CONVOLUTIONS, 3)
        unet = LoraConfig(r=4, lora_alpha=4, target_modules=[*UNET, *CONVOLUTIONS], rank_pattern=ranks)
        encoder = LoraConfig(r=4, lora_alpha=4, target_modules=ENCODER)
        layers = layers_of(pipeline, unet, encoder)
        pipeline.save_lora_weights(root / f"{kind}-diffusers", **{f"{k}_lora_layers": v for k, v in layers.items()})
        flat = {f"{part}.{key}": tensor for part, tensors in layers.items() for key, tensor in tensors.items()}
        notes = {"ss_network_module": "networks.lora", "ss_tag_frequency": '{"cat": 3}', "ss_output_name": "höhe"}
        save_file(convert_state_dict_to_kohya(flat), root / f"{kind}-kohya.safetensors", metadata=notes)
    return root


def upstream(directory: Path) -> DiffusionPipeline:
    pipeline = AutoPipelineForText2Image.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_upstream(pipeline: DiffusionPipeline) -> Tensor:
    call = {"prompt": "a photo of a cat", "negative_prompt": "ugly", "guidance_scale": 5.0, **CALL}
    return pipeline(**call, output_type="pt", generator=torch.Generator().manual_seed(3)).images


def drawn_here(model: LatentDiffusionModel) -> Tensor:
    options: dict[str, Any] = {"condition_scale": 5.0, "generator": torch.Generator().manual_seed(3), **CALL}
    with torch.no_grad():
        return text_to_image(model, "a photo of a cat", negative_prompt="ugly", **options).pixels()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_diffusers_draws_the_pixels_of_diffusers_and_leaves_no_trace(kind: str, folder: Path) -> None:
    pipeline, model = upstream(folder / kind), from_directory(folder / kind)
    before = drawn_here(model)
    pipeline.load_lora_weights(folder / f"{kind}-diffusers")
    loras = model.load_loras(folder / f"{kind}-diffusers")
    with_loras = drawn_here(model)
    assert same_bits(with_loras, drawn_by_upstream(pipeline))
    assert not same_bits(with_loras, before)
    loras.eject()
    assert same_bits(drawn_here(model), before)


def test_a_file_of_kohya_draws_the_pixels_of_diffusers(folder: Path) -> None:
    pipeline, model = upstream(folder / "sd1"), from_directory(folder / "sd1")
    pipeline.load_lora_weights(folder / "sd1-kohya.safetensors")
    model.load_loras(folder / "sd1-kohya.safetensors")
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))


def test_half_the_scale_draws_the_pixels_of_diffusers(folder: Path) -> None:
    pipeline, model = upstream(folder / "sd1"), from_directory(folder / "sd1")
    pipeline.load_lora_weights(folder / "sd1-diffusers", adapter_name="style")
    pipeline.set_adapters(["style"], [0.5])
    model.load_loras(folder / "sd1-diffusers", "style", scale=0.5)
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))


def test_a_file_of_old_diffusers_draws_the_pixels_of_diffusers(folder: Path, tmp_path: Path) -> None:
    projections = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    old: dict[str, Tensor] = {}
    for entry in read_loras(folder / "sd1-diffusers").entries.values():
        for role, tensor in entry.spec.tensors.items():
            path, _, name = entry.module.removesuffix(".0").rpartition(".")
            if entry.part == "unet" and name in projections:
                old[f"unet.{path}.processor.{name}_lora.{role}.weight"] = tensor
            for spelling, projection in projections.items():
                if entry.part == "text_encoder" and name == projection:
                    old[f"text_encoder.text_model.{path}.{spelling}_lora.{role}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    pipeline, model = upstream(folder / "sd1"), from_directory(folder / "sd1")
    pipeline.load_lora_weights(tmp_path / "old.safetensors")
    assert len(model.load_loras(tmp_path / "old.safetensors")) == len(old) / 2 == 4 * (2 * 4 + 2)
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_written_here_draws_the_same_pixels_in_diffusers(
    kind: str, layout: str, folder: Path, tmp_path: Path
) -> None:
    model = from_directory(folder / kind)
    loras = model.load_loras(folder / f"{kind}-kohya.safetensors")
    loras.write(tmp_path / "loras.safetensors", layout)
    pipeline = upstream(folder / kind)
    pipeline.load_lora_weights(tmp_path / "loras.safetensors")
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))


def test_an_alpha_of_its_own_for_each_layer_is_written_so_that_diffusers_counts_it(
    folder: Path, tmp_path: Path
) -> None:
    model = from_directory(folder / "sd1")
    specs = read_loras(folder / "sd1-diffusers").specs_for(model.unet)
    changed = {path: replace(spec, alpha=1.0 + i % 3) for i, (path, spec) in enumerate(specs.items())}
    inject_loras(model.unet, changed, name="style")
    write_loras(tmp_path / "loras.safetensors", changed, model.unet)
    pipeline = upstream(folder / "sd1")
    pipeline.load_lora_weights(tmp_path / "loras.safetensors")
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))
    again = read_loras(tmp_path / "loras.safetensors").specs_for(model.unet)
    assert {path: spec.alpha for path, spec in again.items()} == {path: s.alpha for path, s in changed.items()}


@pytest.mark.parametrize("name", ["sd1-diffusers", "sd1-kohya.safetensors", "sdxl-diffusers", "sdxl-kohya.safetensors"])
def test_a_file_of_upstream_is_written_again_byte_by_byte(name: str, folder: Path, tmp_path: Path) -> None:
    file = read_loras(folder / name)
    write_loras(tmp_path / "again.safetensors", file)
    assert file.path is not None
    assert (tmp_path / "again.safetensors").read_bytes() == file.path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_loras_taken_from_a_tree_are_written_with_the_bytes_of_diffusers(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    model = from_directory(folder / kind)
    loras = model.load_loras(folder / f"{kind}-diffusers")
    loras.write(tmp_path / "again.safetensors")
    original = folder / f"{kind}-diffusers" / "pytorch_lora_weights.safetensors"
    assert (tmp_path / "again.safetensors").read_bytes() == original.read_bytes()


def test_a_file_for_another_model_is_named_and_nothing_is_touched(folder: Path) -> None:
    model = from_directory(folder / "sd1")
    before = list(model.state_dict())
    with pytest.raises(ConversionError, match="the UNet of Stable Diffusion XL"):
        model.load_loras(folder / "sdxl-diffusers")
    assert list(model.state_dict()) == before


# peft


def clip_pair() -> tuple[nn.Module, fl.Chain, KeyMap]:
    config = CLIPTextConfig(**tiny_pipelines.TEXT)
    return CLIPTextModel(config), clip.text_encoder_from_config(config.to_dict()), clip.TEXT_ENCODER_KEYS


def bert_pair() -> tuple[nn.Module, fl.Chain, KeyMap]:
    config = bert_cases.config()
    port = bert.sentence_encoder_from_config(config.to_dict())
    return BertModel(config), port, bert.SENTENCE_ENCODER_KEYS


PAIRS: Mapping[str, Callable[[], tuple[nn.Module, fl.Chain, KeyMap]]] = {"clip": clip_pair, "bert": bert_pair}
LINEAR: Mapping[str, Any] = {
    "clip": {"target_modules": ENCODER},
    "bert": {"target_modules": ["query", "key", "value", "attention.output.dense", "intermediate.dense"]},
}
IDS = torch.randint(1, 90, (2, 7), generator=torch.Generator().manual_seed(5))


def states(model: nn.Module) -> Tensor:
    """The last hidden states of either side."""
    with torch.no_grad():
        if not isinstance(model, fl.Chain):
            return model(IDS).last_hidden_state
        if isinstance(model, bert.SentenceEncoder):
            return model[:-2](IDS)
        return model(IDS)


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "lora": lambda **targets: LoraConfig(r=4, lora_alpha=6, **targets),
    "patterns": lambda **targets: LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"0.*": 2, "value|v_proj": 3}, alpha_pattern={"query|q_proj": 5}, **targets
    ),
    "stabilised": lambda **targets: LoraConfig(r=3, lora_alpha=6, use_rslora=True, **targets),
    "bias": lambda **targets: LoraConfig(r=4, lora_alpha=6, lora_bias=True, **targets),
    "dora": lambda **targets: LoraConfig(r=4, lora_alpha=6, use_dora=True, **targets),
    "loha": lambda **targets: LoHaConfig(r=4, alpha=6, **targets),
    "lokr": lambda **targets: LoKrConfig(r=2, alpha=6, **targets),
    "lokr of full matrices": lambda **targets: LoKrConfig(r=64, alpha=6, **targets),
    "lokr of two products": lambda **targets: LoKrConfig(
        r=1, alpha=6, decompose_both=True, decompose_factor=4, **targets
    ),
}


def in_peft(upstream: nn.Module, config: Any, folder: Path) -> PeftModel:
    """Injects adapters with peft, and lets peft write them."""
    model = get_peft_model(upstream, config).eval()
    randomise(model, 1)
    model.save_pretrained(str(folder))
    return model


def pair(name: str) -> tuple[nn.Module, fl.Chain]:
    torch.manual_seed(0)
    upstream, port, keys = PAIRS[name]()
    port.load_state_dict(keys.convert(upstream.state_dict(), port), assign=True)
    return upstream.eval(), port.eval()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_folder_of_peft_computes_what_peft_does_in_both_directions(method: str, name: str, tmp_path: Path) -> None:
    upstream, port = pair(name)
    theirs = in_peft(upstream, CONFIGS[method](**LINEAR[name]), tmp_path / "theirs")
    file = read_loras(tmp_path / "theirs")
    loras = inject_loras(port, file, name="style")
    ours = states(port)
    assert same_bits(ours, states(theirs))

    write_loras(tmp_path / "again", file)
    write_loras(tmp_path / "ours", loras.specs(), port, layout="peft")
    for written in ("again", "ours"):
        weights = "adapter_model.safetensors"
        assert (tmp_path / written / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    config = "adapter_config.json"
    assert (tmp_path / "again" / config).read_bytes() == (tmp_path / "theirs" / config).read_bytes()
    reloaded = PeftModel.from_pretrained(pair(name)[0], str(tmp_path / "ours")).eval()
    assert same_bits(states(reloaded), ours)


def test_the_embedding_of_peft_is_read_and_written(tmp_path: Path) -> None:
    upstream, port = pair("bert")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["word_embeddings", "query"])
    theirs = get_peft_model(upstream, config).eval()
    randomise(theirs, 1)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    loras = inject_loras(port, read_loras(tmp_path / "theirs"), name="style")
    assert same_bits(states(port), states(theirs))
    write_loras(tmp_path / "ours", loras.specs(), port, layout="peft")
    reloaded = PeftModel.from_pretrained(pair("bert")[0], str(tmp_path / "ours")).eval()
    assert same_bits(states(reloaded), states(port))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        LNTuningConfig(target_modules=["LayerNorm"]),
    ],
    ids=["ia3", "norms"],
)
def test_ia3_and_tuned_norms_of_peft_compute_what_peft_does(config: Any, tmp_path: Path) -> None:
    upstream, port = pair("bert")
    before = states(port)
    theirs = in_peft(upstream, config, tmp_path / "theirs")
    file = read_loras(tmp_path / "theirs")
    adapters = inject_tuning(port, file)
    assert same_bits(states(port), states(theirs))
    assert not same_bits(states(port), before)
    write_loras(tmp_path / "again", file)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    adapters.eject()
    assert same_bits(states(port), before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_peft_trains_is_refused_by_name(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    upstream, _ = pair("bert")
    in_peft(upstream, LoraConfig(r=4, target_modules=["query"], **options), tmp_path / "theirs")
    with pytest.raises(ConversionError, match=told):
        read_loras(tmp_path / "theirs")


# two forms of one layer


def in_other_form(file: LoraFile) -> tuple[dict[str, Tensor], int]:
    """The tensors of a file, with the LoRAs of convolutions of one pixel as matrices; and how many these are."""
    tensors, count = dict(file.tensors), 0
    for entry in file.entries.values():
        pair = [entry.spec.tensors[role] for role in ("down", "up")]
        if all(tensor.ndim == 4 and tensor.shape[2:].numel() == 1 for tensor in pair):
            count += 1
            for role in ("down", "up"):
                tensors[entry.keys[role]] = entry.spec.tensors[role].flatten(1).contiguous()
    return tensors, count


def test_matrices_for_convolutions_of_one_pixel_draw_what_diffusers_does_with_the_form_that_it_reads(
    folder: Path, tmp_path: Path
) -> None:
    original, flat = folder / "sd1-kohya.safetensors", tmp_path / "flat.safetensors"
    tensors, count = in_other_form(read_loras(original))
    assert count > 4
    save_file(tensors, flat)
    pipeline, model = upstream(folder / "sd1"), from_directory(folder / "sd1")
    pipeline.load_lora_weights(original)
    loras = model.load_loras(flat)
    assert same_bits(drawn_here(model), drawn_by_upstream(pipeline))
    pipeline.unload_lora_weights()
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipeline.load_lora_weights(flat)

    write_loras(tmp_path / "again.safetensors", read_loras(flat))
    assert (tmp_path / "again.safetensors").read_bytes() == flat.read_bytes()
    # From a tree, kohya's layout keeps the form of the file; that of diffusers gets the one that diffusers reads.
    loras.write(tmp_path / "kohya.safetensors", "kohya")
    for entry in read_loras(tmp_path / "kohya.safetensors").of_part("unet"):
        assert all(same_bits(tensor, tensors[entry.keys[role]]) for role, tensor in entry.spec.tensors.items())
    loras.write(tmp_path / "from-flat.safetensors", "diffusers")
    loras.eject()
    model.load_loras(original).write(tmp_path / "from-original.safetensors", "diffusers")
    both = [read_loras(tmp_path / f"from-{name}.safetensors").tensors for name in ("flat", "original")]
    assert list(both[0]) == list(both[1])
    assert all(same_bits(tensor, both[1][key]) for key, tensor in both[0].items())
