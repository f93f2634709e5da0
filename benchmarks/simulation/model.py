"""What must hold, checked against a dict of what was put, and against each commit as it is made.

Knows of the store only the format of its rows and tables. A violation ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulation.files import Content
from benchmarks.simulation.machine import FOLDER, LIVE_DIR, Machine
from benchmarks.simulation.scheduler import Process, Scheduler
from benchmarks.simulation.tables import Tables
from prefixstore.ledger import DISK, MEMORY
from prefixstore.rows import Pending, Row, pack_address
from prefixstore.testing_data import content_of

NEVER = -1
_EMPTY: dict[bytes, bytes] = {}


@dataclass
class Known:
    """What is known of a key. Times are steps."""

    put_began: int = NEVER
    put_ended: int = NEVER
    removal_began: int = NEVER  # delete, retire, a time to live: it may be gone
    removed: tuple[int, int] = (NEVER, NEVER)  # the last delete that ended well
    durable: int = NEVER  # the last commit that wrote its durable row, or took it away
    dirtied: dict[bytes, int] = field(default_factory=dict)  # who has to write it, since when


class Model:
    """See the module docstring. ``payloads`` tells the bytes of a chunk by its namespace."""

    def __init__(self, scheduler: Scheduler, machine: Machine) -> None:
        self._scheduler, self._machine = scheduler, machine
        self.payloads: dict[bytes, int] = {}
        self.caps: dict[int, int] = {}
        self.lossy = False  # quotas or faults may keep chunks in memory only, where they go
        self.keys: dict[bytes, Known] = {}
        self.retired: dict[bytes, int] = {}  # namespace -> the step at which retiring it began
        self.putting: list[tuple[Process, bytes]] = []
        self.owed: dict[Process, dict[bytes, int]] = {}  # stored, and not flushed yet
        self._told: dict[Process, int] = {}
        self._contents: dict[tuple[bytes, int], bytes] = {}

    def fail(self, what: str) -> None:
        self._scheduler.note_failure(what)

    def known(self, key: bytes) -> Known:
        return self.keys.setdefault(key, Known())

    def content(self, key: bytes, num_bytes: int) -> bytes:
        made = self._contents.get((key, num_bytes))
        if made is None:
            made = self._contents[key, num_bytes] = content_of(key, num_bytes)
        return made

    # ------------------------------------------------------------------ operations
    def put_begins(self, process: Process, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.known(key).put_began = self._scheduler.steps
            self.putting.append((process, key))

    def put_ends(self, process: Process, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.putting.remove((process, key))
            self.known(key).put_ended = self._scheduler.steps

    def stored(self, process: Process, key: bytes, began: int) -> None:
        """A put that began at that step stored it. It may have been on disk before that returned;
        or all the while: a spill of another process enters the row first, then where it stands."""
        if self._told.get(process, NEVER) < began:
            mark = process.owner.to_bytes(4, "little")
            self.owed.setdefault(process, {})[key] = self.known(key).dirtied.get(mark, began)

    def told(self, process: Process) -> None:
        """A flush said that something was not written: maybe of a put that has yet to return."""
        self._told[process] = self._scheduler.steps
        self.owed.pop(process, None)

    def killed(self, process: Process) -> None:
        self.put_ends(process, [key for one, key in self.putting if one is process])
        self.owed.pop(process, None)

    def removal_begins(self, keys: Sequence[bytes]) -> int:
        for key in keys:
            self.known(key).removal_began = self._scheduler.steps
        return self._scheduler.steps

    def removal_ends(self, keys: Sequence[bytes], began: int) -> None:
        for key in keys:
            known, writing = self.known(key), any(key == other for _, other in self.putting)
            if not writing and max(known.put_began, known.put_ended) < began:
                known.removed = (began, self._scheduler.steps)

    def must_miss(self, key: bytes) -> bool:
        """Whether a get that begins now may not find it: deleted, and not put since."""
        known = self.known(key)
        return known.removed[0] > known.put_began

    def flushed(self, process: Process, owed: dict[bytes, int]) -> None:
        """A flush said that all this is on disk."""
        rows = self._index_rows()
        for key, stored in owed.items():
            known = self.known(key)
            if key in rows or known.durable >= stored or known.removal_began >= 0:
                continue
            if self._retired_row(key):
                continue
            self.fail(f"flush ended well, but chunk {key.hex()} was never on disk")
        mine = self.owed.get(process, {})
        for key in owed:
            mine.pop(key, None)

    def _retired_row(self, key: bytes) -> bool:
        data = self._live_rows().get(key)
        return bool(self.retired) and (data is None or Row.unpack(data).namespace in self.retired)

    # ------------------------------------------------------------------ commits
    def watch_live(self, before: Tables, after: Tables) -> None:
        """A commit of the live index."""
        if "chunk" not in before:
            return
        rows, old = after["chunk"].data, before["chunk"].data
        if rows is not old:
            for key, data in rows.items():
                if old.get(key) is not data and old.get(key) != data:
                    self._check_row(MEMORY, key, data, "is committed")
            dirty = before["dirty"].data
            for key, mark in after["dirty"].data.items() - dirty.items():
                self.known(key).dirtied[mark] = self._scheduler.steps
            for key in [key for key in dirty if key in old and key not in rows]:
                self._check_lost(key, old[key])
        if after["free"] is not before["free"] or after["hole"] is not before["hole"]:
            self._check_freed(before, after)
        leased = after["leased"].data
        if leased:
            self._check_leases(after)
        for tier, cap in self.caps.items():
            name = b"allocated%d" % tier
            now, then = (_number(tables["meta"].data, name) for tables in (after, before))
            if now > cap and now > then:
                self.fail(f"tier {tier} has {now} bytes of {cap}")

    def _check_freed(self, before: Tables, after: Tables) -> None:
        freed = [
            address
            for table in ("free", "hole")
            for address in after[table].data.keys() - before[table].data.keys()
            if address[0] == DISK
        ]
        if freed:
            for key, data in self._index_rows().items():
                row = Row.unpack(data)
                if pack_address(DISK, row.slot_bytes, row.slot) in freed:
                    self.fail(f"slot {row.slot} was freed, and the row of {key.hex()} names it")

    def _check_leases(self, after: Tables) -> None:
        pending = [Pending.unpack(data) for data in after["pending"].data.values()]
        filling = {pack_address(MEMORY, one.slot_bytes, one.slot) for one in pending}
        for name in after["leased"].data:
            address = name[:9]
            for table in ("free", "hole"):
                if address in after[table].data:
                    self.fail(f"a leased slot is {table}: {address.hex()}")
            if address in filling:
                self.fail(f"a leased slot is being filled: {address.hex()}")

    def _check_lost(self, key: bytes, data: bytes) -> None:
        known = self.known(key)
        if self.lossy or key in self._index_rows() or known.removal_began >= 0:
            return
        if Row.unpack(data).namespace in self.retired:
            return
        self.fail(f"chunk {key.hex()} left memory before it was on disk")

    def watch_index(self, before: Tables, after: Tables) -> None:
        """A commit of the durable index: rows may only speak of synced bytes."""
        if "chunk" not in before:
            return
        rows, old = after["chunk"].data, before["chunk"].data
        if rows is old:
            return
        for key, data in rows.items():
            if old.get(key) != data:
                self.known(key).durable = self._scheduler.steps
                self._check_row(DISK, key, data, "is committed")
        for key in old.keys() - rows.keys():  # it was there until now
            self.known(key).durable = self._scheduler.steps

    def _check_row(self, tier: int, key: bytes, data: bytes, when: str) -> None:
        row = Row.unpack(data)
        folder, name = (LIVE_DIR, "memory") if tier == MEMORY else (FOLDER, "disk")
        file = self._machine.files.get(f"{folder}/{name}-{row.slot_bytes}.slots")
        size = self.payloads[row.namespace]
        contents: list[Content] = [] if file is None else [file.seen]
        if file is not None and tier == DISK:
            contents.append(file.synced)
        for content in contents:
            found = content.slots.get(row.slot, b"")[:size]
            if found != self.content(key, size):
                where = "unsynced " if content is not contents[0] else ""
                self.fail(f"the row of {key.hex()} {when} in tier {tier}: wrong {where}bytes")
        if not contents:
            self.fail(f"the row of {key.hex()} {when} in tier {tier}: there is no file")

    def audit(self, when: str) -> None:
        """All rows that are committed now."""
        for tier, rows in ((MEMORY, self._live_rows()), (DISK, self._index_rows())):
            for key, data in rows.items():
                self._check_row(tier, key, data, when)
        for tier, cap in self.caps.items():
            folder = LIVE_DIR if tier == MEMORY else FOLDER
            used = sum(
                len(file.seen.slots) * file.seen.slot_bytes
                for path, file in self._machine.files.items()
                if path.startswith(folder + "/")
            )
            if used > cap:
                self.fail(f"the files of tier {tier} take {used} bytes of {cap} ({when})")

    def _live_rows(self) -> dict[bytes, bytes]:
        return self._rows(f"{LIVE_DIR}/live")

    def _index_rows(self) -> dict[bytes, bytes]:
        return self._rows(f"{FOLDER}/index")

    def _rows(self, path: str) -> dict[bytes, bytes]:
        database = self._machine.databases.get(path)
        if database is None or "chunk" not in database.tables:
            return _EMPTY
        return database.tables["chunk"].data


def _number(meta: dict[bytes, bytes], name: bytes) -> int:
    return int.from_bytes(meta.get(name, b""), "little")
