"""The ledger excuses exactly what it names, and no line outlives its cause."""

from dataclasses import replace
from pathlib import Path

import pytest

from refiners.errors import ParityError
from refiners.parity import Ledger, Result, Verdict

LINE = """
[[line]]
id = "clip/text"
lane = "bfloat16"
verdict = "{verdict}"
cause = "the sum is taken in another order"
until = "never: upstream's order depends on the machine"
"""


def ledger(tmp_path: Path, text: str) -> Ledger:
    path = tmp_path / "ledger.toml"
    path.write_text(text)
    return Ledger.load(path)


def result(verdict: Verdict, lane: str = "bfloat16") -> Result:
    return Result(case="clip/text", lane=lane, verdict=verdict, reasons=("because",))


def test_bitwise_needs_no_line() -> None:
    assert Ledger().judge(result(Verdict.BITWISE)).accepted


def test_rounding_without_a_line_is_red() -> None:
    judged = Ledger().judge(result(Verdict.ROUNDING))
    assert not judged.accepted
    assert judged.message == "ROUNDING without a line in the ledger that names its cause: because"


def test_rounding_with_a_line_is_accepted_in_that_lane_only(tmp_path: Path) -> None:
    lines = ledger(tmp_path, LINE.format(verdict="ROUNDING"))
    assert lines.judge(result(Verdict.ROUNDING)).accepted
    assert not lines.judge(result(Verdict.ROUNDING, "float32")).accepted


def test_a_line_for_rounding_excuses_nothing_worse(tmp_path: Path) -> None:
    judged = ledger(tmp_path, LINE.format(verdict="ROUNDING")).judge(result(Verdict.DIFFERENT))
    assert not judged.accepted
    assert "excuses ROUNDING only: because" in judged.message


def test_a_known_gap_is_accepted_and_told(tmp_path: Path) -> None:
    judged = ledger(tmp_path, LINE.format(verdict="DIFFERENT")).judge(result(Verdict.DIFFERENT))
    assert judged.accepted
    assert judged.known_gap


def in_other_dtypes(values: Verdict) -> Result:
    reasons = ("the same value is computed in other dtypes",)
    return replace(result(Verdict.DIFFERENT), besides_dtypes=values, reasons=reasons)


def test_other_dtypes_are_excused_by_a_line_that_says_so_and_by_no_other(tmp_path: Path) -> None:
    found = in_other_dtypes(Verdict.ROUNDING)
    judged = ledger(tmp_path, LINE.format(verdict="ROUNDING") + "dtypes = true").judge(found)
    assert judged.accepted
    assert judged.known_gap
    assert "ROUNDING in other dtypes, known: the sum" in judged.message
    assert not ledger(tmp_path, LINE.format(verdict="ROUNDING")).judge(found).accepted


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (Verdict.BITWISE, "but the values are BITWISE now: change the line"),
        (Verdict.DIFFERENT, "excuses ROUNDING in other dtypes only"),
    ],
)
def test_a_line_about_dtypes_excuses_no_other_values(tmp_path: Path, values: Verdict, told: str) -> None:
    judged = ledger(tmp_path, LINE.format(verdict="ROUNDING") + "dtypes = true").judge(in_other_dtypes(values))
    assert not judged.accepted
    assert told in judged.message


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (Verdict.BITWISE, "remove the line"),
        (Verdict.ROUNDING, "remove `dtypes`"),
        (Verdict.DIFFERENT, "excuses ROUNDING in other dtypes only: because"),
    ],
)
def test_a_line_about_dtypes_that_agree_is_stale(tmp_path: Path, now: Verdict, told: str) -> None:
    judged = ledger(tmp_path, LINE.format(verdict="ROUNDING") + "dtypes = true").judge(result(now))
    assert not judged.accepted
    assert told in judged.message


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (LINE.format(verdict="DIFFERENT") + "dtypes = true", "BITWISE or ROUNDING with `dtypes = true`"),
        (LINE.format(verdict="BITWISE"), "may excuse ROUNDING or DIFFERENT"),
        (LINE.format(verdict="BITWISE") + 'dtypes = "yes"', "`dtypes`, which is true or false"),
    ],
)
def test_a_line_about_dtypes_names_the_verdict_of_the_values(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ParityError, match=told):
        ledger(tmp_path, line)


@pytest.mark.parametrize(
    ("line", "now", "advice"),
    [
        ("ROUNDING", Verdict.BITWISE, "BITWISE now: remove the line"),
        ("DIFFERENT", Verdict.BITWISE, "BITWISE now: remove the line"),
        ("DIFFERENT", Verdict.ROUNDING, "ROUNDING now: change the line"),
    ],
)
def test_a_line_that_no_longer_holds_is_red(tmp_path: Path, line: str, now: Verdict, advice: str) -> None:
    judged = ledger(tmp_path, LINE.format(verdict=line)).judge(result(now))
    assert not judged.accepted
    assert advice in judged.message


def test_a_line_about_an_unknown_case_or_lane_is_stale(tmp_path: Path) -> None:
    lines = ledger(tmp_path, LINE.format(verdict="ROUNDING"))
    assert lines.stale({("clip/text", "bfloat16")}, complete=True) == []
    assert "not registered: remove it" in lines.stale({("clip/text", "float32")}, complete=False)[0]
    assert lines.stale({("bert/tiny", "float32")}, complete=False) == []
    assert len(lines.stale({("bert/tiny", "float32")}, complete=True)) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[line]]\nid = 'a/b'\n", "line 1 lacks lane, verdict, cause, until"),
        (LINE.format(verdict="ROUNDING") + "why = 'so'\n", "line 1 has an unknown why"),
        (LINE.format(verdict="BITWISE"), "line 1 may excuse ROUNDING or DIFFERENT, got 'BITWISE'"),
        (LINE.format(verdict="ROUNDING") * 2, "two lines for clip/text[bfloat16]"),
        ("[[gap]]\nid = 1\n", "holds [[line]] tables only, got gap"),
        ("line = 3", "holds [[line]] tables only"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_ledger_that_cannot_be_used_says_where(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ParityError) as error:
        ledger(tmp_path, text)
    assert reason in str(error.value)


def test_a_missing_ledger_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="cannot be read"):
        Ledger.load(tmp_path / "none.toml")
