"""The ledger: every result that is not bitwise, and every known gap, with its cause and the condition that ends it.

    [[line]]
    id = "clip/text-l"
    lane = "bfloat16"
    verdict = "ROUNDING"      # or "DIFFERENT": a known gap
    cause = "upstream adds the two biases one after the other, the port adds their sum"
    until = "transformers releases the fused addition"

A line excuses exactly the verdict it names. One with `dtypes = true` also excuses sides that compute in other dtypes
(see `refiners.parity.precision`); its verdict is then that of the values alone, and may be "BITWISE". A line whose case
is equal by now, or is not registered any more, is an error: nobody has to wonder which lines still hold.
"""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from refiners.errors import ParityError
from refiners.parity.result import Result, Verdict


@dataclass(frozen=True)
class Line:
    """One excuse."""

    id: str
    lane: str
    verdict: Verdict
    cause: str
    until: str
    dtypes: bool = False
    """Whether other dtypes may compute the values."""


@dataclass(frozen=True)
class Judgement:
    """Whether a result may stand."""

    accepted: bool
    message: str = ""
    known_gap: bool = False
    """Accepted although DIFFERENT."""


class Ledger:
    """The lines of a ledger file, or none.

    Raises:
        ParityError: two lines excuse the same case in the same lane.
    """

    def __init__(self, lines: Sequence[Line] = (), name: str = "the ledger") -> None:
        self.name = name
        self.lines: dict[tuple[str, str], Line] = {}
        for line in lines:
            if (line.id, line.lane) in self.lines:
                raise ParityError(f"{name} has two lines for {line.id}[{line.lane}]. Keep one.")
            self.lines[line.id, line.lane] = line

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Reads a ledger file.

        Raises:
            ParityError: the file cannot be read, a line lacks a field or has an unknown one. Lists every line at fault.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ParityError(f"The ledger {path} cannot be read: {error}.") from error
        unknown = [key for key in data if key != "line"]
        tables = data.get("line", [])
        if unknown or not isinstance(tables, list):
            raise ParityError(f"The ledger {path} holds [[line]] tables only, got {', '.join(unknown) or 'a table'}.")
        lines: list[Line] = []
        problems: list[str] = []
        for number, table in enumerate(cast(list[Any], tables), start=1):
            _read(number, table, lines, problems)
        if problems:
            raise ParityError(f"The ledger {path} cannot be used: {'; '.join(problems)}.")
        return cls(lines, str(path))

    def judge(self, result: Result) -> Judgement:
        """Whether a result may stand as it is."""
        line = self.lines.get((result.case, result.lane))
        if line is None:
            return _unexcused(result)
        if line.dtypes:
            return self._judge_besides_dtypes(line, result)
        if result.verdict is line.verdict:
            return Judgement(True, f"{result.verdict}, known: {line.cause}", result.verdict is Verdict.DIFFERENT)
        if result.verdict is Verdict.DIFFERENT:
            return Judgement(False, f"DIFFERENT, while {self.name} excuses {line.verdict} only: {result.reason}")
        stale = f"{self.name} says {line.verdict}, but it is {result.verdict} now"
        return Judgement(False, f"{stale}: {'remove' if result.verdict is Verdict.BITWISE else 'change'} the line")

    def _judge_besides_dtypes(self, line: Line, result: Result) -> Judgement:
        found = result.besides_dtypes
        if found is line.verdict:
            return Judgement(True, f"{found} in other dtypes, known: {line.cause}", True)
        if found is Verdict.DIFFERENT or (found is None and result.verdict is Verdict.DIFFERENT):
            told = f"{self.name} excuses {line.verdict} in other dtypes only"
            return Judgement(False, f"DIFFERENT, while {told}: {result.reason}")
        if found is not None:
            return Judgement(False, f"{self.name} says {line.verdict}, but the values are {found} now: change the line")
        advice = "remove the line" if result.verdict is Verdict.BITWISE else "remove `dtypes`"
        return Judgement(False, f"{self.name} excuses other dtypes, but they agree now: {advice}")

    def stale(self, registered: Collection[tuple[str, str]], *, complete: bool) -> list[str]:
        """Lines about a case or lane that does not exist.

        Receives:
            registered: case id and lane of everything that could have run, whatever lanes were chosen.
            complete: whether all cases were loaded. If not, only families of which some case was loaded are judged.
        """
        families = {case_id.split("/")[0] for case_id, _ in registered}
        return [
            f"{self.name} has a line for {line.id}[{line.lane}], which is not registered: remove it"
            for key, line in self.lines.items()
            if key not in registered and (complete or line.id.split("/")[0] in families)
        ]


def _unexcused(result: Result) -> Judgement:
    if result.verdict is Verdict.BITWISE:
        return Judgement(True, "BITWISE")
    if result.verdict is Verdict.ROUNDING:
        return Judgement(False, f"ROUNDING without a line in the ledger that names its cause: {result.reason}")
    return Judgement(False, f"DIFFERENT: {result.reason}")


def _read(number: int, table: Mapping[str, Any], lines: list[Line], problems: list[str]) -> None:
    names = ("id", "lane", "verdict", "cause", "until")
    missing = [name for name in names if not str(table.get(name, "")).strip()]
    unknown = [name for name in table if name not in (*names, "dtypes")]
    dtypes = table.get("dtypes", False)
    verdicts = (Verdict.BITWISE, Verdict.ROUNDING) if dtypes else (Verdict.ROUNDING, Verdict.DIFFERENT)
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        wrong += [f"has an unknown {', '.join(unknown)}"] if unknown else []
        problems.append(f"line {number} {' and '.join(wrong)}")
    elif dtypes not in (True, False):
        problems.append(f"line {number} has `dtypes`, which is true or false, got {dtypes!r}")
    elif table["verdict"] not in verdicts:
        told = " with `dtypes = true`" if dtypes else ""
        problems.append(f"line {number} may excuse {' or '.join(verdicts)}{told}, got {table['verdict']!r}")
    else:
        verdict = Verdict(table["verdict"])
        lines.append(Line(table["id"], table["lane"], verdict, table["cause"], table["until"], bool(dtypes)))
