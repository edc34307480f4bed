"""Files of published weights: one safetensors file, or several shards with an index, read without copying.

`read_state_dict` maps all tensors into memory: nothing is read before it is used. `WeightFiles` reads them one by one
and maps nothing, so that what has been used takes no memory. A file is written beside its path and renamed at the end,
so that whoever looks sees all of it or none.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refiners.conversion.header import Header
from refiners.conversion.lazy import LazyWeights
from refiners.errors import FileFormatError
from refiners.fluxion.utils import load_from_safetensors, save_to_safetensors


class _ExistsError(FileFormatError, FileExistsError):
    """A path that is there already and was not to be replaced."""


class _NoFolderError(FileFormatError, FileNotFoundError):
    """A path in a folder that is not there."""


class StoredWeights(LazyWeights):
    """Tensors in files, read one by one when they are asked for."""

    path: Path

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"


class WeightFiles(StoredWeights):
    """The tensors of a published model in safetensors files, each copied out of its file when it is asked for.

    Receives:
        path: a safetensors file, an index of shards (`*.safetensors.index.json`), or a folder that holds one of them.

    Raises:
        FileFormatError: a file is truncated, corrupted or of another format; shards and index do not agree; a folder
            holds several models. Lists all that is wrong with an index.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._headers: dict[Path, Header] = {}
        self._file_of: dict[str, Path] = {}
        self._meta: dict[str, Tensor] = {}
        found = _find(self.path)
        if not is_index(found):
            self._read_header(found)
            return
        index = _read_index(found)
        for shard in dict.fromkeys(index.values()):
            self._read_header(found.parent / shard)
        _check_index(found, index, {key: file.name for key, file in self._file_of.items()})

    def _read_header(self, file: Path) -> None:
        header = read_header(file)
        self._headers[file] = header
        self._meta |= header.meta()
        for key in header.places:
            if key in self._file_of:
                raise FileFormatError(
                    f"{self.path}: {key} is in {self._file_of[key].name} and in {file.name}. Download it again."
                )
            self._file_of[key] = file

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._headers)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the files say about themselves."""
        return {name: text for header in self._headers.values() for name, text in header.metadata.items()}

    def meta(self) -> dict[str, Tensor]:
        return self._meta

    def __getitem__(self, key: str) -> Tensor:
        file = self._file_of[key]
        with file.open("rb") as opened:
            return self._headers[file].read_tensor(opened, key)


def open_state_dict(path: Path | str) -> WeightFiles:
    """The tensors of a published model, read one by one when they are asked for. See `WeightFiles`."""
    return WeightFiles(path)


def read_state_dict(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a published model; on the CPU they are mapped into memory, elsewhere copied once.

    Receives:
        path: a safetensors file, an index of shards (`*.safetensors.index.json`), or a folder that holds one of them.
        device: where the tensors shall be.

    Raises:
        FileFormatError: as `WeightFiles`.
        FileNotFoundError: there is no such file.
    """
    tensors: dict[str, Tensor] = {}
    for file in WeightFiles(path).files:
        tensors |= load_from_safetensors(file, device)
    return tensors


def write_state_dict(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors to a safetensors file that appears whole or not at all.

    Receives:
        path: where to write.
        tensors: what to write. Tensors that share memory are each written in full.
        metadata: what the file shall say about itself.
        overwrite: whether a file of that name may be replaced.

    Raises:
        FileFormatError: (a FileExistsError) the path is there already; (an OSError) it cannot be written to.
        InputError: (a TypeError) a value is no tensor with values.
    """
    check_writable(path, overwrite)
    save_to_safetensors(path, tensors, metadata)


def check_writable(path: Path | str, overwrite: bool = False) -> None:
    """Checks a path before the work whose result goes there.

    Raises:
        FileFormatError: (a FileExistsError) the path is a folder, or is there already; (an OSError) its folder is not.
    """
    target = Path(path)
    if target.is_dir():
        raise _ExistsError(f"{path} is a folder. Give the path of the file to write.")
    if target.exists() and not overwrite:
        raise _ExistsError(f"{path} exists. Nothing was written. Choose another path, or allow it to be overwritten.")
    if not target.absolute().parent.is_dir():
        raise _NoFolderError(f"{path} cannot be written: the folder {target.parent} does not exist. Create it first.")


def read_header(file: Path) -> Header:
    """The header of a safetensors file; what is no such file is told apart.

    Raises:
        FileFormatError: the file is truncated, corrupted or of another format.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        load_from_safetensors(file)  # raises: it says what is wrong with the path
    try:
        return Header.read(file)
    except FileFormatError as error:
        if "expected" not in str(error) and "twice" not in str(error):
            load_from_safetensors(file)  # raises: it says what the file is instead
        raise


def is_index(file: Path) -> bool:
    """Whether this is the name of an index of shards, that of a variant (`.index.fp16.json`) included."""
    return file.suffix == ".json" and (".index." in file.name)


def _find(path: Path) -> Path:
    """The file that a path means: itself, or the only model of a folder."""
    if not path.is_dir():
        return path
    indexes = [file for file in sorted(path.glob("*.safetensors*.json")) if is_index(file)]
    shards = {shard for index in indexes for shard in _read_index(index).values()}
    models = indexes + [file for file in sorted(path.glob("*.safetensors")) if file.name not in shards]
    if len(models) == 1:
        return models[0]
    if not models:
        raise FileFormatError(
            f"{path} holds no safetensors file and no safetensors.index.json. Give the folder that holds one model's "
            "weights."
        )
    names = ", ".join(model.name for model in models)
    raise FileFormatError(f"{path} holds several models: {names}. Give the path of one of them.")


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        shards = {str(key): str(shard) for key, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f'{path} is no index of shards, a JSON object with a "weight_map" ({error!r}). Download it again.'
        ) from error
    strangers = sorted({shard for shard in shards.values() if Path(shard).name != shard or shard in ("", ".", "..")})
    absent = sorted({shard for shard in shards.values() if not (path.parent / shard).is_file()} - set(strangers))
    if strangers:
        raise FileFormatError(f"{path} names shards that are not in its own folder: {', '.join(strangers)}.")
    if absent:
        raise FileFormatError(f"{path} names shards that are not there: {', '.join(absent)}. Download them too.")
    return shards


def _check_index(path: Path, index: Mapping[str, str], found: Mapping[str, str]) -> None:
    wrong = [f"{key} is not in {shard}" for key, shard in index.items() if found.get(key) != shard]
    wrong += [f"{key} in {shard} is not in the index" for key, shard in found.items() if key not in index]
    if wrong:
        lines = "\n  ".join(wrong[:12]) + (f"\n  … and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise FileFormatError(f"{path} does not agree with its shards:\n  {lines}\nDownload all of them again.")
