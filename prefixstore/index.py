"""The index: LMDB environments, read without locks and written by one lane a process.

Nobody but this module and its parts imports lmdb. A store has two environments of this kind:

- ``index`` on disk, durable: one row a chunk of the disk tier. Each commit is an fsync.
- ``live`` beside the memory tier (tmpfs): rows of the memory tier, free slots, leases, recency.
  All of it is meaningless after a reboot and rebuilt from the first; commits cost 13 us instead
  of 650 us because nothing is synced. It survives the death of any process all the same.

What must hold: a process opens an environment once and never carries it over a fork (LMDB's rule);
read transactions are short; every write goes through the lane, so a foreign holder of the writer
lock stalls the lane's thread, never a caller beyond its deadline. A crash at any point leaves the
last committed state: LMDB's own guarantee (copy on write, robust writer mutex).
"""

from __future__ import annotations

import queue
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from prefixstore import config
from prefixstore.errors import DamagedError, StoreClosedError, StoreTimeoutError
from prefixstore.index_check import Damaged, check_pages
from prefixstore.index_errors import not_opened, translate, translated
from prefixstore.index_files import make_whole, open_env
from prefixstore.txn import Reads
from prefixstore.txn import Txn as Txn

T = TypeVar("T")
REPLACED = "was removed or replaced while open"


class Environment:
    """One LMDB environment with its writer lane. Thread-safe. Close it before the process ends."""

    def __init__(
        self,
        folder: Path,
        tables: tuple[str, ...],
        *,
        durable: bool,
        walk: bool = True,
        damaged: Callable[[], None] = lambda: None,
    ) -> None:
        """``walk``: nobody else has it open, so look at all pages first (`index_check`), and leave
        out spare ones if they are many and it is not durable. ``damaged`` is called when records
        turn out to contradict each other. Raises FormatError, DamagedError, StoreTimeoutError."""
        self._damaged = damaged
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        try:
            if durable:
                make_whole(folder)
            self._env = open_env(folder, len(tables), durable)
        except lmdb.Error as error:
            raise not_opened(folder, error) from error
        self._file = folder / "data.mdb"
        try:
            self.check_readers()
            if walk:
                with self._env.begin():  # keeps the pages of its snapshot as they are
                    used = check_pages(self._file, self._env.stat()["psize"])
                if not durable:
                    self._leave_out_spare(used, len(tables))
            self._tables = self._open_tables(tables)
            self._inode = self._file.stat().st_ino
            self._closed = self._forsaken = False
            self._reads = Reads()
            self._committing = False
            self._queue: queue.Queue[tuple[Callable[[Txn], Any], Future[Any]] | None] = queue.Queue(
                config.LANE_QUEUE_MAX
            )
            self._lane = threading.Thread(
                target=self._run_lane, name=f"lane-{folder.name}", daemon=True
            )
            self._lane.start()
        except (lmdb.Error, Damaged) as error:
            self._env.close()  # a process may open it once only, and will try again
            raise not_opened(folder, error) from error
        except (OSError, RuntimeError):  # RuntimeError: no thread can be started
            self._env.close()
            raise

    def _leave_out_spare(self, used: int, tables: int) -> None:
        """LMDB gives no page back: once somebody has read for long while others wrote, the tier
        would have less room for chunks for good. Where there is no room for a copy it stays so."""
        aside = self.folder / "compact"
        shutil.rmtree(aside, ignore_errors=True)  # a process was killed here
        if self._env.info()["last_pgno"] <= 2 * used + config.SPARE_PAGES:
            return
        with suppress(lmdb.Error):
            aside.mkdir()
            self._env.copy(str(aside), compact=True)
            self._env.close()
            # A process that is closing it may have the old one open still: with its lock file LMDB
            # would take the page that is current there, which is the empty one here.
            (self.folder / "lock.mdb").unlink(missing_ok=True)
            (aside / "data.mdb").replace(self._file)
            self._env = open_env(self.folder, tables, durable=False)
        shutil.rmtree(aside, ignore_errors=True)

    def _open_tables(self, tables: tuple[str, ...]) -> dict[str, Any]:
        """Open the tables, on a thread: that takes the writer lock, which may be held for ever. If
        it is held for too long the thread closes the environment, once it has the lock: LMDB must
        not be closed beneath it."""
        opened: Future[dict[str, Any]] = Future()

        def work() -> None:
            try:
                with self._env.begin(write=True) as txn:
                    found = {n: self._env.open_db(n.encode(), txn=txn) for n in tables}
                tell = partial(opened.set_result, found)
            except lmdb.Error as error:
                tell = partial(opened.set_exception, error)
            if _may_run(opened):
                tell()
            else:
                self._env.close()

        threading.Thread(target=work, name="prefixstore-tables", daemon=True).start()
        try:
            return opened.result(config.LOCK_WAIT_S)
        except FutureTimeout:
            if not opened.cancel():  # it has just got the lock
                return opened.result()
            raise StoreTimeoutError(
                f"another process holds the writer lock of {self.folder}",
                "wait for it, or end it",
            ) from None

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A read transaction: a consistent snapshot. Keep it short: it holds old pages alive."""
        if self._closed:
            raise StoreClosedError(f"the index {self.folder} is closed")
        try:
            with self._reads, translated(self.folder), self._env.begin() as txn:
                yield Txn(txn, self._tables)
        except DamagedError as error:
            if isinstance(error.__cause__, (AssertionError, struct.error)):  # as in a write
                with suppress(OSError):
                    self._damaged()
            raise

    @contextmanager
    def lookup(self, table: str) -> Iterator[Callable[[bytes], bytes | None]]:
        """A read transaction as a function that looks up keys of one table.

        It is LMDB's own: a sixth faster than `Txn.get`, and a match makes hundreds of calls.
        """
        if self._closed:
            raise StoreClosedError(f"the index {self.folder} is closed")
        with self._reads, translated(self.folder), self._env.begin(db=self._tables[table]) as txn:
            yield txn.get

    def submit(self, operation: Callable[[Txn], T]) -> Future[T]:
        """Queue a write. The operation may run more than once, so it must only touch its Txn."""
        if self._closed:
            raise StoreClosedError(f"the index {self.folder} is closed")
        future: Future[T] = Future()
        try:
            self._queue.put_nowait((operation, future))
        except queue.Full:
            raise StoreTimeoutError(
                f"{config.LANE_QUEUE_MAX} writes already wait for the index {self.folder}",
                "another process holds the writer lock, or the disk is stalled",
            ) from None
        return future

    def write(self, operation: Callable[[Txn], T], deadline_s: float = config.OP_DEADLINE_S) -> T:
        """Run a write and wait for its commit. Raises StoreTimeoutError if it is not begun in time.

        A write that has begun when the time is over is still waited for (twice the deadline): it
        holds the lock and ends, and its outcome must be known.
        """
        future = self.submit(operation)
        try:
            return future.result(deadline_s)
        except FutureTimeout:
            if future.cancel():
                raise StoreTimeoutError(
                    f"the index {self.folder} took no write within {deadline_s:.1f} s",
                    "another process holds the writer lock, or the disk is stalled",
                ) from None
        try:
            return future.result(2 * deadline_s)
        except FutureTimeout:
            raise StoreTimeoutError(
                f"a write to {self.folder} has not ended after {3 * deadline_s:.1f} s",
                "the disk is stalled",
            ) from None

    def _run_lane(self) -> None:
        commits = 0
        while True:
            item = self._queue.get()
            batch = []
            while item is not None:
                batch.append(item)
                if len(batch) >= config.LANE_BATCH_MAX or self._queue.empty():
                    break
                item = self._queue.get()
            self._committing = True
            self._commit(batch)
            self._committing = False
            commits += 1
            if commits % config.READERS_CHECKED_EVERY == 0:
                with suppress(lmdb.Error):  # of one that must be opened again
                    self.check_readers()
            if item is None:
                return

    def idle(self) -> bool:
        """Whether no write of this process is queued or under way."""
        return self._queue.empty() and not self._committing

    def _commit(self, batch: list[tuple[Callable[[Txn], Any], Future[Any]]]) -> None:
        """Commit a batch as one transaction; if any operation fails, each in its own."""
        if not batch:
            return
        try:
            with self._env.begin(write=True) as txn:
                # Only now, with the lock: what waited for it beyond its deadline is cancelled.
                batch = [item for item in batch if _may_run(item[1])]
                wrapped = Txn(txn, self._tables)
                results = []
                for operation, _ in batch:
                    results.append(operation(wrapped))
                    wrapped.write_counters()
        except Exception as error:  # thread loop: the caller gets it through its future
            if len(batch) == 1:
                told = translate(error, self.folder)
                if _may_run(batch[0][1]):  # it may have been cancelled before there was the lock
                    batch[0][1].set_exception(told)
                if isinstance(told, DamagedError):
                    with suppress(OSError):
                        self._damaged()
            else:
                for item in batch:
                    self._commit([item])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def check_readers(self) -> None:
        """Free the reader slots of dead processes: they would keep old pages from being reused."""
        self._env.reader_check()

    def file_bytes(self) -> int:
        """Bytes the environment takes on its file system, spare pages included, and those of a
        commit in the middle of which its process was killed."""
        info = self._env.info()
        known = int((info["last_pgno"] + 1) * self._env.stat()["psize"])
        try:
            return max(known, self._file.stat().st_size)
        except OSError:  # it was removed: `lost`
            return known

    def lost(self) -> str:
        """Why it is of no use to this process any more; "" while it is of use.

        After an error while it wrote its first pages LMDB does nothing more; opened again it has
        what was committed before.
        """
        try:
            with self._env.begin():
                pass
        except lmdb.PanicError:
            return "had an input/output error in its index"
        except lmdb.ReadersFullError:  # that will pass
            pass
        except lmdb.Error:
            return REPLACED
        try:
            return "" if self._file.stat().st_ino == self._inode else REPLACED
        except OSError:
            return REPLACED

    def forsake(self) -> None:
        """Refuse all calls from now on; of a child that was forked."""
        self._closed = self._forsaken = True

    def end(self) -> bool:
        """Take no more calls, and wait until writes are committed and reads have ended; whether
        that came to an end. Else it stays open: LMDB must not be closed beneath them."""
        if self._forsaken:
            return False
        if not self._closed:
            self._closed = True
            with suppress(queue.Full):  # the lane is stuck
                self._queue.put(None, timeout=config.OP_DEADLINE_S)
        self._lane.join(config.OP_DEADLINE_S)
        return not self._lane.is_alive() and self._reads.end(config.OP_DEADLINE_S)

    def close(self) -> None:
        """Commit what is queued, then close."""
        if self.end():
            self._env.close()


def _may_run(future: Future[Any]) -> bool:
    return future.running() or future.set_running_or_notify_cancel()
