"""LoRA files without upstream: names, bad input, and round trips."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraFile, LoraNames, lora_file, read_loras, write_loras
from refiners.conversion.loras.roles import split_end
from refiners.conversion.loras.storage import write_as_library
from refiners.errors import ConversionError, FileFormatError
from refiners.fluxion.adapters import DeltaSpec, inject_loras

KEYS = KeyMap(
    {"blocks.{i}.fc": "Block_{i+1}.Linear", "blocks.{i}.conv": "Block_{i+1}.Conv2d", "words": "Embedding"},
    aliases={"model.{rest}": "{rest}"},
    name="a toy",
)


class Block(fl.Chain):
    """Two kinds of layers that LoRAs are for."""

    def __init__(self) -> None:
        super().__init__(fl.Linear(6, 4), fl.Conv2d(3, 8, kernel_size=3, padding=1))


class Toy(fl.Chain):
    """A tree with a key map, never run."""

    def __init__(self) -> None:
        super().__init__(fl.Embedding(10, 6), Block(), Block())


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def state(
    rank: int = 2, names: tuple[str, ...] = ("blocks.0", "blocks.1"), dtype: Any = torch.float32
) -> dict[str, Tensor]:
    """A state dict as diffusers' UNets have it, without a part."""
    found: dict[str, Tensor] = {}
    for name in names:
        found[f"{name}.fc.lora_A.weight"] = torch.randn(rank, 6, dtype=dtype)
        found[f"{name}.fc.lora_B.weight"] = torch.randn(4, rank, dtype=dtype)
        found[f"{name}.conv.lora_A.weight"] = torch.randn(rank, 3, 3, 3, dtype=dtype)
        found[f"{name}.conv.lora_B.weight"] = torch.randn(8, rank, 1, 1, dtype=dtype)
    return found


def kohya(tensors: Mapping[str, Tensor], alpha: float | None = 1.0) -> dict[str, Tensor]:
    """The same in the layout of kohya's scripts."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, end = split_end(key)
        joined = "lora_unet_" + name.replace(".", "_")
        found[f"{joined}.{ {'lora_A.weight': 'lora_down.weight', 'lora_B.weight': 'lora_up.weight'}[end] }"] = tensor
        if alpha is not None:
            found[f"{joined}.alpha"] = torch.tensor(alpha)
    return found


def names(toy: nn.Module, part: str = "unet") -> LoraNames:
    return LoraNames.of(toy, KEYS, part=part, title="a toy")


def problem_of(tensors: Mapping[str, Tensor], toy: nn.Module) -> str:
    with pytest.raises(ConversionError) as caught:
        read_loras(tensors).specs_for(toy, KEYS)
    return str(caught.value)


# Names


def test_underscores_are_looked_up_and_never_taken_apart(toy: Toy) -> None:
    twice = LoraNames({"a.b_c": "Linear_1", "a_b.c": "Linear_2"})
    assert twice.find("a_b_c", joined=True) == ["Linear_1", "Linear_2"]
    assert names(toy).find("model_blocks_1_fc", joined=True) == ["Block_2.Linear"]
    assert names(toy).find("model.blocks.1.conv") == ["Block_2.Conv2d"]


def test_names_are_those_of_the_base_whatever_is_injected(toy: Toy) -> None:
    before = names(toy).paths
    inject_loras(toy, name="style", rank=2)
    assert names(toy).paths == before


# Matching


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_each_lora_goes_to_the_layer_of_its_name_in_any_order(layout: str, toy: Toy) -> None:
    tensors = state()
    given = dict(reversed((kohya(tensors) if layout == "kohya" else tensors).items()))
    specs = read_loras(given).specs_for(toy, KEYS)
    assert set(specs) == {"Block_1.Linear", "Block_1.Conv2d", "Block_2.Linear", "Block_2.Conv2d"}
    assert torch.equal(specs["Block_2.Linear"].tensors["down"], tensors["blocks.1.fc.lora_A.weight"])
    assert {spec.alpha for spec in specs.values()} == ({1.0} if layout == "kohya" else {None})


def test_all_that_does_not_fit_is_told_in_one_error_with_the_nearest_names(toy: Toy) -> None:
    tensors = state()
    tensors["blocks.0.fcc.lora_A.weight"] = tensors.pop("blocks.0.fc.lora_A.weight")
    tensors["blocks.0.fcc.lora_B.weight"] = tensors.pop("blocks.0.fc.lora_B.weight")
    tensors["blocks.1.fc.lora_A.weight"] = torch.ones(2, 7)
    tensors["blocks.1.conv.lora_B.weight"][0] = torch.nan
    text = problem_of(tensors, toy)
    assert "1 shape, 1 value, 1 unexpected" in text
    assert "nearest: 'blocks.0.fc'" in text
    assert "changes a weight of (4, 7), that of the layer is (4, 6)" in text
    assert "up holds values that are not finite" in text


def test_what_does_not_fit_is_left_out_and_told_where_that_is_asked_for(toy: Toy) -> None:
    tensors = state(names=("blocks.0", "blocks.7"))
    specs = read_loras(tensors).specs_for(toy, KEYS, strict=False)
    assert set(specs) == {"Block_1.Linear", "Block_1.Conv2d"}
    assert specs.problems.keys("unexpected") == ["blocks.7.fc", "blocks.7.conv"]


def test_two_spellings_of_one_layer_are_an_error(toy: Toy) -> None:
    tensors = state(names=("blocks.0",))
    text = problem_of({**tensors, **{f"model.{key}": tensor for key, tensor in tensors.items()}}, toy)
    assert "2 twice" in text


def test_a_name_that_could_be_two_layers_is_an_error(toy: Toy) -> None:
    ambiguous = LoraNames({"a.b_c": "Block_1.Linear", "a_b.c": "Block_2.Linear"}, part="unet")
    tensors = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 6), "lora_unet_a_b_c.lora_up.weight": torch.ones(4, 1)}
    with pytest.raises(ConversionError, match="could be Block_1.Linear or Block_2.Linear"):
        read_loras(tensors).specs_for(ambiguous)


def test_a_part_that_the_file_lacks_is_an_error_that_names_those_it_has(toy: Toy) -> None:
    file = read_loras({f"text_encoder.{key}": tensor for key, tensor in state().items()})
    with pytest.raises(ConversionError, match="its parts are 'text_encoder', none is 'unet'"):
        file.specs_for(names(toy))
    assert len(file.specs_for(names(toy), part="text_encoder")) == 4


def test_specs_begin_where_products_of_matrices_find_them(toy: Toy, tmp_path: Path) -> None:
    save_file({**state(rank=1), "blocks.0.fc.alpha": torch.tensor(1.0)}, tmp_path / "style.safetensors")
    specs = read_loras(tmp_path / "style.safetensors").specs_for(toy, KEYS)
    assert {tensor.data_ptr() % 64 for spec in specs.values() for tensor in spec.tensors.values()} == {0}


def test_a_file_is_injected_in_one_call(toy: Toy, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "style.safetensors")
    loras = inject_loras(toy, read_loras(tmp_path / "style.safetensors").specs_for(toy, KEYS), name="style")
    assert len(loras) == 4
    loras.eject()


# Bad input


def test_half_a_pair_is_an_error() -> None:
    tensors = state()
    del tensors["blocks.0.fc.lora_B.weight"]
    with pytest.raises(ConversionError, match=r"blocks\.0\.fc: misses up"):
        read_loras(tensors)


def test_another_rank_on_the_way_up_is_an_error() -> None:
    with pytest.raises(ConversionError, match=r"down \[2, 6\] and up \[4, 3\] are no pair"):
        read_loras({**state(), "blocks.0.fc.lora_B.weight": torch.ones(4, 3)})


@pytest.mark.parametrize("end", ["diff", "diff_b", "oft_blocks", "on_input", "strange"])
def test_what_is_not_read_is_an_error_and_not_passed_over(end: str) -> None:
    with pytest.raises(ConversionError, match=f"1 unexpected.\n.*\n.*{end}"):
        read_loras({**kohya(state()), f"lora_unet_blocks_0_fc.{end}": torch.ones(1)})


def test_two_layouts_in_one_file_are_an_error() -> None:
    with pytest.raises(ConversionError, match="mixes the layouts diffusers and kohya"):
        read_loras({**state(), **kohya(state())})


def test_a_whole_model_is_no_lora() -> None:
    with pytest.raises(ConversionError, match="holds no LoRA"):
        read_loras({"fc.weight": torch.ones(1)})


def test_an_alpha_without_weights_is_an_error() -> None:
    with pytest.raises(ConversionError, match="alpha of a layer without weights"):
        read_loras({**kohya(state()), "lora_unet_other.alpha": torch.tensor(1.0)})


def test_a_dora_that_rescales_inputs_is_refused() -> None:
    given = kohya(state(names=("blocks.0",)))
    with pytest.raises(ConversionError, match="rescales the inputs"):
        read_loras({**given, "lora_unet_blocks_0_fc.dora_scale": torch.ones(1, 6)})


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "style.safetensors")
    with pytest.raises(FileFormatError, match="pickle"):
        read_loras(tmp_path / "style.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match="truncated"):
        read_loras(path)


def test_a_file_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    entry = '"fc.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (tmp_path / "style.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FileFormatError, match="twice"):
        read_loras(tmp_path / "style.safetensors")


def test_a_folder_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no LoRA file"):
        read_loras(tmp_path)


# Configurations of peft


def peft(config: Mapping[str, Any], rank: int = 2) -> LoraFile:
    return read_loras({f"base_model.model.{key}": tensor for key, tensor in state(rank).items()}, config)


def test_a_configuration_gives_each_layer_its_alpha(toy: Toy) -> None:
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"0.fc": 3, "^blocks.1.conv": 5}, "use_rslora": True}
    specs = peft({"peft_type": "LORA", **config}).specs_for(toy, KEYS)
    alphas = {"Block_1.Linear": 3.0, "Block_1.Conv2d": 6.0, "Block_2.Linear": 6.0, "Block_2.Conv2d": 5.0}
    assert {path: spec.alpha for path, spec in specs.items()} == alphas
    assert all(spec.rank_stabilized for spec in specs.values())


def test_a_rank_that_the_configuration_denies_is_an_error() -> None:
    with pytest.raises(ConversionError, match="has rank 2, the configuration says 3"):
        peft({"r": 3})


@pytest.mark.parametrize(
    "option",
    [{"modules_to_save": ["head"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"something_new": 1}],
    ids=lambda option: next(iter(option)),
)
def test_a_configuration_that_changes_the_result_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=next(iter(option))):
        peft({"r": 2, **option})


def test_a_target_of_the_configuration_without_weights_is_missing(toy: Toy) -> None:
    config = {"r": 2, "target_modules": ["fc", "conv", "words"]}
    with pytest.raises(ConversionError, match="words: is a target of the configuration"):
        peft(config).specs_for(toy, KEYS)


# Writing


def specs_of(toy: nn.Module, **changes: Any) -> dict[str, DeltaSpec]:
    return {path: replace(spec, **changes) for path, spec in read_loras(state()).specs_for(toy, KEYS).items()}


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("alpha", [None, 2.0, 3.5])
def test_what_is_written_is_read_again(layout: str, alpha: float | None, toy: Toy, tmp_path: Path) -> None:
    specs = specs_of(toy, alpha=alpha)
    path = tmp_path / ("style" if layout == "peft" else "style.safetensors")
    write_loras(path, specs, names(toy), layout=layout, metadata={"ss_note": "ü"})
    file = read_loras(path)
    again = file.specs_for(names(toy))
    assert file.layout == layout
    assert file.metadata["ss_note"] == "ü"
    assert {p: (s.alpha or s.rank) for p, s in again.items()} == {p: (s.alpha or s.rank) for p, s in specs.items()}
    for place, spec in specs.items():
        assert all(torch.equal(spec.tensors[role], again[place].tensors[role]) for role in spec.tensors)


def lycoris(method: str) -> dict[str, DeltaSpec]:
    """A LoHa and a LoKr for the Linear of the first block."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if method == "dora":
        tensors = {"down": draw(2, 6), "up": draw(4, 2), "magnitude": draw(4)}
    elif method == "locon":
        tensors = {"down": draw(2, 3, 1, 1), "mid": draw(2, 2, 3, 3), "up": draw(8, 2, 1, 1)}
        return {"Block_1.Conv2d": DeltaSpec(method, tensors, alpha=3.0)}
    elif method == "loha":
        tensors = {"w1_a": draw(4, 2), "w1_b": draw(2, 6), "w2_a": draw(4, 2), "w2_b": draw(2, 6)}
    else:
        tensors = {"w1": draw(2, 2), "w2_a": draw(2, 1), "w2_b": draw(1, 3)}
    return {"Block_1.Linear": DeltaSpec(method, tensors, alpha=3.0)}


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("method", ["dora", "locon", "loha", "lokr"])
def test_other_methods_are_written_and_read_again(method: str, layout: str, toy: Toy, tmp_path: Path) -> None:
    specs = lycoris(method)
    path = tmp_path / ("style" if layout == "peft" else "style.safetensors")
    if (method, layout) == ("locon", "peft"):
        with pytest.raises(ConversionError, match="which has no locon.*kohya's layout holds them"):
            write_loras(path, specs, names(toy), layout=layout)
        return
    write_loras(path, specs, names(toy), layout=layout)
    (place, given), (again,) = next(iter(specs.items())), read_loras(path).specs_for(names(toy)).values()
    assert (again.method, again.alpha) == (method, 3.0)
    assert all(torch.equal(again.tensors[role], tensor) for role, tensor in given.tensors.items())
    assert len(inject_loras(toy, {place: again}, name="style")) == 1


def test_what_a_layout_has_no_place_for_is_an_error(toy: Toy) -> None:
    with pytest.raises(ConversionError, match="is loha, which diffusers"):
        lora_file({"unet": lycoris("loha")}, {"unet": names(toy)}, layout="diffusers")
    with pytest.raises(ConversionError, match="rank-stabilised"):
        lora_file({"unet": specs_of(toy, rank_stabilized=True)}, {"unet": names(toy)}, layout="kohya")
    with pytest.raises(ConversionError, match="for one model"):
        both = {"unet": specs_of(toy), "text_encoder": specs_of(toy)}
        lora_file(both, {part: names(toy) for part in both}, layout="peft")
    with pytest.raises(ConversionError, match="several methods"):
        mixed = {**specs_of(toy), **lycoris("loha")}
        lora_file({"unet": mixed}, {"unet": names(toy)}, layout="peft")


def test_a_path_without_a_name_is_an_error(toy: Toy) -> None:
    specs = {"Block_3.Linear": lycoris("dora")["Block_1.Linear"]}
    with pytest.raises(ConversionError, match=r"Block_3\.Linear: has no name in files; nearest"):
        lora_file({"unet": specs}, {"unet": names(toy)}, layout="kohya")


def test_a_file_that_is_there_is_not_replaced(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    write_loras(path, specs_of(toy), names(toy))
    with pytest.raises(FileFormatError, match="exists"):
        write_loras(path, specs_of(toy), names(toy))
    write_loras(path, specs_of(toy), names(toy), overwrite=True)


def test_peft_is_told_full_names_where_the_end_of_one_is_another(toy: Toy) -> None:
    nested = LoraNames({"fc": "Block_1.Linear", "blocks.fc": "Block_2.Linear"}, layers=names(toy).layers)
    found = lora_file({"": {"Block_1.Linear": specs_of(toy)["Block_1.Linear"]}}, {"": nested}, layout="peft")
    assert found.config is not None
    assert found.config["target_modules"] == "fc"


# Bytes

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def test_files_have_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{i}": torch.ones(3, i + 1).to(kind) for i, kind in enumerate(TYPES) for name in ("z", "a", "ü\n")
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": 'ü\x7f"\\\t'})
    write_as_library(tmp_path / "ours.safetensors", tensors, {"a": 'ü\x7f"\\\t'})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_file_that_was_read_is_written_byte_by_byte_whatever_the_order_of_its_metadata(tmp_path: Path) -> None:
    notes = {f"ss_{i}": str(i) for i in range(20)}
    save_file(kohya(state()), tmp_path / "style.safetensors", metadata=notes)
    write_loras(tmp_path / "again.safetensors", read_loras(tmp_path / "style.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "style.safetensors").read_bytes()


def test_the_configuration_of_peft_is_written_as_it_was_read(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc", "conv"], "peft_version": "0.21.2"}
    write_loras(tmp_path / "style", peft(config))
    assert json.loads((tmp_path / "style" / "adapter_config.json").read_text()) == config
