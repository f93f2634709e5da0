"""The keeper: the one background thread of a process that has a store open.

It spills new chunks to disk, promotes chunks read from disk, and once a second keeps house: records
hits in the eviction order, reaps what dead processes left, drops expired chunks, evicts ahead of
need, takes over chunks a dead process had not yet spilled. Nothing a request waits for runs here;
its queue is bounded and losing a job costs a hit, never a wrong one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from prefixstore import config
from prefixstore.errors import StoreClosedError, StoreTimeoutError
from prefixstore.given_up import GivenUp
from prefixstore.healing import Suspects
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY
from prefixstore.promote import promote
from prefixstore.recovery import adopt_dirty
from prefixstore.retiring import sweep
from prefixstore.room import make_room
from prefixstore.rows import NAMESPACE, Row

if TYPE_CHECKING:
    from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
T = TypeVar("T")
Job = Callable[[], Any]
_SPILL_KEYS = 1024  # looked at in one spill
_FAILURES_MAX = 3  # spills that fail in a row, before their chunks are given up


class Keeper:
    """Runs jobs in order; see the module docstring."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs: queue.Queue[tuple[Job, Future[Any]] | None] = queue.Queue(config.JOBS_MAX)
        self._spill: deque[bytes] = deque(maxlen=config.JOBS_MAX)
        self._promote: deque[bytes] = deque(maxlen=config.JOBS_MAX)
        self._retried: set[bytes] = set()
        self._failures = 0
        self.given_up = GivenUp()
        self._read_at = 0.0
        self._touched: deque[tuple[int, bytes]] = deque(maxlen=config.JOBS_MAX)
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._stopping = False
        self.suspects = Suspects(store)

    def start(self) -> None:
        """Begin; the store must be complete."""
        self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """Finish what is queued, as far as the deadline allows; whether the thread has ended."""
        self._stopping = True
        with suppress(queue.Full):
            self._jobs.put(None, timeout=deadline_s)
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------- from any thread
    def count(self, name: str, by: int = 1) -> None:
        """Add to a statistic of the store; written to the index within a second."""
        with self._counts_lock:
            self._counts[name] += by

    def touched(self, tier: int, key: bytes) -> None:
        """Note a hit."""
        self._touched.append((tier, key))
        self._read_at = time.monotonic()

    def spill(self, keys: list[bytes]) -> None:
        """Have chunks of the memory tier written to disk."""
        self._spill.extend(keys)
        self._wake()

    def promote(self, key: bytes) -> None:
        """Have a chunk read from disk copied to memory, once nobody is reading any more."""
        self._promote.append(key)

    def forget_promotions(self) -> None:
        """Drop what waits to be promoted."""
        self._promote.clear()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run a job on this thread. Raises StoreClosedError, StoreTimeoutError (queue full)."""
        future: Future[T] = Future()
        if self._stopping:
            raise StoreClosedError("the store is closing")
        try:
            self._jobs.put_nowait((job, future))
        except queue.Full:
            self.count("jobs_dropped")
            raise StoreTimeoutError(
                f"{config.JOBS_MAX} jobs already wait for {self._store.folder}",
                "the disk is slow or stalled; try again",
            ) from None
        return future

    def _wake(self) -> None:
        if self._jobs.empty() and not self._stopping:
            self.submit(lambda: None)  # empty, so not full

    # ------------------------------------------------------------- the thread
    def _run(self) -> None:
        next_round = time.monotonic()
        while True:
            wait_s = next_round - time.monotonic()
            if self._promote:
                wait_s = min(wait_s, config.QUIET_S)
            try:
                item = self._jobs.get(timeout=max(0.0, wait_s))
            except queue.Empty:
                item = (partial(self._idle, next_round), Future())
            if time.monotonic() >= next_round:
                self._round()
                next_round = time.monotonic() + config.KEEPER_PERIOD_S
            self._guard(self._spill_some)
            self._guard(self.suspects.look_into)
            if item is None:
                while self._spill and not self._store.gone and self._guard(self._spill_some):
                    pass
                self._guard(self._flush_notes)
                return
            job, future = item
            if future.set_running_or_notify_cancel():
                self._guard(job, future)

    def _idle(self, until: float) -> None:
        """Promotions yield to reads: on a busy machine they would slow the request they serve."""
        while self._promote and self._jobs.empty() and time.monotonic() < until:
            if time.monotonic() - self._read_at < config.QUIET_S:
                return
            promote(self._store, self._promote.popleft())

    def _guard(self, job: Job, future: Future[Any] | None = None) -> bool:
        try:
            result = job()
        except Exception as error:  # thread loop: one failed job must not end the keeper
            self.count("keeper_errors")
            if future is not None:
                future.set_exception(error)
            else:
                logger.warning("housekeeping of %s: %s", self._store.folder, error, exc_info=error)
            return False
        if future is not None:
            future.set_result(result)
        return True

    def drain_spill(self, deadline: float) -> bool:
        """Job: spill until nothing is left (True) or the time (monotonic) is over."""
        while True:
            if not self._spill:
                self._spill.extend(self._adopt_dirty())
            if not self._spill:
                return True
            if time.monotonic() > deadline or self._store.gone:
                return False
            self._spill_some()

    def _spill_some(self) -> None:
        if not self._spill or self._store.gone:
            return
        batch = [self._spill.popleft() for _ in range(min(len(self._spill), _SPILL_KEYS))]
        try:
            done = self._store.disk.spill(batch)
        except Exception:  # thread loop: the guard logs it; here only the keys are looked after
            self._failures += 1
            if self._failures >= _FAILURES_MAX and not self._look_for_it():
                self._give_up(batch)
            raise  # else they are still dirty and ours: the next round takes them up again
        self._failures = 0
        self.count("chunks_spilled", len(done.durable))
        again = set(done.failed) - self._retried if done.retry else set()
        self._retried = again  # each is tried twice: what else takes the room may keep taking it
        lost = [key for key in (*done.failed, *done.refused) if key not in again]
        if lost:
            self._give_up(lost)
        handled = {*done.durable, *lost}
        rest = [key for key in batch if key not in handled]
        if not done.durable and not done.failed:
            rest = self._make_room(rest)
        self._spill.extendleft(reversed(rest))

    def _give_up(self, keys: list[bytes]) -> None:
        """These stay in memory only, where they may be evicted."""
        live, mark = self._store.live, self._store.ledger.mark

        def clean(txn: Txn) -> list[bytes]:
            ours = [key for key in keys if txn.get("dirty", key) == mark]
            for key in ours:
                txn.delete("dirty", key)
            return ours

        names: dict[bytes, bytes] = {}
        lost = keys  # if the write does not say: it may be made when nobody waits any more
        try:
            with live.read() as txn:
                names = {key: row[NAMESPACE] for key in keys if (row := txn.get("chunk", key))}
            lost = live.write(clean)
        finally:
            self.given_up.add(names[key] for key in lost if key in names)
            self.count("spill_failed", len(lost))

    def _make_room(self, keys: list[bytes]) -> list[bytes]:
        """Nothing could be claimed: evict for what is still dirty; give up what finds no room."""
        store = self._store
        with store.live.read() as txn:
            dirty = [key for key in keys if txn.get("dirty", key) == store.ledger.mark]
            rows = [(key, Row.unpack(data)) for key in dirty if (data := txn.get("chunk", key))]
        if not rows:
            return []
        # Of one namespace at a time: who has a quota makes no room among others' chunks.
        ours = [(key, row) for key, row in rows if row.namespace == rows[0][1].namespace]
        need = min(sum(row.slot_bytes for _, row in ours), config.SPILL_BATCH_BYTES)
        yielding = store.quotas.of(DISK).yielding(ours[0][1].namespace)
        if store.disk.evict(need, yielding) > 0:
            return dirty
        given_up = [key for key, _ in ours]
        self._give_up(given_up)
        return [key for key in dirty if key not in set(given_up)]

    def _round(self) -> None:
        """Once a second. One step that fails does not stop the others."""
        if self._look_for_it():
            return
        for step in (
            self._flush_notes,
            self._store.reap,
            self._expire,
            self._store.names.refresh,
            partial(sweep, self._store),
            partial(make_room, self._store),
            partial(self._store.ledger.places.walk, self._store.ledger, self._store.live),
            self._take_up_dirty,
            self._store.live.check_readers,
            self._store.index.check_readers,
        ):
            self._guard(step)

    def _look_for_it(self) -> bool:
        """Whether the store is lost: of no use until it is opened again."""
        store = self._store
        store.lost = store.index.lost()
        if not store.lost and store.live.lost():
            store.lost = "has lost its memory tier, which was removed or had an error"
        return store.gone

    def _take_up_dirty(self) -> None:
        self._spill.extend(self._adopt_dirty())

    def _adopt_dirty(self) -> list[bytes]:
        """Chunks to spill whose writer has ended, and with an empty queue also those of our own
        that an error has left: somebody must finish."""
        store, own = self._store, not self._spill
        return store.live.write(lambda txn: adopt_dirty(store, txn, own))

    def _flush_notes(self) -> None:
        touched = [self._touched.popleft() for _ in range(len(self._touched))]
        with self._counts_lock:
            counts, self._counts = self._counts, Counter()
        if not touched and not counts:
            return

        def note(txn: Txn) -> None:
            for tier in (MEMORY, DISK):
                keys = dict.fromkeys(key for of, key in touched if of == tier)
                self._store.ledger.touch(txn, tier, keys)
            for name, by in counts.items():
                txn.add_int("counter", name.encode(), by)

        self._store.live.write(note)

    def _expire(self) -> None:
        store, now = self._store, int(time.time())
        due: dict[int, list[bytes]] = {MEMORY: [], DISK: []}
        with store.live.read() as txn:
            for name, _ in islice(txn.scan("expiry"), config.SWEEP_ROWS_MAX):
                if int.from_bytes(name[:4], "big") > now:
                    break
                due[name[4]].append(name[5:])

        def drop(txn: Txn) -> None:
            for key in due[MEMORY]:  # its time may be another by now
                entry = store.ledger.entry(txn, MEMORY, key)
                if entry is not None and 0 < entry.expires_s <= now:
                    store.ledger.drop_memory(txn, key)

        if due[MEMORY]:
            store.live.write(drop)
        if due[DISK]:
            store.disk.expire(due[DISK], now)
        self.count("chunks_expired", len(set(due[MEMORY]) | set(due[DISK])))
