"""A published or converted model on disk, opened: its parts with their configurations and weights, nothing read yet.

Three layouts are told apart:

    folder        one sub-folder a part with config.json and weights, as diffusers publishes models
    single file   all weights in one file under the names of the original code, without a configuration
    converted     what `refiners convert` writes: one file a part in the port's own keys, and refiners.json
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refiners.conversion.bundle import Bundle, Part
from refiners.conversion.config import read_config
from refiners.conversion.files import StoredWeights, WeightFiles
from refiners.conversion.lazy import ConvertedWeights, LazyWeights, WeightsBelow, WeightsInMemory
from refiners.conversion.patterns import Pattern, PatternIndex
from refiners.conversion.problems import Problems
from refiners.conversion.recognise import Bundles, find_bundle, looks_alone, recognise
from refiners.conversion.variants import open_weights
from refiners.errors import ConversionError, FileFormatError
from refiners.fluxion.layers.loading import adopt_weights
from refiners.fluxion.utils import load_from_safetensors

Layout = Literal["folder", "single file", "converted"]
MANIFEST = "refiners.json"
_INDEX = "model_index.json"


@dataclass(frozen=True)
class OpenedPart:
    """One part of a model on disk.

    Attributes:
        part: what it is.
        config: its configuration.
        stored: the files that hold its weights.
        weights: its weights in the port's keys, read one by one when they are asked for.
    """

    part: Part
    config: Mapping[str, Any]
    stored: StoredWeights
    weights: LazyWeights
    # The port that was built to check the keys: whoever loads first has it.
    _checked: list[nn.Module] = field(default_factory=list[nn.Module], repr=False)

    def build(self) -> nn.Module:
        """The port of this configuration, on torch's default device."""
        return self.part.build(self.config)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights in the port's keys, mapped into memory: nothing is read before it is used."""
        mapped = self.stored
        if isinstance(mapped, WeightFiles):
            files = [load_from_safetensors(file) for file in mapped.files]
            mapped = WeightsInMemory({key: tensor for tensors in files for key, tensor in tensors.items()})
        return {key: tensor.contiguous() for key, tensor in self.weights.over(mapped).items()}

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The port with its weights; on the CPU, and in the type of the file, they are mapped and not copied.

        Receives:
            device: where the weights shall be.
            dtype: the type of its floating-point weights; that of the file by default.

        Raises:
            ConversionError: the weights do not fit the port.
        """
        module = self._checked.pop() if self._checked else _on_meta(self.part, self.config)
        tensors = {
            key: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for key, tensor in self.state_dict().items()
        }
        adopt_weights(module, tensors, source=str(self.stored.path), own_dtype=False)
        return module


@dataclass(frozen=True)
class OpenedModel:
    """A model on disk.

    Attributes:
        path: where it is.
        layout: how it is laid out.
        bundle: what it is.
        parts: its parts by name.
        scheduler: its scheduler_config.json, or the published one.
        pipeline: what its model_index.json says beside the parts.
        tokenizers: the folders of its tokenizers that are there.
        left_out: what the path holds and no part uses, each with the reason.
    """

    path: Path
    layout: Layout
    bundle: Bundle
    parts: Mapping[str, OpenedPart]
    scheduler: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    tokenizers: Mapping[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> str:
        """The name of the bundle."""
        return self.bundle.name

    def load(self, part: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The port of one part with its weights. See `OpenedPart.load`."""
        return self.parts[part].load(device, dtype)


def open_directory(
    path: Path | str,
    bundles: Bundles,
    kind: str | None = None,
    variant: str | None = None,
    configs: Path | str | None = None,
) -> OpenedModel:
    """Opens a model on disk, whatever its layout. Keys, shapes and configurations are checked, no weight is read.

    Receives:
        path: a folder in either layout, or a single file.
        bundles: what it may be.
        kind: the name of the bundle; recognised from keys and shapes by default.
        variant: which of several sets of weights in a folder to take, such as `fp16`.
        configs: for a single file of other sizes than the published ones, a folder with `unet/config.json` and so on.

    Raises:
        ConversionError: the weights are those of another model, or do not fit. Lists all that does not.
        FileFormatError: a file is truncated, corrupted or of another format; parts or shards are missing.
        FileNotFoundError: there is no such path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked in {path.absolute().parent}).")
    if (path / MANIFEST).is_file():
        return _open_converted(path, bundles, kind)
    folders = {part.folder for bundle in bundles.values() for part in bundle.parts}
    if (path / _INDEX).is_file() or any((path / folder).is_dir() for folder in folders):
        return _open_folder(path, bundles, kind, variant)
    return _open_single_file(path, bundles, kind, configs)


def _open_converted(path: Path, bundles: Bundles, kind: str | None) -> OpenedModel:
    manifest = read_config(path / MANIFEST)
    try:
        bundle = find_bundle(bundles, manifest["kind"])
        entries = {part.name: manifest["parts"][part.name] for part in bundle.parts}
        scheduler, pipeline, tokenizers = manifest["scheduler"], manifest["pipeline"], manifest["tokenizers"]
        files = {name: (path / entry["file"], entry["config"]) for name, entry in entries.items()}
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path / MANIFEST} lacks {error}. Convert the model again.") from error
    if kind not in (None, bundle.name):
        raise ConversionError(f"{path} is {bundle.title}, not {find_bundle(bundles, kind or '').title}.")
    parts: dict[str, OpenedPart] = {}
    for part in bundle.parts:
        file, config = files[part.name]
        stored = WeightFiles(file)
        parts[part.name] = OpenedPart(part, config, stored, stored)
    folders = {name: path / name for name in tokenizers}
    return OpenedModel(path, "converted", bundle, parts, scheduler, pipeline, folders)


def _open_folder(path: Path, bundles: Bundles, kind: str | None, variant: str | None) -> OpenedModel:
    stored: dict[str, StoredWeights] = {}
    for folder in dict.fromkeys(part.folder for bundle in bundles.values() for part in bundle.parts):
        if (path / folder).is_dir():
            stored[folder] = open_weights(path / folder, variant)
    shapes = {f"{folder}/{key}": shape for folder, weights in stored.items() for key, shape in weights.shapes.items()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    found = read_config(scheduler) if scheduler.is_file() else None
    bundle = recognise(bundles, shapes, path, kind, None if found is None else found.get("prediction_type", "epsilon"))
    absent = [part.folder for part in bundle.parts if part.folder not in stored]
    if absent:
        raise FileFormatError(f"{path} lacks the folders {', '.join(absent)} of {bundle.title}. Download them too.")
    index = read_config(path / _INDEX) if (path / _INDEX).is_file() else {}
    configs = {part.name: read_config(path / part.folder / "config.json") for part in bundle.parts}
    own = {part.name: stored[part.folder] for part in bundle.parts}
    parts = _parts(bundle, path, configs, own, _published, bundles)
    used = {"scheduler", *(part.folder for part in bundle.parts), *bundle.tokenizers}
    left_out = {
        name: "no part of the port"
        for name, entry in index.items()
        if name not in used and isinstance(entry, list) and entry != [None, None]
    }
    return OpenedModel(
        path,
        "folder",
        bundle,
        parts,
        bundle.scheduler if found is None else found,
        {name: entry for name, entry in index.items() if not isinstance(entry, list) and not name.startswith("_")},
        {name: path / name for name in bundle.tokenizers if (path / name).is_dir()},
        left_out,
    )


def _open_single_file(path: Path, bundles: Bundles, kind: str | None, configs: Path | str | None) -> OpenedModel:
    stored = open_weights(path)
    bundle = recognise(bundles, stored.shapes, path, kind)
    read = {
        part.name: part.config if configs is None else read_config(Path(configs) / part.folder / "config.json")
        for part in bundle.parts
    }
    parts = _parts(bundle, path, read, {part.name: stored for part in bundle.parts}, _below)
    left_out = _left_out(bundle, stored)
    return OpenedModel(path, "single file", bundle, parts, bundle.scheduler, bundle.pipeline, {}, left_out)


Chain = Callable[[Part, Mapping[str, Any], nn.Module, LazyWeights], LazyWeights]


def _parts(
    bundle: Bundle,
    path: Path,
    configs: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, StoredWeights],
    chain: Chain,
    sights: Bundles | None = None,
) -> dict[str, OpenedPart]:
    """All parts, or one error that says what does not fit in any of them.

    Receives:
        sights: given, the weights of a part that does not fit are looked at: they may be another part's.
    """
    parts: dict[str, OpenedPart] = {}
    problems: list[str] = []
    for part in bundle.parts:
        try:
            parts[part.name] = _part(part, configs[part.name], stored[part.name], chain)
        except ConversionError as error:
            stranger = _stranger(part, stored[part.name], sights or {})
            problems.append(f"{part.name}: {stranger or error}")
    if problems:
        advice = (
            "\nIf its sizes are not the published ones, give their configurations: --config DIR, with unet/config.json "
            "and so on."
        )
        raise ConversionError(
            f"{path} does not fit {bundle.title}.\n" + "\n".join(problems) + (advice if chain is _below else "")
        )
    return parts


def _stranger(part: Part, stored: StoredWeights, sights: Bundles) -> str:
    """What is wrong with a folder that holds the weights of something else than a part; else the empty text."""
    looks = looks_alone(sights, stored.shapes)
    if not looks:
        return ""
    with torch.device("meta"):
        published = part.keys(part.config).invert(part.build(part.config).state_dict())
    expected = looks_alone(sights, {key: tensor.shape for key, tensor in published.items()})
    if looks == expected:
        return ""
    return f"{stored.path} looks like {looks}, not {expected or 'a ' + part.name}. Put the published files there."


def _part(part: Part, config: Mapping[str, Any], stored: StoredWeights, chain: Chain) -> OpenedPart:
    port = _on_meta(part, config)
    return OpenedPart(part, config, stored, chain(part, config, port, stored), [port])


def _on_meta(part: Part, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return part.build(config)


def _published(part: Part, config: Mapping[str, Any], port: nn.Module, weights: LazyWeights) -> LazyWeights:
    return ConvertedWeights(weights, part.keys(config), port)


def _below(part: Part, config: Mapping[str, Any], port: nn.Module, weights: LazyWeights) -> LazyWeights:
    """The port's weights from those of a single file: brought to the published names first."""
    if part.single_file is None:
        raise ConversionError("no single file holds it. Give the folder that the model was published in.")
    keys = part.keys(config)
    published = keys.invert(port.state_dict())
    prefix = _prefix(part, weights)
    own = WeightsBelow(weights, prefix)
    if not own:
        raise ConversionError(f"no key begins with {' or '.join(map(repr, part.prefixes))}: it is not in this file.")
    return ConvertedWeights(ConvertedWeights(own, part.single_file(config), published), keys, port)


def _prefix(part: Part, weights: LazyWeights) -> str:
    found = [prefix for prefix in part.prefixes if any(key.startswith(prefix) for key in weights.meta())]
    return found[0] if found else part.prefixes[0]


def _left_out(bundle: Bundle, weights: LazyWeights) -> dict[str, str]:
    """The keys of a single file that belong to no part, with the reasons.

    Raises:
        ConversionError: some have no reason.
    """
    prefixes = tuple(_prefix(part, weights) for part in bundle.parts)
    reasons: PatternIndex[str] = PatternIndex()
    for pattern, reason in bundle.ignore.items():
        reasons.add(Pattern(pattern), reason)
    left_out: dict[str, str] = {}
    problems = Problems()
    for key in weights.meta():
        if key.startswith(prefixes):
            continue
        if matches := reasons.find(key):
            left_out[key] = matches[0].value
        else:
            problems.add("unexpected", key, f"belongs to no part of {bundle.title}")
    problems.raise_if_any(f"The weights are not those of {bundle.title} alone", "Nothing was converted.")
    return left_out
