"""Holding: slots of the memory tier made, and claimed for a moment, before a chunk needs them.

A device that reads and writes slots by itself must have their pages registered (`lending`), which
takes longer than the copy; so whoever does that does it ahead. A slot that is held is nobody
else's: its space is not given back meanwhile, and it is free again after.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from prefixstore.config import HIGH_SHARE
from prefixstore.errors import StoreError
from prefixstore.index import Txn
from prefixstore.ledger import MEMORY
from prefixstore.rows import CLAIM_HELD, Claim, pack_address, pool_key, unpack_address
from prefixstore.store import Store


@dataclass(frozen=True, slots=True)
class Space:
    """A slot with pages. ``version``: of them, see `lending`. ``free``: it holds no chunk."""

    slot: int
    version: int
    free: bool


def spaces(store: Store, slot_bytes: int, known: Container[int] = ()) -> list[Space]:
    """The slots of that size which have pages, but for those ``known``. Raises StoreError."""
    prefix = pool_key(MEMORY, slot_bytes)
    with store.live.read() as txn:
        free, holes = (
            {unpack_address(name)[2] for name, _ in txn.scan(table, prefix)}
            for table in ("free", "hole")
        )
        return [
            Space(slot, _version(txn, slot_bytes, slot), slot in free)
            for slot in range(txn.get_int("pool", prefix))
            if slot not in known and slot not in holes
        ]


def times_changed(store: Store) -> tuple[int, int]:
    """Where it is the same, no slot of the memory tier has come or gone. Raises StoreError."""
    with store.live.read() as txn:
        return store.ledger.allocated(txn, MEMORY), txn.get_int("meta", b"punched")


@contextmanager
def held_free(store: Store, slot_bytes: int, slots: Sequence[int]) -> Iterator[list[Space]]:
    """Those of the slots that are still free. Raises StoreError."""

    def hold(txn: Txn) -> list[int]:
        return [slot for slot in slots if txn.delete("free", _address(slot_bytes, slot))]

    with _held(store, slot_bytes, hold) as found:
        yield found


@contextmanager
def held_new(store: Store, slot_bytes: int, most: int) -> Iterator[list[Space]]:
    """Slots without pages, up to ``most`` and as far as the tier has room: the caller makes them.
    Raises StoreError."""

    def hold(txn: Txn) -> list[int]:
        room = int(HIGH_SHARE * store.ledger.cap(txn, MEMORY)) - store.ledger.allocated(txn, MEMORY)
        count = max(0, min(most, room // slot_bytes))
        return [store.ledger.new_slot(txn, MEMORY, slot_bytes) for _ in range(count)]

    with _held(store, slot_bytes, hold) as found:
        yield found


@contextmanager
def _held(store: Store, slot_bytes: int, take: Callable[[Txn], list[int]]) -> Iterator[list[Space]]:
    """If this process dies meanwhile, `recovery.reap` frees them."""
    found: list[Space] = []
    known = False
    ours = Claim(store.ledger.owner, CLAIM_HELD, bytes(16)).pack()

    def hold(txn: Txn) -> None:
        found.clear()
        for slot in take(txn):
            txn.put("claim", _address(slot_bytes, slot), ours)
            found.append(Space(slot, _version(txn, slot_bytes, slot), free=True))

    def free(txn: Txn) -> None:
        for one in found:
            if txn.get("claim", _address(slot_bytes, one.slot)) == ours:
                store.ledger.free_slot(txn, MEMORY, slot_bytes, one.slot)

    try:
        store.live.write(hold)
        known = True
        yield found
    finally:
        if found or not known:  # it may be held later: this comes after
            with suppress(StoreError):
                store.live.submit(free)


def _address(slot_bytes: int, slot: int) -> bytes:
    return pack_address(MEMORY, slot_bytes, slot)


def _version(txn: Txn, slot_bytes: int, slot: int) -> int:
    return txn.get_int("punched", _address(slot_bytes, slot))
