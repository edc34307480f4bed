"""An operation on the wrong side of a leaf: missing in what it receives, too much in what reads it, or the reverse.

Both places differ, and the words for the first alone ("without `gelu`") would tell half of it: who follows them has
another mistake then.
"""

import re
from collections.abc import Callable

from refiners.parity.flow import name_of
from refiners.parity.localise import Finding
from refiners.parity.replay import needed
from refiners.parity.session import Session
from refiners.parity.teacher import Where

_LACKS = re.compile(r"when it computes (?:`(\w+)[(]|upstream's (\w+) here)")
_LACKS_MODULE = "when it runs upstream's `"
_HAS = re.compile(r"without `(\w+)[(]")


def crossed(finding: Finding, text: str, session: Session, diagnose: Callable[[Finding], str]) -> str:
    """The diagnosis of a finding and of the next one of the same node as one; "" where they are no such pair.

    Receives:
        finding: with `others` of the same node.
        text: its diagnosis.
        diagnose: that of another one.
    """
    if finding.point.where is not Where.RECEIVES or not (_lacking(finding, text) or _extra(text)):
        return ""
    leaf = finding.point.port
    returned = {number for call in session.port_trace.calls if call.path == leaf for number in call.outputs}
    for other in finding.others:
        starts = needed(other.port_region, other.actual) if other.actual is not None else set[int]()
        if other.actual in returned or starts & returned:
            second = diagnose(other)
            for names, words in (
                (_extra(text) & _lacking(other, second), f"behind `{leaf}`, not before it"),
                (_lacking(finding, text) & _extra(second), f"before `{leaf}`, not behind it"),
            ):
                if names:
                    return f"when `{names.pop()}` comes {words}, as upstream's does"
            return ""
    return ""


def _extra(text: str) -> set[str]:
    """The name of an operation that is said to be too much."""
    found = _HAS.match(text)
    return {found.group(1)} if found else set()


def _lacking(finding: Finding, text: str) -> set[str]:
    """The names of operations that are said to be missing."""
    if text.startswith(_LACKS_MODULE):
        return {name_of(operation) for operation in finding.region}
    found = _LACKS.match(text)
    return {one for one in found.groups() if one} if found else set()
