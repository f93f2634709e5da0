"""Host memory that chunks are read into before they go to the pages.

On CUDA it is pinned and there are two of it: while the GPU takes one to its pages, the store fills
the other. On a CPU pages are written at once, and one is enough.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch

from prefixstore.config import MIB
from prefixstore.slots import aligned_buffer

BYTES, PINNED_BYTES = 32 * MIB, 128 * MIB  # pinned: enough for all threads that help to read
CHUNKS_MAX = 64


class Buffers:
    """Used by one thread. ``chunks`` of ``unit_bytes`` are read at once, at most ``most``."""

    def __init__(self, device: torch.device, unit_bytes: int, most: int = CHUNKS_MAX) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        room = PINNED_BYTES if self._cuda else BYTES
        self.chunks = max(1, min(room // unit_bytes, most))
        self._shape = self.chunks, unit_bytes
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._current = 0

    def prepare(self) -> None:
        """Allocate now: pinning takes as long as a load. One of two is enough if there is no memory
        for the other; without any it is tried again when it is used."""
        with suppress(RuntimeError):
            for _ in range(1 + self._cuda):
                self._allocate()

    def _allocate(self) -> None:
        if self._cuda:
            new = torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        else:  # at a page, as pinned memory is: a cold disk is read past the page cache
            room = aligned_buffer(math.prod(self._shape))
            new = torch.frombuffer(room, dtype=torch.uint8).view(self._shape)
        self._buffers.append(new)

    def take(self, count: int) -> torch.Tensor:
        """``[count, unit_bytes]``, once the pages have what it held. Raises RuntimeError."""
        if not self._buffers:
            self._allocate()
        self._current = (self._current + 1) % len(self._buffers)
        event = self._events[self._current]
        if event is not None:
            event.synchronize()
        return self._buffers[self._current][:count]

    def enqueued(self) -> torch.cuda.Event | None:
        """What was taken last is on its way to the pages, on this thread's stream; the event comes
        when it is there. None where it is there already."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._events[self._current] = event
        return event

    def drain(self) -> None:
        """Wait until the pages have everything."""
        for event in self._events:
            if event is not None:
                event.synchronize()
