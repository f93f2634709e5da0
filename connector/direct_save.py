"""Saving by DMA: the GPU hashes chunks and writes them to slots of the memory tier.

The host neither copies nor hashes, so a save takes little of the time of the interpreter that runs
the engine too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch

from connector.direct import Sums
from connector.rank import Rank
from connector.region_copy import RegionCopy, batch_copy
from connector.registered import RegisteredSlots
from prefixstore.filling import Claimed, Copied, Copy
from prefixstore.layout import Layout, Roi
from prefixstore.lending import Lent
from prefixstore.reading import helpers_for, share_out
from prefixstore.slots import SlotFile
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")


class DirectSave:
    """Used by one thread, on its current stream. ``slots`` may be shared by several."""

    def __init__(self, layout: Layout, roi: Roi, sums: Sums, slots: RegisteredSlots) -> None:
        self._sums, self._slots = sums, slots
        self._runs, self._whole = layout.runs(roi), roi == layout.whole
        self._region = RegionCopy(self._runs, batch_copy())
        self._layout = layout
        self._pieces = layout.roi_bytes(roi) // layout.piece_bytes
        self._found = torch.zeros(0, 0, dtype=torch.int64)  # hashes, in pinned memory on CUDA

    def copy(self, store: Store, parts: Sequence[torch.Tensor]) -> Copy:
        """For `Namespace.put_by`: chunks of a put in order, ``[n, unit_bytes]`` on the device each.

        A slot that CUDA cannot write to is written by the host, and so is one that does not have
        what CUDA wrote: a process that ends between giving a slot's pages back and counting that
        leaves no sign, and CUDA writes to the old ones. The chunks must be there: a copy to the
        host's own memory that waits for others' work on the device keeps all threads from it.
        """
        rows = [row for part in parts for row in part]
        # Known when the stream has come so far. If no slot is claimed nobody waits for it: the ring
        # may have other chunks then, and nobody reads what was hashed.
        sums = self._hashed(parts)

        def copy(file: SlotFile, claimed: Sequence[Claimed]) -> list[Copied | None]:
            targets = [Lent(store, file, one.slot, one.version) for one in claimed]
            memory = dict(enumerate(self._slots.take(targets)))
            new = [i for i, at in memory.items() if at is None]

            def claim(n: int) -> None:
                i = new[n]
                try:
                    memory[i] = self._slots.claim(targets[i])
                except OSError:  # no room
                    del memory[i]
                    if self._whole:  # no other rank has written to it
                        with suppress(OSError):
                            file.punch(targets[i].slot)  # some of its pages were made

            try:
                if new:
                    helpers = helpers_for(len(new) * file.slot_bytes)
                    share_out(len(new), claim, store.helpers, helpers)
                near = {i: at for i, at in memory.items() if at is not None}
                if near:
                    sources = [rows[claimed[i].number] for i in near]
                    self._region.to_slots(list(near.values()), sources)
            finally:
                if rows[0].is_cuda:
                    torch.cuda.current_stream(rows[0].device).synchronize()
                self._slots.give_back(targets[i] for i, at in memory.items() if at is not None)
            copied: list[Copied | None] = [None] * len(claimed)
            for i in memory:
                of_chunk = sums[claimed[i].number].copy()  # the next call's are put there
                there = i in near and self._is_there(targets[i], of_chunk)
                if i in near and not there:
                    self._slots.distrust(targets[i])
                if there or self._by_host(targets[i], rows[claimed[i].number]):
                    copied[i] = Copied(of_chunk)
            return copied

        return copy

    def _hashed(self, parts: Sequence[torch.Tensor]) -> npt.NDArray[np.uint64]:
        """``[n, pieces]``: of each chunk, the xxh3_64 of its pieces, until the next call; on CUDA
        only enqueued."""
        count, at = sum(map(len, parts)), 0
        if count > len(self._found):  # as rarely as can be: CUDA may stop for it
            shape = 2 * count, self._pieces
            self._found = torch.empty(shape, dtype=torch.int64, pin_memory=parts[0].is_cuda)
        found = self._found[:count]
        for part in parts:
            sums = torch.empty((len(part), self._pieces), dtype=torch.int64, device=part.device)
            self._sums(part, sums)
            found[at : at + len(part)].copy_(sums, non_blocking=True)
            at += len(part)
        return found.numpy().view(np.uint64)

    def _is_there(self, target: Lent, sums: npt.NDArray[np.uint64]) -> bool:
        """Whether the file has what CUDA wrote, by its first piece: a slot has all of its pages or
        none."""
        try:
            at, size = self._runs[0].slot_offset, self._layout.piece_bytes
            piece = target.file.peek(target.slot, at, size)
        except OSError:
            return False
        return self._layout.piece_sums(piece) == [int(sums[0])]

    def _by_host(self, target: Lent, row: torch.Tensor) -> bool:
        """Write a chunk; whether there was room."""
        chunk = memoryview(row.cpu().numpy().data)
        try:
            for run in self._runs:
                target.file.write(target.slot, run.in_buffer(chunk), run.slot_offset)
        except OSError:
            return False
        return True


def direct_save_for(rank: Rank, slots: RegisteredSlots) -> DirectSave | None:
    """For the thread that saves that rank's pages; None where it cannot be done."""
    if rank.device.type != "cuda" or rank.sum_kernel is None:
        return None
    return DirectSave(rank.layout, rank.roi, rank.sum_kernel, slots)
