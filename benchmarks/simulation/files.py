"""Slot files, simulated: bytes as processes see them, and as a device has them after a cut.

Of a disk file each write, hole and reserved slot is unsynced until a `sync` that began after it has
ended. A power cut keeps of what is unsynced a drawn part, sector by sector. A `sync` that fails has
lost a drawn part for ever: the next one does not bring it back. Writes and reads take several
steps, so that a reader can see half of one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation.scheduler import active
from prefixstore.layout import Run
from prefixstore.slots import ShortFileError

SECTOR_BYTES = 512
_RESERVE = b""


@dataclass(frozen=True, slots=True)
class Unsynced:
    """Bytes at an offset of a slot, or ``None``: a hole; or nothing: the slot was reserved."""

    slot: int
    offset: int
    data: bytes | None


class Content:
    """Slots of a file: their bytes, and how many the file is long enough for."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes, self.length = slot_bytes, 0
        self.slots: dict[int, bytearray] = {}  # those with space behind them

    def apply(self, slot: int, offset: int, data: bytes | None) -> None:
        if data is None:
            old = self.slots.pop(slot, None)
            if old is not None:
                old[:] = bytes(self.slot_bytes)  # who has it mapped reads zeros
            return
        self.length = max(self.length, slot + 1)
        there = self.slots.get(slot)
        if there is None:
            there = self.slots[slot] = bytearray(self.slot_bytes)
        there[offset : offset + len(data)] = data

    def copy(self) -> Content:
        other = Content(self.slot_bytes)
        other.length = self.length
        other.slots = {slot: bytearray(data) for slot, data in self.slots.items()}
        return other


Fault = Callable[[str], OSError | None]


class File:
    """One file, for all processes that open it."""

    def __init__(self, slot_bytes: int, volatile: bool) -> None:
        self.volatile = volatile
        self.seen, self.synced = Content(slot_bytes), Content(slot_bytes)
        self.unsynced: list[Unsynced] = []
        self.failed_syncs = 0  # every process that has the file open is told once, as by Linux
        self.fault: Fault = lambda what: None
        self.sync_s: Callable[[], float] = lambda: 0.0

    def apply(self, slot: int, offset: int, data: bytes | None) -> None:
        self.seen.apply(slot, offset, data)
        if not self.volatile:
            self.unsynced.append(Unsynced(slot, offset, data))

    def settle(self, changes: list[Unsynced]) -> None:
        """These are on the device now."""
        for change in changes:
            self.synced.apply(change.slot, change.offset, change.data)
        gone = {id(change) for change in changes}
        self.unsynced = [change for change in self.unsynced if id(change) not in gone]

    def after_power_cut(self) -> File:
        """What the device has when the power is back."""
        rng, left = active().rng, self.synced.copy()
        share = rng.choice((0.0, 0.5, 0.9, 1.0))
        for change in self.unsynced:
            data = change.data
            if not data:
                if rng.random() < share:
                    left.apply(change.slot, change.offset, data)
                continue
            for at in range(0, len(data), SECTOR_BYTES):
                if rng.random() < share:
                    part = data[at : at + SECTOR_BYTES]
                    left.apply(change.slot, change.offset + at, part)
        other = File(left.slot_bytes, self.volatile)
        other.synced, other.seen = left, left.copy()
        other.fault, other.sync_s = self.fault, self.sync_s
        return other


class SimSlotFile:
    """In place of `slots.SlotFile`."""

    def __init__(self, path: Any, slot_bytes: int, *, mapped: bool) -> None:
        self.path, self.slot_bytes, self.mapped = path, slot_bytes, mapped
        self._file: File = path.slot_file(slot_bytes, volatile=mapped)
        self._told = self._file.failed_syncs

    def _may_fail(self, what: str) -> None:
        active().step(f"{what} {self.path.name}")
        error = self._file.fault(what)
        if error is not None:
            raise error

    def num_slots(self) -> int:
        return self._file.seen.length

    def allocate(self, slot: int) -> None:
        self._may_fail("allocate")
        self._file.apply(slot, 0, _RESERVE)

    def punch(self, slot: int) -> None:
        self._may_fail("punch")
        self._file.apply(slot, 0, None)

    def view(self, slot: int) -> memoryview:
        active().step(f"view {self.path.name}")
        content = self._file.seen
        if slot >= content.length:
            raise ShortFileError(f"{self.path} ends before slot {slot}")
        if slot not in content.slots:  # a hole
            return memoryview(bytes(self.slot_bytes))
        return memoryview(content.slots[slot]).toreadonly()

    def read(self, slot: int, runs: Sequence[Run], out: memoryview) -> None:
        if not self.mapped:
            self._may_fail("read")
        for run in runs:
            target = run.in_buffer(out)
            middle = len(target) // 2
            for low, high in ((0, middle), (middle, len(target))):
                source = run.in_slot(self.view(slot))
                target[low:high] = source[low:high]

    def write(self, slot: int, data: memoryview, offset: int = 0) -> None:
        self._may_fail("write")
        middle = len(data) // 2 // SECTOR_BYTES * SECTOR_BYTES
        for low, high in ((0, middle), (middle, len(data))):
            if low < high:
                self._file.apply(slot, offset + low, bytes(data[low:high]))
            active().step(f"wrote {self.path.name}")

    def sync(self) -> None:
        began = list(self._file.unsynced)
        active().sleep(self._file.sync_s())
        error = self._file.fault("sync")
        file, there = self._file, {id(change) for change in self._file.unsynced}
        began = [change for change in began if id(change) in there]
        if error is not None:
            rng = active().rng
            file.settle([change for change in began if rng.random() < 0.5])
            lost = {id(change) for change in began}
            file.unsynced = [change for change in file.unsynced if id(change) not in lost]
            file.failed_syncs += 1
        else:
            file.settle(began)
        if self._told < file.failed_syncs:
            self._told = file.failed_syncs
            raise bad_sector()
        active().step(f"synced {self.path.name}")

    def close(self) -> None:
        """Nothing is held open."""


def no_room() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def bad_sector() -> OSError:
    return OSError(errno.EIO, "Input/output error")
