"""Whether modules of upstream that the port seems to lack are all that it lacks.

A value that the port has goes into upstream's norm, and the port has nothing that stands for the norm: it may lack it,
or do it by itself, in another way or behind what comes next. Who follows the words would do it twice then.
"""

from refiners.parity.operations import ModuleCall
from refiners.parity.reasons.candidates import put
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.replay import Program, coarsely
from refiners.parity.reasons.session import Session
from refiners.parity.reasons.trial import Trial

MOST = 4


def is_all_that_lacks(port: Program, upstream: Program, finding: Finding, session: Session) -> bool:
    """Whether the port makes the right value where upstream's module, and others like it, change what they receive."""
    try:
        calls = _calls(port, upstream, session)
        named = [call for call in calls if call.path == finding.upstream]
        trial = Trial(port, upstream)
        return any(some and len(some) <= MOST and _holds(trial, some) for some in (named, calls, _like(calls, named)))
    except Exception:  # a value that was not seen, or an operation that does not take float64
        return False


def _holds(trial: Trial, calls: list[ModuleCall]) -> bool:
    pairs = [(given, made) for call in calls for given, made in _ends(call)]
    if trial.holds(put(pairs)):
        return True
    with coarsely():
        return trial.holds(put(pairs))


def _ends(call: ModuleCall) -> list[tuple[int, int]]:
    """What a module changes, and into what."""
    made = [number for number in call.outputs if number not in call.inputs]
    return [(call.inputs[0], made[0])] if call.inputs and made else []


def _like(calls: list[ModuleCall], named: list[ModuleCall]) -> list[ModuleCall]:
    kinds = {call.kind for call in named}
    return [call for call in calls if call.kind in kinds]


def _calls(port: Program, upstream: Program, session: Session) -> list[ModuleCall]:
    """The outermost modules of upstream that change a value of the port's, and of which nothing runs there."""
    ran = {session.pairing.get(call.path, "") for call in session.port_trace.calls} - {""}
    found: list[ModuleCall] = []
    for call in session.upstream_trace.calls:
        is_here = any(path == call.path or path.startswith(f"{call.path}.") for path in ran) or not call.path
        inside = any(one.path == call.path or call.path.startswith(f"{one.path}.") for one in found)
        ends = _ends(call)
        if not is_here and not inside and ends and ends[0][0] in port.values and ends[0][1] in upstream.values:
            found.append(call)
    return found
