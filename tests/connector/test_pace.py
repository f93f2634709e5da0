"""When a load is ended because computing is faster: against exact arithmetic, and what it loses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest

from connector.pace import LOST_S_MAX, READ_CHUNKS_MAX, Pace

COMPUTE_S = 2.0**-4  # powers of two: the code's floats are exact, and ties are ties
ROOM = 64


def reads(count: int) -> list[int]:
    """What a load of so many chunks reads at once: 1, 2, 4, ... up to what is allowed."""
    sizes: list[int] = []
    size = 1
    while sum(sizes) < count:
        sizes.append(min(size, count - sum(sizes)))
        size = min(2 * size, READ_CHUNKS_MAX)
    return sizes


def played(times: Sequence[float], compute_s: float, lost: int = 0) -> tuple[int, float]:
    """A load whose chunks take so long: how many it loads, and when all of the prompt is there.
    ``lost``: chunks besides the rest that must be computed if it is ended."""
    pace, done, clock = Pace(compute_s), 0, 0.0
    while done < len(times):
        count = min(pace.to_read(ROOM), len(times) - done)
        took = sum(times[done : done + count])
        done, clock = done + count, clock + took
        pace.went(count, took)
        left = len(times) - done
        if left and pace.too_slow(left, left + (done if lost else 0)):
            return done, clock + compute_s * (left + (done if lost else 0))
    return done, clock


def expected(times: Sequence[float], compute_s: float) -> int:
    """The chunks loaded, from the definition: the load ends when its greatest loss over any run of
    reads that ends now is more than is allowed."""
    c, seconds = Fraction(compute_s), [Fraction(t) for t in times]
    allowed, done, losses = max(c, Fraction(LOST_S_MAX)), 0, list[Fraction]()
    for count in reads(len(times)):
        losses.append(sum(seconds[done : done + count], Fraction()) - count * c)
        done += count
        worst = max(sum(losses[first:], Fraction()) for first in range(len(losses)))
        if worst > allowed and done < len(times):
            break
    return done


@pytest.mark.parametrize("seed", range(200))
def test_a_load_ends_where_the_definition_says(seed: int) -> None:
    rng = random.Random(seed)
    level = [rng.choice((0.25, 0.5, 1.0, 1.25, 2.0, 4.0)) for _ in range(4)]
    times = [COMPUTE_S * level[i // 20] for i in range(rng.randrange(1, 80))]
    assert played(times, COMPUTE_S)[0] == expected(times, COMPUTE_S)


@pytest.mark.parametrize("slower", [1.5, 2.0, 3.0, 10.0])
@pytest.mark.parametrize("count", [4, 46, 500])
def test_a_slow_tier_costs_a_few_chunks_time(slower: float, count: int) -> None:
    loaded, seconds = played([slower * COMPUTE_S] * count, COMPUTE_S)
    assert loaded < count
    assert loaded <= 3
    assert seconds - count * COMPUTE_S <= (slower - 1) * 3 * COMPUTE_S


def test_a_fast_tier_is_loaded_to_its_end() -> None:
    assert played([COMPUTE_S / 2] * 100, COMPUTE_S) == (100, 50 * COMPUTE_S)
    assert played([COMPUTE_S] * 100, COMPUTE_S)[0] == 100


def test_what_was_won_before_does_not_hide_that_a_tier_has_become_slow() -> None:
    fast, slow = [COMPUTE_S / 100] * 31, [2 * COMPUTE_S] * 200
    loaded, seconds = played(fast + slow, COMPUTE_S)
    assert loaded == 31 + READ_CHUNKS_MAX
    assert seconds < len(fast + slow) * COMPUTE_S


@pytest.mark.parametrize(
    ("compute_s", "hiccup_s"), [(COMPUTE_S, 1.9 * COMPUTE_S), (LOST_S_MAX / 10, LOST_S_MAX)]
)
def test_a_hiccup_is_forgiven(compute_s: float, hiccup_s: float) -> None:
    times = [compute_s / 4] * 60
    times[0] = hiccup_s
    assert played(times, compute_s)[0] == len(times)


def test_what_would_be_lost_by_ending_counts() -> None:
    """Where what is loaded is of no use without the rest, near its end a slow load goes on."""
    fast, slow = [COMPUTE_S / 100] * 31, [2 * COMPUTE_S] * 20
    assert played(fast + slow, COMPUTE_S)[0] == 31 + READ_CHUNKS_MAX
    assert played(fast + slow, COMPUTE_S, lost=1)[0] == len(fast + slow)
    assert played([2 * COMPUTE_S] * 20, COMPUTE_S, lost=1)[0] < 20


def test_its_speed_is_that_of_the_slow_part() -> None:
    pace = Pace(COMPUTE_S)
    pace.went(10, COMPUTE_S)
    assert pace.chunks_per_s == 0.0
    pace.went(2, 8 * COMPUTE_S)
    assert pace.chunks_per_s == 1 / (4 * COMPUTE_S)
    assert pace.too_slow(1, 1)


def test_buffers_bound_what_is_read_at_once() -> None:
    pace = Pace(COMPUTE_S)
    assert [pace.to_read(6) for _ in range(5)] == [1, 2, 4, 6, 6]
    pace = Pace(COMPUTE_S)
    assert [pace.to_read(ROOM) for _ in range(6)] == [1, 2, 4, 8, 16, 16]
