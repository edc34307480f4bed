"""Which published model a LoRA file is for, told from the names and shapes of all its layers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from refiners.conversion.loras.file import LoraEntry, LoraFile
from refiners.conversion.loras.fitting import misfit
from refiners.conversion.loras.names import LoraNames, names_of, registered

# Names that only models have that no family here is a port of.
_BY_SIGHT = {
    "Flux": ("double_blocks", "single_transformer_blocks", "single_blocks"),
    "Stable Diffusion 3": ("joint_blocks", "context_embedder", "add_k_proj"),
    "a language model": ("model.layers.0.self_attn.q_proj", "gate_proj"),
}


@dataclass(frozen=True)
class Candidate:
    """A published model that a part of a file may be for.

    Attributes:
        title: what it is.
        kind: what all sizes of it are.
        names: what files call its layers.
        named: how many layers of the file it has by name.
        fitting: how many of them have the shape that the file is for.
    """

    title: str
    kind: str
    names: LoraNames
    named: int
    fitting: int


def recognise(file: LoraFile) -> str:
    """What a file is for, in words: the model of each part; "" if no known model fits.

    The families whose packages were imported are tried, at their published sizes.
    """
    titles = dict.fromkeys(recognise_part(file, part) for part in sorted(file.parts, reverse=True))
    return ", ".join(title for title in titles if title) or by_sight(file)


def recognise_part(file: LoraFile, part: str) -> str:
    """The published model that one part of a file fits: by names and shapes, else by names; "" if none does."""
    found = models_of(file, part)
    if found:
        return " or ".join(dict.fromkeys(candidate.title for candidate in found))
    count = len(file.of_part(part))
    by_name = [candidate for candidate in _candidates(file, part) if candidate.named == count]
    titles = list(dict.fromkeys(candidate.title for candidate in by_name))
    if len(titles) > 1:
        titles = list(dict.fromkeys(candidate.kind for candidate in by_name))
    return f"{' or '.join(titles)} in another size" if titles else ""


def models_of(file: LoraFile, part: str) -> list[Candidate]:
    """The published models that a part of a file fits by names and shapes, those of that very part first."""
    candidates = _candidates(file, part)
    count = len(file.of_part(part))
    found = [candidate for candidate in candidates if candidate.fitting == count]
    if not found:
        # A few layers may be of another kind; but what fits half is no evidence, since many models share shapes.
        best = max(candidates, key=lambda candidate: candidate.fitting, default=None)
        found = [best] if best is not None and best.fitting * 10 >= count * 9 else []
    return sorted(found, key=lambda candidate: candidate.names.part != part)


def _candidates(file: LoraFile, part: str) -> list[Candidate]:
    entries = file.of_part(part)
    return [
        _candidate(title, target.title, _names(title, build), entries, file.layout == "kohya")
        for target in registered()
        for title, build in target.published.items()
        if not part or _is_encoder(part) == _is_encoder(_names(title, build).part)
    ]


def _is_encoder(part: str) -> bool:
    return part.startswith("text_encoder")


def _candidate(title: str, kind: str, names: LoraNames, entries: Iterable[LoraEntry], joined: bool) -> Candidate:
    named = fitting = 0
    for entry in entries:
        paths = names.find(entry.module, joined)
        if len(paths) == 1:
            named += 1
            fitting += not misfit(entry.spec, names.layers[paths[0]])
    return Candidate(title, kind, names, named, fitting)


@cache
def _names(title: str, build: Callable[[], nn.Module]) -> LoraNames:
    with torch.device("meta"):
        return names_of(build())


def by_sight(file: LoraFile) -> str:
    """A model of which no family is here, known by the names of its layers; "" if it is not known either."""
    modules = [entry.module for entry in file.entries.values()]
    return next((title for title, signs in _BY_SIGHT.items() if any(s in m for m in modules for s in signs)), "")
