"""Copies of a region between a slot and a chunk as a rank has it, enqueued on the current stream.

A rank with a part of the heads has many runs in each slot, at equal distances: one copy by CUDA
takes them all, where one for each would keep Python busy for longer than the bytes travel.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch

from connector.cudart import function
from prefixstore.layout import Run

logger = logging.getLogger("vllm.prefixstore")

_ANY_TO_ANY = 4  # cudaMemcpyDefault: CUDA knows from the addresses

Copy2d = Callable[[int, int, int, int, int, int, int, int], int]
"""cudaMemcpy2DAsync: to, its pitch, from, its pitch, bytes of a row, rows, kind, stream."""


class RegionCopy:
    """``runs`` are those of the region. One for any number of threads."""

    def __init__(self, runs: Sequence[Run], copy_2d: Copy2d | None = None) -> None:
        """Raises ValueError for runs that are not alike or not at equal distances."""
        self._count, self._first, self._copy_2d = len(runs), runs[0], copy_2d
        second = runs[1] if len(runs) > 1 else runs[0]
        self._slot_pitch = second.slot_offset - self._first.slot_offset
        self._chunk_pitch = second.buffer_offset - self._first.buffer_offset
        for number, run in enumerate(runs):
            if run != Run(
                self._first.slot_offset + number * self._slot_pitch,
                self._first.buffer_offset + number * self._chunk_pitch,
                self._first.num_bytes,
            ):
                raise ValueError(f"run {number} of a region is {run}, unlike those before it")

    def to_chunk(self, slot: torch.Tensor, chunk: torch.Tensor) -> None:
        """uint8 ``[slot_bytes]`` to ``[unit_bytes]``."""
        self._copy(self._in_chunk(chunk), self._in_slot(slot))

    def to_slot(self, slot: torch.Tensor, chunk: torch.Tensor) -> None:
        """The other way."""
        self._copy(self._in_slot(slot), self._in_chunk(chunk))

    def _in_slot(self, slot: torch.Tensor) -> torch.Tensor:
        return self._rows(slot, self._first.slot_offset, self._slot_pitch)

    def _in_chunk(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._rows(chunk, self._first.buffer_offset, self._chunk_pitch)

    def _rows(self, memory: torch.Tensor, offset: int, pitch: int) -> torch.Tensor:
        width = self._first.num_bytes
        last = offset + (self._count - 1) * pitch + width
        assert last <= memory.numel(), "a region that ends behind the memory"
        return memory.as_strided((self._count, width), (pitch, 1), memory.storage_offset() + offset)

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        copy = self._copy_2d if self._count > 1 else None  # another thread may find it refused
        if copy is None or not self._at_once(to, source, copy):
            for there, here in zip(to, source, strict=True):
                there.copy_(here, non_blocking=True)

    def _at_once(self, to: torch.Tensor, source: torch.Tensor, copy: Copy2d) -> bool:
        """False where CUDA refuses; it is not asked again."""
        device = to.device if to.is_cuda else source.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        result = copy(
            to.data_ptr(), to.stride(0), source.data_ptr(), source.stride(0),
            self._first.num_bytes, self._count, _ANY_TO_ANY, stream,
        )  # fmt: skip
        if result:
            self._copy_2d = None
            logger.warning("prefixstore: parts of chunks are copied run by run: error %d", result)
            with suppress(RuntimeError):  # the error would be the next launch's of this thread
                torch.zeros(1, device=device)
        return not result


@cache
def copy_2d() -> Copy2d | None:
    """CUDA's; None where there is none."""
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    arguments = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    return function("cudaMemcpy2DAsync", arguments, "parts of chunks are copied run by run")
