"""Loading: chunks from the store into the pages vLLM has set aside for a request.

Threads read chunks into a buffer of their own, where the store has checked them, and only then
write them to the pages. A load that is given up (stall) has its pages barred first, under a lock,
so a late thread cannot write into what has become somebody else's. Any failure is a failed load,
reported by block, which vLLM recomputes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from connector.handle import StoreHandle
from connector.messages import LoadJob
from connector.rank import Rank
from prefixstore.config import MIB
from prefixstore.namespace import MISS

logger = logging.getLogger("vllm.prefixstore")

IDLE_WAIT_S = 0.005
LOAD_BUFFER_BYTES = 32 * MIB
BATCH_CHUNKS_MAX = 64
QUEUE_MAX = 4096
MEASURED_BYTES_MIN = MIB  # a smaller load measures overhead


@dataclass
class _Load:
    """A load under way. Unless ``barred`` its pages may be written, under ``pages_lock``."""

    job: LoadJob
    failed_from: int | None = None
    barred: bool = False
    pages_lock: threading.Lock = field(default_factory=threading.Lock)
    tiers: Counter[int] = field(default_factory=Counter)


class Loader:
    """See the module docstring. Engine calls come from one thread; ``stall_s`` bounds a stall."""

    def __init__(
        self, rank: Rank, handle: StoreHandle, counts: Counter[str], stall_s: float, threads: int
    ) -> None:
        self._rank, self._handle, self._counts, self._stall_s = rank, handle, counts, stall_s
        self._lock = threading.Condition()
        self._loads: dict[str, _Load] = {}
        self._ended: dict[str, _Load] = {}
        self._invalid: set[int] = set()
        self._progress_at = time.monotonic()
        self.stalled = False
        self.bandwidth: dict[int, float] = {}
        self._warm: set[int] = set()
        self.seconds: list[float] = []
        self._queue: queue.Queue[_Load | None] = queue.Queue(QUEUE_MAX)
        self._threads = [
            threading.Thread(target=self._run, name="prefixstore-load", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, jobs: list[LoadJob]) -> None:
        """Queue loads."""
        for job in jobs:
            load = _Load(job)
            with self._lock:
                if not self._loads:
                    self._progress_at = time.monotonic()
                self._loads[job.req_id] = load
            try:
                self._queue.put_nowait(load)
            except queue.Full:
                self._end(load, failed_from=0)

    def _run(self) -> None:
        rank = self._rank
        chunks = max(1, min(LOAD_BUFFER_BYTES // rank.unit_bytes, BATCH_CHUNKS_MAX))
        pinned = rank.device.type == "cuda"
        buffer = torch.empty((chunks, rank.unit_bytes), dtype=torch.uint8, pin_memory=pinned)
        while (load := self._queue.get()) is not None:
            began = time.monotonic()
            try:
                failed = self._load(load, buffer)
            except Exception as error:  # thread loop: a failed load is recomputed, never fatal
                logger.warning("prefixstore: load of %s failed: %s", load.job.req_id, error)
                failed = 0
            seconds = time.monotonic() - began
            self.seconds.append(seconds)
            for tier, num_bytes in load.tiers.items():
                self._counts[f"bytes_loaded_{tier}"] += num_bytes
            if len(load.tiers) == 1:
                self._measured(*load.tiers.popitem(), seconds)
            self._end(load, failed)

    def _measured(self, tier: int, num_bytes: int, seconds: float) -> None:
        """Note a tier's speed. Its first load pays for page faults and allocations: left out."""
        if num_bytes >= MEASURED_BYTES_MIN and tier in self._warm:
            # What this rank loads is its share of the chunk: the tier serves all ranks at once.
            share = self._rank.unit_bytes / self._rank.layout.payload_bytes
            self.bandwidth[tier] = num_bytes / share / max(seconds, 1e-6)
        self._warm.add(tier)

    def take_bandwidth(self) -> dict[int, float]:
        """Bytes a second by tier, measured since the last call."""
        taken, self.bandwidth = self.bandwidth, {}
        return taken

    def _load(self, load: _Load, buffer: torch.Tensor) -> int | None:
        """Read, check, write to pages; returns the first chunk that failed, None for none."""
        job, store = load.job, self._handle.get()
        if store is None:
            return 0
        namespace = self._rank.namespace(store, job.namespace)
        step = len(buffer)
        for at in range(0, len(job.refs), step):
            refs = job.refs[at : at + step]
            rows = buffer[: len(refs)]
            outs = [memoryview(row.numpy()) for row in rows]
            tiers = namespace.get(refs, outs, self._rank.roi, self._progressed)
            good = tiers.index(MISS) if MISS in tiers else len(tiers)
            for tier in tiers[:good]:
                load.tiers[tier] += self._rank.unit_bytes
            with load.pages_lock:
                if load.barred:
                    return at
                skip = job.skip_blocks if at == 0 else 0
                self._rank.write_pages(job.blocks[at : at + good], skip, rows[:good])
            if good < len(refs):
                return at + good
        return None

    def _progressed(self) -> None:
        self._progress_at = time.monotonic()

    def _end(self, load: _Load, failed_from: int | None) -> None:
        with self._lock:
            if self._loads.get(load.job.req_id) is not load:
                return  # it was given up
            load.failed_from = failed_from
            del self._loads[load.job.req_id]
            self._ended[load.job.req_id] = load
            self._lock.notify_all()

    def finished(self, idle: bool) -> set[str]:
        """Requests whose load has ended, well or not, since the last call."""
        if idle and self._loads:
            with self._lock:
                self._lock.wait_for(lambda: self._ended, IDLE_WAIT_S)
        if self._loads and time.monotonic() - self._progress_at > self._stall_s:
            self._give_up()
        with self._lock:
            ended, self._ended = self._ended, {}
        for load in ended.values():
            if load.failed_from is not None:
                job = load.job
                for index in range(load.failed_from, len(job.refs)):
                    skip = job.skip_blocks if index == 0 else 0
                    self._invalid.update(job.blocks[index][skip:])
                self._counts["loads_failed"] += 1
        return set(ended)

    def _give_up(self) -> None:
        """No chunk arrived for too long: end all loads as failed and leave the store alone."""
        with self._lock:
            given_up, self._loads = self._loads, {}
            self._ended.update(given_up)
        for load in given_up.values():
            with load.pages_lock:  # held by a writer for milliseconds: it only copies memory
                load.barred, load.failed_from = True, 0
        self.stalled = True
        self._counts["loads_stalled"] += 1
        self._handle.stalled("a load")

    def failed_blocks(self) -> set[int]:
        """Blocks whose load failed, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self, end: float) -> None:
        """End the threads by ``end`` (monotonic)."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
