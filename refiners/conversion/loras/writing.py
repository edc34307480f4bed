"""Writing LoRA files in the layout of diffusers, peft or kohya's scripts, under the names of the published code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from refiners.conversion.files import check_writable
from refiners.conversion.loras.file import LoraEntry, LoraFile
from refiners.conversion.loras.matching import model_paths
from refiners.conversion.loras.names import LoraNames, Named, names_of
from refiners.conversion.loras.peft_config import PEFT_TYPES, encode_config
from refiners.conversion.loras.peft_writing import config_of
from refiners.conversion.loras.reading import CONFIG, METADATA, WEIGHTS
from refiners.conversion.loras.roles import ALPHA, PEFT_PREFIX
from refiners.conversion.loras.storage import write_as_library
from refiners.conversion.problems import Problems
from refiners.errors import ConversionError, UnwritableFileError
from refiners.fluxion.adapters.lora.forms import with_axes
from refiners.fluxion.adapters.lora.spec import DeltaSpec

Specs = Mapping[str, DeltaSpec]
LAYOUTS = ("diffusers", "peft", "kohya")

_PEFT_ENDS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_ENDS = {**_PEFT_ENDS, "down": "lora_embedding_A", "up": "lora_embedding_B"}
_KOHYA_ENDS = {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
_LYCORIS = {"loha": "hada", "lokr": "lokr"}


def write_loras(
    path: Path | str,
    specs: LoraFile | Specs | Mapping[str, Specs],
    models: Named | Mapping[str, Named] | None = None,
    *,
    layout: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters to a file that diffusers, peft or kohya's scripts read.

    Receives:
        path: a safetensors file; for peft a folder, which gets adapter_model.safetensors and adapter_config.json.
        specs: the adapters by path, such as `LoraSet.specs()` gives, or those of each part by its name (`unet`,
            `text_encoder`, `text_encoder_2`); a `LoraFile` is written as it was read.
        models: the tree whose paths these are, or that of each part.
        layout: `diffusers`, `peft` or `kohya`.
        metadata: what the file shall say about itself.
        overwrite: whether files may be replaced.

    Raises:
        ConversionError: the layout has no place for them. Lists all.
        FileFormatError: the path is there already, or cannot be written to.

    Example:
        >>> import torch
        >>> from refiners.conversion import KeyMap
        >>> import refiners.fluxion.layers as fl
        >>> model = fl.Chain(fl.Linear(4, 3))
        >>> names = LoraNames.of(model, KeyMap({"fc": "Linear"}))
        >>> spec = DeltaSpec("lora", {"down": torch.ones(2, 4), "up": torch.ones(3, 2)})
        >>> list(lora_file({"": {"Linear": spec}}, {"": names}, layout="peft").tensors)
        ['base_model.model.fc.lora_A.weight', 'base_model.model.fc.lora_B.weight']
    """
    if isinstance(specs, LoraFile):
        file = specs
    else:
        parts, trees = _by_part(specs, models)
        file = lora_file(parts, trees, layout=layout, metadata=metadata)
    write_file(path, file, overwrite)


def write_file(path: Path | str, file: LoraFile, overwrite: bool = False) -> None:
    """Writes a file under its own keys: what was read comes out byte by byte.

    Raises:
        FileFormatError: the path is there already, or cannot be written to.
        ConversionError: the file was read with `strict=False`, and something of it is left out.
    """
    file.problems.raise_if_any(f"{file.title} was not read as a whole", "Nothing was written.")
    if file.layout != "peft" or file.config is None:
        write_as_library(path, file.tensors, file.metadata, file.header, overwrite)
        return
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableFileError(f"{folder} cannot be made into a folder: {error.strerror or error}.") from error
    check_writable(folder / WEIGHTS, overwrite)
    check_writable(folder / CONFIG, overwrite)
    write_as_library(folder / WEIGHTS, file.tensors, file.metadata, file.header, overwrite)
    (folder / CONFIG).write_text(encode_config(file.config), encoding="utf-8")


def lora_file(
    specs: Mapping[str, Specs],
    names: Mapping[str, LoraNames],
    *,
    layout: str,
    metadata: Mapping[str, str] | None = None,
) -> LoraFile:
    """The file that holds these adapters, in memory.

    Receives:
        specs: the adapters by path, of each part.
        names: what files call the layers of each part.
        layout, metadata: as in `write_loras`.

    Raises:
        ConversionError: the layout has no place for them. Lists all.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"No layout is called {layout!r}. There are {', '.join(LAYOUTS)}.")
    for part, adapters in specs.items():
        model_paths(adapters, names[part])
    kept = {key: text for key, text in (metadata or {}).items() if key not in (METADATA, "format")}
    if layout == "kohya":
        return LoraFile(layout, _kohya_entries(specs, names), kept)
    if layout == "peft":
        _check_peft(specs)
    else:
        _check_diffusers(specs)
    entries: dict[str, LoraEntry] = {}
    configs: dict[str, dict[str, Any]] = {}
    for part, adapters in specs.items():
        named = names[part]
        prefix = PEFT_PREFIX if layout == "peft" else f"{part}."
        for path, spec in adapters.items():
            entry = _peft_entry(prefix, part, named.names[path], spec, named.layers.get(path))
            entries[entry.name] = entry
        layers = {name: named.layers[path] for name, path in named.paths.items() if path in named.layers}
        configs[part] = config_of({named.names[path]: s for path, s in adapters.items()}, layers, named.title)
    kept = {"format": "pt", **kept}
    if layout == "peft":
        return LoraFile(layout, entries, kept, next(iter(configs.values())))
    if any(_needs_config(spec) for adapters in specs.values() for spec in adapters.values()):
        kept[METADATA] = encode_config(
            {f"{part}.{k}": v for part, config in configs.items() for k, v in config.items()}
        )
    return LoraFile(layout, entries, kept)


def _by_part(
    specs: Specs | Mapping[str, Specs], models: Named | Mapping[str, Named] | None
) -> tuple[dict[str, Specs], dict[str, LoraNames]]:
    if models is None:
        raise ConversionError("The paths of adapters say nothing without their tree. Give the model, or its names.")
    if isinstance(models, nn.Module | LoraNames):
        names = names_of(models)
        if not _is_specs(specs):
            raise ConversionError(f"There are several parts, {', '.join(specs)}, and one model. Give one for each.")
        return {names.part: specs}, {names.part: names}
    parts: dict[str, Specs] = {
        part: adapters for part, adapters in specs.items() if not isinstance(adapters, DeltaSpec)
    }
    absent = sorted({*specs} - {*models})
    if absent or len(parts) < len(specs):
        raise ConversionError(f"The specs are of {', '.join(specs)}, the models of {', '.join(models)}. Give the same.")
    return parts, {part: names_of(models[part]) for part in parts}


def _is_specs(specs: Specs | Mapping[str, Specs]) -> TypeGuard[Specs]:
    return all(isinstance(value, DeltaSpec) for value in specs.values())


def _check_peft(specs: Mapping[str, Specs]) -> None:
    if len(specs) != 1:
        raise ConversionError(
            f"A file of peft is for one model, and these LoRAs are for {', '.join(specs)}. Write one file for each."
        )
    methods = {spec.method for adapters in specs.values() for spec in adapters.values()}
    unknown = sorted(methods - {*PEFT_TYPES, "dora"})
    if unknown:
        raise ConversionError(
            f"These LoRAs cannot be written for peft, which has no {' and no '.join(unknown)}. Nothing was written. "
            "kohya's layout holds them."
        )


def _check_diffusers(specs: Mapping[str, Specs]) -> None:
    problems = Problems()
    for part, adapters in specs.items():
        if not part:
            problems.add("unexpected", "part", 'diffusers says which part each LoRA is for: give {"unet": …}')
        for path, spec in adapters.items():
            if spec.method not in ("lora", "dora"):
                problems.add("unexpected", path, f"is {spec.method}, which diffusers' Stable Diffusion does not read")
    problems.raise_if_any("The LoRAs cannot be written for diffusers", "Nothing was written. kohya's layout may do.")


def _needs_config(spec: DeltaSpec) -> bool:
    """Whether its strength is another than the tensors alone would give."""
    return spec.rank_stabilized or spec.alpha not in (None, float(spec.rank or 0))


def _peft_entry(prefix: str, part: str, name: str, spec: DeltaSpec, layer: nn.Module | None) -> LoraEntry:
    ends = _EMBEDDING_ENDS if isinstance(layer, nn.Embedding) else _PEFT_ENDS
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        spec = with_axes(spec, layer.weight.ndim)  # the only form that peft reads
    if spec.method in _LYCORIS:
        ends = {role: f"{_LYCORIS[spec.method]}_{role}" for role in spec.tensors}
    keys = {role: f"{prefix}{name}.{ends[role]}" for role in spec.tensors}
    return LoraEntry(prefix, part, name, spec, keys)


def _kohya_entries(specs: Mapping[str, Specs], names: Mapping[str, LoraNames]) -> dict[str, LoraEntry]:
    is_xl = "text_encoder_2" in specs or any(part == "unet" and bool(names[part].kohya) for part in specs)
    prefixes = {
        "": "lycoris_",
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if is_xl else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    problems = Problems()
    entries: dict[str, LoraEntry] = {}
    for part, adapters in specs.items():
        for path, spec in adapters.items():
            text = _not_for_kohya(spec, names[part].layers.get(path))
            if text or part not in prefixes:
                problems.add("unexpected", path, text or f"kohya's layout has no part {part!r}")
                continue
            entry = _kohya_entry(prefixes[part], part, names[part].joined_name(path), spec)
            if entry.name in entries:
                problems.add("twice", path, f"has the name {entry.name}, which another layer has too")
            entries[entry.name] = entry
    problems.raise_if_any("The LoRAs cannot be written for kohya", "Nothing was written. peft's layout may do.")
    return entries


def _not_for_kohya(spec: DeltaSpec, layer: nn.Module | None) -> str:
    if isinstance(layer, nn.Embedding):
        return "is for an embedding, which kohya's layout does not know"
    if spec.rank_stabilized:
        return "has a rank-stabilised strength, which kohya's layout does not know"
    if "up_bias" in spec.tensors:
        return "has a bias, which kohya's layout does not know"
    full = spec.method == "lokr" and {"w1", "w2"} <= spec.tensors.keys()
    if full and spec.alpha not in (None, spec.declared_rank):
        return "is a LoKr of two full matrices with an alpha, which LyCORIS does not count"
    return ""


def _kohya_entry(prefix: str, part: str, module: str, spec: DeltaSpec) -> LoraEntry:
    word = _LYCORIS.get(spec.method)
    keys = {
        role: f"{prefix}{module}.{_KOHYA_ENDS[role] if word is None else f'{word}_{role}'}" for role in spec.tensors
    }
    stored: dict[str, Tensor] = {}
    rank = spec.rank
    if rank is not None or spec.alpha is not None:
        keys[ALPHA] = f"{prefix}{module}.{ALPHA}"
        dtype = next(iter(spec.tensors.values())).dtype
        stored[ALPHA] = _as_tensor(float(rank or 1) if spec.alpha is None else spec.alpha, dtype)
    if (magnitude := spec.tensors.get("magnitude")) is not None:
        up = spec.tensors["up"]
        stored["magnitude"] = magnitude.reshape(up.shape[0], *([1] * (up.ndim - 1)))
    return LoraEntry(prefix, part, module, spec, keys, stored)


def _as_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """A number in a type that holds it: that of the weights, if it does."""
    kinds = (dtype, torch.float32, torch.float64)
    return next(
        t for t in (torch.tensor(alpha, dtype=kind) for kind in kinds) if float(t) == alpha or t.dtype == kinds[2]
    )
