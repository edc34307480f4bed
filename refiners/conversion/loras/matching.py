"""Which layer of a tree each adapter of a file is for: by name, through the key map of the port, never by order.

All that does not fit is told in one error, with the nearest names, and with the model that the file does fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from refiners.conversion.key_map import KeyMap
from refiners.conversion.loras.file import METHODS, LoraEntry, LoraFile
from refiners.conversion.loras.fitting import aligned, misfit
from refiners.conversion.loras.names import LoraNames, Named, names_of
from refiners.conversion.loras.peft_config import PeftConfig
from refiners.conversion.loras.recognition import recognise
from refiners.conversion.problems import Problems, hint
from refiners.errors import ConversionError
from refiners.fluxion.adapters.lora.spec import DeltaSpec


class LoraSpecs(dict[str, DeltaSpec]):
    """Adapters by the path of their layer in a tree, with what did not fit.

    Attributes:
        problems: what was left out and why; empty unless it was asked for with `strict=False`.
        entries: where each comes from in the file.
        configs: what the file's configurations say, by part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems = Problems()
        self.entries: dict[str, LoraEntry] = {}
        self.configs: Mapping[str, PeftConfig] = {}

    @property
    def left_out(self) -> dict[str, str]:
        """What was left out, by its name in the file, and why."""
        return {key: text for lines in self.problems.lines.values() for key, text in lines.items()}


def specs_for(
    file: LoraFile,
    model: Named,
    key_map: KeyMap | None = None,
    *,
    part: str | None = None,
    strict: bool = True,
    methods: Iterable[str] = METHODS,
) -> LoraSpecs:
    """The adapters of a file for the layers of a model, by path. Nothing is injected.

    Receives:
        file: what `read_loras` has read.
        model: the tree. One that is no tree of a registered family needs a key map.
        key_map: from the published keys to those of the tree.
        part: which part of the file is for this model; by default what its family says, or the only one.
        strict: False leaves out what does not fit, and tells it in `problems`.
        methods: which methods are wanted.

    Raises:
        ConversionError: names, shapes or values do not fit, or the file holds nothing for the model. Lists all.
    """
    names = names_of(model, key_map)
    found = _match(file, names, part, set(methods))
    if strict:
        found.problems.raise_if_any(
            f"{file.title} is no LoRA for {names.title}", _advice(file, found.problems, [names.title])
        )
    return found


def specs_for_parts(file: LoraFile, models: Mapping[str, Named], *, strict: bool = True) -> dict[str, LoraSpecs]:
    """The adapters of a file for several models, by part. What does not fit any of them is told in one error.

    Receives:
        file: what `read_loras` has read.
        models: the tree of each part, or the names of its layers.
        strict: as in `specs_for`; False leaves out the parts of the file of which there is no model, too.

    Raises:
        ConversionError: names, shapes or values do not fit, a part has no model, or none has. Lists all.
    """
    names = {part: names_of(model) for part, model in models.items()}
    problems = Problems()
    if not file.entries:
        file.problems.raise_if_any(f"{file.title} cannot be read as LoRAs", "Nothing was loaded.")
    # A file of one model says no part, and is for the first.
    given = {next(iter(models)): ""} if file.parts == ("",) else {part: part for part in file.parts}
    absent = [part for part in given if part not in models]
    found = {part: _match(file, names[part], held, set(METHODS)) for part, held in given.items() if part in models}
    for specs in found.values():
        problems.update(specs.problems)
    for part in absent:
        text = f"holds {len(file.of_part(part))} LoRAs for {part}, and the model has {', '.join(models)} only"
        problems.add("unexpected", part, text)
    if strict or not found:
        titles = [names[part].title for part in found]
        what = f"{file.title} is no LoRA for {' and '.join(titles) or 'the model'}"
        problems.raise_if_any(what, _advice(file, problems, titles))
    return {part: specs for part, specs in found.items() if specs}


def _match(file: LoraFile, names: LoraNames, part: str | None, methods: set[str]) -> LoraSpecs:
    """What fits, and in its problems what does not."""
    if not file.entries:
        file.problems.raise_if_any(f"{file.title} cannot be read as LoRAs", "Nothing was loaded.")
    found = LoraSpecs()
    found.configs = file.configs
    found.problems.update(file.problems)
    entries = file.of_part(_part(file, names, part))
    _check_methods(file, entries, methods)
    joined = file.layout == "kohya"
    for entry in entries:
        _place(entry, names, joined, found)
    _report_missing(file, entries, names, found)
    return found


def _part(file: LoraFile, names: LoraNames, part: str | None) -> str:
    """Which part of a file is for a model."""
    wanted = names.part if part is None else part
    if wanted in file.parts:
        return wanted
    if part is None and (file.parts == ("",) or (not wanted and len(file.parts) == 1)):
        return file.parts[0]
    # Of the second text encoder, where it is the only one, files say `text_encoder` too.
    held = ", ".join(map(repr, file.parts)) or "none"
    looks = recognise(file)
    looks_like = f" It looks like a LoRA of {looks}." if looks else ""
    raise ConversionError(
        f"{file.title} holds nothing for {names.title}: its parts are {held}, none is {wanted!r}.{looks_like} "
        "Nothing was loaded. If one of them is meant, say which with part=."
    )


def _check_methods(file: LoraFile, entries: list[LoraEntry], methods: set[str]) -> None:
    others = {entry.spec.method for entry in entries} - methods
    if others:
        raise ConversionError(
            f"{file.title} holds {' and '.join(sorted(others))}, which inject_loras does not take. Nothing was loaded. "
            "Inject it with refiners.conversion.loras.inject_tuning(model, file)."
        )


def _place(entry: LoraEntry, names: LoraNames, joined: bool, found: LoraSpecs) -> None:
    problems = found.problems
    paths = names.find(entry.module, joined)
    if not paths:
        text = "the model has no layer of that name"
        problems.add("unexpected", entry.name, text + _nearest(entry.module, names, joined, problems))
        return
    if len(paths) > 1:
        problems.add("ambiguous", entry.name, f"could be {' or '.join(paths)}")
        return
    path = paths[0]
    if path in found.entries:
        problems.add("twice", entry.name, f"is for {path}, as {found.entries[path].name} is")
        return
    text = misfit(entry.spec, names.layers[path]) if path in names.layers else ""
    if text:
        problems.add("shape", entry.name, text)
        return
    for text in entry.problems():
        problems.add("value", entry.name, text)
        return
    found.entries[path] = entry
    tensors = {role: aligned(tensor) for role, tensor in entry.spec.tensors.items()}
    found[path] = replace(entry.spec, tensors=tensors)


def _nearest(name: str, names: LoraNames, joined: bool, problems: Problems) -> str:
    """The nearest name, for as many as are shown."""
    return hint(name, names.spellings(joined)) if len(problems.keys("unexpected")) < 12 else ""


def _report_missing(file: LoraFile, entries: list[LoraEntry], names: LoraNames, found: LoraSpecs) -> None:
    """The layers that peft's configuration names, and that the file does not hold."""
    config = file.configs.get(entries[0].part) if entries else None
    if config is None or config.targets is None or "unexpected" in found.problems.lines:
        return  # a key that is not understood may be the one that is missed
    held = {path for entry in entries for path in names.find(entry.module, file.layout == "kohya")}
    for name, path in names.paths.items():
        if path not in held and config.is_target(name) and isinstance(names.layers.get(path), nn.Module):
            text = "is a target of the configuration, and the file holds nothing for it"
            found.problems.add("missing", entries[0].prefix + name, text)


def _advice(file: LoraFile, problems: Problems, titles: list[str]) -> str:
    looks = "" if set(problems.lines) == {"value"} else recognise(file)
    if looks and not set(looks.split(", ")) <= set(titles):
        return f"It looks like a LoRA of {looks}. Nothing was loaded."
    return "Nothing was loaded. Check that it was trained on this model; strict=False leaves out what does not fit."


def model_paths(specs: Mapping[str, DeltaSpec], names: LoraNames) -> None:
    """Checks that specs are for layers whose names in files are known.

    Raises:
        ConversionError: some are not. Lists all.
    """
    problems = Problems()
    for path in specs:
        if path not in names.names:
            problems.add("unexpected", path, "has no name in files" + hint(path, list(names.names)))
    problems.raise_if_any(f"The LoRAs cannot be written as those of {names.title}", "Nothing was written.")
