"""Models of several parts: converted from a folder or a single file, continued, verified, and opened again."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refiners.conversion import (
    KeyMap,
    Progress,
    Recomputed,
    convert_directory,
    open_directory,
    read_state_dict,
    verify_directory,
    write_state_dict,
)
from refiners.errors import ConversionError, FileFormatError
from tests.refiners.conversion.toy_bundles import (
    BUNDLES,
    HEAD,
    NET,
    TOY,
    assert_converted,
    expected,
    files_below,
    net_weights,
    same,
    single_weights,
    write_folder,
    write_single_file,
)


@pytest.mark.parametrize("write", [write_folder, write_single_file], ids=["folder", "single file"])
def test_both_layouts_become_the_weights_of_the_ports(write: Any, tmp_path: Path) -> None:
    result = convert_directory(write(tmp_path / "in.safetensors"), tmp_path / "out", BUNDLES)
    assert result.kind == "toy"
    assert {name: part.tensors for name, part in result.parts.items()} == {"net": 6, "head": 1}
    assert result.warnings == ()
    assert_converted(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_configurations_scheduler_tokenizer_and_digests_are_kept(tmp_path: Path) -> None:
    convert_directory(write_folder(tmp_path / "in", 8), tmp_path / "out", BUNDLES, "toy")
    manifest = json.loads((tmp_path / "out" / "refiners.json").read_text())
    assert manifest["kind"] == "toy"
    assert manifest["scheduler"] == {"_class_name": "Own"}
    assert manifest["pipeline"] == {"safe": False}
    assert manifest["parts"]["net"]["config"] == {"width": 8}
    bias = expected(8)["net"]["Key.bias"]
    assert manifest["parts"]["net"]["tensors"]["Key.bias"] == hashlib.sha256(bias.numpy().tobytes()).hexdigest()
    assert set(files_below(tmp_path / "out")) == {
        "net.safetensors",
        "head.safetensors",
        "refiners.json",
        "tokenizer/vocab.json",
    }


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = convert_directory(write_folder(tmp_path / "in"), tmp_path / "out", BUNDLES)
    assert folder.notes == ("left out: checker (no part of the port)",)
    single = convert_directory(write_single_file(tmp_path / "in.safetensors"), tmp_path / "single", BUNDLES)
    assert single.notes == (
        "left out: betas (a table)",
        "left out: ema.net (a copy)",
        f"without tokenizer, which {tmp_path / 'in.safetensors'} does not hold: give one with --tokenizer",
    )


def test_a_single_file_gets_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    source = write_single_file(tmp_path / "in.safetensors")
    (tmp_path / "clip").mkdir()
    with pytest.raises(FileFormatError, match="holds no files of a tokenizer"):
        convert_directory(source, tmp_path / "out", BUNDLES, tokenizer=tmp_path / "clip")
    (tmp_path / "clip" / "vocab.json").write_text("{}")
    convert_directory(source, tmp_path / "out", BUNDLES, tokenizer=tmp_path / "clip")
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_text() == "{}"


def test_a_single_file_of_unusual_size_takes_configurations(tmp_path: Path) -> None:
    source = write_single_file(tmp_path / "in.safetensors", 8)
    with pytest.raises(ConversionError, match=r"net: .*(?s:.)*head: "):
        convert_directory(source, tmp_path / "out", BUNDLES)
    convert_directory(source, tmp_path / "out", BUNDLES, configs=write_folder(tmp_path / "configs", 8))
    assert_converted(tmp_path / "out", 8)


def test_another_spelling_of_a_prefix_is_read(tmp_path: Path) -> None:
    weights = {key.replace("head.", "old_head."): tensor for key, tensor in single_weights().items()}
    write_state_dict(tmp_path / "in.safetensors", weights)
    convert_directory(tmp_path / "in.safetensors", tmp_path / "out", BUNDLES)
    assert_converted(tmp_path / "out")


def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    convert_directory(write_folder(tmp_path / "in"), tmp_path / "out", BUNDLES, dtype=torch.float16)
    read = read_state_dict(tmp_path / "out" / "net.safetensors")
    assert all(torch.equal(read[key], tensor.half()) for key, tensor in expected()["net"].items())


def test_the_variant_that_is_asked_for_is_taken_where_there_is_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    half = {key: tensor.half() for key, tensor in net_weights().items()}
    write_state_dict(folder / "net" / "diffusion_pytorch_model.fp16.safetensors", half)
    convert_directory(folder, tmp_path / "plain", BUNDLES)
    convert_directory(folder, tmp_path / "mixed", BUNDLES, variant="fp16")
    assert_converted(tmp_path / "plain")
    assert read_state_dict(tmp_path / "mixed" / "net.safetensors")["Out.bias"].dtype == torch.float16
    assert read_state_dict(tmp_path / "mixed" / "head.safetensors")["Linear.weight"].dtype == torch.float32


def test_values_that_are_no_numbers_are_named_and_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    weights = net_weights()
    weights["out.bias"][0] = float("nan")
    weights["attn.q.weight"][1, 1] = float("-inf")
    weights["attn.k.weight"][0, 0] = 1e6
    write_state_dict(folder / "net" / "diffusion_pytorch_model.safetensors", weights, overwrite=True)
    result = convert_directory(folder, tmp_path / "out", BUNDLES, dtype=torch.float16)
    assert set(result.warnings) == {
        "net: Out.bias, made of out.bias, holds NaN",
        "net: Query.weight, made of attn.q.weight, holds infinity",
        "net: Key.weight, made of attn.k.weight, holds infinity: its values are too large for float16",
    }
    assert read_state_dict(tmp_path / "out" / "net.safetensors")["Out.bias"].isnan().all()
    manifest = json.loads((tmp_path / "out" / "refiners.json").read_text())
    assert manifest["parts"]["net"]["not_finite"]["Out.bias"] == "NaN"


def test_an_output_that_exists_is_replaced_only_if_it_is_a_conversion(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    convert_directory(source, target, BUNDLES)
    convert_directory(source, tmp_path / "empty", BUNDLES)
    before = files_below(tmp_path)
    for name, message in {
        "out": "exists.*--force",
        "full": "exists",
        "file": "is a file",
        "no/out": "does not exist",
    }.items():
        with pytest.raises(FileFormatError, match=message):
            convert_directory(source, tmp_path / name, BUNDLES)
    with pytest.raises(FileFormatError, match="something else than a converted model, and is not replaced"):
        convert_directory(source, tmp_path / "full", BUNDLES, overwrite=True)
    assert files_below(tmp_path) == before
    convert_directory(source, target, BUNDLES, dtype=torch.bfloat16, overwrite=True)
    assert read_state_dict(target / "net.safetensors")["Out.bias"].dtype == torch.bfloat16
    assert not list(tmp_path.glob("out.*"))


def test_a_link_stays_one_and_what_it_points_at_is_written(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    for overwrite in (False, True):
        convert_directory(source, tmp_path / "out", BUNDLES, overwrite=overwrite)
        assert (tmp_path / "out").is_symlink()
        assert_converted(tmp_path / "disk" / "model")
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_converted_folder_is_converted_again_in_another_type(tmp_path: Path) -> None:
    convert_directory(write_folder(tmp_path / "in"), tmp_path / "out", BUNDLES)
    convert_directory(tmp_path / "out", tmp_path / "half", BUNDLES, dtype=torch.float16)
    read = read_state_dict(tmp_path / "half" / "net.safetensors")
    assert all(torch.equal(read[key], tensor.half()) for key, tensor in expected()["net"].items())
    assert (tmp_path / "half" / "tokenizer" / "vocab.json").is_file()


def test_a_converted_folder_is_verified_to_the_bit(tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert_directory(write_folder(tmp_path / "in"), target, BUNDLES)
    steps: list[Progress] = []
    assert verify_directory(target, steps.append) == 7
    assert {step.part for step in steps} == {"net", "head"}
    file = target / "net.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FileFormatError, match=r"1 differences:\n  net: \w+.bias holds other bytes"):
        verify_directory(target)
    file.write_bytes(whole[:-1])
    with pytest.raises(FileFormatError, match=rf"truncated, expected {len(whole)} bytes, found {len(whole) - 1}"):
        verify_directory(target)
    write_state_dict(file, read_state_dict(target / "head.safetensors"), overwrite=True)
    (target / "tokenizer" / "vocab.json").write_text("[]")
    (target / "head.safetensors").unlink()
    with pytest.raises(
        FileFormatError, match=r"3 differences:(?s:.)*another header(?s:.)*does not exist(?s:.)*vocab.json"
    ):
        verify_directory(target)


def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    (source / "the_head").rename(source / "elsewhere")
    with pytest.raises(FileFormatError, match="lacks the folders the_head of Toy 1"):
        convert_directory(source, tmp_path / "out", BUNDLES)


def test_what_does_not_fit_in_any_part_is_told_in_one_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    weights = net_weights()
    weights["attn.query.bias"] = weights.pop("attn.q.bias")
    write_state_dict(source / "net" / "diffusion_pytorch_model.safetensors", weights, overwrite=True)
    write_state_dict(
        source / "the_head" / "diffusion_pytorch_model.safetensors", {"fc.weight": torch.zeros(2, 5)}, overwrite=True
    )
    with pytest.raises(ConversionError) as error:
        convert_directory(source, tmp_path / "out", BUNDLES)
    for text in ("does not fit Toy 1", "attn.query.bias", "Query.bias", "Linear.weight: needs (2, 4)", "(2, 5)"):
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_key_that_belongs_to_no_part_is_refused(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "in.safetensors", {**single_weights(), "control.weight": torch.zeros(1)})
    with pytest.raises(ConversionError, match="control.weight: belongs to no part of Toy 1"):
        convert_directory(tmp_path / "in.safetensors", tmp_path / "out", BUNDLES)


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        (("strange",), None, "looks like a stranger. Nothing was converted: no port reads that"),
        (("strange",), "toy", "looks like a stranger, not Toy 1"),
        (("model.net.last.weight",), "twin", "looks like Toy 1, not Twin. Nothing was converted. Convert it as toy."),
        (
            ("twin",),
            None,
            "looks like Twin or Twin base, which have the same weights. Say which it is: twin or twin-base",
        ),
        (("twin",), "toy", "looks like Twin or Twin base, not Toy 1"),
        (("other",), None, r"looks like no model that can be converted \(Toy 1, Twin, Twin base\); it holds 1 tensors"),
        (("strange",), "twn", 'No model is called "twn". Did you mean twin'),
        (("strange",), "stranger", 'No model is called "stranger"'),
    ],
)
def test_a_checkpoint_of_another_model_is_recognised(
    keys: tuple[str, ...], kind: str | None, message: str, tmp_path: Path
) -> None:
    write_state_dict(tmp_path / "in.safetensors", dict.fromkeys(keys, torch.zeros(1)))
    with pytest.raises(ConversionError, match=message):
        convert_directory(tmp_path / "in.safetensors", tmp_path / "out", BUNDLES, kind)


def test_models_with_the_same_weights_are_told_apart_by_the_scheduler(tmp_path: Path) -> None:
    bundles = {name: bundle for name, bundle in BUNDLES.items() if name.startswith("twin")}
    source = write_folder(tmp_path / "in")
    write_state_dict(
        source / "net" / "diffusion_pytorch_model.safetensors",
        {**net_weights(), "twin": torch.zeros(1)},
        overwrite=True,
    )
    for scheduler, wanted in (({"prediction_type": "v"}, "Twin"), ({}, "Twin base")):
        (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        recognising = {name: replace(b, recognises=lambda shapes: "net/twin" in shapes) for name, b in bundles.items()}
        with pytest.raises(ConversionError, match=f"does not fit {wanted}\\."):
            open_directory(source, recognising)


@pytest.mark.parametrize("layout", ["folder", "single file", "converted"])
def test_every_layout_is_opened_and_loaded(layout: str, tmp_path: Path) -> None:
    source = write_single_file(tmp_path / "in") if layout == "single file" else write_folder(tmp_path / "in")
    if layout == "converted":
        convert_directory(source, tmp_path / "out", BUNDLES)
        source = tmp_path / "out"
    model = open_directory(source, BUNDLES)
    assert (model.layout, model.kind) == (layout, "toy")
    assert set(model.parts) == {"net", "head"}
    assert model.parts["net"].config == {"width": 4}
    assert model.scheduler == {"_class_name": "Published" if layout == "single file" else "Own"}
    assert model.pipeline == {"safe": layout == "single file"}
    assert list(model.tokenizers) == ([] if layout == "single file" else ["tokenizer"])
    assert same(model.parts["net"].state_dict(), expected()["net"])
    assert same(dict(model.load("head").state_dict()), expected()["head"])
    half = model.load("net", dtype=torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    assert all(parameter.requires_grad for parameter in half.parameters())


def test_a_part_that_is_loaded_twice_gives_two_models(tmp_path: Path) -> None:
    model = open_directory(write_folder(tmp_path / "in"), BUNDLES)
    half, whole = model.load("net", dtype=torch.float16), model.load("net")
    assert half is not whole
    assert {weight.dtype for weight in half.state_dict().values()} == {torch.float16}
    assert same(dict(whole.state_dict()), expected()["net"])


def test_loaded_weights_of_a_file_are_mapped_and_not_copied(tmp_path: Path) -> None:
    convert_directory(write_folder(tmp_path / "in"), tmp_path / "out", BUNDLES)
    module = open_directory(tmp_path / "out", BUNDLES).load("net")
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split("-")[0] for line in maps if line.endswith("net.safetensors")]
    address = module.get_parameter("Query.weight").data_ptr()
    ends = [int(line.split()[0].split("-")[1], 16) for line in maps if line.endswith("net.safetensors")]
    assert any(int(start, 16) <= address < end for start, end in zip(mapped, ends, strict=True))


def test_a_converted_folder_that_is_damaged_is_refused(tmp_path: Path) -> None:
    convert_directory(write_folder(tmp_path / "in"), tmp_path / "out", BUNDLES)
    with pytest.raises(ConversionError, match="is Toy 1, not Twin"):
        open_directory(tmp_path / "out", BUNDLES, "twin")
    (tmp_path / "out" / "refiners.json").write_text('{"kind": "toy", "parts": {}}')
    with pytest.raises(FileFormatError, match="refiners.json lacks 'net'"):
        open_directory(tmp_path / "out", BUNDLES)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_directory(tmp_path / "nowhere", BUNDLES)


def test_a_known_value_that_upstream_does_not_read_either_is_told_and_left_out(tmp_path: Path) -> None:
    counts = Recomputed("counts", lambda shape: torch.arange(shape[0]), upstream_reads=False)
    keys = KeyMap({"fc": "Linear"}, ignore={"ids": counts})
    bundles = {"toy": replace(TOY, parts=(NET, replace(HEAD, keys=lambda config: keys)))}
    source = write_folder(tmp_path / "in")
    file = source / "the_head" / "diffusion_pytorch_model.safetensors"
    write_state_dict(file, {**read_state_dict(file), "ids": torch.tensor([1, 0])}, overwrite=True)
    result = convert_directory(source, tmp_path / "out", bundles)
    assert result.warnings == ("head: ids holds other values than those that count (counts): it is left out",)


def test_a_tensor_whose_value_is_not_the_known_one_leaves_nothing_behind(tmp_path: Path) -> None:
    keys = KeyMap({"fc": "Linear"}, ignore={"ids": Recomputed("counts", lambda shape: torch.arange(shape[0]))})
    bundles = {"toy": replace(TOY, parts=(NET, replace(HEAD, keys=lambda config: keys)))}
    source = write_folder(tmp_path / "in")
    file = source / "the_head" / "diffusion_pytorch_model.safetensors"
    weights = read_state_dict(file)
    write_state_dict(file, {**weights, "ids": torch.tensor([1, 0])}, overwrite=True)
    with pytest.raises(ConversionError, match="ids: is recomputed"):
        convert_directory(source, tmp_path / "out", bundles)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    write_state_dict(file, {**weights, "ids": torch.tensor([0, 1])}, overwrite=True)
    convert_directory(source, tmp_path / "out", bundles)
