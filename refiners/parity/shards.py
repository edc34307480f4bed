"""Dividing a run among machines: every part is somewhere, none is twice, and all shares take about as long.

Nothing is agreed on between the machines: each computes the same division from the same list and the recorded times.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refiners.errors import ParityError


@dataclass(frozen=True)
class Shard:
    """One of several shares of a run: `2/5` is the second of five."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads `2/5`.

        Raises:
            ParityError: the text is something else, or there is no such share.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ParityError(f"There is no shard {text!r}. Write its number and how many there are: 1/5 to 5/5.")
        return cls(int(match[1]), int(match[2]))

    def share(self, parts: Sequence[str], seconds: Mapping[str, float]) -> set[str]:
        """The parts that are this shard's.

        Receives:
            parts: all of them, each once, in any order.
            seconds: how long they took. One that is not known counts as the median of those that are.
        """
        known = [seconds[part] for part in parts if part in seconds]
        usual = statistics.median(known) if known else 1.0
        longest_first = sorted(parts, key=lambda part: (-seconds.get(part, usual), part))
        loads = [0.0] * self.count
        mine: set[str] = set()
        for part in longest_first:
            lightest = min(range(self.count), key=lambda index: (loads[index], index))
            # Nothing is free: without times, or with times of zero, shares are still of equal number.
            loads[lightest] += max(seconds.get(part, usual), 1e-3)
            if lightest == self.number - 1:
                mine.add(part)
        return mine

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
