"""The copy of a spill: from slots of the memory tier into claimed slots of the disk tier."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from prefixstore.failpoints import reached
from prefixstore.ledger import DISK, MEMORY
from prefixstore.reading import share_out
from prefixstore.rows import Row
from prefixstore.slots import SlotFile

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Move:
    """One chunk on its way from a memory slot to a disk slot."""

    key: bytes
    row: Row
    disk_slot: int


@dataclass(frozen=True, slots=True)
class Spilled:
    """What a spill did: keys now durable, keys that failed, and whether those may be retried; and
    those that a quota keeps from the disk."""

    durable: list[bytes]
    failed: list[bytes]
    retry: bool
    refused: list[bytes]


def copy_to_disk(
    moves: Sequence[Move], file_of: Callable[[int, int], SlotFile], pool: Executor
) -> list[OSError | None]:
    """Write to the disk slots; what went wrong, for each move."""
    errors: list[OSError | None] = []
    for move in moves:  # before any write: a write holds the file's lock, which this waits for
        try:
            file_of(DISK, move.row.slot_bytes).allocate(move.disk_slot)
            errors.append(None)
        except OSError as error:
            errors.append(error)
    reached("spill.allocated")

    def write(i: int) -> None:
        move, size = moves[i], moves[i].row.slot_bytes
        if errors[i] is None:
            try:
                source = file_of(MEMORY, size).view(move.row.slot)
                file_of(DISK, size).write(move.disk_slot, source)
            except OSError as error:
                errors[i] = error

    share_out(len(moves), write, pool, helpers=3)  # two at a time keep a device busy
    return errors
