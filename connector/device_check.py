"""Loading by way of the host, checked by the device: what the host has read is hashed by the GPU.

The host's hashes are hundreds of small calls for each chunk that hold the interpreter's lock: many
threads read no faster than one then, and the engine waits for them. So threads only read, each
chunk is sent to the device when it is there, and all are hashed by one launch. They are handed on
when they have been compared. What is wrong is read again and checked by the host, where damage is
told from a slot that was reused, and is healed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from connector.direct import Sums
from connector.rank import Rank, mark
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.lending import get_unchecked
from prefixstore.namespace import MISS, Namespace

logger = logging.getLogger("vllm.prefixstore")


class DeviceCheck:
    """Used by one thread, on its current stream. Reads up to ``most`` chunks at once."""

    def __init__(
        self, device: torch.device, layout: Layout, roi: Roi, sums: Sums, most: int
    ) -> None:
        """Raises RuntimeError where there is no memory for it."""
        self._device, self._roi, self._hash = device, roi, sums
        unit, cuda = layout.roi_bytes(roi), device.type == "cuda"
        shape = most, unit // layout.piece_bytes
        self._chunks = torch.empty((most, unit), dtype=torch.uint8, device=device)
        self._sums = torch.empty(shape, dtype=torch.int64, device=device)
        self._wanted = torch.zeros(shape, dtype=torch.int64, pin_memory=cuda)
        self._wrong = torch.zeros(most, dtype=torch.uint8, pin_memory=cuda)

    def read(
        self,
        namespace: Namespace,
        refs: Sequence[ChunkRef],
        rows: torch.Tensor,
        progress: Callable[[], None],
        rests: Callable[[], None],
    ) -> tuple[torch.Tensor, list[int]]:
        """Chunks, checked, a row for each, on the device: uint8 ``[n, unit_bytes]``, until the next
        call; and the tier each came from, or MISS: that row is garbage.

        ``rows``: host memory for them, the same shape, pinned; free again when this returns.
        ``progress`` is called each time this thread has read a chunk, ``rests`` when the store is
        not waited for any more. Raises LayoutError, StoreError, RuntimeError.
        """
        outs = [memoryview(row.numpy()) for row in rows]
        sums: list[npt.NDArray[np.uint64] | None] = [None] * len(refs)
        chunks, sent = self._chunks[: len(refs)], set[int]()

        def came() -> None:
            """Send what is there by now, also what other threads have read."""
            for i, there in enumerate(sums):
                if there is not None and i not in sent:
                    sent.add(i)
                    chunks[i].copy_(rows[i], non_blocking=True)
            progress()

        try:
            tiers = get_unchecked(namespace, refs, outs, self._roi, sums, came)
            came()
            rests()
            self._compare(sums)
        finally:
            self._wait()
        wrong = [i for i, tier in enumerate(tiers) if tier != MISS and self._wrong[i]]
        if wrong:
            progress()
            found = namespace.get(
                [refs[i] for i in wrong], [outs[i] for i in wrong], self._roi, progress
            )
            rests()
            for i, tier in zip(wrong, found, strict=True):
                tiers[i] = tier
                chunks[i].copy_(rows[i])
        return chunks, tiers

    def _compare(self, sums: Sequence[npt.NDArray[np.uint64] | None]) -> None:
        """Hash what was sent, and note which is wrong; on CUDA only enqueued."""
        count = len(sums)
        for row, one in zip(self._wanted.numpy(), sums, strict=False):
            if one is not None:
                row[:] = one.view(np.int64)
        parts = self._chunks, self._sums, self._wanted, self._wrong
        self._hash.compare(*(part[:count] for part in parts))

    def _wait(self) -> None:
        event = mark(self._device)
        if event is not None:
            event.synchronize()


def device_check_for(rank: Rank, most: int) -> DeviceCheck | None:
    """For a thread that loads to that rank's pages; None where the host must hash."""
    if rank.device.type != "cuda" or rank.sum_kernel is None:
        return None
    try:
        return DeviceCheck(rank.device, rank.layout, rank.roi, rank.sum_kernel, most)
    except RuntimeError as error:
        logger.warning("prefixstore: chunks from a disk are checked by the host: %s", error)
        return None
