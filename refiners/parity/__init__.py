"""The verifier: proof, by running both, that a port computes what its upstream computes, tensor for tensor.

    case.py        what is compared: two builders, a key map, inputs, outputs
    weights.py     informative values in one set of storages for both sides
    lanes.py       dtype × device, and everything held equal
    verdict.py     BITWISE, ROUNDING or DIFFERENT; rounding.py has the two constants
    runner.py      one case; suite.py many of them
    explain.py     where and why a port differs; trace.py, teacher.py, localise.py and diagnose.py do it
    ledger.py      results that are not bitwise, each with its cause
    selection.py   what runs here and now: one of several shards, what changed since it passed
    report.py      what people read of a run; junit.py and page/ write it down
    plugin.py      `pytest --parity-cases your.module`

The names below are the API. They are looked up when they are used, so that pytest can load the plugin of this package
in any project without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refiners.parity.case import Case as Case
    from refiners.parity.case import Conversion as Conversion
    from refiners.parity.case import FullSize as FullSize
    from refiners.parity.case import with_both_inits as with_both_inits
    from refiners.parity.explain import Explanation as Explanation
    from refiners.parity.explain import explain as explain
    from refiners.parity.explain import explain_modules as explain_modules
    from refiners.parity.full_size import FullSizeResult as FullSizeResult
    from refiners.parity.lanes import Lane as Lane
    from refiners.parity.ledger import Ledger as Ledger
    from refiners.parity.registry import collect_cases as collect_cases
    from refiners.parity.registry import load_cases as load_cases
    from refiners.parity.report import render_readme_table as render_readme_table
    from refiners.parity.result import Result as Result
    from refiners.parity.result import Verdict as Verdict
    from refiners.parity.runner import CaseRunner as CaseRunner
    from refiners.parity.suite import Baseline as Baseline
    from refiners.parity.suite import Report as Report
    from refiners.parity.suite import run as run

_HOMES = {
    "Baseline": "suite",
    "Case": "case",
    "CaseRunner": "runner",
    "Conversion": "case",
    "Explanation": "explain",
    "FullSize": "case",
    "FullSizeResult": "full_size",
    "Lane": "lanes",
    "Ledger": "ledger",
    "Report": "suite",
    "Result": "result",
    "Verdict": "result",
    "collect_cases": "registry",
    "explain_modules": "explain",
    "load_cases": "registry",
    "render_readme_table": "report",
    "run": "suite",
    "with_both_inits": "case",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  # the keys are the names imported above


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
