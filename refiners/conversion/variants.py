"""Which file of a folder holds the weights: one or several shards, safetensors or pickle, of this variant or that.

A published folder may hold the same weights several times: `model.safetensors`, `model.fp16.safetensors`,
`pytorch_model.bin`. Safetensors goes before pickle; what stands behind the first dot is the variant.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiners.conversion.files import StoredWeights, WeightFiles
from refiners.conversion.pickled import SUFFIXES, PickledWeights
from refiners.errors import FileFormatError

_SHARD = r"(?:-\d{5}-of-\d{5})?"
_STEM = r"(?:diffusion_pytorch_model|pytorch_model|model)"
_WEIGHTS = re.compile(
    rf"{_STEM}(?P<shard>-\d{{5}}-of-\d{{5}})?(?:\.(?P<variant>[\w-]+?)(?P<late>{_SHARD}))?\.(?P<kind>safetensors|bin)"
)
_INDEX = re.compile(
    rf"{_STEM}(?:\.(?P<early>\w+))?\.(?P<kind>safetensors|bin)(?:\.(?P<old>\w+))?\.index(?:\.(?P<variant>\w+))?\.json"
)


@dataclass(frozen=True)
class _Candidate:
    path: Path
    variant: str
    kind: str
    sharded: bool


def open_weights(path: Path | str, variant: str | None = None) -> StoredWeights:
    """The tensors of published weights, whatever they are stored as, each read when it is asked for.

    Receives:
        path: a safetensors file or a pickle, an index of shards, or a folder that holds the weights of one model.
        variant: which of several sets of weights to take, such as `fp16`. A folder that has no such set gives its
            plain one.

    Raises:
        FileFormatError: a file is truncated, corrupted or of another format; shards are missing; a folder holds no
            weights, or several models or variants of which none is asked for.
        FileNotFoundError: there is no such path.
    """
    path = Path(path)
    found = find_weights(path, variant) if path.is_dir() else path
    if found.suffix in SUFFIXES:
        return PickledWeights(found, [found])
    if found.suffix == ".json" and ".bin." in found.name:
        return PickledWeights(found, _shards(found))
    return WeightFiles(found)


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The file, or the index of shards, that holds the weights of a folder.

    Raises:
        FileFormatError: there are none, or several variants of which none is asked for.
    """
    candidates = [candidate for file in sorted(folder.iterdir()) if (candidate := _read(file)) is not None]
    candidates = [c for c in candidates if not c.sharded or c.path.suffix == ".json"]
    if not candidates:
        return folder  # WeightFiles knows other names, and says what it misses
    variants = {candidate.variant for candidate in candidates}
    wanted = variant if variant in variants else ""
    if wanted not in variants:
        if variant is not None or len(variants) > 1:
            asked = f'not of the variant "{variant}"' if variant is not None else "which one is not said"
            raise FileFormatError(
                f"{folder} holds the variants {', '.join(sorted(variants))}, {asked}. Name one of them: --variant "
                f"{min(variants)}."
            )
        (wanted,) = variants
    chosen = [candidate for candidate in candidates if candidate.variant == wanted]
    chosen = [candidate for candidate in chosen if candidate.kind == "safetensors"] or chosen
    if len(chosen) > 1:
        names = ", ".join(candidate.path.name for candidate in chosen)
        raise FileFormatError(f"{folder} holds several models: {names}. Give the path of one of them.")
    return chosen[0].path


def _read(file: Path) -> _Candidate | None:
    if (found := _INDEX.fullmatch(file.name)) is not None:
        variant = found["variant"] or found["old"] or found["early"] or ""
        return _Candidate(file, variant, found["kind"], sharded=True)
    if (found := _WEIGHTS.fullmatch(file.name)) is not None:
        sharded = bool(found["shard"] or found["late"])
        return _Candidate(file, found["variant"] or "", found["kind"], sharded)
    return None


def _shards(index: Path) -> list[Path]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        weights: Mapping[str, str] = content["weight_map"]
        shards = [index.parent / name for name in dict.fromkeys(weights.values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{index} is no index of shards ({error!r}). Download it again.") from error
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise FileFormatError(f"{index} names shards that are not there: {', '.join(absent)}. Download them too.")
    return shards
