"""What follows from the values of both sides alone, where no edit of a node was found: only what they prove."""

from collections import Counter

from refiners.parity.reasons import flow
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.session import Session
from refiners.parity.reasons.teacher import Where
from refiners.parity.reasons.ways import gives_shape

MOST_NAMES = 8


def repeated(finding: Finding, session: Session) -> str:
    """A node that runs too often: a leaf of it, or it, runs more often than upstream's does."""
    if finding.passed_on is not None:
        return ""
    ours = Counter(call.path for call in session.port_trace.calls)
    theirs = Counter(call.path for call in session.upstream_trace.calls)
    path = finding.port
    inside = [one for one in session.pairing if one == path or not path or one.startswith(f"{path}.")]
    more = any(ours[one] > theirs[session.pairing[one]] > 0 for one in inside)
    return f"when it runs fewer times than {ours[path]}" if more and ours[path] > 1 else ""


def by_data_flow(finding: Finding, session: Session) -> str:
    """What follows from values alone, when no edit of the node was found: only what they prove."""
    if finding.passed_on is not None:
        is_proved = finding.passed_on == finding.actual  # all that upstream does to it is missing
        return _out_of_order(finding, session) or (_missing_operations(finding, finding.passed_on) if is_proved else "")
    expected, actual = set(finding.point.expected), set(finding.point.actual)
    for ours in finding.port_operations:
        if expected & set(ours.inputs) and actual & set(ours.outputs):
            return f"without {flow.told(ours)}{' (a residual too much)' if flow.is_residual(ours) else ''}"
    return _of_leaf(finding) if finding.is_leaf else _not_as_it_is(finding, session)


def _not_as_it_is(finding: Finding, session: Session) -> str:
    """Upstream's leaf receives a value that the port has, and of which it makes another one first."""
    if finding.expected is None or finding.region or finding.point.where is not Where.RECEIVES:
        return ""
    if not any(finding.expected in operation.inputs for operation in finding.port_region):
        return ""
    names = dict.fromkeys(flow.name_of(op) for op in finding.port_region if not gives_shape(op))
    right = flow.origin(session.port_trace, finding.expected, session.pairing)
    if not names or not right or len(names) > MOST_NAMES:
        return ""
    session.cause_at = [session.port_trace.path_of(finding.port_region[-1])]
    leaf = f"when `{finding.point.port}` comes first and receives {right} as it is, as upstream's does"
    return f"{leaf}: here that goes through {', '.join(names)} before"


def _of_leaf(finding: Finding) -> str:
    """The first operation of a leaf that gives something else than upstream's does from the same values."""
    for ours, theirs in zip(finding.port_operations[:1], finding.upstream_operations[:1], strict=False):
        if ours.function is theirs.function and ours.inputs == theirs.inputs and "→" not in f"{ours.name}{theirs.name}":
            return flow.unlike(ours, theirs)
    return ""


def _out_of_order(finding: Finding, session: Session) -> str:
    """A leaf that upstream runs first is there in the port as well, and runs at another place."""
    ours = {other: path for path, other in session.pairing.items()}
    for theirs in finding.upstream_operations:
        other = session.upstream_trace.path_of(theirs)
        ran = {call.path for call in session.port_trace.calls}
        if other in ours and finding.passed_on in theirs.inputs and ours[other] in ran:
            return f"when `{ours[other]}` comes first, as upstream's `{other}` does: the port runs it elsewhere"
    return ""


def is_wiring(finding: Finding) -> bool:
    """Whether both sides have the value that arrives and the one that should: something else is connected here."""
    return not (finding.is_leaf or finding.port_operations or finding.upstream_operations)


def wired(finding: Finding, session: Session) -> str:
    """What arrives where something else should, if both sides have both values."""
    ours = {other: path for path, other in session.pairing.items()}
    unlike = [(e, a) for e, a in zip(finding.point.expected, finding.point.actual, strict=False) if e != a]
    if not unlike:
        return ""
    expected, actual = unlike[0]
    given = flow.origin(session.port_trace, actual, session.pairing)
    call = next((c for c in session.upstream_trace.calls if c.path in ours and expected in c.outputs), None)
    if call is None:
        right = flow.origin(session.upstream_trace, expected, ours)
        if right and right == given and all(finding.point.shapes):  # two of several things that the model is given
            there, here = finding.point.shapes
            right, given = f"{right} ({there})", f"{given} ({here})"
        return f"when it receives {right} of upstream: here it receives {given}" if right and given else ""
    return (
        f"when it receives what `{ours[call.path]}` returns, as upstream's does: here it receives {given or 'another'}"
    )


def missing_module(finding: Finding, session: Session) -> str:
    """A whole module of upstream of which nothing runs in the port, between the value passed on and the right one."""
    path, taken = finding.upstream, {session.pairing.get(call.path, "") for call in session.port_trace.calls} - {""}
    if finding.passed_on is None or not path or any(f"{other}.".startswith(f"{path}.") for other in taken):
        return ""
    for call in session.upstream_trace.calls:
        if call.path == path and finding.passed_on in call.inputs and set(call.outputs) - set(call.inputs):
            # Where the port does nothing more, the module has to give the right value by itself.
            is_all = bool(finding.port_region) or finding.expected in call.outputs
            return f"when it runs upstream's `{path}` ({call.kind}), which is missing here" if is_all else ""
    return ""


def _missing_operations(finding: Finding, passed_on: int) -> str:
    """What upstream does between the value passed on and the right one."""
    region = finding.region
    if region and len(region) <= 8 and passed_on in {number for op in region for number in op.inputs}:
        if len(region) == 1 and flow.is_residual(region[0]):
            return f"when it is added to what came before it (a missing residual), as at {region[0].source}"
        names = ", ".join(dict.fromkeys(op.name.removeprefix("aten.") for op in region))
        made = next(iter(region))
        return f"when it computes upstream's {names} here, as at {made.source}"
    return ""
