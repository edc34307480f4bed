"""Every check of the project: `nox -l` lists them, `nox -s NAME -- ARGUMENTS` runs one.

All sessions share one environment, `.nox/environment`, because torch alone takes almost a gigabyte; each adds the
dependency group of its own name (pyproject.toml) at the pinned versions (constraints.txt). On a machine that has
everything, `--no-venv --no-install` runs them with the Python that has torch.
"""

import importlib.util
import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests", "parity"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
ENVIRONMENT = ROOT / ".nox" / "environment"
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
OFFLINE = {"HF_HUB_OFFLINE": "1", "PIP_CONSTRAINT": str(CONSTRAINTS), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
# A room as `testpaths` gives way to paths among the arguments: `nox -s tests -- tests/refiners/test_cli.py`.
PYTEST = ["-m", "pytest", "--override-ini"]
MOST_PROCESSES = 8  # each imports torch and transformers, which takes a gigabyte
PACKAGES = ["refiners", "reference_ports", "parity_tests", "benchmarks", "tests", "tools", "docs", "noxfile.py"]

# True where a session must not make or use `.nox/environment`: under --no-venv, said by the session that makes it.
provided_by_the_machine = not ENVIRONMENT.exists()


def pinned(package: str) -> str:
    """The requirement that constraints.txt holds for a package, such as `torch==2.13.0`."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.lower().replace("_", "-").startswith(f"{package.lower().replace('_', '-')}=="):
            return line
    raise LookupError(f"{package} has no line in {CONSTRAINTS.name}: add one, such as `{package}==1.0`.")


def python() -> str:
    """The interpreter that sessions run: the shared environment's, or the machine's under --no-venv."""
    if not provided_by_the_machine:
        return str(ENVIRONMENT / SCRIPTS / "python")
    # nox itself may live apart from torch (pipx, uvx); then the first Python of the PATH is meant.
    return sys.executable if importlib.util.find_spec("torch") else "python"


def install(session: nox.Session, group: str, *options: str) -> None:
    """Add a dependency group to the shared environment, at the pinned versions."""
    if provided_by_the_machine:
        return
    requirements = nox.project.dependency_groups(GROUPS, group)
    session.run(python(), "-m", "pip", "install", "--quiet", *options, *requirements, env=OFFLINE)


def run(session: nox.Session, *arguments: str) -> None:
    """Run a Python module or script of the environment from the root of the checkout."""
    session.run(python(), *arguments, env=OFFLINE)


def in_parallel(arguments: list[str]) -> list[str]:
    """The arguments by which pytest-xdist uses all cores, unless it is told otherwise or would be in the way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    serial = ("-n", "--numprocesses", "--dist", "--pdb", "--collect-only")
    asked = any(argument.startswith(serial) for argument in arguments)
    shares_a_gpu = any(argument.endswith(("cuda", "device=all")) for argument in arguments) or "all" in arguments
    if asked or shares_a_gpu or cores < 2:
        return []
    # Items that follow one another go to one process, so that the lanes of a case share what they can.
    return ["-n", str(min(cores, MOST_PROCESSES)), "--dist", "worksteal"]


@nox.session(reuse_venv=True)
def environment(session: nox.Session) -> None:
    """Make the environment that all sessions share: the pinned torch first, then this project, editable."""
    global provided_by_the_machine
    provided_by_the_machine = session.venv_backend == "none"
    # Torch first and exactly: any other request would bring the newest build with its CUDA packages.
    session.install(pinned("torch"), env=OFFLINE)
    session.install(*nox.project.dependency_groups(GROUPS, "build"), env=OFFLINE)
    session.install("--no-build-isolation", "--editable", ".", env=OFFLINE)


@nox.session(venv_backend="none", requires=["environment"])
def parity(session: nox.Session) -> None:
    """Prove that every port computes what its upstream computes; `-- -k clip`, `-- --shard 2/5`, `-- --changed`."""
    install(session, "parity")
    install(session, "published-files", "--no-deps")
    run(session, *PYTEST, "testpaths=parity_tests", *in_parallel(session.posargs), *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def parity_full(session: nox.Session) -> None:
    """Run published sizes in full beside upstream: bits, time and memory. Takes minutes and 8 GiB."""
    install(session, "parity")
    run(session, "-m", "pytest", "parity_tests/full_run.py", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def mutants(session: nox.Session) -> None:
    """Plant faults in the ports and count those that the cases tell; `-- bert --budget 60 --seed 1`."""
    install(session, "parity")
    install(session, "published-files", "--no-deps")
    run(session, "-m", "refiners.cli", "parity", "mutants", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def upstream(session: nox.Session) -> None:
    """Run the cases against other versions; `-- transformers==5.17.0 diffusers==0.36.0`, then as `parity drift`."""
    install(session, "parity")
    install(session, "published-files", "--no-deps")
    versions = [argument for argument in session.posargs if "==" in argument]
    others = ROOT / ".nox" / ("upstream-" + "-".join(sorted(versions)).replace("==", "-"))
    if versions:
        # An environment of its own on top of the shared one: what is given comes first, torch is not fetched again.
        session.run(python(), "-m", "venv", "--without-pip", str(others))
        interpreter = str(others / SCRIPTS / "python")
        show = "import sysconfig; print(sysconfig.get_path('purelib'))"
        below, own = (str(session.run(p, "-c", show, silent=True)).strip() for p in (python(), interpreter))
        Path(own, "below.pth").write_text(f"{below}\n")
        torch = others / "constraints.txt"
        torch.write_text(f"{pinned('torch')}\n")
        pip = [python(), "-m", "pip", "--python", interpreter]
        session.run(*pip, "install", "--quiet", *versions, env={**OFFLINE, "PIP_CONSTRAINT": str(torch)})
    else:
        interpreter = python()
    session.env.update(OFFLINE)
    session.run(interpreter, "-m", "refiners.cli", "parity", "drift", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def tests(session: nox.Session) -> None:
    """Run the unit tests, the examples of the docs, and the planted faults of every rule."""
    install(session, "tests")
    run(session, *PYTEST, "testpaths=tests", *in_parallel(session.posargs), *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def docs(session: nox.Session) -> None:
    """Run every example that stands in a docstring, the README or docs/."""
    install(session, "docs")
    run(session, *PYTEST, "testpaths=tests/test_documentation.py", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def lint(session: nox.Session) -> None:
    """Check style, format, import contracts, the house rules, and that no generated file is stale."""
    install(session, "lint")
    run(session, "-m", "ruff", "check", *PACKAGES)
    run(session, "-m", "ruff", "format", "--check", *PACKAGES)
    session.run(str(Path(python()).with_name("lint-imports")), env=OFFLINE)
    run(session, "-m", "tools.house_rules")
    run(session, "-m", "tools.generated", "--check", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def types(session: nox.Session) -> None:
    """Check the types of refiners and reference_ports with pyright, strictly."""
    install(session, "types")
    run(session, "-m", "pyright", "--pythonpath", python(), *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def benchmarks(session: nox.Session) -> None:
    """Count and time what ports and adapters cost; `-- --write-budgets`, `-- --figures FILE`, `-- --on cuda`."""
    install(session, "benchmarks")
    room = [*PYTEST, "testpaths=benchmarks"]
    how = ["-m", "timed"]
    if session.posargs:
        how = in_parallel(session.posargs) if "--write-budgets" in session.posargs else []
    else:
        # Counts are the same on a busy machine; what is timed has it for itself.
        run(session, *room, *in_parallel([]), "-m", "not timed")
    run(session, *room, *how, *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def benchmark_gate(session: nox.Session) -> None:
    """Measure how often the timings raise false alarms and miss 5 %; `-- --minutes 20 --runs 100`."""
    install(session, "benchmarks")
    run(session, "-m", "benchmarks.gate", *session.posargs)


@nox.session(venv_backend="none", requires=["environment"])
def fix(session: nox.Session) -> None:
    """Repair what a machine can: style, format, and the generated files."""
    install(session, "lint")
    run(session, "-m", "ruff", "check", "--fix-only", *PACKAGES)
    run(session, "-m", "ruff", "format", *PACKAGES)
    run(session, "-m", "tools.generated", "--write", *session.posargs)
