"""One transaction of the index."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

from prefixstore.errors import StoreClosedError

_SPARSE = ("usage",)  # counters that go when they are 0: clients choose their names (salts)


class Reads:
    """How many transactions read an environment now: a context manager for each of them.

    To close one that is read is a crash of the process, not an error (py-lmdb's ``getmulti`` lets
    other threads run).
    """

    def __init__(self) -> None:
        self._count, self._ended = 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            if self._ended:
                raise StoreClosedError("the index is closed")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            if self._ended:
                self._changed.notify_all()

    def end(self, deadline_s: float) -> bool:
        """Let nobody begin any more; whether all have ended."""
        with self._changed:
            self._ended = True
            return self._changed.wait_for(lambda: not self._count, deadline_s)


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
            if value or table not in _SPARSE:
                self.put(table, key, value.to_bytes(8, "little"))
            else:
                self.delete(table, key)
        self._counters.clear()

    def add_int(self, table: str, key: bytes, change: int) -> int:
        """Add to a counter and return it."""
        value = self.get_int(table, key) + change
        self.put_int(table, key, value)
        return value

    def count(self, table: str) -> int:
        """Entries of a table."""
        return int(self._txn.stat(self._tables[table])["entries"])
