"""Figures as a table of markdown, for a document."""

from refiners.bench.figures import Run
from refiners.bench.page import TITLES


def render_tables(run: Run) -> str:
    """Where the run took place, and a table for each suite."""
    facts = ", ".join(f"{name} {value}" for name, value in run.device.items() if name not in ("device", "kind"))
    state = "" if run.complete else " The run was interrupted."
    lines = [f"{run.device['device']} ({facts}), commit `{run.commit}`, {run.started[:10]}.{state}", ""]
    for suite in dict.fromkeys(figure.suite for figure in run.figures):
        lines += [f"### {TITLES.get(suite, suite.capitalize())}", ""]
        lines += ["| case | figure | 99 % interval | limit | verdict |", "|---|---|---|---|---|"]
        for figure in run.of(suite=suite):
            limit = "" if figure.limit is None else f"≤ {figure.limit:g}"
            verdict = "" if figure.verdict == "no limit" else figure.verdict
            verdict = " ".join(dict.fromkeys(filter(None, (verdict, figure.standing))))
            lines.append(f"| {figure.title} | {figure.number} | {figure.spread} | {limit} | {verdict} |")
        lines.append("")
    lines += [f"{name} failed: {error}" for name, error in run.errors.items()]
    return "\n".join(lines).strip() + "\n"
