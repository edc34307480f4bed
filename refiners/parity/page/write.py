"""Filling the template."""

import html
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from refiners.parity.case import Case
from refiners.parity.junit import printable
from refiners.parity.page.content import content
from refiners.parity.suite import Report

_PARTS = ("page.html.jinja", "case.html.jinja", "page.css", "page.js")


def render_page(report: Report, cases: Mapping[str, Case], modules: str = "", *, with_trees: bool = True) -> str:
    """The page as text; see `content` for what it is given."""
    parts = {name: files("refiners.parity.page").joinpath(name).read_text(encoding="utf-8") for name in _PARTS}
    templates = Environment(
        loader=DictLoader(parts),
        autoescape=lambda name: name is None or not name.endswith((".css", ".js")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["code"] = with_code
    told = content(report, cases, modules, with_trees=with_trees)
    return printable(templates.get_template("page.html.jinja").render(told))


class Html(str):
    """Text that is HTML already."""

    def __html__(self) -> str:
        return str(self)


def with_code(text: str) -> Html:
    """Text as HTML, what stands between backticks as code."""
    parts = html.escape(text).split("`")
    if len(parts) % 2 == 0:  # one of them has no other
        return Html(html.escape(text))
    return Html("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def write_page(folder: Path, report: Report, cases: Mapping[str, Case], modules: str = "") -> Path:
    """Writes `index.html` into a folder, which is made if it is not there: to a temporary file first.

    Returns:
        the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    temporary = folder / ".index.html.partial"
    temporary.write_text(render_page(report, cases, modules), encoding="utf-8")
    temporary.replace(path)
    return path
