"""Loading by DMA: the GPU reads chunks from the memory tier, hashes what it received, and writes it
to the pages. The host neither copies nor hashes.

Lanes take turns, each with a buffer and a stream: while one's chunks arrive, those of another are
hashed and written, and the next copies are already asked for. Before the first of them is written
the steps that were begun before must be over (`Load.write_by`). Pages are written before the hashes
are known, and the load ends only after: a chunk whose hashes are wrong, with all behind it, is
loaded again by way of the host, where damage is told from a slot that was reused, and is healed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from connector.rank import Rank
from connector.region_copy import RegionCopy, batch_copy
from connector.registered import RegisteredSlots
from prefixstore.config import MIB
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.lending import Lent, lend
from prefixstore.namespace import Namespace
from prefixstore.reading import helpers_for, share_out
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

LANE_BYTES = 64 * MIB
LANES = 3

Write = Callable[[int, torch.Tensor], bool]
Checked = Callable[[int, torch.Tensor, torch.Tensor, list[bool]], None]


class Sums(Protocol):
    """`sum_kernel.SumKernel`: xxh3_64 of equal pieces."""

    def __call__(
        self, data: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor | None = None
    ) -> None:
        """Hash ``data``, or ``rows`` of it, into ``sums``."""

    def compare(
        self, data: torch.Tensor, sums: torch.Tensor, wanted: torch.Tensor, wrong: torch.Tensor
    ) -> None:
        """Hash ``data``, and note which rows have other sums than are ``wanted``."""


@dataclass
class _Lane:
    """One buffer and what is in it."""

    chunks: torch.Tensor  # uint8 [n, unit_bytes], on the device
    sums: torch.Tensor  # int64 [n, pieces], on the device
    wanted: torch.Tensor  # the same, what they must be; pinned
    wrong: torch.Tensor  # uint8 [n], pinned
    stream: torch.cuda.Stream | None
    lent: list[Lent] = field(default_factory=list)  # under way
    at: int = 0  # the number of the first of them
    written: bool = False  # to the pages, or being so

    def on(self) -> AbstractContextManager[object]:
        """For work on this lane."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class Direct:
    """Used by one thread. ``slots`` may be shared by several."""

    def __init__(
        self, device: torch.device, layout: Layout, roi: Roi, sums: Sums, slots: RegisteredSlots
    ) -> None:
        """Raises RuntimeError where there is no memory for it."""
        self._roi, self._sums, self._slots = roi, sums, slots
        self._region = RegionCopy(layout.runs(roi), batch_copy())
        unit, cuda = layout.roi_bytes(roi), device.type == "cuda"
        pieces = unit // layout.piece_bytes
        self._count = max(1, LANE_BYTES // unit)
        self._lanes = [
            _Lane(
                torch.empty((self._count, unit), dtype=torch.uint8, device=device),
                torch.empty((self._count, pieces), dtype=torch.int64, device=device),
                torch.empty((self._count, pieces), dtype=torch.int64, pin_memory=cuda),
                torch.empty(self._count, dtype=torch.uint8, pin_memory=cuda),
                torch.cuda.Stream(device) if cuda else None,
            )
            for _ in range(LANES)
        ]

    def load(
        self,
        namespace: Namespace,
        refs: Sequence[ChunkRef],
        write: Write,
        checked: Checked | None = None,
    ) -> int:
        """Load leading chunks; how many are in the pages and checked.

        ``write(i, chunks)`` enqueues, on the current stream, writing chunks ``i`` and on to their
        pages; False gives the load up. ``checked(i, chunks, sums, right)`` is told when the hashes
        of chunks ``i`` and on are known, and may enqueue reading them. Ends at the first chunk that
        cannot be read like this. Raises StoreClosedError, RuntimeError, and what ``write`` does;
        nothing is on its way to the pages when this returns or raises.
        """
        right: list[bool] = []
        under_way: deque[_Lane] = deque()
        try:
            for turn, at in enumerate(range(0, len(refs), self._count)):
                if len(under_way) == LANES:
                    right += self._finish(under_way.popleft(), checked)
                part, lane = refs[at : at + self._count], self._lanes[turn % LANES]
                count = self._receive(lane, namespace, part) if all(right) else 0
                if count == 0:
                    break
                lane.at, lane.written = at, False
                under_way.append(lane)
                with lane.on():
                    lane.written = write(at, lane.chunks[:count])
                if not lane.written or count < len(part):
                    break
        finally:
            try:
                while under_way:
                    right += self._finish(under_way.popleft(), checked)
            finally:
                for lane in under_way:
                    self._end(lane)
        return right.index(False) if False in right else len(right)

    def _receive(self, lane: _Lane, namespace: Namespace, refs: Sequence[ChunkRef]) -> int:
        """Have leading chunks copied to the lane and hashed; how many."""
        lent = lend(namespace, refs, self._roi)
        sources: list[torch.Tensor] = []
        with ExitStack() as unless_enqueued:  # part of it may be under way
            unless_enqueued.callback(self._end, lane)
            self._take(namespace.store, lent, lane, sources)
            if not sources:
                return 0
            self._enqueue(lane, sources)
            unless_enqueued.pop_all()
        return len(sources)

    def _enqueue(self, lane: _Lane, sources: Sequence[torch.Tensor]) -> None:
        count = len(sources)
        for row, one in zip(lane.wanted.numpy(), lane.lent, strict=False):
            row[:] = one.sums.view(np.int64)
        chunks = lane.chunks[:count]
        with lane.on():
            self._region.to_chunks(sources, chunks.unbind())
            self._sums.compare(chunks, lane.sums[:count], lane.wanted[:count], lane.wrong[:count])

    def _take(
        self, store: Store, lent: Sequence[Lent], lane: _Lane, sources: list[torch.Tensor]
    ) -> None:
        """Take leading slots that CUDA can read; those that are not registered are, by several
        threads."""
        found = self._slots.take(lent)
        missing = [i for i, memory in enumerate(found) if memory is None]

        def register(n: int) -> None:
            found[missing[n]] = self._slots.register(lent[missing[n]])

        try:
            if missing:
                helpers = helpers_for(len(missing) * lent[0].file.slot_bytes)
                share_out(len(missing), register, store.helpers, helpers)
        finally:
            # Not by ``None in found``, which asks each tensor whether it equals None.
            there = [memory is not None for memory in found]
            leading = there.index(False) if False in there else len(there)
            lane.lent += lent[:leading]
            sources += [memory for memory in found[:leading] if memory is not None]
            behind = zip(lent[leading:], there[leading:], strict=True)
            self._slots.give_back(one for one, taken in behind if taken)

    def _finish(self, lane: _Lane, checked: Checked | None) -> list[bool]:
        """Wait for what is under way; whether each chunk is right, and in the pages."""
        lent = lane.lent
        self._end(lane)
        right = [not wrong for wrong in lane.wrong[: len(lent)].tolist()]
        for one, fine in zip(lent, right, strict=True):
            if not fine:
                self._slots.distrust(one)
        if not lane.written:
            return [False] * len(lent)
        if checked is not None:
            with lane.on():
                checked(lane.at, lane.chunks, lane.sums, right)
        return right

    def _end(self, lane: _Lane) -> None:
        """Wait for it; its slots are not read any more."""
        if lane.stream is not None:
            lane.stream.synchronize()
        self._slots.give_back(lane.lent)
        lane.lent = []


def direct_for(rank: Rank, slots: RegisteredSlots) -> Direct | None:
    """For a thread that loads to that rank's pages; None where it cannot be done."""
    if rank.device.type != "cuda" or rank.sum_kernel is None:
        return None
    try:
        return Direct(rank.device, rank.layout, rank.roi, rank.sum_kernel, slots)
    except RuntimeError as error:
        logger.warning("prefixstore: chunks are read by way of the host: %s", error)
        return None
