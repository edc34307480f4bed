"""What a module can reach by imports, read from the source without running it.

Files of the user's own are followed, their imports in turn, those inside functions included. An installed package is
not followed: its name stands for it, and its version says whether it changed. Where the source does not say what is
imported (`import_module(name)`), everything in that module's package counts: too much rather than too little.

What runs only for a type checker does not count, nor does what the functions of a package would import if somebody
called them, when the package was reached as the parent of a module and nothing of its own was asked for.
"""

import ast
import importlib.metadata
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_DYNAMIC = frozenset({"import_module", "__import__"})


@dataclass(frozen=True)
class Reach:
    """The files and the installed packages that some modules can reach."""

    files: frozenset[Path]
    packages: frozenset[str]
    """Top-level names: `torch`, `transformers`."""


@dataclass
class _Imports:
    """What one file asks for."""

    modules: set[str] = field(default_factory=set[str])
    """Dotted names of modules."""
    names: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """Module and name, of `from module import name`: the name may be a module or not."""
    strings: set[str] = field(default_factory=set[str])
    """Whatever could name a module or a file."""
    is_open: bool = False
    """Whether a function may import what the source does not name."""
    is_open_on_import: bool = False
    """Whether that may happen when the module is imported."""


class Sources:
    """Source files, each read once, found without importing anything of a user's own."""

    def __init__(self) -> None:
        self._files: dict[str, Path | None] = {}
        self._imports: dict[tuple[Path, str], _Imports] = {}
        self._own: dict[str, bool] = {}

    def reach(self, modules: Iterable[str], *, stop: Iterable[str] = ()) -> Reach:
        """Everything that some modules can reach.

        Receives:
            modules: dotted names.
            stop: top-level packages that are not followed, as if they were installed.
        """
        stopped = frozenset(stop)
        files: set[Path] = set()
        packages: set[str] = set()
        seen: set[tuple[str, bool]] = set()
        waiting = [(name, True) for name in modules]
        while waiting:
            name, is_used = waiting.pop()
            if (name, is_used) in seen:
                continue
            seen.add((name, is_used))
            top = name.partition(".")[0]
            if top in stopped or not self._is_own(top):
                packages.add(top)
                continue
            file = self.file_of(name)
            if file is None:
                continue
            files.add(file)
            parent = name.rpartition(".")[0]
            if parent:
                waiting.append((parent, False))
            found = self.imports_of(file, name)
            waiting += self._asked_for(name, file, found, is_used=is_used)
            files |= _data_files(file, found.strings)
            packages |= found.strings & distributions().keys()
        return Reach(frozenset(files), frozenset(packages - sys.stdlib_module_names))

    def _asked_for(self, name: str, file: Path, found: _Imports, *, is_used: bool) -> Iterator[tuple[str, bool]]:
        yield from ((module, True) for module in found.modules)
        for module, attribute in found.names:
            inside = f"{module}.{attribute}"
            is_module = self._is_own(module.partition(".")[0]) and self.file_of(inside) is not None
            yield (inside, True) if is_module else (module, True)
        for text in found.strings:
            if self._is_own(text.partition(".")[0]) and self.file_of(text) is not None:
                yield text, True
                yield from ((child, True) for child in self._below(text))
        if found.is_open_on_import or (found.is_open and is_used):
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            yield from ((child, True) for child in self._below(package))

    def file_of(self, name: str) -> Path | None:
        """The source of a module; None where there is none."""
        if name not in self._files:
            self._files[name] = _find(name)
        return self._files[name]

    def _below(self, package: str) -> tuple[str, ...]:
        file = self.file_of(package)
        if file is None or file.name != "__init__.py":
            return ()
        inside = (path.relative_to(file.parent).with_suffix("") for path in sorted(file.parent.rglob("*.py")))
        return tuple(".".join((package, *path.parts)).removesuffix(".__init__") for path in inside)

    def _is_own(self, top: str) -> bool:
        """Whether a top-level name is a package of the user's own, and not one that was installed."""
        if top not in self._own:
            self._own[top] = top.isidentifier() and top not in sys.stdlib_module_names and self._is_not_installed(top)
        return self._own[top]

    def _is_not_installed(self, top: str) -> bool:
        file = self.file_of(top)
        places = [file] if file else [Path(place) for place in _folders(top)]
        return bool(places) and not any(place.is_relative_to(folder) for place in places for folder in _installed())

    def imports_of(self, file: Path, name: str) -> _Imports:
        """What a file asks for. One that cannot be read or parsed asks for nothing: it cannot be imported either."""
        if (file, name) not in self._imports:
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            try:
                self._imports[file, name] = _read(ast.parse(file.read_bytes()), package)
            except (OSError, SyntaxError, ValueError):
                self._imports[file, name] = _Imports()
        return self._imports[file, name]


def _folders(top: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec else []


def _find(name: str) -> Path | None:
    """Only the top-level package is asked for, which imports nothing; what is below it is looked for in its folders."""
    top, *rest = name.split(".")
    if not top.isidentifier():
        return None
    if not rest:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        return Path(spec.origin) if spec and spec.origin and spec.has_location else None
    for folder in _folders(top):
        base = Path(folder).joinpath(*rest)
        for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if path.is_file():
                return path
    return None


def _data_files(file: Path, strings: Iterable[str]) -> set[Path]:
    """Files beside a module that it names in a string."""
    named = {file.parent / text for text in strings if "." in text and not text.startswith((".", "/"))}
    return {path for path in named if path.suffix != ".py" and path.is_file()}


@cache
def distributions() -> Mapping[str, list[str]]:
    """Top-level name of an installed package → the distributions that brought it."""
    return importlib.metadata.packages_distributions()


@cache
def _installed() -> tuple[Path, ...]:
    paths = [sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    return tuple({Path(path) for path in [*paths, *site.getsitepackages(), site.getusersitepackages()]})


def _read(tree: ast.Module, package: str) -> _Imports:
    found = _Imports()
    openers: set[str] = set()
    for statement in tree.body:
        opens = _read_statement(statement, package, found)
        found.is_open |= opens
        if opens and isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            openers.add(statement.name)
        elif opens:
            found.is_open_on_import = True
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            found.is_open_on_import |= bool(used & openers)
    return found


def _read_statement(statement: ast.stmt, package: str, found: _Imports) -> bool:
    """Adds what a statement asks for. Returns whether it may import what it does not name."""
    opens = False
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                waiting += node.orelse
                continue
            case ast.Import():
                found.modules |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                module = _absolute(node, package)
                found.names |= {(module, alias.name) for alias in node.names}
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in _DYNAMIC:
                opens |= not (node.args and isinstance(node.args[0], ast.Constant))
            case ast.Constant(value=str() as text) if 0 < len(text) < 200 and "\n" not in text and " " not in text:
                found.strings.add(text)
            case _:
                pass
        waiting += ast.iter_child_nodes(node)
    return opens


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])
