"""Puts the simulated parts in the places of the real ones, for the time of a run.

Real: `Store` (its parts, opening included), `Namespace`, `Keeper`, `Environment` with its lane,
`Ledger`, `DiskTier` and all procedures on them, `Txn`, the opening of the live index.
Simulated: LMDB, slot files, the clock, threads, queues, futures, pools, paths, locks, who is alive.
The product has no seam for it: names of its modules are replaced, as its tests do.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.simulation import files, machine, parts, scheduler
from prefixstore import (
    config,
    healing,
    index,
    index_files,
    keeper,
    opened,
    opening,
    reading,
    recovery,
    registry,
    store,
    txn,
)
from prefixstore.errors import DamagedError, StoreError

THREADS = SimpleNamespace(Lock=parts.Lock, Condition=parts.Condition, Thread=parts.SimThread)
QUEUES = SimpleNamespace(Queue=parts.Queue, Empty=queue.Empty, Full=queue.Full)


class KeeperLog:
    """In place of the keeper's logger: what it swallows and is no failing call is a finding."""

    def warning(self, text: str, *what: object, exc_info: BaseException) -> None:
        expected = isinstance(exc_info, (StoreError, OSError))
        if isinstance(exc_info, DamagedError) or not expected:
            scheduler.active().note_failure(f"the keeper met {exc_info!r}: {exc_info.__cause__!r}")


def _nothing(*args: object, **options: object) -> int:
    return 0


def _replacements() -> list[tuple[object, str, Any]]:
    nobody = SimpleNamespace(
        open=_nothing, close=_nothing, O_RDWR=0, O_CREAT=0, O_CLOEXEC=0, truncate=machine.truncate
    )
    found: list[tuple[object, str, Any]] = [
        (index, "lmdb", machine.fake_lmdb()),
        (index_files, "lmdb", machine.fake_lmdb()),
        (index, "queue", QUEUES),
        (index, "threading", THREADS),
        (index, "Future", parts.Future),
        (keeper, "queue", QUEUES),
        (keeper, "threading", THREADS),
        (keeper, "Future", parts.Future),
        (registry, "threading", THREADS),
        (txn, "threading", THREADS),
        (reading, "threading", THREADS),
        (keeper, "logger", KeeperLog()),
        (store, "SlotFile", files.SimSlotFile),
        (store, "Liveness", machine.SimLiveness),
        (store, "ThreadPoolExecutor", parts.Pool),
        (store, "nobody_holds", lambda live_dir: False),  # so that no pages are walked
        (store, "os", nobody),
        (store, "fcntl", SimpleNamespace(flock=_nothing, LOCK_SH=0)),
        (opened, "lock", parts.NoLock()),
        (index, "make_whole", lambda folder: None),  # no power is lost while one is made
        (recovery, "os", nobody),
        (opening, "Path", machine.SimPath),
        (opening, "note_origin", _nothing),
        (opening, "remove_stale", _nothing),
        (opening, "shutil", SimpleNamespace(rmtree=_remove_tree)),
        (opening, "secrets", SimpleNamespace(token_hex=lambda n: machine.machine().fresh_token(n))),
        (config, "SMALL_FILES_BYTES", 0),
        (healing, "_logged_at", -healing.LOG_PERIOD_S),
    ]
    for name in sorted(sys.modules):
        module = sys.modules[name]
        if name.startswith("prefixstore.") and getattr(module, "time", None) is time:
            found.append((module, "time", parts.Clock))
    return found


def _remove_tree(path: object, ignore_errors: bool) -> None:
    machine.machine().remove_tree(str(path))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within it, the store runs in the simulation. Not for two runs of a process at once."""
    logger = logging.getLogger("prefixstore")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # the keeper logs each fault that was planted
    with contextlib.ExitStack() as stack:
        for target, name, value in _replacements():
            stack.enter_context(mock.patch.object(target, name, value))
        try:
            yield
        finally:
            logger.setLevel(level)
