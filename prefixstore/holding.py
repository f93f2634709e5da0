"""Holding: slots of the memory tier made, and claimed for a moment, before a chunk needs them.

A device that reads and writes slots by itself must have their pages registered (`lending`), which
takes longer than the copy; so whoever does that does it ahead. A slot that is held is nobody
else's: its space is not given back meanwhile, and it is free again after.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prefixstore.config import HIGH_SHARE, MIB
from prefixstore.errors import StoreError
from prefixstore.filling import version_of
from prefixstore.index import Txn
from prefixstore.ledger import MEMORY
from prefixstore.rows import CLAIM_HELD, Claim, pack_address, pool_key, unpack_address
from prefixstore.store import Store

# Of the tier's file system: for the live index, and for others who have it, too.
LEFT_BYTES_MIN, LEFT_SHARE = 64 * MIB, 1 / 64


@dataclass(frozen=True, slots=True)
class Space:
    """A slot with pages. ``version``: of them, see `lending`. ``free``: it holds no chunk."""

    slot: int
    version: int
    free: bool


@dataclass
class Spaces:
    """``found``: slots with pages. ``held``, ``filling``: how many others there are that may have
    none yet, because somebody makes them or fills them."""

    found: list[Space]
    held: int
    filling: int


@dataclass
class Held:
    """Slots that are held. ``unmade``: those of them for which there is no memory after all."""

    spaces: list[Space] = field(default_factory=list)
    unmade: set[int] = field(default_factory=set)


def spaces(store: Store, slot_bytes: int, known: Container[int] = ()) -> Spaces:
    """The slots of that size, but for those ``known``. Raises StoreError."""
    prefix = pool_key(MEMORY, slot_bytes)
    with store.live.read() as txn:
        free, holes = (
            {unpack_address(name)[2] for name, _ in txn.scan(table, prefix)}
            for table in ("free", "hole")
        )
        held = {
            unpack_address(name)[2]
            for name, record in txn.scan("claim", prefix)
            if Claim.unpack(record).kind == CLAIM_HELD
        }
        filling = {one for _, size, one in store.ledger.pending_slots(txn) if size == slot_bytes}
        rest = {
            slot
            for slot in range(txn.get_int("pool", prefix))
            if slot not in known and slot not in holes
        }
        found = [
            Space(slot, version_of(txn, slot_bytes, slot), slot in free)
            for slot in sorted(rest - held - filling)
        ]
    return Spaces(found, len(rest & held), len(rest & filling))


def times_changed(store: Store) -> tuple[int, int]:
    """Where it is the same, no slot of the memory tier has come or gone. Raises StoreError."""
    with store.live.read() as txn:
        return store.ledger.allocated(txn, MEMORY), txn.get_int("meta", b"punched")


@contextmanager
def held_free(store: Store, slot_bytes: int, slots: Sequence[int]) -> Iterator[Held]:
    """Those of the slots that are still free. Raises StoreError."""

    def hold(txn: Txn) -> dict[int, bytes]:
        found = {slot: txn.get("free", _address(slot_bytes, slot)) for slot in slots}
        return {slot: freed for slot, freed in found.items() if freed is not None}

    with _held(store, slot_bytes, hold) as held:
        yield held


@contextmanager
def held_new(store: Store, slot_bytes: int, most: int) -> Iterator[Held]:
    """Slots without pages, up to ``most`` and as far as the tier and its file system have room: the
    caller makes them. Raises StoreError."""
    ledger = store.ledger

    def hold(txn: Txn) -> dict[int, bytes]:
        room = int(HIGH_SHARE * ledger.cap(txn, MEMORY)) - ledger.allocated(txn, MEMORY)
        others = sum(1 for _ in txn.scan("claim", pool_key(MEMORY, slot_bytes)))
        count = min(room, _room_of_files(store) - others * slot_bytes) // slot_bytes
        new = (ledger.new_slot(txn, MEMORY, slot_bytes) for _ in range(min(count, most)))
        return dict.fromkeys(new, bytes(8))  # nobody can be reading what it held

    with _held(store, slot_bytes, hold) as held:
        yield held


def _room_of_files(store: Store) -> int:
    found = os.statvfs(store.live_dir)
    if not found.f_blocks:  # a tmpfs without a limit of its own
        return sys.maxsize
    left = max(LEFT_BYTES_MIN, int(LEFT_SHARE * found.f_blocks * found.f_frsize))
    return found.f_bavail * found.f_frsize - left


@contextmanager
def _held(store: Store, slot_bytes: int, take: Callable[[Txn], dict[int, bytes]]) -> Iterator[Held]:
    """Slots that ``take`` gives, with what table ``free`` is to say of each after. If this process
    dies meanwhile, or what ends it fails, `recovery.reap` frees them."""
    held, freed, over, ledger = Held(), dict[int, bytes](), False, store.ledger
    ours = Claim(ledger.owner, CLAIM_HELD, secrets.token_bytes(16)).pack()  # like no other

    def forget() -> None:
        ledger.held.difference_update(_address(slot_bytes, slot) for slot in list(freed))

    def hold(txn: Txn) -> None:
        forget()  # it may run again
        freed.clear()
        freed.update({} if over else take(txn))
        held.spaces = [Space(slot, version_of(txn, slot_bytes, slot), free=True) for slot in freed]
        for slot in freed:
            address = _address(slot_bytes, slot)
            txn.delete("free", address)
            txn.put("claim", address, ours)
            ledger.held.add(address)

    def free(txn: Txn) -> None:
        forget()  # if this is not committed, `reap` does it
        for slot, when in freed.items():
            address = _address(slot_bytes, slot)
            if txn.get("claim", address) != ours:
                continue
            txn.delete("claim", address)
            if slot in held.unmade:
                ledger.give_back(txn, MEMORY, slot_bytes, slot)
            else:
                txn.put("free", address, when)

    try:
        store.live.write(hold)
        yield held
    finally:
        over = True
        try:  # also where it is not known whether they are held: this comes after
            store.live.submit(free)
        except StoreError:
            forget()


def _address(slot_bytes: int, slot: int) -> bytes:
    return pack_address(MEMORY, slot_bytes, slot)
