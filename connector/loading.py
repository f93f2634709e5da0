"""Loading: chunks from the store into the pages vLLM has set aside for a request.

Threads read chunks into buffers of their own, have them checked by the store or by the GPU
(`device_check`), and only then write them to the pages; or have the GPU read, place and check them
(`direct`, `device_tier`). A load that is given up (stall) has its pages barred first, under a lock,
so a late thread cannot write into what has become somebody else's. Any failure is a failed load,
reported by block, which vLLM recomputes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

from connector.bandwidth import Bandwidth
from connector.device_tier import DeviceTier
from connector.direct import FIRST_BYTES
from connector.handle import StoreHandle
from connector.load import Load
from connector.load_work import LoadWork
from connector.messages import BlendJob, BlendLoaded, LoadJob, RowsJob, SplitJob
from connector.rank import Rank
from connector.registered import RegisteredSlots
from connector.tally import Tally
from prefixstore.client.about import about
from prefixstore.ledger import MEMORY

logger = logging.getLogger("vllm.prefixstore")

IDLE_WAIT_S = 0.005
PAGES_WAIT_S = 0.02
# Between two words of how far a load has come: with an engine that does nothing else each is a step
# of its scheduler, whose interpreter the loading thread needs too.
FURTHER_S = 0.01
QUEUE_MAX = 4096
EARLY_S, EARLY_SHARE = 0.001, 12  # the first three times as many arrive before a load waits


class Loader:
    """See the module docstring. Engine calls come from one thread."""

    def __init__(
        self,
        rank: Rank,
        handle: StoreHandle,
        counts: Tally,
        threads: int,
        slots: RegisteredSlots,
        tier: DeviceTier | None = None,
    ) -> None:
        self._rank, self._handle, self._counts = rank, handle, counts
        self._lock = threading.Condition()
        self._loads: dict[str, Load] = {}
        self._ended: dict[str, Load] = {}
        self._invalid: set[int] = set()
        self._failed: set[str] = set()
        self._cut: set[str] = set()
        self._for_blends: dict[str, Load] = {}
        self._reading: dict[int, tuple[float, float]] = {}  # thread: last progress, stall_s
        self._stuck: set[int] = set()  # threads whose load was given up and that are not back
        self.stalled = False
        self.bandwidth = Bandwidth()
        self.seconds: list[float] = []
        self._queue: queue.Queue[Load | None] = queue.Queue(QUEUE_MAX)
        self._threads = []
        for _ in range(threads):
            work = LoadWork(rank, slots, tier, self._progressed, self._rests, self._wake)
            thread = threading.Thread(
                target=self._run, args=(work,), name="prefixstore-load", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def start(self, jobs: list[LoadJob]) -> None:
        """Queue loads."""
        for job in jobs:
            load = Load(job, after=self._rank.mark())
            with self._lock:
                self._loads[job.req_id] = load
            cannot = isinstance(job.blend, SplitJob) and self._rank.engine is None
            if cannot or len(self._stuck) == len(self._threads):
                self._end(load, failed_from=0)  # nobody is there to compute or load it
                continue
            try:
                self._queue.put_nowait(load)
            except queue.Full:
                self._end(load, failed_from=0)

    def _run(self, work: LoadWork) -> None:
        while (load := self._queue.get()) is not None:
            began = time.monotonic()
            try:
                with self._rank.own_stream(), about(load.job.req_id):
                    try:
                        store = self._handle.get()
                        self._progressed(load.job.stall_s)
                        failed = 0 if store is None else work.run(load, store)
                    finally:
                        work.drain()
            except Exception as error:  # thread loop: a failed load is recomputed, never fatal
                logger.warning("prefixstore: load of %s failed: %s", load.job.req_id, error)
                failed = 0
            finally:
                with self._lock:
                    self._reading.pop(threading.get_ident(), None)
                    self._stuck.discard(threading.get_ident())
            seconds = time.monotonic() - began
            self.seconds.append(seconds)
            if failed is None or load.slow is not None:
                self._handle.answered()
            for tier, num_bytes in load.tiers.items():
                self._counts.add(f"bytes_loaded_{tier}", num_bytes)
            if load.slow is not None:
                tier, chunks_per_s = load.slow
                self.bandwidth.saw_slow(tier, chunks_per_s * self._rank.layout.payload_bytes)
            elif len(load.tiers) == 1 and not isinstance(load.job.blend, BlendJob):
                # What this rank loads is its share of the chunk: the tier serves all at once.
                share = self._rank.unit_bytes / self._rank.layout.payload_bytes
                tier, num_bytes = load.tiers.popitem()
                # A split reads the memory tier by way of the host, other loads need not; and what
                # arrived while it waited for the engine says nothing where that was much of it.
                early = load.waited_s > EARLY_S and num_bytes < EARLY_SHARE * FIRST_BYTES
                if tier != MEMORY or not (early or load.job.blend is not None):
                    self.bandwidth.saw(tier, num_bytes / share, seconds - load.waited_s)
            self._end(load, failed)

    def _progressed(self, stall_s: float) -> None:
        """The store gives chunks. Only its time counts as a stall, not that of the pages."""
        if threading.get_ident() not in self._stuck:
            self._reading[threading.get_ident()] = (time.monotonic(), stall_s)

    def _rests(self) -> None:
        self._reading.pop(threading.get_ident(), None)

    def _wake(self) -> None:
        if self._further():
            with self._lock:
                self._lock.notify_all()

    def _end(self, load: Load, failed_from: int | None) -> None:
        with self._lock:
            if self._loads.get(load.job.req_id) is not load:
                return  # it was given up
            load.failed_from = failed_from
            del self._loads[load.job.req_id]
            if not load.stopped:
                self._ended[load.job.req_id] = load
            self._lock.notify_all()

    def finished(self, idle: bool) -> set[str]:
        """Requests whose load has ended, well or not, since the last call."""
        self._failed = set()  # older vLLMs do not ask for them
        # Of one that is barred nothing wakes who waits: it is asked when it is written.
        if idle and self._loads and not any(load.barred for load in list(self._loads.values())):
            with self._lock:
                self._lock.wait_for(lambda: self._ended or self._further(), IDLE_WAIT_S)
        now = time.monotonic()
        if any(now - at > stall_s for at, stall_s in list(self._reading.values())):
            self._give_up()
        for load in list(self._loads.values()):
            if load.barred and load.is_written():
                self._end(load, failed_from=0)
        with self._lock:
            ended, self._ended = self._ended, {}
        for req_id, load in list(ended.items()):
            if load.job.blend is not None:
                self._for_blends[req_id] = ended.pop(req_id)
            if load.failed_from is not None:
                if not isinstance(load.job.blend, SplitJob):  # what it lacks is computed
                    self._failed.add(req_id)
                    self._invalid.update(load.job.blocks_from(load.failed_from))
                if load.slow is not None:
                    self._cut.add(req_id)
                name = "loads_failed" if load.slow is None else "loads_cut"
                self._counts.add(name, self._rank.leads)
        return set(ended)

    def _further(self) -> list[Load]:
        """Loads under way that have come further, and of which nothing was told for a while."""
        before = time.monotonic() - FURTHER_S
        loads = list(self._loads.values())
        return [one for one in loads if one.is_news(before)]

    def take_placed(self) -> dict[str, tuple[RowsJob, int]]:
        """Blends that have come further since the last call, and how far."""
        with self._lock:
            further = self._further()
            further += [load for load in self._ended.values() if load.placed != load.told]
        further += [load for load in self._for_blends.values() if load.placed != load.told]
        for load in further:
            load.told, load.told_at = load.placed, time.monotonic()
        return {
            load.job.req_id: (load.job.blend, load.told)
            for load in further
            if load.job.blend is not None
        }

    def take_for_blends(self) -> dict[str, tuple[RowsJob, BlendLoaded]]:
        """Loads that a blend goes on from, ended since the last call."""
        taken, self._for_blends = self._for_blends, {}
        told: dict[str, tuple[RowsJob, BlendLoaded]] = {}
        for req_id, load in taken.items():
            if load.job.blend is None:
                continue
            aborted = load.failed_from is not None
            if isinstance(load.job.blend, SplitJob):  # what was not loaded is computed
                aborted = self._rank.engine is None
            loaded = BlendLoaded(1, frozenset(load.failed_pieces), aborted)
            told[req_id] = load.job.blend, loaded
        return told

    def awaits(self, req_id: str, position: int) -> None:
        """A blend can go on when all before that position is in the pages: tell no sooner. 0: it
        can go on now, or that is not known."""
        load = self._loads.get(req_id)
        if load is not None:
            load.awaited = position

    def reached(self, req_id: str, position: int) -> None:
        """A split has computed what is before that position, or does so now: load no more of it.
        What is being loaded just then may be written to the same pages: it was checked, so each
        number is right, whichever of the two is last."""
        load = self._loads.get(req_id)
        if load is not None:
            load.reached = position

    def stop(self, req_id: str) -> bool:
        """Write nothing more to a request's pages, and tell nothing more of it; False: they are
        being written just now, so ask again."""
        load = self._loads.get(req_id)
        if load is not None:
            load.stopped = True
            self._bar(load)
            if not (load.barred and load.is_written()):
                return False
        with self._lock:
            self._loads.pop(req_id, None)
            self._ended.pop(req_id, None)
        self._for_blends.pop(req_id, None)
        return True

    def _bar(self, load: Load) -> None:
        """Have nothing more sent to its pages; unless something is just now, for long: then it
        has its chunks and ends by itself."""
        if load.pages_lock.acquire(timeout=PAGES_WAIT_S):
            load.barred = True
            load.pages_lock.release()

    def _give_up(self) -> None:
        """No chunk arrived for too long: all loads end as failed, when their pages have what they
        were sent, and the store is left alone."""
        for load in list(self._loads.values()):
            self._bar(load)
        now = time.monotonic()
        with self._lock:
            for thread, (at, stall_s) in list(self._reading.items()):
                if now - at > stall_s:
                    self._stuck.add(thread)
                    self._reading.pop(thread, None)
        self.stalled = True
        self._counts.add("loads_stalled", self._rank.leads)
        self._handle.stalled("a load")

    def failed_requests(self) -> set[str]:
        """Of what `finished` told last, those whose load failed, or a part of it."""
        return self._failed

    def take_cut(self) -> frozenset[str]:
        """Of those, the ones that were ended because computing is faster, since the last call."""
        cut, self._cut = frozenset(self._cut), set()
        return cut

    def failed_blocks(self) -> set[int]:
        """Blocks whose load failed, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self, end: float) -> None:
        """End the threads by ``end`` (monotonic)."""
        for _ in self._threads:
            with suppress(queue.Full):  # then a thread is stuck, and ends with the process
                self._queue.put_nowait(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
