"""The eviction policy's properties, and that it does in simulation what it was chosen for."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.eviction import served
from benchmarks.eviction_policies import POLICIES
from benchmarks.traces import FAMILIES, Request, footprint, make_trace, served_by_min
from prefixstore import evict
from prefixstore.evict import Heat, admit, clock_step, pack_rank, touch, unpack_rank

SLOTS = 1000


def walk(heats: list[Heat], clock: int, depths: int) -> tuple[list[Heat], int]:
    """Use one prompt's chunks from the root, as a store does: the clock moves on in between."""
    out = []
    for depth in range(depths):
        before = heats[depth] if depth < len(heats) else None
        clock += clock_step(None) if before is None else 0
        after = admit(clock, depth, SLOTS)
        if before is not None:
            after = touch(before, clock, depth, SLOTS)
            clock += clock_step(before)
        out.append(after)
    return out, clock


@pytest.mark.parametrize("seed", range(20))
def test_a_chunk_never_outranks_its_ancestor(seed: int) -> None:
    """Whatever is used, extended and evicted leaf first: ranks fall from the root to the leaf."""
    rng = random.Random(seed)
    heats: list[Heat] = []
    clock = rng.randrange(10**6)
    for _ in range(50):
        if rng.random() < 0.3:
            heats = heats[: rng.randint(0, len(heats))]
        if rng.random() < 0.5:
            heats, clock = walk(heats, clock, len(heats) + rng.randint(1, 5))
        else:
            used, clock = walk(heats, clock, rng.randint(0, len(heats)))
            heats = used + heats[len(used) :]
        assert all(parent.rank > child.rank for parent, child in itertools.pairwise(heats))
        clock += rng.choice([0, 1, 30, 2 * SLOTS])


@pytest.mark.parametrize("seed", range(20))
def test_a_scan_never_outranks_what_was_used_twice(seed: int) -> None:
    """A re-used chunk stays ahead of every one-off chunk for a capacity's worth of admissions."""
    rng = random.Random(seed)
    clock, depth = rng.randrange(10**6), rng.randrange(20)
    heat = admit(clock, depth, SLOTS)
    for _ in range(2):
        heat = touch(heat, clock, depth, SLOTS)
    for scan_depth in range(SLOTS):
        clock += clock_step(None)
        assert admit(clock, rng.randint(0, scan_depth), SLOTS).rank < heat.rank


def test_what_is_no_longer_used_does_leave() -> None:
    """The credit is finite: one-off chunks alone outlast it, first re-uses twenty times sooner."""
    stale = touch(admit(0, 0, SLOTS), 0, 0, SLOTS)
    credit = evict.REUSE_CREDIT * SLOTS
    assert admit(credit, 0, SLOTS).rank <= stale.rank < admit(credit + 1, 0, SLOTS).rank
    assert clock_step(admit(0, 0, SLOTS)) == evict.PROMOTION_TICKS > clock_step(None) == 1
    assert clock_step(stale) == 0


def test_a_stale_clock_does_not_demote() -> None:
    heat = touch(admit(500, 3, SLOTS), 500, 3, SLOTS)
    assert touch(heat, 100, 3, SLOTS) == heat


@pytest.mark.parametrize(
    "rank", [0, 1, 255, 256, 2**40, 2**63 - 1, 2**63, evict.RANK_MAX, 2**64 - 1]
)
def test_packed_ranks_read_back(rank: int) -> None:
    assert unpack_rank(pack_rank(rank)) == rank


def test_packed_ranks_sort_as_numbers() -> None:
    rng = random.Random(1)
    ranks = [rng.getrandbits(rng.randint(1, 64)) for _ in range(1000)]
    assert sorted(map(pack_rank, ranks)) == [pack_rank(rank) for rank in sorted(ranks)]


def test_ranks_stay_in_range() -> None:
    assert admit(0, 2**32 - 1, SLOTS).rank > 0
    assert touch(admit(2**64, 0, SLOTS), 2**64, 0, SLOTS).rank == evict.RANK_MAX


@pytest.mark.parametrize("bad", [(-1, 0, 1), (0, -1, 1), (0, 0, -1)])
def test_negative_arguments_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="below 0"):
        admit(*bad)
    with pytest.raises(ValueError, match="below 0"):
        touch(Heat(1, 1), *bad)


def test_what_is_no_rank_is_refused() -> None:
    for rank in (-1, 2**64):
        with pytest.raises(ValueError, match="64 bits"):
            pack_rank(rank)
    with pytest.raises(ValueError, match="8 bytes, got 7"):
        unpack_rank(bytes(7))


@pytest.mark.parametrize("family", ["scan10", "scan30", "scan50"])
def test_beats_lru_on_the_scan_mix(family: str) -> None:
    trace = make_trace(family, 0, 6000)
    slots = footprint(trace) // 10
    assert served(POLICIES["credit"], trace, slots) > served(POLICIES["lru"], trace, slots) + 0.01


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_policy_beats_the_optimum_or_the_footprint(family: str, policy: str) -> None:
    """Bounds from outside: the offline optimum, and with room for all, all that was seen before."""
    trace = make_trace(family, 3, 1500)
    slots = footprint(trace) // 8
    assert served(POLICIES[policy], trace, slots) <= served_by_min(trace, slots)
    seen: set[int] = set()
    repeated = 0
    for request in trace:
        repeated += sum(chunk in seen for chunk in request.path[: request.prompt_chunks])
        seen.update(request.path)
    share = repeated / sum(request.prompt_chunks for request in trace)
    # Segmented policies never fill: with room for everything nothing is evicted by any of them.
    room = 20 * footprint(trace)
    assert served(POLICIES[policy], trace, room) == pytest.approx(share)
    assert served_by_min(trace, room) == pytest.approx(share)


def test_first_in_first_out_loses_the_root() -> None:
    """A known answer: one prompt longer than the tier, asked twice."""
    prompt = Request(tuple(range(10)), 10)
    assert served(POLICIES["lru_no_depth"], [prompt, prompt], 5) == 0
    assert served(POLICIES["credit"], [prompt, prompt], 5) == 5 / 20
    assert served_by_min([prompt, prompt], 5) == 5 / 20
