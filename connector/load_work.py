"""What one thread does for a load: reads chunks, has them checked, writes them to the pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from connector.buffers import Buffers
from connector.direct import Placed, Write, direct_for
from connector.load import Load
from connector.messages import BlendJob, StateLoad
from connector.pieces import Placing
from connector.rank import Rank
from connector.registered import RegisteredSlots
from connector.states import StatePages
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS, Namespace


class LoadWork:
    """Used by one thread. ``progressed(stall_s)`` is called when the store begins to give a chunk
    or has given one, ``rests`` when it is not asked for any, ``further`` when `Load.placed` is."""

    def __init__(
        self,
        rank: Rank,
        slots: RegisteredSlots,
        progressed: Callable[[float], None],
        rests: Callable[[], None],
        further: Callable[[], None],
    ) -> None:
        self._rank, self._progressed, self._rests = rank, progressed, rests
        self._further = further
        self._direct = direct_for(rank, slots)
        self._buffers = Buffers(rank.device, rank.unit_bytes)
        self._for_states: Buffers | None = None
        if rank.states is not None:
            self._for_states = Buffers(rank.device, rank.states.unit_bytes, 1)
        for buffers in self._every():
            buffers.prepare()  # here, because vLLM may capture CUDA graphs soon: see `saving`

    def _every(self) -> list[Buffers]:
        return [one for one in (self._buffers, self._for_states) if one is not None]

    def drain(self) -> None:
        """Wait until the pages have everything."""
        for buffers in self._every():
            buffers.drain()

    def run(self, load: Load, store: StoreLike) -> int | None:
        """Read, check, write to pages; returns the first chunk that failed, None for none."""
        job, buffers = load.job, self._buffers
        namespace = self._rank.namespaces.get(store, job.namespace)
        write = partial(load.write_received, self._rank)
        done = self._receive(load, namespace, job.refs, write)
        if load.barred:  # its last chunks were received, and not written
            return 0
        for at in range(done, len(job.refs), buffers.chunks):
            refs = job.refs[at : at + buffers.chunks]
            rows, tiers = self._read(load, namespace, refs, buffers, self._rank)
            good = tiers.index(MISS) if MISS in tiers else len(tiers)
            for tier in tiers[:good]:
                load.tiers[tier] += self._rank.unit_bytes
            if not load.write(self._rank, at, rows[:good], buffers.enqueued):
                return at
            if good < len(refs):
                return at + good
        if job.blend is not None:
            return self._load_pieces(load, job.blend, namespace)
        if job.states is not None:
            return self._load_states(load, job.states, store)
        return None

    def _receive(
        self,
        load: Load,
        namespace: NamespaceLike,
        refs: Sequence[ChunkRef],
        write: Write,
        placed: Placed = lambda count: None,
    ) -> int:
        """Have leading chunks received by DMA; how many are in the pages and checked."""
        if self._direct is None or not isinstance(namespace, Namespace):
            return 0
        self._rests()  # nothing in it waits for the store
        done = self._direct.load(namespace, refs, write, placed)
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
        with load.pages_lock:
            if load.barred:
                return 0
            try:
                self._rank.write_states(job.blocks, rows[0], load.after)
            finally:
                load.enqueued = buffers.enqueued()
        return None

    def _read(
        self,
        load: Load,
        namespace: NamespaceLike,
        refs: list[ChunkRef],
        buffers: Buffers,
        source: Rank | StatePages,
    ) -> tuple[torch.Tensor, list[int]]:
        """Chunks from the store, checked, a row for each; and the tier each came from, or MISS."""
        rows = buffers.take(len(refs))
        outs = [memoryview(row.numpy()) for row in rows]
        progressed = partial(self._progressed, load.job.stall_s)
        progressed()
        tiers = namespace.get(refs, outs, source.roi, progressed)
        self._rests()
        return rows, tiers

    def _load_pieces(self, load: Load, blend: BlendJob, namespace: NamespaceLike) -> int | None:
        """Put what is reused from elsewhere in place; one that is gone or damaged is no failure."""
        engine, per_chunk = self._rank.engine, self._rank.layout.chunk_tokens
        buffers = self._buffers
        if engine is None:  # this rank cannot blend: all ranks give it up
            return len(load.job.refs)
        wanted = [piece.ref for piece in blend.pieces]
        placing = Placing(engine, blend.pieces, blend.blocks, per_chunk)
        write = partial(load.write_received_pieces, self._rank, placing)
        buffers.drain()  # what is exact is in the pages before any piece is said to be

        def placed(count: int) -> None:
            if count < len(blend.pieces) and not load.failed_pieces:  # else the end says so
                load.placed = blend.pieces[count].start
                self._further()

        done = self._receive(load, namespace, wanted, write, placed)
        if load.barred:
            return 0
        written: deque[tuple[torch.cuda.Event | None, int]] = deque()
        for at in range(done, len(blend.pieces), buffers.chunks):
            part = slice(at, at + buffers.chunks)
            rows, tiers = self._read(load, namespace, wanted[part], buffers, self._rank)
            there = [number for number, tier in enumerate(tiers) if tier != MISS]
            gone = (at + number for number, tier in enumerate(tiers) if tier == MISS)
            load.failed_pieces.update(gone)
            for number in there:
                load.tiers[tiers[number]] += self._rank.unit_bytes
            good = rows if len(there) == len(rows) else rows[there]
            chosen = [blend.pieces[at + number] for number in there]
            placing = Placing(engine, chosen, blend.blocks, per_chunk)
            if not load.write_pieces(self._rank, placing, 0, good, buffers.enqueued):
                return 0
            written.append((load.enqueued, at + len(rows)))
            while written and (written[0][0] is None or written[0][0].query()):
                placed(written.popleft()[1])
        return None
