"""Every metamorphic cell of every tiny case, see `refiners.parity.cells`. `refiners parity cells` runs them all.

Tracing a model takes torch seconds, so `compiled` runs here for a few cases only, one for each way through a family.
"""

import pytest

from refiners.parity import Case, load_cases
from refiners.parity.cells.metamorphic import CELLS, check_cell, check_cells

CASES = {case.id: case for case in load_cases("parity_tests.cases")}
TINY = [case for case in CASES.values() if case.weights is None and not case.id.endswith("-width")]
COMPILED = (
    "bert/tiny",
    "bert/sentences",
    "clip/text-bigg",
    "clip/image-interpolated",
    "clip/whole",
    "vit/tiny",
    "autoencoder/tiny",
    "unet/sdxl",
    "pipelines/sd1-text",
)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("case", TINY, ids=[case.id for case in TINY])
def test_what_changes_nothing_changes_nothing(case: Case) -> None:
    found = check_cells(case, [cell for cell in CELLS if cell != "compiled"])
    assert [str(finding) for finding in found if not finding.ok] == []


@pytest.mark.parametrize("case_id", COMPILED)
def test_a_compiled_port_is_one_graph_of_the_same_bits(case_id: str) -> None:
    found = check_cell(CASES[case_id], "compiled")
    assert found.outcome == "holds", str(found)
