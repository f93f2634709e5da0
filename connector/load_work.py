"""What one thread does for a load: reads chunks, has them checked, writes them to the pages."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial

import torch

from connector.buffers import Buffers
from connector.device_check import device_check_for
from connector.device_tier import DEVICE, DeviceTier, Missing
from connector.direct import Write, direct_for
from connector.groups import have_windows
from connector.load import Load
from connector.messages import BlendJob, SplitJob, StateLoad
from connector.pace import READ_CHUNKS_MAX, Pace
from connector.pieces import Placing
from connector.rank import Rank, is_past
from connector.registered import RegisteredSlots
from connector.states import StatePages
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.lending import note_use
from prefixstore.namespace import MISS, Namespace

SPLIT_PARTS = 8  # of what a split has still to load or compute: so much is read at once

Written = deque[tuple[torch.cuda.Event | None, int]]  # when it is in the pages, and how far it is
WriteChosen = Callable[[Sequence[int], torch.Tensor, Sequence[int]], bool]


class LoadWork:
    """Used by one thread. ``progressed(stall_s)`` is called when the store begins to give a chunk
    or has given one, ``rests`` when it is not asked for any, ``further`` when `Load.placed` is."""

    def __init__(
        self,
        rank: Rank,
        slots: RegisteredSlots,
        tier: DeviceTier | None,
        progressed: Callable[[float], None],
        rests: Callable[[], None],
        further: Callable[[], None],
    ) -> None:
        self._rank, self._progressed, self._rests = rank, progressed, rests
        self._further = further
        self._tier = tier
        self._direct = direct_for(rank, slots)
        self._buffers = Buffers(rank.device, rank.unit_bytes)
        self._for_states: Buffers | None = None
        if rank.states is not None:
            self._for_states = Buffers(rank.device, rank.states.unit_bytes, 1)
        for buffers in self._every():
            buffers.prepare()  # here, because vLLM may capture CUDA graphs soon: see `saving`
        self._check = device_check_for(rank, self._buffers.chunks)

    def _every(self) -> list[Buffers]:
        return [one for one in (self._buffers, self._for_states) if one is not None]

    def drain(self) -> None:
        """Wait until the pages have everything."""
        for buffers in self._every():
            buffers.drain()

    def run(self, load: Load, store: StoreLike) -> int | None:
        """Read, check, write to pages; returns the first chunk that failed, None for none."""
        job, rank = load.job, self._rank
        namespace = rank.namespaces.get(store, job.namespace)
        if isinstance(job.blend, SplitJob):
            return self._from_back(load, job.blend, namespace)
        to_pages = partial(load.write_received, rank)
        missing = self._from_device(load, namespace, job.refs, to_pages)
        numbers = missing.numbers

        def write(at: int, chunks: torch.Tensor) -> bool:
            return to_pages(numbers[at : at + len(chunks)], chunks)

        done = self._receive(load, namespace, missing, write)
        if load.barred:  # its last chunks were received, and not written
            return 0
        failed = self._by_host(load, namespace, missing, done)
        if failed is not None:
            return failed
        if job.blend is not None:
            return self._load_pieces(load, job.blend, namespace)
        if job.states is not None:
            return self._load_states(load, job.states, store)
        return None

    def _by_host(
        self, load: Load, namespace: NamespaceLike, missing: Missing, at: int
    ) -> int | None:
        """Load the chunks from ``at`` on by way of the host, as long as that is worth it; the
        first that was not, None for none."""
        buffers, rank, numbers = self._buffers, self._rank, missing.numbers
        job, every = load.job, len(load.job.refs)
        pace = Pace(job.compute_s) if job.compute_s and job.blend is None else None
        whole = len(rank.kv_groups) > 1 or have_windows(rank.kv_groups) or rank.states is not None
        while at < len(numbers):
            began, waited = time.monotonic(), load.waited_s
            count = buffers.chunks if pace is None else pace.to_read(buffers.chunks)
            refs = missing.refs[at : at + count]
            rows, tiers = self._read(load, namespace, refs, buffers, rank)
            good = tiers.index(MISS) if MISS in tiers else len(tiers)
            for tier in tiers[:good]:
                load.tiers[tier] += rank.unit_bytes
            if not load.write(rank, numbers[at : at + good], rows[:good], buffers.enqueued):
                return numbers[at]
            self._admit(missing, at, range(good), rows)
            at += good
            if good < len(refs):
                return numbers[at]
            if pace is None or at == len(numbers):
                continue
            pace.went(good, time.monotonic() - began - (load.waited_s - waited))
            if pace.too_slow(len(numbers) - at, every if whole else every - numbers[at]):
                [(tier, _)] = Counter(tiers).most_common(1)
                load.slow = tier, pace.chunks_per_s
                return numbers[at]
        return None

    def _from_back(self, load: Load, split: SplitJob, namespace: NamespaceLike) -> int | None:
        """Load the last chunks first, down to what is computed meanwhile, or to one that is gone or
        damaged: that and all before it is computed, too."""
        rank, buffers, refs = self._rank, self._buffers, load.job.refs
        size = rank.layout.chunk_tokens
        begin = len(split.token_ids) - len(refs) * size
        written: Written = deque()
        stop, count, lost = len(refs), 1, 0
        while not lost and (wanted := stop - max(0, load.reached - begin) // size) > 0:
            if load.barred:
                return 0
            count = min(2 * count, buffers.chunks, READ_CHUNKS_MAX, max(1, wanted // SPLIT_PARTS))
            at = stop - count
            rows, tiers = self._read(load, namespace, refs[at:stop], buffers, rank)
            lost = count - tiers[::-1].index(MISS) if MISS in tiers else 0
            for tier in tiers[lost:]:
                load.tiers[tier] += rank.unit_bytes
            if not load.write(rank, range(at + lost, stop), rows[lost:], buffers.enqueued):
                return 0
            stop = at + lost
            written.append((load.enqueued, begin + stop * size))
            for placed in _arrived(written):
                load.placed = placed
                self._further()
        buffers.drain()
        load.placed = begin + stop * size
        return None

    def _from_device(
        self, load: Load, namespace: NamespaceLike, refs: Sequence[ChunkRef], write: WriteChosen
    ) -> Missing:
        """Write what the device tier has; returns what it has not."""
        tier, name = self._tier, load.job.namespace
        if tier is None:
            return Missing(name, refs, range(len(refs)))
        self._rests()  # nothing in it waits for the store
        missing = tier.load(name, refs, lambda numbers, slots: write(numbers, tier.chunks, slots))
        rest = set(missing.numbers)
        found = [ref for number, ref in enumerate(refs) if number not in rest]
        if found and not load.barred:
            load.tiers[DEVICE] += len(found) * self._rank.unit_bytes
            note_use(namespace, found)
        return missing

    def _admit(self, missing: Missing, at: int, rows: Iterable[int], chunks: torch.Tensor) -> None:
        """Have the device tier take in what was read, and is on its way to the pages."""
        if self._tier is not None:
            try:
                self._tier.admit(missing, at, rows, chunks)
            finally:
                self._buffers.enqueued()  # also what was enqueued before it failed

    def _receive(
        self,
        load: Load,
        namespace: NamespaceLike,
        missing: Missing,
        write: Write,
        placed: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Have leading chunks received by DMA; how many are in the pages and checked."""
        if self._direct is None or not isinstance(namespace, Namespace):
            return 0
        self._rests()  # nothing in it waits for the store
        tier, leading = self._tier, 0

        def checked(at: int, chunks: torch.Tensor, sums: torch.Tensor, right: list[bool]) -> None:
            nonlocal leading
            if leading == at and all(right):
                leading += len(right)
                placed(leading)
            if tier is not None:
                tier.admit(missing, at, [i for i, fine in enumerate(right) if fine], chunks, sums)

        held = bool(missing.wanted)
        done = self._direct.load(namespace, missing.refs, write, checked, held=held)
        if done and not load.barred:
            load.tiers[MEMORY] += done * self._rank.unit_bytes
        return done

    def _load_states(self, load: Load, job: StateLoad, store: StoreLike) -> int | None:
        """What the chunks lead to. Without it they are worth nothing: all have failed."""
        states, buffers = self._rank.states, self._for_states
        if states is None or buffers is None:  # this worker sees no states where the scheduler does
            return 0
        namespace = states.namespaces.get(store, job.namespace)
        rows, [tier] = self._read(load, namespace, [job.ref], buffers, states)
        if tier == MISS:
            return 0
        load.tiers[tier] += states.unit_bytes
        write = partial(states.write_pages, job.blocks, rows[0])
        return None if load.write_by(write, buffers.enqueued) else 0

    def _read(
        self,
        load: Load,
        namespace: NamespaceLike,
        refs: Sequence[ChunkRef],
        buffers: Buffers,
        source: Rank | StatePages,
    ) -> tuple[torch.Tensor, list[int]]:
        """Chunks from the store, checked, a row for each, in host memory or on the device; and the
        tier each came from, or MISS."""
        rows = buffers.take(len(refs))
        progressed = partial(self._progressed, load.job.stall_s)
        progressed()
        if self._check and source is self._rank and isinstance(namespace, Namespace):
            return self._check.read(namespace, refs, rows, progressed, self._rests)
        outs = [memoryview(row.numpy()) for row in rows]
        tiers = namespace.get(refs, outs, source.roi, progressed)
        self._rests()
        return rows, tiers

    def _load_pieces(self, load: Load, blend: BlendJob, namespace: NamespaceLike) -> int | None:
        """Put what is reused from elsewhere in place; one that is gone or damaged is no failure."""
        engine, rank, buffers = self._rank.engine, self._rank, self._buffers
        if engine is None:  # this rank cannot blend: all ranks give it up
            return len(load.job.refs)
        refs = [piece.ref for piece in blend.pieces]

        def placing(numbers: Sequence[int]) -> Placing:
            pieces = [blend.pieces[number] for number in numbers]
            return Placing(engine, pieces, blend.blocks, rank.layout.chunk_tokens)

        def write(numbers: Sequence[int], chunks: torch.Tensor, chosen: Sequence[int]) -> bool:
            return load.write_received_pieces(rank, placing(numbers), 0, chunks, chosen)

        missing = self._from_device(load, namespace, refs, write)
        numbers = missing.numbers
        if load.barred:
            return 0
        if not numbers:
            return None
        all_placing = cache(lambda: placing(numbers))  # made while the first of them arrive

        def received(at: int, chunks: torch.Tensor) -> bool:
            return load.write_received_pieces(rank, all_placing(), at, chunks)

        buffers.drain()  # what is exact is in the pages before any piece is said to be

        def placed(count: int) -> None:
            if count < len(numbers) and not load.failed_pieces:  # else the end says so
                load.placed = blend.pieces[numbers[count]].start
                self._further()

        done = self._receive(load, namespace, missing, received, placed)
        if load.barred:
            return 0
        written: Written = deque()
        for at in range(done, len(numbers), buffers.chunks):
            part = missing.refs[at : at + buffers.chunks]
            rows, tiers = self._read(load, namespace, part, buffers, rank)
            there = [place for place, tier in enumerate(tiers) if tier != MISS]
            load.failed_pieces.update(
                numbers[at + place] for place, tier in enumerate(tiers) if tier == MISS
            )
            for place in there:
                load.tiers[tiers[place]] += rank.unit_bytes
            good = rows if len(there) == len(rows) else rows[there]
            chosen = placing([numbers[at + place] for place in there])
            if not load.write_pieces(rank, chosen, 0, good, buffers.enqueued):
                return 0
            self._admit(missing, at, there, rows)
            written.append((load.enqueued, at + len(rows)))
            for count in _arrived(written):
                placed(count)
        return None


def _arrived(written: Written) -> Iterator[int]:
    """Take out what is in the pages by now."""
    while written and is_past(written[0][0]):
        yield written.popleft()[1]
