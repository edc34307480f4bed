"""Faults planted in ports of real models are found at their leaf, and the diagnosis is the fix.

`python -m parity_tests.explain_measured` counts the same over hundreds of faults.
"""

from collections.abc import Callable

import pytest

import refiners.fluxion.layers as fl
from parity_tests import test_planted_faults as planted_faults
from refiners.parity import CaseRunner, Lane
from refiners.parity.explain import Explanation, explain

BERT, TEXT, IMAGE = planted_faults.BERT, planted_faults.TEXT, planted_faults.IMAGE
FIRST = "TransformerLayer_1"
ATTENTION = f"{FIRST}.AttentionResidual.SelfAttention"

FAULTS: list[tuple[str, Callable[[fl.Chain], None], str, str]] = [
    (BERT, planted_faults.change_eps, f"{FIRST}.LayerNorm_1", "when `eps` is 1e-12"),
    (BERT, planted_faults.transpose, f"{ATTENTION}.Projections.Query", "when `weight` is transposed"),
    (BERT, planted_faults.other_head_count, f"{ATTENTION}.MaskedAttention", "when `num_heads` is 4"),
    (BERT, planted_faults.drop_residual, f"{FIRST}.Chain", "a missing residual"),
    (BERT, planted_faults.drop_layer, "", "upstream's `encoder.layer.0`"),
    (BERT, planted_faults.ignore_mask, f"{ATTENTION}.Unmasked", "`attn_mask` is upstream's tensor"),
    (TEXT, planted_faults.change_activation, f"{FIRST}.FeedForwardResidual.FeedForward.GeLU", "'sigmoid'"),
    (TEXT, planted_faults.rotate_heads, f"{ATTENTION}.Projections.Value", "rolled by -8 rows"),
    (IMAGE, planted_faults.interleave_heads, f"{ATTENTION}.Projections.Value", "4 interleaved heads"),
    (IMAGE, planted_faults.double_class_token, "ClassTokenAndPatches.ClassToken", "when `weight` is times 0.5"),
    (IMAGE, planted_faults.invent_causality, f"{ATTENTION}.MaskedAttention", "when `is_causal` is False"),
]


def explained(case_id: str, *faults: Callable[[fl.Chain], None], lane: str = "float32") -> Explanation:
    def fault(model: fl.Chain) -> None:
        for plant in faults:
            plant(model)

    return explain(planted_faults.planted(planted_faults.CASES[case_id], fault), Lane(lane))


@pytest.mark.parametrize(
    ("case_id", "fault", "path", "text"), FAULTS, ids=[f"{fault.__name__}-{name}" for name, fault, *_ in FAULTS]
)
def test_a_fault_is_found_and_diagnosed(case_id: str, fault: Callable[[fl.Chain], None], path: str, text: str) -> None:
    explanation = explained(case_id, fault)
    assert [found.endswith(path) for found in explanation.leaves] == [True]
    assert text in explanation.faults[0].diagnosis


@pytest.mark.parametrize("lane", ["float64", "bfloat16"])
def test_three_faults_are_found_in_one_run(lane: str) -> None:
    faults = (planted_faults.transpose, planted_faults.change_activation, planted_faults.shift_positions)
    explanation = explained(BERT, *faults, lane=lane)
    paths = [path.rpartition(".")[-1] for path in explanation.leaves]
    assert sorted(paths) == ["GeLU", "Query", "Shifted"]
    assert all(fault.diagnosis for fault in explanation.faults)


def test_upstreams_line_and_module_are_told() -> None:
    text = str(explained(BERT, planted_faults.change_eps))
    assert "encoder.layer.0.attention.output.LayerNorm" in text
    assert "transformers/models/bert/modeling_bert.py" in text
    assert "refiners parity explain bert/tiny --lanes float32" in text


def test_a_case_that_is_equal_has_nothing_to_explain() -> None:
    assert not explained(BERT, lambda model: None).faults


def test_the_verdict_of_an_explained_case_stays() -> None:
    runner = CaseRunner(planted_faults.planted(planted_faults.CASES[BERT], planted_faults.change_eps))
    before = runner.run(Lane("float32"))
    explain(runner, Lane("float32"))
    assert runner.run(Lane("float32")) == before
