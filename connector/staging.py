"""The staging ring: memory between the engine's KV cache and the store, bounded and reused; on the
device of the KV cache, so that the engine's stream does not wait for PCIe.

Chunks are copied out of the KV cache within the step that completed them (so no block is ever held
back or read after it was reused) and stored by a thread later. When the store is slower than the
engine for so long that the ring is full, chunks are not saved: the engine never waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch


class StagingRing:
    """``num_units`` equal buffers, taken and given back in the same order. Raises RuntimeError if
    there is no memory for them."""

    def __init__(self, unit_bytes: int, num_units: int, device: torch.device) -> None:
        self.unit_bytes, self.num_units = unit_bytes, num_units
        self._memory = torch.empty((num_units, unit_bytes), dtype=torch.uint8, device=device)
        self._head = 0  # units taken since the start; units given back since the start
        self._tail = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> list[torch.Tensor]:
        """Buffers for ``count`` chunks, or for as many as are free: neighbours together, uint8
        ``[n, unit_bytes]``."""
        with self._lock:
            count = min(count, self.num_units - (self._head - self._tail))
            if count == 0:
                return []
            first = self._head % self.num_units
            self._head += count
        stop = min(first + count, self.num_units)
        parts = [self._memory[first:stop]]
        if stop - first < count:
            parts.append(self._memory[: count - (stop - first)])
        return parts

    def give_back(self, parts: Sequence[torch.Tensor]) -> None:
        """Return the oldest buffers that are out."""
        with self._lock:
            self._tail += sum(len(part) for part in parts)
            assert self._tail <= self._head
