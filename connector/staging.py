"""The staging ring: host memory between the engine's KV cache and the store, bounded and reused.

Chunks are copied out of the KV cache within the step that completed them (so no block is ever held
back or read after it was reused) and stored by a thread later. When the store is slower than the
engine for so long that the ring is full, chunks are not saved: the engine never waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Staged:
    """Neighbouring buffers."""

    rows: torch.Tensor  # uint8 [n, unit_bytes]
    sums: torch.Tensor | None  # int64 [n, sums of a unit], where the GPU hashes

    def __len__(self) -> int:
        return len(self.rows)


class StagingRing:
    """``num_units`` equal buffers, taken and given back in the same order. ``num_sums``: of each,
    where the GPU hashes what it copies there; else 0."""

    def __init__(self, unit_bytes: int, num_units: int, *, pinned: bool, num_sums: int = 0) -> None:
        self.unit_bytes, self.num_units = unit_bytes, num_units
        self._memory = torch.empty((num_units, unit_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._sums: torch.Tensor | None = None
        if num_sums:
            self._sums = torch.empty((num_units, num_sums), dtype=torch.int64, pin_memory=pinned)
        self._head = 0  # units taken since the start; units given back since the start
        self._tail = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> list[Staged]:
        """Buffers for ``count`` chunks, or for as many as are free."""
        with self._lock:
            count = min(count, self.num_units - (self._head - self._tail))
            if count == 0:
                return []
            first = self._head % self.num_units
            self._head += count
        stop = min(first + count, self.num_units)
        parts = [self._staged(first, stop)]
        if stop - first < count:
            parts.append(self._staged(0, count - (stop - first)))
        return parts

    def _staged(self, first: int, stop: int) -> Staged:
        sums = None if self._sums is None else self._sums[first:stop]
        return Staged(self._memory[first:stop], sums)

    def give_back(self, parts: Sequence[Staged]) -> None:
        """Return the oldest buffers that are out."""
        with self._lock:
            self._tail += sum(len(part) for part in parts)
            assert self._tail <= self._head
