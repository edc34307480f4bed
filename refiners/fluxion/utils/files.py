"""Files of tensors.

The format is safetensors: a header, then bytes that can be mapped into memory as they are and cannot run code. Loading
maps the file: nothing is read before it is used, and nothing is copied before it is written to. Saving writes beside
the target and renames at the end: whoever looks sees the old file or the new one, never a half.
"""

import os
import pickle
import secrets
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (its type is partial)
from torch import Tensor

from refiners.errors import FileFormatError, InputError, NotTensorsError, PickledModelError, UnwritableFileError


def load_from_safetensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Writing to a tensor changes neither the file nor what others load from it. On another device than the CPU each
    tensor is copied once, from the mapping to the device.

    Raises:
        FileFormatError: (a ValueError) the file is truncated, corrupted, or of another format.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        opened: Any = safe_open(path, framework="pt", device=str(device))
        with opened as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping, in spite of its keys)
    except SafetensorError as error:
        raise FileFormatError(f"{path} cannot be read as safetensors: {_diagnose(path, error)}") from error


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the path of a file in it.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked in {path.absolute().parent}).")


def _diagnose(path: Path, error: Exception) -> str:
    """What a file that is not safetensors is, and what to do about it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if size == 0:
        return "it is empty. Download or save it again."
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return (
            "it is a pickle, as torch.save writes. Read it with refiners.fluxion.utils.load_tensors() and write its "
            "tensors with save_to_safetensors()."
        )
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the file itself. Fetch the file with `git lfs pull`."
    if start.lstrip()[:1] == b"<":
        return "it is a web page, probably an error of the server. Download it again."
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and length + 8 > size:
        return f"it is truncated: its header alone needs {length + 8} bytes, it has {size}. Download it again."
    if len(start) > 8 and start[8:9] == b"{":
        return f"it is truncated or corrupted ({error}; it has {size} bytes). Download or save it again."
    return f"it is of another format, or corrupted at its start ({error}; it has {size} bytes)."


def load_tensors(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote. Code in it is never run.

    Raises:
        FileFormatError: the file is truncated or corrupted; it holds something else than a dict of tensors (then also
            an AssertionError); it holds Python objects, such as a whole model (then also an UnpicklingError).
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        loaded: Any = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise PickledModelError(
            f"{path} holds Python objects, which could run code, or is no file of torch at all. Save the tensors "
            "alone: torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileFormatError(f"{path} is truncated or corrupted: {error}. Download or save it again.") from error
    if not isinstance(loaded, dict):
        raise NotTensorsError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors.")
    tensors = cast(dict[Any, Any], loaded)
    strangers = {key: value for key, value in tensors.items() if not _is_entry(key, value)}
    if strangers:
        shown = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(strangers.items())[:5])
        raise NotTensorsError(
            f"{path} holds a dict of which {len(strangers)} of {len(tensors)} entries are not a tensor under a string: "
            f"{shown}. Load it with torch.load and pick the dict of tensors in it."
        )
    return cast(dict[str, Tensor], tensors)


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def save_to_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, replacing the file of that name only once all is written.

    The format knows no shared memory: tensors that overlap are each written in full. Tensors with gaps are written
    without them.

    Raises:
        InputError: (a TypeError) a key that is no string, a value that is no tensor or has no values to write.
        FileFormatError: (an OSError) the path cannot be written to. A file that was there is untouched.
    """
    prepared = _prepare(tensors)
    entries: list[Any] = [item for pair in (metadata or {}).items() for item in pair]
    if not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"The metadata of a safetensors file maps strings to strings, got {metadata!r}.")
    # A link stays one: what it points at is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # safetensors gives its files to their owner only; a file made by us first has the permissions of the umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        permissions = (target if target.exists() else temporary).stat().st_mode & 0o777
        save_file(prepared, temporary, metadata=None if metadata is None else dict(metadata))
        temporary.chmod(permissions)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise UnwritableFileError(
            f"{path} cannot be written: {error}. Nothing was changed there. Choose a path in a folder that exists, "
            "that you may write to, and that has the room."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    # Whatever stops this has stopped the saving too, and is what the error tells.
    with suppress(OSError):
        path.unlink()


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that the format can take: without gaps, and no two of them in the same memory."""
    prepared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not _is_entry(key, tensor):
            raise InputError(f"A safetensors file maps strings to tensors, got {key!r}: {type(tensor).__name__}.")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise InputError(
                f'"{key}" is on the meta device or sparse, so it has no values to write one after the other. Load '
                "weights into it, or call to_dense()."
            )
        prepared[key] = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # In the order of their addresses, a tensor overlaps with one before it if it begins before the last of them ends.
    ends: dict[torch.device, int] = {}
    for key, tensor in sorted(prepared.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < ends.get(tensor.device, 0):
            prepared[key] = tensor.clone()
        else:
            ends[tensor.device] = start + tensor.nbytes
    return prepared
