"""Small summaries of endless streams: latencies, and what occurs most. Bounded in memory.

Not thread-safe: each belongs to one thread.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
LEAST_S = 50e-6  # what is faster is counted here
PER_OCTAVE = 4  # so that a percentile is at most 19 % off before it is interpolated
BUCKETS = 82  # the last begins at 60 s
PERCENTS = (50, 90, 99)


def bucket_of(seconds: float) -> int:
    """The bucket a duration falls into."""
    if seconds <= LEAST_S:
        return 0
    return min(int(PER_OCTAVE * math.log2(seconds / LEAST_S)) + 1, BUCKETS - 1)


def percentile(counts: Counter[int], percent: float) -> float | None:
    """Seconds that so many percent took at most, interpolated in its bucket; None of nothing."""
    total = counts.total()
    if not total:
        return None
    rank, below = percent / 100 * total, 0
    for bucket in sorted(counts):
        if below + counts[bucket] >= rank:
            high = LEAST_S * 2 ** (bucket / PER_OCTAVE)
            low = 0.0 if bucket == 0 else LEAST_S * 2 ** ((bucket - 1) / PER_OCTAVE)
            return low + (high - low) * (rank - below) / counts[bucket]
        below += counts[bucket]
    raise AssertionError("a rank beyond all counts")


class Latencies:
    """Durations of the last while: a ring of histograms of ``slot_s`` seconds each."""

    def __init__(self, slot_s: float, slots: int) -> None:
        self._slot_s = slot_s
        self._ring: deque[tuple[int, Counter[int]]] = deque(maxlen=slots)

    def add(self, now_s: float, seconds: float) -> None:
        """One more."""
        slot = int(now_s / self._slot_s)
        if not self._ring or self._ring[-1][0] != slot:
            self._ring.append((slot, Counter()))
        self._ring[-1][1][bucket_of(seconds)] += 1

    def over(self, now_s: float, window_s: float) -> Counter[int]:
        """The histogram of the last ``window_s`` seconds."""
        first = int((now_s - window_s) / self._slot_s)
        total: Counter[int] = Counter()
        for slot, counts in self._ring:
            if slot > first:
                total.update(counts)
        return total


class Top(Generic[T]):
    """What occurs most: Space-Saving (Metwally, Agrawal, El Abbadi 2005), with ``size`` counters.

    Whatever makes up more than 1/size of all is in it; a count is at most 1/size of all too high.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: dict[T, float] = {}

    def add(self, item: T, by: float = 1) -> T | None:
        """Count an item; returns the one it takes the place of, if any."""
        counts = self._counts
        if item in counts or len(counts) < self._size:
            counts[item] = counts.get(item, 0) + by
            return None
        least = min(counts, key=counts.__getitem__)
        counts[item] = counts.pop(least) + by
        return least

    def fade(self, factor: float) -> list[T]:
        """Multiply all counts, so that what was long ago weighs less; returns what is forgotten."""
        gone = [item for item, count in self._counts.items() if count * factor < 0.5]
        self._counts = {i: c * factor for i, c in self._counts.items() if c * factor >= 0.5}
        return gone

    def most(self, count: int) -> Iterable[tuple[T, float]]:
        """The items that occur most, and how often."""
        return sorted(self._counts.items(), key=lambda pair: -pair[1])[:count]
