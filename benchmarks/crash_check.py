"""What must hold of a store after its processes, or its machine, were stopped at any moment.

The diary says what was promised. Nothing here repairs: what `Store.open` and `reap` do is all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.corruption import LAYOUT
from benchmarks.crash_roles import Scene, WrongBytes, open_store, read, refs_of
from prefixstore import Store, admin
from prefixstore.accounting import check_accounting
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS, Namespace
from prefixstore.retiring import sweep
from prefixstore.rows import Pending, readable
from prefixstore.testing_data import identity_for

# Where pins were promised without a disk to keep them on: the cap comes first.
PINS_EVICTED = "pinned chunks gave way to the index"
# Killed before the row of the chunk was committed.
UNCOMMITTED = ("put.claiming", "put.claimed", "put.copied", "put.finishing")
FLUSH_S, TRIM_S = 30.0, 10.0


@dataclass
class Promises:
    """What the diary says must be there, and what must not. Prompt -> how many chunks."""

    there: dict[int, int] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    ends: dict[int, tuple[int, float]] = field(default_factory=dict)
    retired: set[bytes] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, lines: Iterable[list[str]], scene: Scene, *, durable: bool) -> Promises:
        """``durable``: of a machine that was stopped, not just processes. A store whose disk has
        room keeps everything; another may evict all but pinned chunks, and one without a disk
        keeps those in memory."""
        found = cls()
        putting: dict[str, tuple[int, int]] = {}
        stored: dict[str, dict[int, int]] = {}
        for word, who, *rest in lines:
            if word == "putting":
                putting[who] = int(rest[0]), int(rest[1])
            elif word == "stored":
                if scene.roomy or rest[2] == "pinned":
                    stored.setdefault(who, {})[int(rest[0])] = int(rest[1])
                    if not durable:
                        found.there[int(rest[0])] = int(rest[1])
            elif word == "flushed":
                # A flush is of all that its process has put, less what it has removed since.
                found.there.update(stored.get(who, {}) if durable else {})
            elif word == "removing":
                found.there.pop(int(rest[0]), None)
                stored.get(who, {}).pop(int(rest[0]), None)
            elif word == "removed":
                found.gone[int(rest[0])] = int(rest[1])
            elif word == "expires":
                found.ends[int(rest[0])] = int(rest[1]), float(rest[2])
            elif word == "retired":
                found.retired.add(bytes.fromhex(rest[0]))
            elif word == "died":
                prompt, chunks = putting.get(who, (0, 0))
                if rest[0] in UNCOMMITTED:
                    found.gone[prompt] = chunks
            elif word == "wrong":
                found.wrong.append(f"process {who}: {' '.join(rest)}")
        return found


class Checker:
    """One look at a store. ``faults`` is empty if all is well."""

    def __init__(self, store: Store, scene: Scene, promises: Promises, quiet: bool) -> None:
        self.store, self.scene, self.promises, self.quiet = store, scene, promises, quiet
        self.ns = store.namespace(identity_for("a", LAYOUT), LAYOUT)
        self.faults: list[str] = list(promises.wrong)

    def run(self) -> list[str]:
        """All checks; those that survivors at work would disturb, only if it is quiet."""
        store = self.store
        if self.quiet and not store.flush(FLUSH_S) and self.scene.roomy:
            self.faults.append("what the dead had put could not be written to disk")
        store.on_keeper(self._check_ledger)
        try:
            self._check_promises()
            if self.quiet:
                self._check_rows()
        except WrongBytes as error:
            self.faults.append(f"wrong bytes: {error}")
        store.keeper.forget_promotions()
        if self.quiet:
            found = store.on_keeper(lambda: admin.stats(store))
            for name in ("corrupt_memory", "corrupt_disk", "key_collisions", "keeper_errors"):
                if found["counters"].get(name):
                    self.faults.append(f"{name}: {found['counters'][name]}")
            report = admin.verify(store)
            if not report.sound:
                self.faults.append(f"unsound: {report}"[:600])
            self._check_space()
        return self.faults

    def _check_ledger(self) -> None:
        """On the keeper thread, so that nothing of this process is between two steps."""
        store = self.store
        store.reap()
        sweep(store)
        with store.live.read() as txn:
            for tier in (MEMORY, DISK):
                self.faults += check_accounting(store.ledger, txn, tier)
                if store.ledger.allocated(txn, tier) > txn.get_int("meta", b"cap%d" % tier):
                    self.faults.append(f"tier {tier} is over its cap")
            if not self.quiet:
                return
            for table in ("lease", "leased", "claim"):
                if txn.count(table):
                    self.faults.append(f"{txn.count(table)} left in {table}")
            for key, record in txn.scan("pending"):  # parts wait for other ranks: theirs did end
                if Pending.unpack(record).writers:
                    self.faults.append(f"chunk {key.hex()} is still being put")
            if self.scene.roomy and txn.count("dirty"):
                self.faults.append(f"{txn.count('dirty')} chunks are not on disk")

    def _check_promises(self) -> None:
        now, promises = time.time(), self.promises
        for prompt, chunks in promises.there.items():
            tiers = read(self.ns, refs_of(self.ns, prompt, chunks))
            if MISS in tiers:
                fault = f"prompt {prompt} was promised, but {tiers}"
                self.faults.append(f"{PINS_EVICTED}: {fault}" if self._pins_evicted() else fault)
        gone = dict(promises.gone)
        gone.update({prompt: n for prompt, (n, end) in promises.ends.items() if end <= now})
        for prompt, chunks in gone.items():
            tiers = read(self.ns, refs_of(self.ns, prompt, chunks))
            if any(tier != MISS for tier in tiers):
                self.faults.append(f"prompt {prompt} must not be there, but {tiers}")

    def _pins_evicted(self) -> bool:
        counters = admin.stats(self.store)["counters"]
        return not self.scene.disk_bytes and counters.get("pinned_evicted_bytes", 0) > 0

    def _check_rows(self) -> None:
        """Whatever has a row can be read and is right; what was retired has none."""
        listed = list(admin.list_chunks(self.store))
        spaces: dict[bytes, Namespace] = {}
        for item in listed:
            if item.row.namespace in self.promises.retired:
                self.faults.append(f"chunk {item.key.hex()} of a retired model")
                continue
            if 0 < item.row.expires_s <= time.time() + 1:
                continue
            name = item.row.namespace
            ns = spaces.setdefault(name, self.store.namespace_of(name))
            ref = ChunkRef(item.key, item.row.preimage, item.row.depth, item.row.salt)
            if read(ns, [ref]) == [MISS] and self._still_there(item):
                self.faults.append(f"chunk {item.key.hex()} has a row, but is a miss")

    def _still_there(self, item: admin.Listed) -> bool:
        """Not evicted since it was listed."""
        with self.store.live.read() as live, self.store.index.read() as index:
            rows = [live.get("chunk", item.key), index.get("chunk", item.key)]
        return any(data is not None and readable(data) == item.row for data in rows)

    def _check_space(self) -> None:
        for folder, cap in (
            (self.store.live_dir, self.scene.memory_bytes),
            (self.store.folder, self.scene.disk_bytes),
        ):
            end = time.monotonic() + TRIM_S  # when the index grew, the keeper makes room for it
            while (taken := space_taken(folder)) > cap > 0 and time.monotonic() < end:
                time.sleep(0.05)
            if taken > cap > 0:
                tiers = admin.stats(self.store)["tiers"]
                self.faults.append(f"{folder.name} takes {taken} bytes of {cap}: {tiers}")


def space_taken(folder: Path) -> int:
    """Bytes that the files below a folder occupy, holes not counted."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """What the store warns of."""
    handler, logger = _Warnings(), logging.getLogger("prefixstore")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def check(
    folder: Path, memory_dir: Path, scene: Scene, promises: Promises, quiet: bool
) -> tuple[list[str], float]:
    """Open a store and look at it; what is wrong, and how long opening took (seconds).

    Nothing that only a crash explains may be logged: a store that says that it is damaged is."""
    started = time.monotonic()
    with warnings_logged() as logged, open_store(folder, memory_dir, scene) as store:
        opened_s = time.monotonic() - started
        faults = Checker(store, scene, promises, quiet).run()
    return [*faults, *(f"logged: {line}" for line in logged)], opened_s
