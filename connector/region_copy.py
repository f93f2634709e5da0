"""Copies of a region between slots and chunks as a rank has them, enqueued on the current stream.

All copies of a batch are one call: each takes Python as long as a megabyte travels, and a rank with
a part of the heads has many runs in each slot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from prefixstore.layout import Run

logger = logging.getLogger("vllm.prefixstore")

Int64s = npt.NDArray[np.int64]
BatchCopy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""From addresses, to addresses, so many bytes: int64 each, in host memory."""


class RegionCopy:
    """``runs`` are those of the region. One for any number of threads."""

    def __init__(self, runs: Sequence[Run], batch: BatchCopy | None = None) -> None:
        self._batch = batch
        self._in_slot = np.array([run.slot_offset for run in runs], np.int64)
        self._in_chunk = np.array([run.buffer_offset for run in runs], np.int64)
        self._sizes = np.array([run.num_bytes for run in runs], np.int64)

    def to_chunks(self, slots: Sequence[torch.Tensor], chunks: Sequence[torch.Tensor]) -> None:
        """From each slot, uint8 ``[slot_bytes]``, to its chunk, ``[unit_bytes]``."""
        self._copy(slots, self._in_slot, chunks, self._in_chunk)

    def to_slots(self, slots: Sequence[torch.Tensor], chunks: Sequence[torch.Tensor]) -> None:
        """The other way."""
        self._copy(chunks, self._in_chunk, slots, self._in_slot)

    def _copy(
        self, sources: Sequence[torch.Tensor], here: Int64s,
        targets: Sequence[torch.Tensor], there: Int64s,
    ) -> None:  # fmt: skip
        if self._at_once(self._at(sources, here), self._at(targets, there)):
            return
        runs = list(zip(here.tolist(), there.tolist(), self._sizes.tolist(), strict=True))
        for source, target in zip(sources, targets, strict=True):
            for begin, at, size in runs:
                target[at : at + size].copy_(source[begin : begin + size], non_blocking=True)

    def _at(self, memory: Sequence[torch.Tensor], offsets: Int64s) -> Int64s:
        """The addresses of all runs in all of them."""
        end = int((offsets + self._sizes).max())
        assert all(one.numel() >= end for one in memory), "a region that ends behind the memory"
        first = np.array([one.data_ptr() for one in memory], np.int64)
        return (first[:, None] + offsets).ravel()

    def _at_once(self, here: Int64s, there: Int64s) -> bool:
        """False where it cannot be done; it is not tried again."""
        batch = self._batch  # another thread may find it refused
        if batch is None:
            return False
        assert len(here) == len(there)
        sizes = np.tile(self._sizes, len(here) // len(self._sizes))
        try:
            batch(torch.from_numpy(here), torch.from_numpy(there), torch.from_numpy(sizes))
        except (AttributeError, RuntimeError) as error:
            self._batch = None
            logger.warning("prefixstore: chunks are copied one by one: %s", error)
            return False
        return True


@cache
def batch_copy() -> BatchCopy | None:
    """vLLM's, by ``cuMemcpyBatchAsync`` where CUDA has that; None where there is none.

    It reads its sources in the stream's order (its default): what is saved may have been rounded by
    a kernel just before. Without ``cuMemcpyBatchAsync`` (drivers before 12.8) vLLM copies one by
    one and looks at no result: what was not copied is found by its hashes, when it is loaded.
    """
    if torch.version.cuda is None:
        return None
    try:
        from vllm._custom_ops import swap_blocks_batch
    except ImportError as error:
        logger.warning("prefixstore: chunks are copied one by one: %s", error)
        return None
    copy: BatchCopy = swap_blocks_batch
    return copy
