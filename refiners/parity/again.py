"""The command that shows a case again, with the module that lists it where that is not this repository's."""

import sys
from typing import Any, cast

from refiners.parity.case import Case
from refiners.parity.lanes import Lane
from refiners.parity.registry import DEFAULT_MODULES


def command_for(case_id: str, modules: str, lane: Lane | None = None, verb: str = "show") -> str:
    """What shows a case again."""
    where = f" --cases {modules}" if modules not in ("", DEFAULT_MODULES) else ""
    lanes = f" --lanes {lane.dtype_name}" if lane else ""
    device = f" --device {lane.device}" if lane and lane.device != "cpu" else ""
    return f"refiners parity {verb} {case_id}{lanes}{device}{where}"


def command_of(case: Case, lane: Lane, verb: str = "explain") -> str:
    """The same of a case that somebody holds, with a blank to fill in where no imported module lists it."""
    home = home_of(case) or "YOUR.MODULE"
    is_ours = f"{home}.".startswith(f"{DEFAULT_MODULES}.")
    return command_for(case.id, DEFAULT_MODULES if is_ours else home, lane, verb)


def home_of(case: Case) -> str | None:
    """The name of the imported module whose `CASES` hold a case."""
    for name, module in list(sys.modules.items()):
        listed = cast(Any, module).__dict__.get("CASES") if hasattr(module, "__dict__") else None
        cases = cast("tuple[Any, ...]", listed) if isinstance(listed, list | tuple) else ()
        if name != "__main__" and any(case is one for one in cases):
            return name
    return None
