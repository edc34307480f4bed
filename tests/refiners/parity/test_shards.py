"""Shards: every part is in one of them, in none twice, and all take about as long."""

import random

import pytest

from refiners.errors import ParityError
from refiners.parity.shards import Shard

PARTS = [f"family/{i}" for i in range(57)]


def times(seed: int) -> dict[str, float]:
    chance = random.Random(seed)
    return {part: chance.expovariate(1.0) for part in PARTS}


@pytest.mark.parametrize("count", [1, 2, 5, 57, 80])
@pytest.mark.parametrize("seconds", [times(0), times(1), {}, dict.fromkeys(PARTS, 0.0)], ids=["a", "b", "none", "zero"])
def test_the_shares_are_disjoint_and_make_up_the_whole(count: int, seconds: dict[str, float]) -> None:
    shares = [Shard(number, count).share(PARTS, seconds) for number in range(1, count + 1)]
    assert sorted(part for share in shares for part in share) == sorted(PARTS)


def test_the_division_does_not_depend_on_the_order_of_the_parts() -> None:
    shuffled = random.Random(3).sample(PARTS, len(PARTS))
    assert Shard(2, 5).share(shuffled, times(0)) == Shard(2, 5).share(PARTS, times(0))


def test_the_shares_take_about_as_long() -> None:
    seconds = times(0)
    loads = [sum(seconds[part] for part in Shard(number, 5).share(PARTS, seconds)) for number in range(1, 6)]
    assert max(loads) <= 1.02 * min(loads)


def test_a_part_that_takes_longer_than_all_others_is_alone() -> None:
    seconds = {**dict.fromkeys(PARTS, 0.1), "family/7": 60.0}
    shares = [Shard(number, 3).share(PARTS, seconds) for number in (1, 2, 3)]
    assert {"family/7"} in shares


def test_a_new_part_counts_as_an_ordinary_one() -> None:
    seconds = dict.fromkeys(PARTS[:-1], 1.0)
    sizes = [len(Shard(number, 3).share(PARTS, seconds)) for number in (1, 2, 3)]
    assert sizes == [19, 19, 19]


def test_a_shard_is_written_as_two_numbers() -> None:
    assert str(Shard.parse(" 2/5 ")) == "2/5"
    for wrong in ("", "2", "0/5", "6/5", "a/b", "-1/5", "1/0"):
        with pytest.raises(ParityError, match="Write its number and how many there are"):
            Shard.parse(wrong)
