"""The index: LMDB environments, read without locks and written by one lane a process.

The only module that imports lmdb. A store has two environments of this kind:

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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import lmdb

from prefixstore import config
from prefixstore.errors import FormatError, StoreClosedError, StoreFullError, StoreTimeoutError

T = TypeVar("T")


class Txn:
    """One transaction, with tables by name. Values read are bytes; keys sort bytewise.

    Counters (``*_int``) are kept here until the end: a write touches the same few for each chunk.
    """

    __slots__ = ("_counters", "_tables", "_txn")

    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn, self._tables = txn, tables
        self._counters: dict[tuple[str, bytes], int] = {}  # changed and not yet written

    def get(self, table: str, key: bytes) -> bytes | None:
        """Value of a key, or None."""
        return cast("bytes | None", self._txn.get(key, db=self._tables[table]))

    def get_many(self, table: str, keys: list[bytes]) -> dict[bytes, bytes]:
        """Values of those keys that are there; best sorted: then a third faster than `get`."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return dict(cursor.getmulti(keys))

    def put(self, table: str, key: bytes, value: bytes = b"") -> None:
        """Insert or replace."""
        self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        """Remove; False when the key was not there."""
        return bool(self._txn.delete(key, db=self._tables[table]))

    def scan(
        self, table: str, prefix: bytes = b"", start: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs whose key begins with ``prefix``, in order, from ``start`` on.

        The table may be changed between two steps only at keys already passed.
        """
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(max(prefix, start or b"")):
                return
            for key, value in cursor.iternext():
                if not key.startswith(prefix):
                    return
                yield key, value

    def first(self, table: str, prefix: bytes) -> bytes | None:
        """Smallest key that begins with ``prefix``."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if cursor.set_range(prefix):
                key = cast(bytes, cursor.key())
                return key if key.startswith(prefix) else None
        return None

    def get_int(self, table: str, key: bytes) -> int:
        """A counter; 0 when it is not there."""
        changed = self._counters.get((table, key))
        if changed is not None:
            return changed
        value = self.get(table, key)
        return 0 if value is None else int.from_bytes(value, "little")

    def put_int(self, table: str, key: bytes, value: int) -> None:
        """Set a counter. It must not be negative: that would be something counted twice."""
        assert value >= 0, f"{table}/{key!r} fell to {value}"
        self._counters[table, key] = value

    def write_counters(self) -> None:
        """Write what the counters have become; `scan`, `get` and `delete` know nothing of it."""
        for (table, key), value in self._counters.items():
            self.put(table, key, value.to_bytes(8, "little"))
        self._counters.clear()

    def add_int(self, table: str, key: bytes, change: int) -> int:
        """Add to a counter and return it."""
        value = self.get_int(table, key) + change
        self.put_int(table, key, value)
        return value

    def count(self, table: str) -> int:
        """Entries of a table."""
        return int(self._txn.stat(self._tables[table])["entries"])


class Environment:
    """One LMDB environment with its writer lane. Thread-safe. Close it before the process ends."""

    def __init__(self, folder: Path, tables: tuple[str, ...], *, durable: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        try:
            self._env = lmdb.open(
                str(folder),
                map_size=config.INDEX_MAP_BYTES,
                max_dbs=len(tables),
                max_readers=config.INDEX_READERS_MAX,
                sync=durable,
                metasync=durable,
                readahead=False,
                mode=0o600,
            )
            self._tables = self._open_tables(tables)
        except lmdb.Error as error:
            raise FormatError(
                f"cannot open the index {folder}: {error}",
                "the folder must be on a local, writable file system; if the file is damaged, "
                "remove the store folder (it is a cache) and start again",
            ) from error
        self.check_readers()
        self._inode = (folder / "data.mdb").stat().st_ino
        self._closed = False
        self._committing = False
        self._queue: queue.Queue[tuple[Callable[[Txn], Any], Future[Any]] | None] = queue.Queue(
            config.LANE_QUEUE_MAX
        )
        self._lane = threading.Thread(
            target=self._run_lane, name=f"lane-{folder.name}", daemon=True
        )
        self._lane.start()

    def _open_tables(self, tables: tuple[str, ...]) -> dict[str, Any]:
        """Open the tables, on a thread: that takes the writer lock, which may be held for ever."""
        opened: Future[dict[str, Any]] = Future()

        def work() -> None:
            try:
                with self._env.begin(write=True) as txn:
                    found = {n: self._env.open_db(n.encode(), txn=txn) for n in tables}
                opened.set_result(found)
            except lmdb.Error as error:
                opened.set_exception(error)

        threading.Thread(target=work, name="prefixstore-tables", daemon=True).start()
        try:
            return opened.result(config.LOCK_WAIT_S)
        except FutureTimeout:
            raise StoreTimeoutError(
                f"another process holds the writer lock of {self.folder}",
                "wait for it, or end it",
            ) from None

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A read transaction: a consistent snapshot. Keep it short: it holds old pages alive."""
        if self._closed:
            raise StoreClosedError(f"the index {self.folder} is closed")
        with self._env.begin() as txn:
            yield Txn(txn, self._tables)

    @contextmanager
    def lookup(self, table: str) -> Iterator[Callable[[bytes], bytes | None]]:
        """A read transaction as a function that looks up keys of one table.

        It is LMDB's own: a sixth faster than `Txn.get`, and a match makes hundreds of calls.
        """
        if self._closed:
            raise StoreClosedError(f"the index {self.folder} is closed")
        with self._env.begin(db=self._tables[table]) as txn:
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
                batch[0][1].set_exception(_translate(error, self.folder))
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
        """Bytes the environment takes on its file system, spare pages included."""
        info = self._env.info()
        return int((info["last_pgno"] + 1) * self._env.stat()["psize"])

    def present(self) -> bool:
        """Whether the files this process has open are still the ones in the folder."""
        try:
            return (self.folder / "data.mdb").stat().st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Commit what is queued, then close."""
        if self._closed:
            return
        self._closed = True
        with suppress(queue.Full):  # the lane is stuck: it and its environment stay
            self._queue.put(None, timeout=config.OP_DEADLINE_S)
        self._lane.join(config.OP_DEADLINE_S)
        if not self._lane.is_alive():
            self._env.close()


def _may_run(future: Future[Any]) -> bool:
    return future.running() or future.set_running_or_notify_cancel()


def _translate(error: Exception, folder: Path) -> Exception:
    if isinstance(error, lmdb.MapFullError):
        return StoreFullError(f"the index {folder} has reached its limit", "remove chunks")
    if isinstance(error, lmdb.DiskError):
        return StoreFullError(f"the index {folder} cannot be written: {error}", "free disk space")
    return error
