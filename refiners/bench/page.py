"""The page: what it shows, and filling the template."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from refiners.bench.drawing import Plot, Sample, Scale, plot
from refiners.bench.figures import Figure, Run, title_of

_PARTS = ("page.html.jinja", "page.css")
TITLES = {
    "framework": "The framework beside plain PyTorch",
    "ports": "Ports beside upstream, on the same weights",
    "solvers": "Steps of solvers beside upstream",
    "adapters": "Injected adapters",
    "cuda": "On the GPU",
    "loading": "Loading weights",
    "import": "Importing",
}
GOOD, BAD = ("MET", "FASTER", "SAME"), ("MISSED", "UNDECIDED")


@dataclass(frozen=True)
class Row:
    """A ratio as a dot with a whisker, in percent of the width."""

    figure: Figure
    left: float
    width: float
    dot: float
    limit: float | None
    mark: str


@dataclass(frozen=True)
class Group:
    """The ratios of one suite, on one scale."""

    title: str
    rows: Sequence[Row]
    one: float
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Bar:
    """Bytes beside those that theory asks for."""

    name: str
    measured: int
    theoretical: int
    share: float
    wanted: float
    what: str


def mark_of(figure: Figure) -> str:
    """What colour a figure has: its limit decides, and where it has none, who is faster."""
    if figure.verdict in ("MET", "MISSED", "UNDECIDED"):
        return "good" if figure.verdict == "MET" else "bad"
    return {"FASTER": "good", "SLOWER": "slow"}.get(figure.standing, "plain")


def groups(run: Run) -> list[Group]:
    """The ratios of each suite."""
    found: list[Group] = []
    for suite in dict.fromkeys(figure.suite for figure in run.figures):
        ratios = [figure for figure in run.of(suite=suite) if figure.is_ratio and "growth" not in figure.facts]
        if ratios:
            found.append(_group(TITLES.get(suite, suite), ratios))
    return found


def _group(title: str, ratios: Sequence[Figure]) -> Group:
    low = min(0.8, *(figure.low for figure in ratios)) / 1.05
    high = max(1.25, *(figure.high for figure in ratios)) * 1.05
    scale = Scale(low, high, 0.0, 100.0, is_log=True)
    rows = [
        Row(
            figure=figure,
            left=scale(figure.low),
            width=round(max(scale(figure.high) - scale(figure.low), 0.3), 2),
            dot=scale(figure.median),
            limit=None if figure.limit is None else scale(figure.limit),
            mark=mark_of(figure),
        )
        for figure in ratios
    ]
    marks = [mark for mark in (0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10) if low <= mark <= high]
    return Group(title, rows, scale(1.0), [(scale(mark), f"{mark:g}×") for mark in marks])


def by_size(run: Run) -> Plot | None:
    """The ratio of each port to upstream, by the size of its model."""
    samples: list[Sample] = [
        (float(figure.facts["parameters"]), figure.median, figure.low, figure.high, figure.facts["workload"])
        for figure in run.figures
        if figure.is_ratio and figure.facts.get("against") == "upstream" and figure.facts.get("parameters")
        if figure.facts.get("threads", 1) == 1
    ]
    return plot({"ports": samples} if samples else {}, "parameters", "time ÷ upstream", log=True, labels=True)


def by_stack(run: Run) -> Plot | None:
    """What a stack of adapters costs, ours, peft's, and the products alone."""
    lines: dict[str, list[Sample]] = {}
    for figure in run.figures:
        if "stack" in figure.facts and "who" in figure.facts:
            count, who = float(figure.facts["stack"]), str(figure.facts["who"])
            sample = (count, figure.median, figure.low, figure.high, f"{who}, {count:g}")
            lines.setdefault(who, []).append(sample)
    return plot({who: sorted(line) for who, line in lines.items()}, "LoRAs on each projection", "time ÷ without")


def bars(run: Run) -> list[Bar]:
    """Measured bytes beside theoretical ones."""
    pairs = [figure for figure in run.figures if {"measured", "theoretical"} <= figure.facts.keys()]
    found: list[Bar] = []
    for figure in pairs:
        measured, wanted = int(figure.facts["measured"]), int(figure.facts["theoretical"])
        most = max(measured, wanted, 1)
        is_adapter = "adapter" in figure.facts
        name = figure.facts["adapter"] if is_adapter else figure.facts.get("workload", figure.name)
        what = "of the adapter's weights" if is_adapter else "at upstream's peak"
        found.append(Bar(str(name), measured, wanted, 100 * measured / most, 100 * wanted / most, what))
    return found


def histories(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, Plot]]]]:
    """For each device with several runs, how the ratios went."""
    devices: dict[str, list[Run]] = {}
    for run in reversed(runs):
        devices.setdefault(run.device["device"], []).append(run)
    found: list[tuple[str, list[tuple[str, Plot]]]] = []
    for device, of_device in devices.items():
        plots: list[tuple[str, Plot]] = []
        for name in dict.fromkeys(figure.name for run in of_device for figure in run.figures if figure.is_ratio):
            samples: list[Sample] = [
                (float(i + 1), figure.median, figure.low, figure.high, f"{run.started[:10]} {run.commit}")
                for i, run in enumerate(of_device)
                for figure in run.figures
                if figure.name == name
            ]
            drawn = plot({"": samples}, "run", "×") if len(samples) > 1 else None
            if drawn is not None:
                plots.append((name, drawn))
        if plots:
            found.append((device, plots))
    return found


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template is given: the latest run first."""
    run = runs[0]
    verdicts = Counter(figure.verdict for figure in run.figures)
    standings = Counter(figure.standing for figure in run.figures if figure.standing)
    return {
        "run": run,
        "runs": len(runs),
        "verdicts": verdicts,
        "standings": standings,
        "is_good": run.complete and not run.errors and not run.throttled and not any(verdicts[bad] for bad in BAD),
        "groups": groups(run),
        "by_size": by_size(run),
        "by_stack": by_stack(run),
        "bars": bars(run),
        "histories": histories(runs),
        "mark_of": mark_of,
    }


def render_page(runs: Sequence[Run]) -> str:
    """The page as text: one file, which needs no other."""
    parts = {name: files("refiners.bench").joinpath(name).read_text(encoding="utf-8") for name in _PARTS}
    templates = Environment(
        loader=DictLoader(parts),
        autoescape=lambda name: name is None or not name.endswith(".css"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["bytes"] = written_bytes
    templates.filters["title_of"] = title_of
    return templates.get_template("page.html.jinja").render(content(runs))


def written_bytes(count: int) -> str:
    """Bytes as people say them."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"


def write_page(folder: Path, runs: Sequence[Run]) -> Path:
    """Writes `index.html` into a folder, which is made if it is not there: to a temporary file first.

    Returns:
        the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / "index.html", folder / ".index.html.partial"
    temporary.write_text(render_page(runs), encoding="utf-8")
    temporary.replace(path)
    return path
