"""Healing: a chunk whose bytes do not match its row is dropped, so that it can be stored again.

So is one whose row does not match its key, or what the ledger says of the chunk. A reader finds the
first by reading, and hands them to `heal`; the others it cannot use, and notes them in `Suspects`.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixstore.config import OP_DEADLINE_S, SUSPECTS_MAX
from prefixstore.errors import StoreError
from prefixstore.index import Txn
from prefixstore.keys import key_of
from prefixstore.layout import Layout
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES
from prefixstore.reading import read_checked
from prefixstore.recovery import entry_of
from prefixstore.rows import Row, readable, same_place
from prefixstore.settling import settle
from prefixstore.slots import ShortFileError

if TYPE_CHECKING:
    from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
LOG_PERIOD_S = 10.0
_DAMAGE = (errno.EIO, errno.ENOENT, errno.EINVAL)
_logged_at = -LOG_PERIOD_S


def fault(store: Store, tier: int, key: bytes, data: bytes) -> str:
    """Read a chunk into a buffer of its own and check all of it; "" when it is sound.

    ``data`` is its encoded row. Both ways of checking are tried: the hash of the payload and those
    of the pieces. Raises OSError where it cannot be read for a reason that says nothing about it: a
    lack of permission, memory or descriptors.
    """
    try:
        row = Row.unpack(data)
        layout = store.layout_of(row.namespace)
        if key_of(row.preimage) != key:
            return "its row is of other tokens"
        if row.slot_bytes != layout.slot_bytes:
            return "the row has another slot size than its namespace"
        if why := _contradiction(store, tier, key, row):
            return why
        return _mismatch(store, tier, key, row, layout)
    except OSError as error:
        if isinstance(error, ShortFileError) or error.errno in _DAMAGE:
            return str(error)
        raise
    except (ValueError, StoreError) as error:
        return str(error)


def _contradiction(store: Store, tier: int, key: bytes, row: Row) -> str:
    """What the ledger says of a chunk otherwise than its row; "" if nothing.

    `lifetime.set_ttl` changes the time to live in the row first and settles the ledger then, so
    that another time says nothing until the row's own is over for as long as a write may wait:
    nobody is given the chunk since, and the ledger would keep it.
    """
    with store.live.read() as txn:
        entry = store.ledger.entry(txn, tier, key)
    if entry is None:  # on its way in or out, or `accounting.rows_without_slot` says so
        return ""
    if entry._replace(expires_s=row.expires_s) != entry_of(row):
        return "its row says another slot, depth or owner than the ledger"
    overdue = 0 < row.expires_s <= time.time() - OP_DEADLINE_S
    if overdue and entry.expires_s != row.expires_s:
        return f"it expired at {row.expires_s} by its row, at {entry.expires_s} by the ledger"
    return ""


def _mismatch(store: Store, tier: int, key: bytes, row: Row, layout: Layout) -> str:
    out = memoryview(bytearray(layout.payload_bytes))
    file = store.file_of(tier, row.slot_bytes)
    if not read_checked(file, layout, key, row, out, layout.whole):
        return "the payload does not match its checksum"
    if not read_checked(file, layout, key, row.without_payload_sum(), out, layout.whole):
        return "the pieces or the trailer do not match their checksums"
    return ""


def heal(store: Store, tier: int, key: bytes, data: bytes) -> bool:
    """Drop a chunk if it is damaged and its row is still ``data`` (keeper thread)."""
    try:
        why = fault(store, tier, key, data)
    except OSError:
        return False
    with (store.live if tier == MEMORY else store.index).read() as txn:
        now = txn.get("chunk", key)
    if not why or now is None or not _same(now, data):
        return False
    store.keeper.count(f"corrupt_{TIER_NAMES[tier]}")
    _log(store, tier, key, why)

    def drop(txn: Txn) -> None:
        if txn.get("chunk", key) == now and not store.ledger.drop_memory(txn, key):
            txn.delete("chunk", key)  # the ledger knows nothing of it

    if tier == MEMORY:
        store.live.write(drop)
    else:
        store.disk.drop([key], {key: now})
    return True


def _same(one: bytes, other: bytes) -> bool:
    """Whether a row is still the same, but for what an operator may change: pins."""
    return one == other or (same_place(one, other) and one[20:24] == other[20:24])


def explain_miss(store: Store, tier: int, key: bytes, data: bytes) -> None:
    """Bytes did not match the row ``data``: tell a chunk that has moved on from one that is
    damaged, and heal the latter."""
    with (store.live if tier == MEMORY else store.index).read() as txn:
        now = txn.get("chunk", key)
    if now is None or not same_place(now, data):
        store.keeper.count("evicted_while_read")
    else:
        store.heal(tier, key, data)


def is_anothers(store: Store, key: bytes, asked: bytes, namespace: bytes, preimage: bytes) -> bool:
    """Whether a row of that namespace and preimage may be right, and who asks for it by that key
    and with the preimage ``asked`` is not: somebody came with another's key. Else the row is
    damaged."""
    if preimage == asked:
        with store.index.lookup("namespace") as known:
            return known(namespace) is not None
    return key_of(asked) != key


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row that is there and could not be used, and what its reader came with. ``data`` is empty
    where the ledger has a chunk (``tier`` is either) and no index a row of it."""

    tier: int
    key: bytes
    data: bytes
    namespace: bytes
    preimage: bytes


class Suspects:
    """Rows to look into. Reads no slot but of a chunk that it has found to be damaged: one that has
    expired, or was asked for by another's key, costs the keeper a look-up or a hash, the reader
    nothing, and stays as it is."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted: deque[Suspect] = deque(maxlen=SUSPECTS_MAX)
        self.note = self._noted.append

    def look_into(self) -> None:
        """Heal those that are damaged (keeper thread)."""
        if self._noted:
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            for suspect in dict.fromkeys(noted):
                if not suspect.data:
                    self._drop_rowless(suspect.key)
                elif self._is_damaged(suspect):
                    heal(self._store, suspect.tier, suspect.key, suspect.data)

    def _is_damaged(self, suspect: Suspect) -> bool:
        store, key, asked = self._store, suspect.key, suspect.preimage
        row = readable(suspect.data)
        if row is None:
            return True
        if (row.namespace, row.preimage) == (suspect.namespace, asked):
            return bool(_contradiction(store, suspect.tier, key, row))
        if not is_anothers(store, key, asked, row.namespace, row.preimage):
            return True
        if row.namespace == suspect.namespace:
            store.keeper.count("key_collisions")
        return False

    def _drop_rowless(self, key: bytes) -> None:
        """The key in the index was changed: nobody finds the chunk, and nobody may store it."""
        store = self._store

        def drop(txn: Txn) -> list[int]:
            in_memory = store.ledger.entry(txn, MEMORY, key) and txn.get("chunk", key) is None
            freed = settle(store.ledger, txn, key, store.disk.durable_row(key))
            if in_memory:
                store.ledger.drop_memory(txn, key)
            return [tier for tier, lost in ((MEMORY, in_memory), (DISK, freed)) if lost]

        for tier in store.live.write(drop):
            store.keeper.count(f"corrupt_{TIER_NAMES[tier]}")
            _log(store, tier, key, "it has a slot but no row")


def _log(store: Store, tier: int, key: bytes, why: str) -> None:
    """One line in a while: a bad disk damages thousands of chunks; the counter has them all."""
    global _logged_at
    if time.monotonic() - _logged_at >= LOG_PERIOD_S:
        _logged_at = time.monotonic()
        logger.warning(
            "%s: chunk %s in the %s tier is damaged and was dropped: %s",
            store.folder, key.hex(), TIER_NAMES[tier], why,
        )  # fmt: skip
