"""The rules of this house that no general linter knows, read from the syntax tree of every file.

    python -m tools.house_rules          check the whole checkout
    python -m tools.house_rules PATH…    check these files

Each rule is a function from a file to what it finds there; tests/tools/test_house_rules.py plants a fault for each.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = ("refiners", "reference_ports")
PROOF = ("parity_tests", "benchmarks")
ROOMS = (*FRAMEWORK, *PROOF, "tests", "tools", "noxfile.py")
UPSTREAM = frozenset(
    {"accelerate", "diffusers", "lycoris", "open_clip", "peft", "tokenizers", "torchvision", "transformers"}
)
TOLERANCES = frozenset({"abs_tol", "atol", "rel_tol", "rtol"})
TOLERANT_CALLS = frozenset({"allclose", "approx", "assert_allclose", "assert_close", "isclose"})
OWNER_OF_TOLERANCES = "refiners/parity/rounding.py"


@dataclass(frozen=True)
class Source:
    """A Python file of the checkout: where it lies, its text, and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module = field(repr=False)

    @property
    def room(self) -> str:
        return self.path.parts[0]


@dataclass(frozen=True, order=True)
class Finding:
    """A line that breaks a rule, and what to write instead."""

    path: Path
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


Rule = Callable[[Source], Iterator[tuple[int, str]]]


def called_name(call: ast.Call) -> str:
    """The last segment of what a call calls: `load` for both `load()` and `json.load()`."""
    match call.func:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def tolerance(source: Source) -> Iterator[tuple[int, str]]:
    """A tolerance, or a comparison that brings one along, outside the one file that owns them."""
    if source.path == Path(OWNER_OF_TOLERANCES):
        return
    advice = "compare bits (torch.equal), or measure both errors against float64"
    for node in ast.walk(source.tree):
        match node:
            case ast.keyword(arg=name) | ast.arg(arg=name) | ast.Name(id=name) if name in TOLERANCES:
                yield node.lineno, f"`{name}` may stand in {OWNER_OF_TOLERANCES} only: {advice}."
            case ast.Call() if called_name(node) in TOLERANT_CALLS:
                yield node.lineno, f"`{called_name(node)}` hides a tolerance: {advice}."
            case _:
                pass


def upstream_by_name(source: Source) -> Iterator[tuple[int, str]]:
    """Upstream imported through a string, where the import contracts cannot see it."""
    if source.room in PROOF:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and called_name(node) in {"__import__", "import_module", "importorskip"}:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                if isinstance(argument, ast.Constant) and str(argument.value).partition(".")[0] in UPSTREAM:
                    yield node.lineno, f"`{argument.value}` is upstream: only {' and '.join(PROOF)} import it."


def imported_packages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every top-level package that a file imports, wherever in the file it does."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name.partition(".")[0]
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]
            case _:
                pass


def undeclared_dependency(source: Source) -> Iterator[tuple[int, str]]:
    """A package that the wheel imports and does not ask for."""
    if source.room not in FRAMEWORK:
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    declared |= {"pil"} if "pillow" in declared else set()
    for line, package in imported_packages(source.tree):
        if package not in sys.stdlib_module_names and package not in FRAMEWORK and package.lower() not in declared:
            yield line, f"`{package}` is no dependency of the project: declare it in pyproject.toml, or do without."


def anonymous_chain(source: Source) -> Iterator[tuple[int, str]]:
    """A bare Chain in a port: an empty named subclass makes the tree, the keys and the errors readable."""
    if source.room != "reference_ports":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"Chain", "fl.Chain"}:
            yield node.lineno, "an anonymous Chain: name its role with a subclass of fl.Chain."


def skipped_test(source: Source) -> Iterator[tuple[int, str]]:
    """A test that is skipped or expected to fail: what is known not to work has its place."""
    if source.room not in {"tests", "parity_tests"}:
        return
    for node in ast.walk(source.tree):
        skips = isinstance(node, ast.Attribute) and node.attr in {"importorskip", "skip", "skipif", "xfail"}
        if skips and ast.unparse(node.value) in {"pytest", "pytest.mark", "mark"}:
            yield node.lineno, f"`{node.attr}`: a known gap is a line of parity_tests/ledger.toml, with its end."


def unexplained_suppression(source: Source) -> Iterator[tuple[int, str]]:
    """A suppression that does not name its rule, or not its reason."""
    directive = re.compile(r"#\s*(?:(?:type|pyright):\s*ignore(?P<rule>\[[\w, -]+\])?|noqa(?P<code>:\s*[A-Z]+\d+)?)")
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        found = directive.match(token.string) if token.type == tokenize.COMMENT else None
        if found is None:
            continue
        if not (found["rule"] or found["code"]):
            yield token.start[0], "name the rule that is suppressed: `# pyright: ignore[ruleName] because …`."
        elif not token.string[found.end() :].strip(" ,#"):
            yield token.start[0], "say why after the rule: `# pyright: ignore[ruleName] because …`."


RULES: dict[str, Rule] = {
    "tolerance": tolerance,
    "upstream-by-name": upstream_by_name,
    "undeclared-dependency": undeclared_dependency,
    "anonymous-chain": anonymous_chain,
    "skipped-test": skipped_test,
    "unexplained-suppression": unexplained_suppression,
}


def check(path: Path, text: str) -> list[Finding]:
    """Everything that breaks a rule in one file. The path is relative to the checkout: rules depend on the room."""
    source = Source(path, text, ast.parse(text, filename=str(path)))
    return sorted(Finding(path, line, name, message) for name, rule in RULES.items() for line, message in rule(source))


def files(root: Path = ROOT) -> Iterator[Path]:
    """Every Python file of every room of the checkout."""
    for room in ROOMS:
        place = root / room
        yield from [place] if place.is_file() else sorted(place.rglob("*.py"))


def main(arguments: list[str]) -> int:
    """Check the files that are given, or all; print what breaks a rule; 1 if anything does."""
    paths = [Path(argument).resolve() for argument in arguments] or list(files())
    findings = [finding for path in paths for finding in check(path.relative_to(ROOT), path.read_text())]
    print(*findings, sep="\n", end="\n" if findings else "")
    print(f"House rules: {len(findings)} broken, {len(paths)} files read, {len(RULES)} rules.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
