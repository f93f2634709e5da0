"""A copy of what a pool says about its chunks of one model, in which segments are searched.

The trailers of all chunks (no KV) are read in the background and entered into an index of this
process's own, in a temporary folder; what has gone from the pool is taken out. So a host with an
empty disk finds segments of what others stored, once it has read them (`scout` says when). What
must hold: a row is entered only if it was found sound (`objects.read_head`); at most CHUNKS_MAX.
The folder of a process that was killed is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefixstore.found import REMOTE
from prefixstore.index import Environment, Txn
from prefixstore.keys import KEY_BYTES
from prefixstore.pool.backend import LOST
from prefixstore.pool.objects import head_bytes
from prefixstore.pool.reading import read_rows
from prefixstore.segment_index import TABLES, enter, forget
from prefixstore.segments import Question, Segment, search

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

CHUNKS_MAX = 200_000  # about 2 KB each
HEADS_MAX = 256  # read in one call of the backend
BATCH = 64  # chunks entered in one transaction: about 10 ms
_NAME = "prefixstore-mirror-"


class Mirror:
    """See the module docstring. Owns the folder. `update` is called by one thread, the rest by
    any."""

    def __init__(self, ns: PooledNamespace) -> None:
        remove_stale()
        self._ns = ns
        self._folder = Path(tempfile.mkdtemp(prefix=_NAME))
        self._held = os.open(self._folder / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._env = Environment(self._folder / "index", ("chunk", *TABLES), durable=False)
        self.keys: set[bytes] = set()  # that were looked at, sound or not
        self.is_complete = False  # it had looked at all that was there once

    def find(self, question: Question) -> list[Segment]:
        """Search it. Raises ConfigError, StoreClosedError."""
        return search(self._env, question, lambda keys: [REMOTE] * len(keys))

    def update(self, there: Sequence[bytes], deadline_s: float) -> None:
        """Make it agree with the keys that are there now. Raises StoreError."""
        now = set(there)
        self.take_out(list(self.keys - now))
        if self.add(there, deadline_s):
            self.is_complete = True

    def add(self, keys: Sequence[bytes], deadline_s: float) -> bool:
        """Enter chunks, as far as there is room; ``deadline_s`` for each call. Whether all were
        looked at: those that were not, since a server was lost, are when they are given again.
        Raises StoreError."""
        keys = [key for key in keys if key not in self.keys][: CHUNKS_MAX - len(self.keys)]
        all_seen = True
        for at in range(0, len(keys), HEADS_MAX):
            part = keys[at : at + HEADS_MAX]
            came, rows = self._read(part, deadline_s)
            for start in range(0, len(rows), BATCH):
                self._enter(rows[start : start + BATCH])
            self.keys.update(key for key, count in zip(part, came, strict=True) if count >= 0)
            all_seen = all_seen and LOST not in came
        return all_seen

    def _read(
        self, keys: Sequence[bytes], deadline_s: float
    ) -> tuple[list[int], list[tuple[int, bytes, bytes]]]:
        """What came of each; depth, key and row of those that can be searched, parents first."""
        preimage = KEY_BYTES + 4 * self._ns.layout.chunk_tokens
        end = time.monotonic() + deadline_s
        found = read_rows(self._ns, keys, head_bytes(preimage), end)
        # One with items is longer, and nothing that is searched.
        rows = [
            (row.depth, key, row.pack())
            for key, (_, row) in found.items()
            if row is not None and len(row.preimage) == preimage
        ]
        return [found[key][0] for key in keys], sorted(rows)

    def _enter(self, rows: Sequence[tuple[int, bytes, bytes]]) -> None:
        size = self._ns.layout.chunk_tokens

        def work(txn: Txn) -> None:
            for _, key, row in rows:
                txn.put("chunk", key, row)
                enter(txn, key, size)

        self._env.write(work)

    def take_out(self, keys: Sequence[bytes]) -> None:
        """These are gone. Raises StoreError."""

        def work(txn: Txn, part: Sequence[bytes]) -> None:
            for key in part:
                txn.delete("chunk", key)
                forget(txn, key)

        for at in range(0, len(keys), BATCH):
            self._env.write(partial(work, part=keys[at : at + BATCH]))
        self.keys.difference_update(keys)

    def close(self) -> None:
        """Remove it."""
        self._env.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._held)


def remove_stale() -> None:
    """Remove the folders of processes that are no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < 60:
                continue  # it may not be held yet
            held = os.open(folder / "held", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)
