"""Weights in files that `torch.save` wrote (`.bin`, `.ckpt`, `.pt`, `.pth`), read tensor by tensor. Code is never run.

Checkpoints of old hold more than weights: the state of the training, with objects of the library that ran it. They are
read as empty shells, which hold what they held and can do nothing. Any other object is refused.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from refiners.conversion.files import StoredWeights
from refiners.errors import FileFormatError, NotTensorsError, PickledModelError

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.")
_KEPT_MAPPED = 2**29


class _Shell:
    """Stands for an object of a trainer. It takes any state and has no method of its own."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs


class PickledWeights(StoredWeights):
    """The tensors of files that `torch.save` wrote, mapped into memory, and let go of after every half gigabyte.

    Receives:
        path: what the weights are called in messages.
        files: the file, or all shards.

    Raises:
        FileFormatError: a file is truncated or corrupted; it holds something else than tensors, or objects.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self._files = tuple(files)
        self._opened: dict[Path, Mapping[str, Tensor]] = {}
        self._touched = 0
        self._meta: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        for file in self._files:
            for key, tensor in self._open(file).items():
                if key in self._file_of:
                    raise FileFormatError(f"{path}: {key} is in {self._file_of[key].name} and in {file.name}.")
                self._file_of[key] = file
                self._meta[key] = tensor.to("meta")
        self._opened.clear()

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    def meta(self) -> dict[str, Tensor]:
        return self._meta

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._open(self._file_of[key])[key]
        self._touched += tensor.nbytes
        if self._touched > _KEPT_MAPPED:
            # What was read stays mapped until its file is let go of; the tensor itself keeps its file alive.
            self._opened.clear()
            self._touched = 0
        return tensor

    def _open(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._opened:
            self._opened[file] = _load(file)
        return self._opened[file]


def _load(file: Path) -> Mapping[str, Tensor]:
    """The tensors of one file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist (looked in {file.absolute().parent}).")
    try:
        with torch.serialization.safe_globals(cast(Any, _shells(file))):
            loaded: Any = _mapped(file)
    except pickle.UnpicklingError as error:
        raise PickledModelError(
            f"{file} holds Python objects, which could run code, or is no file of torch at all. Nothing was run. Ask "
            "for the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        size = file.stat().st_size
        raise FileFormatError(
            f"{file} is truncated or corrupted: found {size} bytes, and {error}. Download it again."
        ) from error
    return _tensors_of(file, loaded)


def _shells(file: Path) -> list[tuple[type[_Shell], str]]:
    """A shell for each class of a trainer that the file mentions."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return []  # not the format of today: loading it says what it is
    return [(type(name.rpartition(".")[2], (_Shell,), {}), name) for name in names if name.startswith(_TRAINERS)]


def _mapped(file: Path) -> Any:
    """What the file holds, mapped; files from before torch 1.6 cannot be, and are read whole."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _tensors_of(file: Path, loaded: Any) -> Mapping[str, Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), Mapping):  # pyright: ignore[reportUnknownMemberType] because a pickle can hold anything
        loaded = cast(Any, loaded)["state_dict"]
    if not isinstance(loaded, Mapping):
        raise NotTensorsError(f"{file} holds a {type(loaded).__name__}, not a dict of tensors.")
    entries = cast(Mapping[Any, Any], loaded)
    strangers = [
        repr(key) for key, value in entries.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strangers:
        raise NotTensorsError(
            f"{file} holds {len(strangers)} entries that are not a tensor under a string: {', '.join(strangers[:5])}. "
            "Save the tensors alone: torch.save(model.state_dict(), path)."
        )
    return {key: tensor.detach() for key, tensor in cast(Mapping[str, Tensor], entries).items()}
