"""Finding cases: modules that expose `CASES`, anywhere on the path, this repository's or a third party's."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

from refiners.errors import ParityError
from refiners.parity.case import Case, collecting
from refiners.parity.environment import package_behind

DEFAULT_MODULES = "parity_tests.cases"
"""Where this repository has its cases."""


@dataclass(frozen=True)
class Registry:
    """The cases of some modules, and what kept the others from being registered."""

    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    homes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Case id → the module that lists it."""

    def one(self, case_id: str) -> Case:
        """The case of that id.

        Raises:
            ParityError: there is none; the message shows the nearest ids.
        """
        import difflib

        for case in self.cases:
            if case.id == case_id:
                return case
        near = difflib.get_close_matches(case_id, [case.id for case in self.cases], n=3, cutoff=0.3)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ParityError(f"There is no case {case_id!r} among {len(self.cases)}.{hint}")


def collect_cases(modules: str | Sequence[str]) -> Registry:
    """The cases of some modules. A module that cannot be used becomes a problem and the others go on.

    Receives:
        modules: dotted names, in one string separated by commas or in a sequence. A package that has no `CASES` stands
            for all its modules whose name does not begin with an underscore.
    """
    names = modules.split(",") if isinstance(modules, str) else modules
    found: list[tuple[str, Case]] = []
    problems: list[str] = []
    for name in (name.strip() for name in names):
        if name:
            _collect(name, found, problems)
    cases = [case for _, case in found]
    twice = [case_id for case_id, count in Counter(case.id for case in cases).items() if count > 1]
    problems += [f"The case id {case_id!r} is registered twice. Give each case an id of its own." for case_id in twice]
    if not cases and not problems:
        problems.append(f"No parity case is registered in {modules!r}. Name modules that expose `CASES`.")
    unique = {case.id: case for case in cases}
    return Registry(tuple(unique.values()), tuple(problems), {case.id: name for name, case in found})


def load_cases(modules: str | Sequence[str]) -> list[Case]:
    """As `collect_cases`, for when nothing may be wrong.

    Raises:
        ParityError: a module cannot be imported or has no usable `CASES`, an id occurs twice, or there is no case.
            Lists everything that is wrong.
    """
    registry = collect_cases(modules)
    if registry.problems:
        raise ParityError("\n".join(registry.problems))
    return list(registry.cases)


def _collect(name: str, found: list[tuple[str, Case]], problems: list[str]) -> None:
    try:
        with collecting():
            module = importlib.import_module(name)
    except Exception as error:  # whatever a third party's module raises on import
        told = (str(error).splitlines() or [""])[0].removesuffix(".")
        package = package_behind(error)
        told += f" ({package})" if package and package.split(" ")[0] != name.split(".")[0] else ""
        problems.append(f"The case module `{name}` cannot be imported: {type(error).__name__}: {told}.")
        return
    if hasattr(module, "CASES"):
        _take(module, found, problems)
    elif hasattr(module, "__path__"):
        inside = sorted(info.name for info in pkgutil.iter_modules(module.__path__) if not info.name.startswith("_"))
        for child in inside:
            _collect(f"{name}.{child}", found, problems)
    else:
        problems.append(
            f"The module `{name}` has no `CASES`. Add `CASES: Sequence[Case]`, or begin its name with an underscore "
            "if it only helps other case modules."
        )


def _take(module: ModuleType, found: list[tuple[str, Case]], problems: list[str]) -> None:
    given: Any = module.CASES
    if not isinstance(given, Sequence) or isinstance(given, str):
        problems.append(f"`CASES` of `{module.__name__}` must be a sequence of Case, got {type(given).__name__}.")
        return
    cases = cast(Sequence[Any], given)
    if not cases:
        problems.append(f"`CASES` of `{module.__name__}` is empty.")
    for index, case in enumerate(cases):
        if isinstance(case, Case) and not case.refusal:
            found.append((module.__name__, case))
        elif isinstance(case, Case):
            problems.append(f"{case.refusal} It is `CASES[{index}]` of `{module.__name__}`.")
        else:
            problems.append(f"`CASES[{index}]` of `{module.__name__}` must be a Case, got {type(case).__name__}.")
