"""An operation on the wrong side of a leaf: missing in what it receives, too much in what reads it, or the reverse.

Both places differ, and the words for the first alone ("without `gelu`") would tell half of it: who follows them has
another mistake then.
"""

import re
from collections.abc import Callable

from refiners.parity.reasons.flow import name_of
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.replay import needed
from refiners.parity.reasons.session import Session
from refiners.parity.reasons.teacher import Where
from refiners.parity.reasons.ways import gives_shape

_LACKS = re.compile(r"when it computes (?:`(\w+)[(]|upstream's (\w+) here)")
_LACKS_MODULE = "when it runs upstream's `"
_GOES_THROUGH = re.compile(r"goes through upstream's ([\w, ]+) first")
_HAS = re.compile(r"without `(\w+)[(]")


def crossed(finding: Finding, text: str, session: Session, diagnose: Callable[[Finding], str]) -> str:
    """The diagnosis of a finding and of the next one of the same node as one; "" where they are no such pair.

    Receives:
        finding: with `others` of the same node.
        text: its diagnosis.
        diagnose: that of another one.
    """
    if finding.point.where is not Where.RECEIVES or not (_lacking(finding, text) or _extra(finding, text)):
        return ""
    leaf = finding.point.port
    returned = {number for call in session.port_trace.calls if call.path == leaf for number in call.outputs}
    for other in finding.others:
        starts = needed(other.port_region, other.actual) if other.actual is not None else set[int]()
        if other.actual in returned or starts & returned:
            second = diagnose(other)
            for names, words in (
                (_both(_extra(finding, text), _lacking(other, second)), f"behind `{leaf}`, not before it"),
                (_both(_lacking(finding, text), _extra(other, second)), f"before `{leaf}`, not behind it"),
            ):
                if len(names) == 1:
                    return f"when `{names[0]}` comes {words}, as upstream's does"
                if names:
                    return f"when {', '.join(f'`{name}`' for name in names)} come {words}, as upstream's do"
            return ""
    return ""


def _both(first: list[str], second: list[str]) -> list[str]:
    """The names of both; none where one side has more that has a name of its own."""
    found = [name for name in second if name in first]
    return found if len(found) == min(len(first), len(second)) or len(found) == 1 else []


def _extra(finding: Finding, text: str) -> list[str]:
    """The names of operations that are said to be too much, or stand between what should arrive and what does."""
    found = _HAS.match(text)
    if found:
        return [found.group(1)]
    is_made = finding.expected is not None and finding.expected in needed(finding.port_region, finding.actual or -1)
    names = (name_of(operation) for operation in finding.port_region if not gives_shape(operation))
    return list(dict.fromkeys(names)) if is_made and not finding.region else []


def _lacking(finding: Finding, text: str) -> list[str]:
    """The names of operations that are said to be missing."""
    through = _GOES_THROUGH.search(text)
    if through:
        return through.group(1).split(", ")
    if text.startswith(_LACKS_MODULE):
        return list(dict.fromkeys(name_of(operation) for operation in finding.region))
    found = _LACKS.match(text)
    return [one for one in found.groups() if one] if found else []
