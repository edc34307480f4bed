"""Every house rule, held against a fault that it has to find and against a neighbour that it has to let pass."""

from pathlib import Path

import pytest

from tools import house_rules
from tools.house_rules import RULES, check, files

FAULTS = {
    "a tolerance as keyword": ("tolerance", "tests/test_x.py", "equal(a, b, atol=1e-5)"),
    "a tolerance as parameter": ("tolerance", "refiners/parity/verdict.py", "def equal(a, b, rel_tol=0.1): ..."),
    "a tolerance as variable": ("tolerance", "parity_tests/test_x.py", "rtol = 1e-3"),
    "a hidden tolerance": ("tolerance", "benchmarks/test_x.py", "torch.allclose(a, b)"),
    "an approximate value": ("tolerance", "tests/test_x.py", "assert a == pytest.approx(b)"),
    "upstream through import_module": (
        "upstream-by-name",
        "refiners/fluxion/x.py",
        'importlib.import_module("transformers.models.clip")',
    ),
    "upstream through a keyword": ("upstream-by-name", "reference_ports/clip/x.py", 'import_module(name="diffusers")'),
    "upstream through __import__": ("upstream-by-name", "reference_ports/clip/x.py", '__import__("peft")'),
    "upstream through importorskip": ("upstream-by-name", "tools/x.py", 'pytest.importorskip("diffusers")'),
    "an undeclared package": ("undeclared-dependency", "refiners/x.py", "import einops"),
    "an undeclared package in a function": (
        "undeclared-dependency",
        "reference_ports/clip/x.py",
        "def f():\n    from einops.layers import torch",
    ),
    "an anonymous Chain": ("anonymous-chain", "reference_ports/clip/x.py", "fl.Chain(fl.Linear(1, 1))"),
    "a skipped test": ("skipped-test", "tests/test_x.py", "@pytest.mark.skipif(True, reason='')\ndef test_x(): ..."),
    "a test that stops": ("skipped-test", "parity_tests/test_x.py", "pytest.xfail('one day')"),
    "a suppression without a rule": ("unexplained-suppression", "refiners/x.py", "x = f()  # type: ignore"),
    "a suppression without a reason": (
        "unexplained-suppression",
        "refiners/x.py",
        "x = f()  # pyright: ignore[reportUnknownVariableType]",
    ),
    "a noqa without a code": ("unexplained-suppression", "tests/x.py", "x = f()  # noqa"),
}

NEIGHBOURS = {
    "the owner of the tolerances": ("refiners/parity/rounding.py", "equal(a, b, atol=1e-5, rtol=0)"),
    "an exact comparison": ("tests/test_x.py", "assert torch.equal(a, b)"),
    "upstream where it belongs": ("parity_tests/cases/x.py", 'import_module("transformers")'),
    "another module by name": ("refiners/x.py", 'import_module("reference_ports.clip")'),
    "a declared package": ("refiners/x.py", "import safetensors.torch\nimport PIL.Image\nimport os"),
    "any package in a test": ("tests/test_x.py", "import hypothesis"),
    "a named Chain": ("reference_ports/clip/x.py", "class Encoder(fl.Chain): ...\nEncoder(fl.Linear(1, 1))"),
    "a Chain in a test": ("tests/test_x.py", "fl.Chain(fl.Linear(1, 1))"),
    "an explained suppression": ("refiners/x.py", "x = f()  # type: ignore[misc]  torch has no stub for f"),
    "a suppression that is only quoted": ("tests/x.py", 'x = "y = 1  # type: ignore"'),
}


@pytest.mark.parametrize(("rule", "path", "text"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_by_its_rule(rule: str, path: str, text: str) -> None:
    assert {finding.rule for finding in check(Path(path), text)} == {rule}


@pytest.mark.parametrize(("path", "text"), NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_what_resembles_a_fault_passes(path: str, text: str) -> None:
    assert check(Path(path), text) == []


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule for rule, _, _ in FAULTS.values()} == set(RULES)


def test_a_finding_says_what_where_and_what_to_do() -> None:
    [finding] = check(Path("tests/test_x.py"), "import torch\n\nassert torch.allclose(a, b)\n")
    assert str(finding).startswith("tests/test_x.py:3: tolerance: `allclose` hides a tolerance: compare bits")


def test_the_rooms_hold_the_files_that_are_checked(tmp_path: Path) -> None:
    for path in ("refiners/x.py", "tests/deep/down/y.py", "elsewhere/z.py", "noxfile.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert {str(path.relative_to(tmp_path)) for path in files(tmp_path)} == {
        "refiners/x.py",
        "tests/deep/down/y.py",
        "noxfile.py",
    }


def test_the_command_fails_when_a_rule_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(house_rules, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    good, bad = tmp_path / "tests" / "good.py", tmp_path / "tests" / "bad.py"
    good.write_text("assert torch.equal(a, b)\n")
    bad.write_text("assert torch.allclose(a, b)\n")
    assert house_rules.main([str(good)]) == 0
    assert house_rules.main([str(good), str(bad)]) == 1
    assert "tests/bad.py:1: tolerance" in capsys.readouterr().out
