"""Loading by DMA: the GPU reads chunks from the memory tier, hashes what it received, and writes it
to the pages. The host neither copies nor hashes.

Chunks go in turns through lanes, each a buffer and a stream: while those of one arrive, those of
another are hashed and written. A lane's stream keeps its turns in order, so the host does not wait
between them but has AHEAD of them under way: beside a thread that launches kernels, as the
engine's does for a blend, it must be done soon. Each of the two waits for the interpreter's lock
whenever the other has called CUDA.

Before the first chunks are written the steps that were begun before must be over (`Load.write_by`).
Pages are written before the hashes are known, and the load ends only after: a chunk whose hashes
are wrong, with all behind it, is loaded again by way of the host, where damage is told from a slot
that was reused, and is healed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from connector.rank import Rank, is_past, mark
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

LANE_BYTES = 256 * MIB  # or less, see `lane_bytes`
LANE_SHARE = 256
LANES = 2
FIRST_BYTES = 32 * MIB  # go first, then twice as much: there is soon something to hash and write
AHEAD = 16  # turns under way at once: a load that is given up ends only after them

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
    """A buffer, and the stream that does all work on it, one turn after another."""

    chunks: torch.Tensor  # uint8 [n, unit_bytes], on the device
    sums: torch.Tensor  # int64 [n, pieces], on the device
    stream: torch.cuda.Stream | None

    def on(self) -> AbstractContextManager[object]:
        """For work on this lane."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


@dataclass
class _Turn:
    """Chunks that go through a lane together, and what becomes of them."""

    lane: _Lane
    at: int  # the number of the first of them
    wanted: torch.Tensor  # int64 [n, pieces]: the sums they must have; pinned
    wrong: torch.Tensor  # uint8 [n], pinned
    lent: list[Lent] = field(default_factory=list)
    written: bool = False  # to the pages, or being so
    over: torch.cuda.Event | None = None  # when all of it is done

    def is_over(self) -> bool:
        """Whether it was written, and nobody has to wait for that."""
        return self.written and is_past(self.over)


def lane_bytes(device: torch.device) -> int:
    """Of one lane: small beside the device's memory."""
    if device.type != "cuda":
        return LANE_BYTES
    return min(LANE_BYTES, torch.cuda.get_device_properties(device).total_memory // LANE_SHARE)


class Direct:
    """Used by one thread. ``slots`` may be shared by several."""

    def __init__(
        self, device: torch.device, layout: Layout, roi: Roi, sums: Sums, slots: RegisteredSlots
    ) -> None:
        """Raises RuntimeError where there is no memory for it."""
        self._device, self._roi, self._sums, self._slots = device, roi, sums, slots
        self._region = RegionCopy(layout.runs(roi), batch_copy())
        unit, cuda = layout.roi_bytes(roi), device.type == "cuda"
        pieces = unit // layout.piece_bytes
        self._count = max(1, lane_bytes(device) // unit)  # chunks of a turn, at most
        self._first = min(self._count, max(1, FIRST_BYTES // unit))
        self._lanes = [
            _Lane(
                torch.empty((self._count, unit), dtype=torch.uint8, device=device),
                torch.empty((self._count, pieces), dtype=torch.int64, device=device),
                # Its kernels are short, and do not wait behind long ones that compute.
                torch.cuda.Stream(device, priority=-1) if cuda else None,
            )
            for _ in range(LANES)
        ]
        # Of each turn that is under way.
        shape = AHEAD, self._count, pieces
        self._wanted = torch.empty(shape, dtype=torch.int64, pin_memory=cuda).unbind()
        self._wrong = torch.empty(shape[:2], dtype=torch.uint8, pin_memory=cuda).unbind()

    def load(
        self,
        namespace: Namespace,
        refs: Sequence[ChunkRef],
        write: Write,
        checked: Checked | None = None,
        *,
        held: bool = False,
    ) -> int:
        """Load leading chunks; how many are in the pages and checked.

        ``write(i, chunks)`` enqueues, on the current stream, writing chunks ``i`` and on to their
        pages; False gives the load up. ``checked(i, chunks, sums, right)`` is told when the hashes
        of chunks ``i`` and on are known; if ``held``, their lane keeps them until it returns, so it
        may enqueue reading them. Ends at the first chunk that cannot be read like this. Raises
        StoreClosedError, RuntimeError, and what ``write`` does; nothing is on its way to the pages
        when this returns or raises.
        """
        right: list[bool] = []
        under_way: list[_Turn] = []
        # Not held, a lane's turns follow each other by its stream. The last one is not written yet,
        # so two must find room.
        most = LANES if held else AHEAD
        goes_on = True
        try:
            for number, part in enumerate(self._parts(len(refs))):
                while under_way and (len(under_way) == most or under_way[0].is_over()):
                    right += self._finish(under_way.pop(0), checked)
                if not (goes_on := all(right)):
                    break
                turn, before = self._turn(number, part.start), under_way[-1:]
                count = self._receive(turn, namespace, refs[part])
                if count:
                    under_way.append(turn)
                # Only now the one before: what ``write`` makes at first may take longer than this
                # one's way.
                goes_on = all(self._write(one, write) for one in before)
                if not goes_on or part.start + count < part.stop:
                    break
            if goes_on and under_way:
                self._write(under_way[-1], write)
        finally:
            try:
                while under_way:
                    right += self._finish(under_way.pop(0), checked)
            finally:
                for turn in under_way:
                    self._end(turn)
        return right.index(False) if False in right else len(right)

    def _parts(self, count: int) -> Iterator[slice]:
        """Chunks of one turn after another."""
        at, size = 0, self._first
        while at < count:
            yield slice(at, min(at + size, count))
            at, size = at + size, min(2 * size, self._count)

    def _turn(self, number: int, at: int) -> _Turn:
        lane, place = self._lanes[number % LANES], number % AHEAD
        return _Turn(lane, at, self._wanted[place], self._wrong[place])

    def _receive(self, turn: _Turn, namespace: Namespace, refs: Sequence[ChunkRef]) -> int:
        """Have leading chunks copied to the lane and hashed; how many. If there are any, the turn
        must be ended."""
        lent = lend(namespace, refs, self._roi)
        sources: list[torch.Tensor] = []
        with ExitStack() as unless_enqueued:  # part of it may be under way
            unless_enqueued.callback(self._end, turn)
            self._take(namespace.store, lent, turn, sources)
            if sources:
                self._enqueue(turn, sources)
            unless_enqueued.pop_all()
        return len(sources)

    def _enqueue(self, turn: _Turn, sources: Sequence[torch.Tensor]) -> None:
        count, lane = len(sources), turn.lane
        for row, one in zip(turn.wanted.numpy(), turn.lent, strict=False):
            row[:] = one.sums.view(np.int64)
        chunks = lane.chunks[:count]
        with lane.on():
            self._region.to_chunks(sources, chunks.unbind())
            self._sums.compare(chunks, lane.sums[:count], turn.wanted[:count], turn.wrong[:count])

    def _take(
        self, store: Store, lent: Sequence[Lent], turn: _Turn, sources: list[torch.Tensor]
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
            turn.lent += lent[:leading]
            sources += [memory for memory in found[:leading] if memory is not None]
            behind = zip(lent[leading:], there[leading:], strict=True)
            self._slots.give_back(one for one, taken in behind if taken)

    def _write(self, turn: _Turn, write: Write) -> bool:
        """Have it written to the pages, unless it is; False: the load is given up."""
        if not turn.written:
            with turn.lane.on():
                turn.written = write(turn.at, turn.lane.chunks[: len(turn.lent)])
                turn.over = mark(self._device)
        return turn.written

    def _finish(self, turn: _Turn, checked: Checked | None) -> list[bool]:
        """Wait until it is over; whether each chunk is right, and in the pages."""
        lent, lane = turn.lent, turn.lane
        self._end(turn)
        right = [not wrong for wrong in turn.wrong[: len(lent)].tolist()]
        for one, fine in zip(lent, right, strict=True):
            if not fine:
                self._slots.distrust(one)
        if not turn.written:
            return [False] * len(lent)
        if checked is not None:
            with lane.on():
                checked(turn.at, lane.chunks, lane.sums, right)
        return right

    def _end(self, turn: _Turn) -> None:
        """Wait for it; its slots are not read any more."""
        if turn.over is not None:
            turn.over.synchronize()
        elif turn.lane.stream is not None:  # it was given up midway
            turn.lane.stream.synchronize()
        self._slots.give_back(turn.lent)
        turn.lent = []


def direct_for(rank: Rank, slots: RegisteredSlots) -> Direct | None:
    """For a thread that loads to that rank's pages; None where it cannot be done."""
    if rank.device.type != "cuda" or rank.sum_kernel is None:
        return None
    try:
        return Direct(rank.device, rank.layout, rank.roi, rank.sum_kernel, slots)
    except RuntimeError as error:
        logger.warning("prefixstore: chunks are read by way of the host: %s", error)
        return None
