"""Load or recompute: the arithmetic against brute force, and what it promises."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest

from connector.plan import (
    PREFILL_TOKENS_MIN,
    PROBE_CHUNKS,
    RETRY_AFTER,
    SLICES_COST,
    SMOOTHING,
    LoadPlanner,
    Speeds,
    StepTimes,
    chunks_to_load,
)
from prefixstore.layout import Layout

MEMORY, DISK = 1, 2
TOKENS, BYTES = 64, 1 << 20


def seconds_loading(tiers: Sequence[int], speeds: Speeds) -> Fraction:
    """What loading these chunks takes, in exact arithmetic; an unmeasured tier takes nothing."""
    known = speeds.tier_bytes_per_s
    return sum((Fraction(BYTES) / Fraction(known[t]) for t in tiers if t in known), Fraction())


def seconds_total(tiers: Sequence[int], loaded: int, speeds: Speeds) -> Fraction:
    """Loading the first ``loaded`` chunks and computing the others."""
    assert speeds.prefill_tokens_per_s is not None
    compute = Fraction(TOKENS) / Fraction(speeds.prefill_tokens_per_s)
    return seconds_loading(tiers[:loaded], speeds) + compute * (len(tiers) - loaded)


def some_speeds(rng: random.Random) -> Speeds:
    """Powers of two, so that the code's floats are exact and ties are ties."""
    tiers = {t: 2.0 ** rng.randrange(20, 34) for t in (MEMORY, DISK) if rng.random() < 0.8}
    return Speeds(2.0 ** rng.randrange(6, 16), tiers)


@pytest.mark.parametrize("seed", range(200))
def test_no_other_prefix_is_faster(seed: int) -> None:
    rng = random.Random(seed)
    speeds = some_speeds(rng)
    tiers = [rng.choice((MEMORY, DISK)) for _ in range(rng.randrange(20))]
    chosen = chunks_to_load(tiers, TOKENS, BYTES, speeds)
    times = [seconds_total(tiers, n, speeds) for n in range(len(tiers) + 1)]
    assert times[chosen] == min(times)
    assert chosen == times.index(min(times))  # of equally fast ones the one that loads least


@pytest.mark.parametrize("seed", range(100))
def test_never_slower_than_computing(seed: int) -> None:
    rng = random.Random(seed)
    speeds = Speeds(
        rng.uniform(10, 1e6), {MEMORY: rng.uniform(1e6, 1e11), DISK: rng.uniform(1e5, 1e10)}
    )
    tiers = [rng.choice((MEMORY, DISK)) for _ in range(rng.randrange(40))]
    chosen = chunks_to_load(tiers, TOKENS, BYTES, speeds)
    slack = 1 + Fraction(1, 10**9)  # the code adds up floats
    assert seconds_total(tiers, chosen, speeds) <= seconds_total(tiers, 0, speeds) * slack


def test_without_a_prefill_speed_all_is_loaded() -> None:
    speeds = Speeds(None, {MEMORY: 1.0, DISK: 1.0})
    assert chunks_to_load([MEMORY, DISK, DISK], TOKENS, BYTES, speeds) == 3
    assert chunks_to_load([], TOKENS, BYTES, speeds) == 0


def test_an_unmeasured_tier_is_tried() -> None:
    assert chunks_to_load([DISK] * 4, TOKENS, BYTES, Speeds(1e9, {MEMORY: 1e10})) == 4


def test_a_slow_tier_behind_a_fast_one_is_left() -> None:
    speeds = Speeds(1000.0, {MEMORY: 1e9, DISK: 1e6})  # 64 ms to compute, 1 ms or 1 s to load
    assert chunks_to_load([MEMORY, MEMORY, DISK, DISK], TOKENS, BYTES, speeds) == 2
    assert chunks_to_load([DISK, DISK], TOKENS, BYTES, speeds) == 0


def test_fast_chunks_can_pay_for_slow_ones_before_them() -> None:
    speeds = Speeds(1000.0, {MEMORY: 1e9, DISK: 1e7})  # 64 ms, 1 ms, 105 ms
    assert chunks_to_load([DISK, MEMORY], TOKENS, BYTES, speeds) == 2
    assert chunks_to_load([DISK, DISK, MEMORY], TOKENS, BYTES, speeds) == 0


def test_a_speed_is_smoothed_and_small_samples_ignored() -> None:
    speeds = Speeds()
    speeds.saw_prefill(PREFILL_TOKENS_MIN - 1, 1.0)
    speeds.saw_prefill(PREFILL_TOKENS_MIN, 0.0)
    assert speeds.prefill_tokens_per_s is None
    speeds.saw_prefill(1000, 1.0)
    speeds.saw_prefill(2000, 1.0)
    assert speeds.prefill_tokens_per_s == pytest.approx(1000 + SMOOTHING * 1000)
    speeds.saw_load(DISK, 100.0)
    assert speeds.tier_bytes_per_s == {DISK: 100.0}
    speeds.saw_load(DISK, 300.0)
    mean_s = (1 - SMOOTHING) / 100 + SMOOTHING / 300  # of a byte
    assert speeds.tier_bytes_per_s == {DISK: pytest.approx(1 / mean_s)}


def test_a_tier_that_has_become_slow_is_known_to_be_after_two_loads() -> None:
    """One might be a hiccup: 2.5 times as slow as computing does not stop a fast tier."""
    speeds = Speeds(64.0, {DISK: 1e6 * BYTES})  # a second to compute a chunk
    speeds.saw_load(DISK, BYTES / 2.5)
    assert chunks_to_load([DISK] * 4, TOKENS, BYTES, speeds) == 4
    speeds.saw_load(DISK, BYTES / 2.5)
    assert chunks_to_load([DISK] * 4, TOKENS, BYTES, speeds) == 0


def test_a_tier_found_too_slow_is_tried_again() -> None:
    speeds = Speeds(1e9, {MEMORY: 1.0, DISK: 1.0})
    for patience in (RETRY_AFTER, 2 * RETRY_AFTER):
        for _ in range(patience - 1):
            speeds.refused(DISK)
        assert chunks_to_load([DISK], TOKENS, BYTES, speeds) == 0
        speeds.refused(DISK)
        assert chunks_to_load([DISK], TOKENS, BYTES, speeds) == 1
        assert chunks_to_load([MEMORY], TOKENS, BYTES, speeds) == 0
        speeds.saw_load(DISK, 1.0)


def test_a_constant_speed_is_found_from_any_start() -> None:
    speeds = Speeds(1.0)
    for _ in range(60):
        speeds.saw_prefill(500, 0.25)
    assert speeds.prefill_tokens_per_s == pytest.approx(2000, rel=1e-6)


def test_a_tier_found_slow_is_probed_with_little_and_ever_more_rarely() -> None:
    speeds = Speeds()
    speeds.saw_prefill(1000, 0.1)  # a chunk of 64 tokens takes 6.4 ms to compute
    speeds.saw_load(1, 1e6)  # and one of 1 MB a second to load
    loads = []
    for _ in range(400):
        chosen = chunks_to_load([1] * 100, 64, 1_000_000, speeds)
        loads.append(chosen)
        if chosen:
            speeds.saw_load(1, 1e6)
        else:
            speeds.refused(1)
    probes = [index for index, chosen in enumerate(loads) if chosen]
    assert set(loads) == {0, PROBE_CHUNKS}
    gaps = [after - before for before, after in pairwise(probes)]
    assert len(gaps) > 2
    assert all(after > before for before, after in pairwise(gaps))


def test_a_tier_that_was_worth_it_is_tried_again_as_soon_as_at_first() -> None:
    planner = LoadPlanner(Layout(1, 1, 1, TOKENS, 16), 0, auto=True)
    planner.speeds.saw_prefill(1000, 1.0)

    def refusals(bytes_per_s: float) -> int:
        """Until the tier is tried again, that speed having been found."""
        planner.speeds.saw_load(DISK, bytes_per_s)
        count = 0
        while planner.stop([DISK] * 4, 0, None, None) == 0:
            count += 1
        return count

    assert [refusals(1.0) for _ in range(3)] == [RETRY_AFTER, 2 * RETRY_AFTER, 4 * RETRY_AFTER]
    assert refusals(1e9) == 0
    assert refusals(1.0) == RETRY_AFTER


class Kept:
    """What engines like this one have measured, and what this one tells."""

    def __init__(self, tokens_per_s: float | None) -> None:
        self.tokens_per_s = tokens_per_s
        self.told: list[float] = []

    def heard(self, tokens_per_s: float) -> None:
        self.told.append(tokens_per_s)


def test_a_planner_begins_with_the_speed_of_engines_like_it() -> None:
    kept: Any = Kept(TOKENS / 0.5)
    one = LoadPlanner(Layout(1, 1, 1, TOKENS, 16), 0, auto=True, kept=kept)
    assert one.chunk_compute_s == 0.5
    one.speeds.saw_load(DISK, 1.0)
    assert one.worth([DISK]) == 0
    assert kept.told == []


def test_a_kept_speed_is_forgotten_with_the_first_measurement() -> None:
    """It may be of another machine. From the second on, measurements are smoothed as ever."""
    for start in (1.0, 1e9, None):
        kept: Any = Kept(start)
        one = LoadPlanner(Layout(1, 1, 1, TOKENS, 16), 0, auto=True, kept=kept)
        one.speeds.saw_prefill(PREFILL_TOKENS_MIN - 1, 1.0)
        assert one.speeds.prefill_tokens_per_s == start
        one.speeds.saw_prefill(1000, 1.0)
        one.speeds.saw_prefill(2000, 1.0)
        assert kept.told == [1000.0, pytest.approx(1000 + SMOOTHING * 1000)]
        assert one.speeds.prefill_tokens_per_s == kept.told[-1]


def test_what_a_load_compares_itself_with() -> None:
    layout = Layout(1, 1, 1, TOKENS, 16)
    planner, always = (LoadPlanner(layout, 0, auto=auto) for auto in (True, False))
    assert planner.chunk_compute_s == 0.0  # not measured yet
    for one in (planner, always):
        one.speeds.saw_prefill(640, 2.5)
    assert planner.chunk_compute_s == 0.25
    assert always.chunk_compute_s == 0.0


def test_a_tier_that_has_become_fast_is_used_again() -> None:
    speeds = Speeds()
    speeds.saw_prefill(1000, 0.1)
    speeds.saw_load(1, 1e6)
    for _ in range(RETRY_AFTER):
        assert chunks_to_load([1] * 100, 64, 1_000_000, speeds) == 0
        speeds.refused(1)
    assert chunks_to_load([1] * 100, 64, 1_000_000, speeds) == PROBE_CHUNKS
    speeds.saw_load(1, 1e10)
    assert chunks_to_load([1] * 100, 64, 1_000_000, speeds) == 100


# ---------------------------------------------------------------------- both at once
def planner(prefill: float | None, tiers: dict[int, float]) -> LoadPlanner:
    planner = LoadPlanner(Layout(1, 2, 1, TOKENS, BYTES // 2 // TOKENS), 0, auto=True)
    planner.speeds = Speeds(prefill, tiers)
    return planner


def test_both_at_once_where_a_tier_is_about_as_fast_as_computing() -> None:
    """The part that is computed is what computing does in the time both take together."""
    prefill = 1000.0
    compute_s = TOKENS / prefill
    for times, splits in ((0.2, False), (0.4, True), (1.0, True), (5.0, True), (20.0, False)):
        front = planner(prefill, {DISK: BYTES / (times * compute_s)}).front([DISK] * 10)
        assert (front > 0) is splits, times
        if splits:
            slices = compute_s * SLICES_COST
            load = times * compute_s
            assert front == pytest.approx(load / (load + slices))


def test_all_tiers_but_memory_may_be_slow_until_it_is_known_what_is_faster() -> None:
    assert planner(None, {}).front([DISK]) == planner(1e3, {}).front([MEMORY, DISK]) == 0.5
    assert planner(None, {DISK: 1e12}).front([DISK]) == 0.5
    assert planner(1e3, {}).front([MEMORY]) == planner(1e3, {}).front([]) == 0.0
    assert planner(None, {}).front([MEMORY]) == planner(None, {MEMORY: 1.0}).front([MEMORY]) == 0.0


def test_a_slow_tier_that_was_left_alone_is_tried_again_by_a_split() -> None:
    one = planner(1e3, {DISK: 1.0})
    for _ in range(RETRY_AFTER):
        assert one.front([DISK] * 4) == 0.0
        assert one.stop([DISK] * 4, 0, None, None) == 0
    assert one.front([DISK] * 4) == 0.5


def test_steps_that_wait_for_rows_say_nothing_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a blend or split are computed behind the step they were launched in."""
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr("connector.plan.time.monotonic", lambda: next(clock))
    speeds = Speeds()
    steps = StepTimes(speeds, 1)
    for tokens, rows in ((1000, True), (0, False), (1000, False)):
        steps.began(tokens, rows=rows)
        steps.ended()
        assert speeds.prefill_tokens_per_s is None
    steps.began(1000, rows=False)
    steps.ended()
    assert speeds.prefill_tokens_per_s == 1000.0
