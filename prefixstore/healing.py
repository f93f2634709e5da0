"""Healing: a chunk whose bytes do not match its row is dropped, so that it can be stored again."""

from __future__ import annotations

import errno
import logging
import time
from typing import TYPE_CHECKING

from prefixstore.errors import StoreError
from prefixstore.keys import ChunkRef, key_of
from prefixstore.layout import Layout
from prefixstore.ledger import MEMORY, TIER_NAMES
from prefixstore.reading import read_checked
from prefixstore.rows import Row, same_place
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
    of the pieces.
    """
    try:
        row = Row.unpack(data)
        layout = store.layout_of(row.namespace)
        if key_of(row.preimage) != key:
            return "its row is of other tokens"
        if row.slot_bytes != layout.slot_bytes:
            return "the row has another slot size than its namespace"
        return _mismatch(store, tier, key, row, layout)
    except OSError as error:  # a lack of memory or descriptors says nothing about the chunk
        damage = isinstance(error, ShortFileError) or error.errno in _DAMAGE
        return str(error) if damage else ""
    except (ValueError, StoreError) as error:
        return str(error)


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
    why = fault(store, tier, key, data)
    with (store.live if tier == MEMORY else store.index).read() as txn:
        now = txn.get("chunk", key)
    if not why or now is None or not (now == data or same_place(now, data)):
        return False
    store.keeper.count(f"corrupt_{TIER_NAMES[tier]}")
    _log(store, tier, key, why)
    if tier == MEMORY:
        store.live.write(lambda txn: store.ledger.drop_memory(txn, key))
    else:
        store.disk.drop([key], {key: now})
    return True


def is_anothers(store: Store, ref: ChunkRef, namespace: bytes, preimage: bytes) -> bool:
    """Whether a row of that namespace and preimage may be right, and who asks for it by ``ref`` is
    not: somebody came with another's key. Else the row is damaged."""
    if preimage == ref.preimage:
        with store.index.lookup("namespace") as known:
            return known(namespace) is not None
    return key_of(ref.preimage) != ref.key


def _log(store: Store, tier: int, key: bytes, why: str) -> None:
    """One line in a while: a bad disk damages thousands of chunks; the counter has them all."""
    global _logged_at
    if time.monotonic() - _logged_at >= LOG_PERIOD_S:
        _logged_at = time.monotonic()
        logger.warning(
            "%s: chunk %s in the %s tier is damaged and was dropped: %s",
            store.folder, key.hex(), TIER_NAMES[tier], why,
        )  # fmt: skip
