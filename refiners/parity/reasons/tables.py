"""Tables that one side holds ready in float32, as frequencies are, where the other one computes them on its way.

In float64 both would be the same but for the rounding of float32, which what follows makes larger: angles are
frequencies times positions, and a softmax is steep. So one table is given to both before their ways are compared.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from refiners.parity.reasons.replay import Program, coarsely, is_close
from refiners.parity.reasons.trial import Varies


def with_one_table(port: Program, upstream: Program) -> tuple[Program, Program]:
    """Both programs, each of which starts from the tables of the other one where it computes the same."""
    varies = Varies(port, upstream)
    port = _given(port, upstream, varies)
    return port, _given(upstream, port, varies)


def _given(program: Program, other: Program, varies: Varies) -> Program:
    tables = {
        number: other.given[table]
        for table in _tables(other, varies)
        for number in _same(program, other, table, varies)
    }
    if not tables:
        return program
    operations = [op for op in program.operations if not tables.keys() & set(op.outputs)]
    given = {**program.given, **tables}
    return replace(program, operations=operations, given=given, recorded=None).part(program.root)


def _tables(program: Program, varies: Varies) -> Iterator[int]:
    """The numbers of the float32 values that a program starts from and that no input and no learnt weight reaches."""
    for number in sorted(program.leaves() & program.given.keys()):
        value = program.given[number]
        if value.dtype == torch.float32 and value.numel() > 1 and not varies(number):
            yield number


def _same(program: Program, other: Program, table: int, varies: Varies) -> Iterator[int]:
    """The first value that a program makes of constants alone and that is a table but for the rounding of float32."""
    right = other.values[table]
    for number, (operation, _) in program.made.items():
        value = program.values[number]
        if number == program.root or value.shape != right.shape or not value.is_floating_point() or varies(number):
            continue
        with coarsely():
            is_table = len(operation.outputs) == 1 and is_close(value, right)
        if is_table:
            if not is_close(value, right):
                yield number
            return
