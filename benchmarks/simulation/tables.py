"""LMDB, simulated: ordered tables, snapshots for readers, one writer at a time over all processes.

What is committed is a dict of tables that is never changed again; a write transaction copies the
tables it changes. A process that is killed inside one leaves nothing of it and drops the lock, as
LMDB's robust mutex does. Of a durable environment a power cut takes nothing that was committed, and
decides for a commit that is under way whether it was.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.simulation.scheduler import Gate, Process, active

Tables = dict[str, "Table"]


class Table:
    """Keys in order, and their values."""

    __slots__ = ("data", "keys")

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []

    def copy(self) -> Table:
        other = Table()
        other.data, other.keys = self.data.copy(), self.keys.copy()
        return other

    def put(self, key: bytes, value: bytes) -> None:
        if key not in self.data:
            insort(self.keys, key)
        self.data[key] = value

    def delete(self, key: bytes) -> bool:
        if self.data.pop(key, None) is None:
            return False
        del self.keys[bisect_left(self.keys, key)]
        return True


class Database:
    """What one environment's files hold, for all processes that open it."""

    def __init__(self, durable: bool) -> None:
        self.durable = durable
        self.tables: Tables = {}
        self.holder: Process | None = None
        self.free = Gate()
        self.on_commit: Callable[[Tables, Tables], None] = lambda before, after: None
        self.fault: Callable[[], Exception | None] = lambda: None  # of a commit
        self.sync_s: Callable[[], float] = lambda: 0.0

    def lock(self) -> None:
        """Wait for the writer lock."""
        me = active().running.process
        while self.holder is not None and not self.holder.dead:
            active().wait(self.free)
        self.holder = me

    def unlock(self) -> None:
        """Give it up, if it is this process's."""
        if self.holder is active().running.process:
            self.release()

    def release(self) -> None:
        """The lock is free, also if its holder was killed."""
        self.holder = None
        active().open(self.free)


class Handle:
    """In place of an `lmdb.Environment`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, write: bool = False, db: str | None = None) -> Transaction:
        return Transaction(self._database, write, db)

    def open_db(self, name: bytes, txn: Transaction) -> str:
        txn.make(name.decode())
        return name.decode()

    def stat(self) -> dict[str, int]:
        return {"psize": 0}  # indexes take no bytes here: caps are whole slots

    def info(self) -> dict[str, int]:
        return {"last_pgno": 0}

    def reader_check(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is held open."""


class Transaction:
    """In place of an `lmdb.Transaction`."""

    def __init__(self, database: Database, write: bool, db: str | None) -> None:
        self._database, self._write, self._db = database, write, db
        self._tables: Tables = {}
        self._own: set[str] = set()

    def __enter__(self) -> Transaction:
        active().step("write lock" if self._write else "read")
        if self._write:
            self._database.lock()
            active().step("locked")
        self._tables = self._database.tables
        if self._write:
            self._tables = dict(self._tables)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self._write:
            return
        database = self._database
        if active().running.process.dead:  # who waits for the lock goes on when it is seen dead
            database.unlock()
            return
        if kind is not None:
            database.unlock()
            active().step("aborted")
            return
        try:
            self._commit()
        finally:
            database.unlock()
        active().step("committed")

    def _commit(self) -> None:
        database = self._database
        if not self._own:
            return
        if database.durable:
            active().sleep(database.sync_s())
        active().step("commit")
        fault = database.fault()
        if fault is not None:
            raise fault
        before, database.tables = database.tables, self._tables
        database.on_commit(before, self._tables)

    def make(self, name: str) -> None:
        if name not in self._tables:
            self._tables[name] = Table()
            self._own.add(name)

    def _mine(self, name: str) -> Table:
        if name not in self._own:
            assert self._write, "a write in a read transaction"
            self._tables[name] = self._tables[name].copy()
            self._own.add(name)
        return self._tables[name]

    def get(self, key: bytes, default: bytes | None = None, db: str | None = None) -> bytes | None:
        return self._tables[db or self._db or ""].data.get(key, default)

    def put(self, key: bytes, value: bytes, db: str) -> None:
        assert 0 < len(key) <= 511, "a key LMDB would not take"
        self._mine(db).put(key, bytes(value))

    def delete(self, key: bytes, db: str) -> bool:
        return key in self._tables[db].data and self._mine(db).delete(key)

    def cursor(self, db: str) -> Cursor:
        return Cursor(self._tables, db)

    def stat(self, db: str) -> dict[str, int]:
        return {"entries": len(self._tables[db].keys)}


class Cursor:
    """In place of an `lmdb.Cursor`. It keeps its place by the key, so the table may change."""

    def __init__(self, tables: Tables, name: str) -> None:
        self._tables, self._name = tables, name
        self._key: bytes | None = None

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def key(self) -> bytes:
        return self._key or b""

    def set_range(self, key: bytes) -> bool:
        keys = self._tables[self._name].keys
        at = bisect_left(keys, key)
        self._key = keys[at] if at < len(keys) else None
        return self._key is not None

    def iternext(self) -> Iterator[tuple[bytes, bytes]]:
        key = self._key
        while key is not None:
            table = self._tables[self._name]
            if key in table.data:
                yield key, table.data[key]
            keys = self._tables[self._name].keys
            at = bisect_right(keys, key)
            key = keys[at] if at < len(keys) else None

    def getmulti(self, keys: list[bytes]) -> list[tuple[bytes, Any]]:
        data = self._tables[self._name].data
        return [(key, data[key]) for key in keys if key in data]
