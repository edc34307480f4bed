"""At the versions that are installed, upstream is what it was when its outputs were summarised in upstream.json.

`nox -s upstream -- transformers==5.17.0` looks at all cases under other versions; here are a few, under these ones.
A change of a case, or of a pinned version, asks for `refiners parity drift --write`.
"""

from pathlib import Path

import pytest

from refiners.parity import CaseRunner, Lane, Ledger, load_cases
from refiners.parity.drift import Side, load, look

CASES = {case.id: case for case in load_cases("parity_tests.cases")}
STORED = load(Path(__file__).parent / "upstream.json")


@pytest.mark.parametrize("case_id", ["bert/tiny", "clip/text-l", "clip/image-l", "vit/tiny", "unet/sd1"])
def test_neither_side_has_moved(case_id: str) -> None:
    case = CASES[case_id]
    found = look(case, STORED[case_id], [CaseRunner(case).run(Lane("float64"))], Ledger())
    assert found.side is Side.NONE, f"{found}\nIf the case was changed: refiners parity drift --write"
    assert found.reasons == []
