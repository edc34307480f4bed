"""The reports of a pytest session: from the rows that its items left behind, in this process or in a worker's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refiners.parity.case import Case
from refiners.parity.full_size import FullSizeResult
from refiners.parity.ledger import Judgement
from refiners.parity.page import write_page
from refiners.parity.registry import collect_cases
from refiners.parity.report import write_json, write_summary
from refiners.parity.result import Result
from refiners.parity.suite import Report
from refiners.parity.told import Told


def gather(registered: Sequence[str], rows: Sequence[Mapping[str, Any]], other_tests: Mapping[str, float]) -> Report:
    """The report that the rows make.

    Receives:
        registered: the ids of all that was to run.
        rows: the result of each item, whether it may stand, and why it differs where that was found out.
        other_tests: test → seconds.
    """
    report = Report(tuple(registered), other_tests=dict(other_tests))
    for row in rows:
        result = FullSizeResult(**row["result"]) if row["meta"] else Result.from_json(row["result"])
        report.take(result)
        report.judged[result.id] = Judgement(**row["judged"])
        if row.get("told"):
            report.explanations[result.id] = Told.from_json(row["told"])
    return report


def write_reports(
    report: Report, sources: Sequence[str], *, json: Path | None, summary: Path | None, html: Path | None
) -> Path | None:
    """Writes what was asked for; the path of the page if there is one."""
    if json:
        write_json(json, report)
    write_summary(summary, report)
    if not html:
        return None
    modules = ",".join(dict.fromkeys(sources))
    cases: dict[str, Case] = {case.id: case for case in collect_cases(modules).cases}
    return write_page(html, report, cases, modules)
