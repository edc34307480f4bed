"""A sample of the planted faults, quick enough for every run; all of them are `nox -s mutants`.

The sample is the same each time. What it must show: every fault is told by some case, none is left in a port, and what
is said to be equivalent is. Pipelines have no sample: most of what is planted in them are faults of the other families.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from parity_tests.cases import autoencoder, bert, clip, lora, solvers, unet, vit
from refiners.parity import Case, Lane
from refiners.parity.explain import explain_sides
from refiners.parity.mutants.equivalent import load_equivalents
from refiners.parity.mutants.kills import Settings, hunt
from refiners.parity.mutants.mutate import bench

EQUIVALENTS = load_equivalents(Path(__file__).parent / "equivalent.toml")
ATTENTION = "TransformerLayer_1.AttentionResidual.SelfAttention.MaskedAttention"
THROWN_AWAY = f"exchange-axes::{ATTENTION}::transpose 4, read as if"
# How many faults are planted in each case. Most faults of a solver are told by one case of many, so all cases run.
PER_CASE = {"solvers": 2}
SAMPLES: dict[str, tuple[Sequence[Case], set[str]]] = {
    "autoencoder": (autoencoder.CASES, {"tiny", "taesd", "one-generator"}),
    "bert": (bert.CASES, {"tiny", "no-mask", "finished-mask", "position-ids", "sentences", "sentences-short"}),
    "clip": (clip.CASES, {"text-l", "text-no-mask", "text-finished-mask", "image-l", "image-float32"}),
    "lora": (lora.CASES, {"layers.dora", "layers.loha", "layers.lokr", "layers.stacked"}),
    "solvers": (solvers.CASES, {case.id.partition("/")[2] for case in solvers.CASES}),
    "unet": (unet.CASES, {"sd1", "sdxl", "batch-1"}),
    "vit": (vit.CASES, {"tiny", "bytes", "mask", "interpolated", "masked-patches", "act-silu"}),
}


@pytest.mark.parametrize("family", SAMPLES)
def test_every_planted_fault_of_a_sample_is_told(family: str) -> None:
    cases, names = SAMPLES[family]
    chosen = [case for case in cases if case.id.partition("/")[2] in names]
    assert len(chosen) == len(names)
    (table,) = hunt(chosen, Settings(seed=3, per_case=PER_CASE.get(family, 15), equivalents=EQUIVALENTS))
    assert len(table.faults) >= 80
    assert [trial.id for trial in table.survived.values()] == []
    assert table.problems == []


def test_a_result_that_is_thrown_away_is_not_said_to_be_another_activation() -> None:
    """What is returned and what should be are two values of the port, each of which is the identity of itself."""
    (case,) = (case for case in vit.CASES if case.id == "vit/tiny")
    with bench(case, Lane("float32")) as stand:
        (mutant,) = (one for one in stand.mutants() if one.fault == THROWN_AWAY)
        with stand.planted(mutant):
            faults = explain_sides(stand.case, stand.lane, stand.upstream, stand.port).faults
    assert [fault.finding.port for fault in faults] == [mutant.path]
    assert "activation" not in faults[0].diagnosis
