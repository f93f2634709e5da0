"""The eviction policy: which chunk of a full tier goes first.

Owns: the arithmetic of ranks, nothing else (no index, no I/O). A tier evicts the chunk with the
smallest rank that is neither leased nor pinned. A chunk's rank is the tier's clock at its last
use, plus a credit once it has been used again after it was stored:

    rank = clock - DEPTH_TICKS * depth + (REUSE_CREDIT * capacity_slots if reused)

The clock counts in ticks: `clock_step` says how far each use moves it. A new chunk moves it by one,
a chunk's first re-use by PROMOTION_TICKS. So one-off prompts hardly age what is used again (scan
resistance), while new popular chunks soon push out old ones (drift). This is SLRU's idea without
its second list: nothing is ever demoted, and no row changes but that of the chunk being used.

What must hold: of two chunks of one prompt used together, the one nearer the root has the higher
rank, because a lookup walks from the root and a chunk without its parent is never reached. The
depth term gives that even when the clock moves on from chunk to chunk within the walk, and it is
why chunks must be used in the order root to leaf. A crash loses at most the latest uses: ranks are
hints, never a matter of correctness.

Source of the numbers: `python -m benchmarks.eviction`.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMOTION_TICKS = 20  # 0 (a clock of admissions alone) serves 0.2 to 0.6 points less
DEPTH_TICKS = PROMOTION_TICKS + 1  # more than one use moves the clock, so a child stays below
REUSE_CREDIT = 7  # ticks per slot; 14 gains up to a point on scans and costs two on chat
FREQ_MAX = 2  # 1: stored, 2: used again. Counting on only keeps finished chat sessions longer
RANK_MAX = 2**64 - 2  # one below all ones, which is left to callers as "never evict"
_ORIGIN = 2**40  # so that no depth takes a young clock below zero


@dataclass(frozen=True, slots=True)
class Heat:
    """What eviction remembers of a chunk: rank (u64, ticks; smallest goes first) and freq."""

    rank: int
    freq: int


def admit(clock: int, depth: int, capacity_slots: int) -> Heat:
    """Return the heat of a chunk just stored.

    clock: the tier's clock in ticks; depth: ordinal of the chunk in its prompt, root 0;
    capacity_slots: slots of the tier. Raises ValueError for a negative argument.
    """
    _check(clock, depth, capacity_slots)
    return Heat(_rank(clock, depth), 1)


def touch(
    heat: Heat,
    clock: int,
    depth: int,
    capacity_slots: int,
    *,
    credit: float = REUSE_CREDIT,
) -> Heat:
    """Return the heat of a chunk just used; arguments as for `admit`.

    A rank never falls, so that a stale clock cannot demote a chunk. `credit` is for benchmarks.
    """
    _check(clock, depth, capacity_slots)
    rank = _rank(clock + int(credit * capacity_slots), depth)
    return Heat(max(heat.rank, rank), min(heat.freq + 1, FREQ_MAX))


def clock_step(before: Heat | None, *, promotion: int = PROMOTION_TICKS) -> int:
    """Return the ticks by which a use moves the tier's clock.

    before: the chunk's heat before the use, None when it was just stored. `promotion` is for
    benchmarks.
    """
    if before is None:
        return 1
    return promotion if before.freq < FREQ_MAX else 0


def pack_rank(rank: int) -> bytes:
    """Encode as 8 big-endian bytes, which sort as the numbers do. Raises ValueError if not u64."""
    if not 0 <= rank < 2**64:
        raise ValueError(f"rank {rank} does not fit 64 bits: expected 0 <= rank < 2**64")
    return rank.to_bytes(8, "big")


def unpack_rank(data: bytes) -> int:
    """Decode what `pack_rank` wrote. Raises ValueError when it is not 8 bytes."""
    if len(data) != 8:
        raise ValueError(f"a packed rank has 8 bytes, got {len(data)}")
    return int.from_bytes(data, "big")


def _check(clock: int, depth: int, capacity_slots: int) -> None:
    if clock < 0 or depth < 0 or capacity_slots < 0:
        raise ValueError(
            f"clock {clock}, depth {depth}, capacity_slots {capacity_slots}: expected none below 0"
        )


def _rank(ticks: int, depth: int) -> int:
    return min(max(_ORIGIN + ticks - DEPTH_TICKS * depth, 0), RANK_MAX)
