"""What a result counts: the elements that were compared, and the errors of both sides."""

from dataclasses import replace

from refiners.parity import rounding
from refiners.parity.result import Result
from refiners.parity.rounding import ErrorPair
from refiners.parity.verdict import Comparison


def elements_by_kind(comparisons: list[Comparison]) -> dict[str, int]:
    """How many elements of outputs, taps and gradients were compared."""
    found: dict[str, int] = {}
    for c in comparisons:
        name = "gradients" if c.pair.kind.is_gradient else f"{c.pair.kind}s"
        found[name] = found.get(name, 0) + c.pair.upstream.numel()
    return found


def with_errors(result: Result, comparisons: list[Comparison]) -> Result:
    """The result with the errors of outputs and gradients of both sides against float64."""
    outputs = [c.errors for c in comparisons if c.errors and not c.pair.kind.is_gradient]
    gradients = [c.errors for c in comparisons if c.errors and c.pair.kind.is_gradient and c.counts_in_ratio]
    if outputs:
        upstream, port = _joint(outputs)
        result = replace(result, error_upstream=upstream, error_port=port)
    if gradients:
        upstream, port = _joint(gradients)
        result = replace(result, gradient_error_upstream=upstream, gradient_error_port=port)
    return result


def _joint(pairs: list[ErrorPair]) -> tuple[float, float]:
    return rounding.joint_error([p.upstream for p in pairs]), rounding.joint_error([p.port for p in pairs])
