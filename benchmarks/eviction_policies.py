"""Eviction policies as simulated tiers: what `benchmarks.eviction` compares."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from benchmarks.traces import Request
from prefixstore import evict
from prefixstore.evict import Heat

GHOST_SHARE = 1.0  # keys remembered after eviction, per slot
_DEPTH_MASK = 0xFFFF


class Cache(Protocol):
    """A simulated tier."""

    def request(self, request: Request) -> int:
        """Look the prompt up, store what is missing; return the prompt chunks served."""


def served_of(request: Request, use: Callable[[int, int], bool]) -> int:
    """Use all chunks of a request, root first; how many of the prompt stand before the first that
    was not there."""
    hits, intact = 0, True
    for depth, chunk in enumerate(request.path):
        intact = use(chunk, depth) and intact
        hits += intact and depth < request.prompt_chunks
    return hits


class PlainCache:
    """FIFO, or LRU by order of access: both know nothing of chains."""

    def __init__(self, capacity: int, *, lru: bool) -> None:
        self._capacity, self._lru = capacity, lru
        self.chunks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, chunk: int) -> bool:
        return chunk in self.chunks

    def request(self, request: Request) -> int:
        return served_of(request, self.use)

    def use(self, chunk: int, _depth: int = 0) -> bool:
        """A chunk is read, or stored where it is not there; whether it was."""
        chunks = self.chunks
        if chunk in chunks:
            if self._lru:
                chunks.move_to_end(chunk)
            return True
        if len(chunks) >= self._capacity:
            chunks.popitem(last=False)
        chunks[chunk] = None
        return False


@dataclass(frozen=True, slots=True)
class Rules:
    """A policy of the form that the store's ordered index can run."""

    admit: Callable[[int, int, int], Heat]
    touch: Callable[[Heat, int, int, int], Heat]
    step: Callable[[Heat | None], int]
    request_ticks: int = 0  # added to the clock after each request


class RankedCache:
    """Evicts the smallest rank. A ghost remembers evicted keys and counts their return as a use.

    The heap is lazy: ranks only rise, so an item is corrected when it surfaces.
    """

    def __init__(self, capacity: int, rules: Rules, ghost_share: float = 0.0) -> None:
        self._capacity, self._rules, self._clock = capacity, rules, 0
        self._heats: dict[int, Heat] = {}
        self._order: list[tuple[int, int]] = []
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._ghost_max = int(ghost_share * capacity)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._heats

    def request(self, request: Request) -> int:
        hits = served_of(request, self.use)
        self._clock += self._rules.request_ticks
        return hits

    def use(self, chunk: int, depth: int) -> bool:
        """A chunk is read, or stored where it is not there; whether it was."""
        heats, rules, capacity = self._heats, self._rules, self._capacity
        heat = heats.get(chunk)
        if heat is not None:
            heats[chunk] = rules.touch(heat, self._clock, depth, capacity)
            self._clock += rules.step(heat)
            return True
        self._clock += rules.step(None)
        heat = rules.admit(self._clock, depth, capacity)
        if chunk in self._ghost:
            del self._ghost[chunk]
            heat = rules.touch(heat, self._clock, depth, capacity)
        heats[chunk] = heat
        heapq.heappush(self._order, (heat.rank, chunk))
        if len(heats) > capacity:
            self._evict()
        return False

    def _evict(self) -> None:
        while True:
            rank, chunk = self._order[0]
            current = self._heats[chunk].rank
            if rank == current:
                break
            heapq.heapreplace(self._order, (current, chunk))
        heapq.heappop(self._order)
        del self._heats[chunk]
        if self._ghost_max:
            self._ghost[chunk] = None
            if len(self._ghost) > self._ghost_max:
                self._ghost.popitem(last=False)


class SlruCache:
    """Segmented LRU, deeper chunks first within a request; `protected_share` for re-used ones."""

    def __init__(self, capacity: int, protected_share: float = 0.8) -> None:
        self._capacity, self._protected_max = capacity, int(capacity * protected_share)
        self._state: dict[int, tuple[int, bool]] = {}  # (rank, protected)
        self._heaps: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        self._protected, self._clock = 0, 0

    def request(self, request: Request) -> int:
        state, hits, intact = self._state, 0, True
        self._clock += 1
        for depth, chunk in enumerate(request.path):
            present = chunk in state
            intact = intact and present
            hits += intact and depth < request.prompt_chunks
            self._place(chunk, recency(self._clock, depth), present)
            while self._protected > self._protected_max:
                rank, demoted = self._pop(True)
                again = recency(self._clock, _DEPTH_MASK - (rank & _DEPTH_MASK))
                self._place(demoted, again, False)
            if len(state) > self._capacity:
                self._pop(len(state) == self._protected)
        return hits

    def _place(self, chunk: int, rank: int, protected: bool) -> None:
        self._protected += protected - self._state.get(chunk, (0, False))[1]
        self._state[chunk] = (rank, protected)
        heapq.heappush(self._heaps[protected], (rank, chunk))

    def _pop(self, protected: bool) -> tuple[int, int]:
        while True:
            rank, chunk = heapq.heappop(self._heaps[protected])
            if self._state.get(chunk) == (rank, protected):
                del self._state[chunk]
                self._protected -= protected
                return rank, chunk


class S3FifoCache:
    """S3-FIFO (Yang et al. 2023) with a ghost of `capacity` keys; deeper chunks leave first.

    One hit in the small queue promotes: on these traces 1 percentage point better than the paper's
    two hits, so the stronger opponent.
    """

    def __init__(self, capacity: int, small_share: float = 0.1) -> None:
        self._capacity, self._small_max = capacity, max(1, int(capacity * small_share))
        self._freq: dict[int, int] = {}
        self._small: list[tuple[int, int]] = []
        self._main: list[tuple[int, int]] = []
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._clock = 0

    def request(self, request: Request) -> int:
        freq, hits, intact = self._freq, 0, True
        self._clock += 1
        for depth, chunk in enumerate(request.path):
            if chunk in freq:
                hits += intact and depth < request.prompt_chunks
                freq[chunk] = min(3, freq[chunk] + 1)
                continue
            intact = False
            freq[chunk] = 0
            queue = self._main if chunk in self._ghost else self._small
            self._ghost.pop(chunk, None)
            heapq.heappush(queue, (recency(self._clock, depth), chunk))
            while len(freq) > self._capacity:
                self._step()
        return hits

    def _step(self) -> None:
        """Take the head of a queue: it is evicted or moves to the tail of the main queue."""
        small = len(self._small) > self._small_max or not self._main
        rank, chunk = heapq.heappop(self._small if small else self._main)
        if self._freq[chunk] > 0:
            self._freq[chunk] = 0 if small else self._freq[chunk] - 1
            depth = _DEPTH_MASK - (rank & _DEPTH_MASK)
            heapq.heappush(self._main, (recency(self._clock, depth), chunk))
            return
        del self._freq[chunk]
        if small:
            self._ghost[chunk] = None
            if len(self._ghost) > self._capacity:
                self._ghost.popitem(last=False)


def recency(clock: int, depth: int) -> int:
    return clock << 16 | (_DEPTH_MASK - depth)


def lru_heat(clock: int, depth: int, _capacity: int) -> Heat:
    return Heat(recency(clock, depth), 1)


def credit_rules(
    credit: float = evict.REUSE_CREDIT, promotion: int = evict.PROMOTION_TICKS
) -> Rules:
    """Return the rules of `prefixstore.evict`, with other constants if wanted."""
    return Rules(
        evict.admit,
        partial(evict.touch, credit=credit),
        partial(evict.clock_step, promotion=promotion),
    )


LRU_RULES = Rules(lru_heat, lambda _, *use: lru_heat(*use), lambda _: 0, request_ticks=1)
CHOSEN = Rules(evict.admit, evict.touch, evict.clock_step)
POLICIES: dict[str, Callable[[int], Cache]] = {
    "fifo": lambda slots: PlainCache(slots, lru=False),
    "lru_no_depth": lambda slots: PlainCache(slots, lru=True),
    "lru": lambda slots: RankedCache(slots, LRU_RULES),
    "slru": SlruCache,
    "s3fifo": S3FifoCache,
    "credit_admission_clock": lambda slots: RankedCache(slots, credit_rules(0.5, 0)),
    "credit": lambda slots: RankedCache(slots, CHOSEN),
    "credit_ghost": lambda slots: RankedCache(slots, CHOSEN, GHOST_SHARE),
}
SWEEP: dict[str, Callable[[int], Cache]] = {
    f"promotion {promotion:2} credit {credit:4}": partial(
        RankedCache, rules=credit_rules(credit, promotion)
    )
    for promotion, credits in (
        (0, (0, 0.25, 0.5, 1, 2)),
        (1, (0.25, 0.5, 1, 2)),
        (5, (1, 2, 4)),
        (10, (3, 5, 7)),
        (20, (3, 5, 7, 9, 14)),
        (40, (7, 14, 28)),
    )
    for credit in credits
}
