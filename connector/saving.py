"""Saving: the step that completes a chunk copies it out of the pages; a thread stores it. So it is
with the states at a chunk's end (`states`).

The copy is made before the step ends, on CUDA enqueued on the compute stream, where later steps
come after it; loads wait for it by an event (`Rank.mark`). So pages may be freed, reused or
preempted at any time after. It goes to the staging ring on the same device. From there the thread
has it rounded, if it is to be, then hashed and sent to its slot of the memory tier by DMA
(`direct_save`), on a stream of its own; for any other store it goes by way of the host. The engine
never waits for the store: chunks for which the ring has no room are dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from connector.direct_save import direct_save_for
from connector.handle import StoreHandle
from connector.messages import SaveJob
from connector.rank import Rank
from connector.registered import RegisteredSlots
from connector.staging import StagingRing
from connector.states import StatePages
from connector.tally import Tally
from prefixstore.client.about import about
from prefixstore.config import MIB
from prefixstore.errors import StoreError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.namespace import Namespace
from prefixstore.putting import PutState, labels_for

logger = logging.getLogger("vllm.prefixstore")

QUEUE_MAX = 4096
SAVE_BYTES = 256 * MIB
HOST_BYTES = 64 * MIB  # copied to host memory at once
STATES_STAGED = 8


@dataclass
class _Saving:
    """A save job whose bytes are in the ring (on CUDA: once ``gathered`` has happened)."""

    job: SaveJob
    source: Rank | StatePages
    ring: StagingRing
    parts: list[torch.Tensor]
    gathered: torch.cuda.Event | None = None
    failed: str = ""  # why nothing was copied


class Saver:
    """See the module docstring. ``save`` comes from the engine's thread."""

    def __init__(
        self,
        rank: Rank,
        handle: StoreHandle,
        counts: Tally,
        staging_bytes: int,
        slots: RegisteredSlots,
    ) -> None:
        self._rank, self._handle, self._counts = rank, handle, counts
        self._direct = direct_save_for(rank, slots)
        self._ring = self._make_ring(rank.staged_bytes, staging_bytes)
        self._state_ring: StagingRing | None = None
        if rank.states is not None:
            size = rank.states.staged_bytes
            self._state_ring = self._make_ring(size, STATES_STAGED * size)
        self._complained = ""
        self.seconds: list[float] = []
        self._queue: queue.Queue[_Saving | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._run, name="prefixstore-save", daemon=True)
        self._thread.start()

    def save(self, jobs: list[SaveJob]) -> None:
        """Copy chunks that are complete to the staging ring; the thread stores them later."""
        for job in self._parts(jobs):
            source: Rank | StatePages = self._rank
            ring = self._ring
            if job.of_states:
                if self._rank.states is None or self._state_ring is None:
                    continue
                source, ring = self._rank.states, self._state_ring
            elif not self._rank.saves:
                continue
            parts = ring.take(len(job.refs))
            dropped = len(job.refs) - sum(len(part) for part in parts)
            self._counts.add("save_dropped_chunks", dropped * self._rank.leads)
            if not parts:
                continue
            saving = _Saving(job, source, ring, parts)
            try:
                at = 0
                for part in parts:
                    blocks = job.blocks[at : at + len(part)]
                    source.read_pages(blocks, part)
                    at += len(part)
            except (OSError, RuntimeError, ValueError) as error:  # say, no device memory for it
                saving.failed = str(error)
            saving.gathered = self._rank.mark()
            self._queue.put(saving)  # cannot block: the rings are smaller than the queue

    def _parts(self, jobs: Sequence[SaveJob]) -> Iterator[SaveJob]:
        """So large that each is worth its transactions, and small enough that the ring has room
        again before the next step is done."""
        size = max(1, SAVE_BYTES // self._rank.staged_bytes)
        for job in together(jobs):
            for at in range(0, len(job.refs), size):
                part = slice(at, at + size)
                yield replace(job, refs=job.refs[part], blocks=job.blocks[part])

    def _make_ring(self, unit_bytes: int, staging_bytes: int) -> StagingRing:
        """One without room if there is no memory for it. Made now, not in a step: vLLM may capture
        CUDA graphs soon, and what another thread asks of CUDA meanwhile ends that."""
        units = max(1, min(staging_bytes // unit_bytes, QUEUE_MAX // 2 - 1))
        try:
            return StagingRing(unit_bytes, units, self._rank.device)
        except RuntimeError as error:
            logger.warning("prefixstore: nothing will be saved: no staging memory: %s", error)
            return StagingRing(unit_bytes, 0, self._rank.device)

    def _run(self) -> None:
        while (saving := self._queue.get()) is not None:
            began = time.monotonic()
            try:
                with self._rank.own_stream(), about(saving.job.req_id):
                    self._store(saving)
            except Exception as error:  # thread loop: a chunk not saved is a later miss
                self._counts.add("save_errors")
                if str(error) != self._complained:  # once for one trouble, however long it lasts
                    logger.warning("prefixstore: chunks not saved: %s", error)
                    self._complained = str(error)
            finally:
                saving.ring.give_back(saving.parts)
            self.seconds.append(time.monotonic() - began)

    def _store(self, saving: _Saving) -> None:
        if saving.failed:
            raise StoreError(saving.failed)
        if saving.gathered is not None:
            # This thread waits, not its stream: behind the wait a copy to the host's own memory
            # would hold up what the engine's thread launches, as long as the step takes.
            saving.gathered.synchronize()
        store, job, leads = self._handle.get(), saving.job, self._rank.leads
        source, count = saving.source, sum(len(part) for part in saving.parts)
        if store is None:
            self._counts.add("save_dropped_chunks", count * leads)
            return
        namespace = source.namespaces.get(store, job.namespace)
        refs = job.refs[:count]
        if self._direct is not None and source is self._rank and isinstance(namespace, Namespace):
            parts = [source.as_stored(part) for part in saving.parts]
            copy = self._direct.copy(namespace.store, parts)
            labels = labels_for(job.ttl_s, job.tag, job.pin, job.alone)
            states = namespace.put_by(refs, copy, source.roi, labels, self._rank.group, wait=False)
        else:
            states = self._by_host(saving, namespace, refs)
        stored = sum(state in (PutState.STORED, PutState.PARTIAL) for state in states)
        refused = sum(state in (PutState.FULL, PutState.QUOTA, PutState.LOST) for state in states)
        self._counts.add("bytes_saved", stored * source.unit_bytes)
        self._counts.add("states_saved" if job.of_states else "chunks_saved", stored * leads)
        self._counts.add("save_refused_chunks", refused * leads)

    def _by_host(
        self, saving: _Saving, namespace: NamespaceLike, refs: Sequence[ChunkRef]
    ) -> list[PutState]:
        job, source = saving.job, saving.source
        states: list[PutState] = []
        for part in saving.parts:
            for rows in part.split(max(1, HOST_BYTES // source.staged_bytes)):
                there = source.as_stored(rows).cpu()
                states += namespace.put(
                    refs[len(states) : len(states) + len(rows)],
                    [memoryview(row.numpy()) for row in there],
                    roi=source.roi, group=self._rank.group, ttl_s=job.ttl_s, tag=job.tag,
                    pin=job.pin, alone=job.alone, wait=False,
                )  # fmt: skip
        return states

    def close(self, end: float) -> None:
        """Store what is staged and end the thread, by ``end`` (monotonic)."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(max(0.0, end - time.monotonic()))


def together(jobs: Sequence[SaveJob]) -> list[SaveJob]:
    """As few jobs as will do: a step in which 64 requests complete a chunk then has one copy and
    two transactions, not 64 and 128. A job that is several says the first one's request."""
    alike: dict[object, list[SaveJob]] = {}
    for job in jobs:
        labels = job.namespace, job.of_states, job.ttl_s, job.tag, job.pin, job.alone
        alike.setdefault(labels, []).append(job)
    return [
        replace(
            some[0],
            refs=[ref for job in some for ref in job.refs],
            blocks=[row for job in some for row in job.blocks],
        )
        for some in alike.values()
    ]
