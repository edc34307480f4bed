"""Every example in a docstring, the README and docs/ runs, and prints what it says it prints.

In a docstring, an example is a block of `>>>` lines, which find `torch`, `fl` and `refiners.fluxion.adapters` imported.
In a Markdown page it is a fenced block marked `python`: with `>>>` lines its output is compared, without them it has to
run. The blocks of one page share their names, from top to bottom.
"""

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import refiners.fluxion.layers as fl
from refiners.fluxion import adapters

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    """Every module of the two packages that the wheel holds."""
    files = sorted(path for package in ("refiners", "reference_ports") for path in (ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names]


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    for block in BLOCK.finditer(text):
        lines = block["code"].splitlines(keepends=True)
        yield (
            text.count("\n", 0, block.start("code")) + 1,
            "".join(line.removeprefix(block["indent"]) for line in lines),
        )


def run_page(text: str, name: str) -> int:
    """Run the blocks of a page in one namespace; the number of blocks that ran."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = list(blocks(text))
    for line, code in found:
        if ">>>" in code:
            names = run_example(doctest.DocTestParser().get_doctest(code, names, name, name, line - 1))
        else:
            # Blank lines in front keep the page's line numbers in a traceback.
            exec(compile("\n" * (line - 1) + code, name, "exec"), names)
    return len(found)


def run_example(example: doctest.DocTest) -> dict[str, Any]:
    """Run a doctest; what it does not print as written is an error. Returns the names that it leaves."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    result = runner.run(example, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)
    return example.globs


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {"torch": torch, "fl": fl, **{name: getattr(adapters, name) for name in adapters.__all__}, **vars(module)}
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        run_example(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_page(text, str(page)) == len(re.findall(r"^ *```python", text, re.MULTILINE))


def test_a_wrong_output_on_a_page_is_found() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        run_page("```python\n>>> 1 + 1\n3\n```\n", "page.md")


def test_a_wrong_output_in_a_docstring_is_found() -> None:
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "docstring", None, 0)
    with pytest.raises(AssertionError, match="Expected"):
        run_example(example)


def test_an_example_that_raises_is_found_at_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        run_page("# Title\n\n```python\nx = 1\n```\n\n```python\nx / 0\n```\n", "page.md")
    assert error.traceback[-1].lineno == 7


def test_blocks_of_a_page_share_their_names_and_other_languages_are_left_alone() -> None:
    assert run_page("```python\nx = 1\n```\n```sh\nno python\n```\n```python\n>>> x\n1\n```\n", "page.md") == 2
