"""What has to run again: a digest of all that decides the verdict of a case, and a record of the last digests.

A digest covers the files that the case's module can reach by imports (its port, its helpers, the data they name), all
of Refiners itself, the versions of the installed packages that those reach with what these require, the machine, and
the lines that the ledger has for the case. A case is left out only if it passed with the very same digest. What the
digest cannot see: files of an installed package edited in place, and data that the source does not name.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import refiners
from refiners.errors import ParityError
from refiners.parity.closure import Sources, distributions
from refiners.parity.environment import environment

FOLDER = ".parity_cache"
"""Where records are kept, beside the user. It hides itself from git."""


class Digests:
    """Digests of modules; each file is read once.

    Receives:
        ledger: case id → the text of its lines.
    """

    def __init__(self, ledger: Mapping[str, str] | None = None) -> None:
        self.ledger = dict(ledger or {})
        self._engine = _hash([*_engine(), json.dumps(environment(), sort_keys=True)])
        self._sources = Sources()
        self._of_modules: dict[tuple[str, ...], str] = {}
        self._known: dict[str, _Installed] = {}

    def of_modules(self, modules: Sequence[str]) -> str:
        """Of everything that some modules can reach."""
        key = tuple(modules)
        if key not in self._of_modules:
            found = self._sources.reach(key, stop=[refiners.__name__])
            files = [f"{os.path.relpath(path)} {_hash_of_file(path)}" for path in sorted(found.files)]
            self._of_modules[key] = _hash([self._engine, *files, *sorted(_versions(found.packages, self._known))])
        return self._of_modules[key]

    def of_case(self, case_id: str, modules: Sequence[str]) -> str:
        """Of a case.

        Receives:
            modules: that define it: the one that lists it, and those of its functions.
        """
        return _hash([self.of_modules(modules), self.ledger.get(case_id, "")])


def _hash(texts: Iterable[str]) -> str:
    made = hashlib.sha256()
    for text in texts:
        made.update(text.encode() + b"\0")
    return made.hexdigest()[:32]


@cache
def _hash_at(path: Path, changed_at: int, size: int) -> str:
    del changed_at, size  # of the file: another content has another key
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_of_file(path: Path) -> str:
    stat = path.stat()
    return _hash_at(path, stat.st_mtime_ns, stat.st_size)


def _engine() -> list[str]:
    """All of Refiners: nobody has to decide which of its files can change a verdict."""
    root = Path(refiners.__file__).parent
    return [f"{path.relative_to(root)} {_hash_of_file(path)}" for path in sorted(root.rglob("*.py"))]


_Installed = tuple[str, list[str]]
"""The version of a distribution, and the names of those that it requires."""


def _versions(packages: Iterable[str], known: dict[str, _Installed] | None = None) -> set[str]:
    """The versions of installed packages, and of all that they require, directly or not.

    Receives:
        known: keeps what was read, since reading metadata is slow.
    """
    known = {} if known is None else known
    waiting = [name for package in packages for name in distributions().get(package, [package])]
    found: dict[str, str] = {}
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        if name not in known:
            known[name] = _look_up(name)
        found[name], required = known[name]
        waiting += required
    return {f"{name} {version}" for name, version in found.items()}


def _look_up(name: str) -> _Installed:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "", []
    required = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in distribution.requires or ()]
    return distribution.version, required


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Record:
    """The digests with which things passed when they last ran: key → digest.

    A key is the id of a case in a lane, or of a test. What fails is struck from the record, so that it runs again.
    """

    def __init__(self, path: Path, passed: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.passed = dict(passed or {})

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """The record in a folder, empty where there is none.

        Raises:
            ParityError: the file is no record.
        """
        path = folder / FOLDER / "record.json"
        if not path.is_file():
            return cls(path)
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, {str(key): str(digest) for key, digest in data["passed"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParityError(f"{path} is no record of digests: {error}. Delete it: everything runs then.") from error

    def is_unchanged(self, keys: Iterable[str], digest: str) -> bool:
        """Whether all of these passed with this digest."""
        return all(self.passed.get(key) == digest for key in keys)

    def take(self, key: str, digest: str, *, passed: bool) -> None:
        """Notes how something went."""
        if passed:
            self.passed[key] = digest
        else:
            self.passed.pop(key, None)

    def save(self) -> None:
        """Writes the file; an interrupted write leaves the old one."""
        self.path.parent.mkdir(exist_ok=True)
        (self.path.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        temporary = self.path.with_name(f".{self.path.name}.partial")
        text = json.dumps({"passed": dict(sorted(self.passed.items()))}, indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(self.path)
