"""A run as JUnit XML, for whatever shows test results: one suite a family, one testcase for each case and lane.

What may not stand is a failure; what was registered and never ran is an error, so that an interrupted run is not green;
a difference that the ledger explains is skipped, with its cause. What is wrong with the run itself is a testcase of the
suite `run`.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from refiners.parity.report import describe, environment_lines
from refiners.parity.suite import AnyResult, Report

_FORBIDDEN = re.compile(r"[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def write_junit(path: Path, report: Report) -> None:
    """Writes the file: to a temporary one first, so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(junit(report), encoding="utf-8")
    temporary.replace(path)


def junit(report: Report) -> str:
    """The XML as text."""
    root = Element("testsuites", name="parity")
    results = {result.id: result for result in report.all_results}
    suites: dict[str, Element] = {}
    for item in dict.fromkeys([*report.registered, *results]):
        suite = suites.setdefault(item.split("/", 1)[0].split("[", 1)[0], Element("testsuite"))
        _testcase(suite, item, results.get(item), report)
    ids = {*report.registered, *results}
    for number, problem in enumerate(_of_the_run(report, ids), 1):
        suite = suites.setdefault("run", Element("testsuite"))
        case = SubElement(suite, "testcase", classname="run", name=f"problem {number}", time="0")
        SubElement(case, "failure", message=printable(_first_line(problem)), type="problem").text = printable(problem)
    for name, suite in suites.items():
        _finish(suite, name, report)
        root.append(suite)
    for attribute in ("tests", "failures", "errors", "skipped"):
        root.set(attribute, str(sum(int(suite.get(attribute, "0")) for suite in suites.values())))
    root.set("time", f"{sum(float(suite.get('time', '0')) for suite in suites.values()):.3f}")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _of_the_run(report: Report, ids: set[str]) -> list[str]:
    """The problems that belong to no single result."""
    return [problem for problem in report.problems if problem.partition(": ")[0] not in ids]


def _testcase(suite: Element, item: str, result: AnyResult | None, report: Report) -> None:
    case_id = item.rpartition("[")[0]
    seconds = result.seconds if result is not None else 0.0
    case = SubElement(suite, "testcase", classname=case_id.replace("/", "."), name=item, time=f"{seconds:.3f}")
    if result is None:
        SubElement(case, "error", message="registered, and did not run", type="not run").text = "The run ended before."
        return
    judged = report.judged.get(item)
    told = report.explanations.get(item)
    text = describe(result) + (f"\n\n{told.text}" if told else "")
    if judged is not None and not judged.accepted:
        kind = judged.message.split(":", 1)[0].split(" ", 1)[0]
        failure = SubElement(case, "failure", message=printable(_first_line(judged.message)), type=printable(kind))
        failure.text = printable(text)
    elif judged is not None and judged.message.partition(",")[0] in ("ROUNDING", "DIFFERENT"):
        SubElement(case, "skipped", message=printable(_first_line(judged.message)))
    else:
        SubElement(case, "system-out").text = printable(text)


def _finish(suite: Element, name: str, report: Report) -> None:
    """The attributes that count, and what was measured with which versions."""
    cases = suite.findall("testcase")
    counts = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    suite.set("name", f"parity.{name}")
    suite.set("tests", str(len(cases)))
    for attribute, tag in counts.items():
        suite.set(attribute, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.3f}")
    properties = Element("properties")
    for key, value in environment_lines(report):
        SubElement(properties, "property", name=printable(key), value=printable(value))
    suite.insert(0, properties)


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def printable(text: str) -> str:
    """Without the characters that neither XML nor HTML can hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
