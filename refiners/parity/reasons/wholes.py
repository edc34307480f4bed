"""Modules of both sides that hold the same weights, all of them, with modules below.

Where a model computes much outside of its leaves, as with weights that are made anew for each picture, one way leads
through several modules, and a fault in the first is told of all of them. Such modules are taught as leaves are: what
arrives, and what they return. Two modules of the same weights need not do the same work, so this is believed only where
it leaves less to look at.
"""

from collections.abc import Mapping

from torch import nn

from refiners.parity.leaves import Pairing
from refiners.parity.modules import named_modules
from refiners.parity.operations import Trace
from refiners.parity.reasons.borders import Lesson
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.teacher import Where

Held = tuple[frozenset[int], int]
"""The storages of the weights of a module, and how many elements: one may hold a half of what another one holds."""


def wholes(upstream: nn.Module, port: nn.Module, pairing: Pairing) -> dict[str, str]:
    """Path of a module of the port → path of the one of upstream; the outermost of those that hold the same.

    Receives:
        upstream, port: with their weights, which share storages where they are the same.
        pairing: of the leaves.
    """
    theirs: dict[Held, str] = {}
    for path, held in _held(upstream).items():
        theirs.setdefault(held, path)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path, held in _held(port).items():
        other = theirs.get(held)
        if other is not None and other not in taken and path not in pairing:
            found[path] = other
            taken.add(other)
    return found


def _held(model: nn.Module) -> dict[str, Held]:
    """What each module below a model that runs and is no leaf holds, the outermost first."""
    found: dict[str, Held] = {}
    for path, module in named_modules(model):
        tensors = module.state_dict(keep_vars=True).values()
        if path and tensors and not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
            sizes = {tensor.data_ptr(): tensor.numel() for tensor in tensors}
            found[path] = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors), sum(sizes.values())
    return found


def crossed(findings: list[Finding], trace: Trace, found: Mapping[str, str]) -> dict[str, str]:
    """Of modules that hold the same weights those that a finding leads into and out of again.

    Receives:
        trace: of the port.
    """
    kept: dict[str, str] = {}
    for finding in findings:
        paths = {trace.path_of(operation) for operation in finding.port_region} if not finding.is_leaf else set[str]()
        for path, other in found.items():
            inside = {one for one in paths if one == path or one.startswith(f"{path}.")}
            if inside and paths - inside:
                kept[path] = other
    return kept


def is_clearer(lesson: Lesson, before: Lesson, found: Mapping[str, str]) -> bool:
    """Whether less is left to look at when modules are taught as well.

    More may be found then, one fault in each of several layers. It is believed if all of these modules receive what
    upstream's do: where a port cuts a model in another way than upstream, what it does too early arrives twice.
    """
    if _extent(lesson) >= _extent(before):
        return False
    unlike = any(point.where is Where.RECEIVES and not point.agrees for point in lesson[1] if point.port in found)
    return len(lesson[0]) <= len(before[0]) or not unlike


def _extent(lesson: Lesson) -> int:
    """The operations of the port in all findings."""
    return sum(len(one.port_region) for finding in lesson[0] for one in (finding, *finding.others))
