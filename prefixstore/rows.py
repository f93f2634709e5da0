"""Index rows: how a chunk and the small records around it are encoded. Little-endian throughout.

A row says all that is needed to trust a slot: where it is, whose it is, its checksums, and the
preimage of its key, which a hit compares byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple, cast

from prefixstore.config import PAGE_BYTES

ROW_VERSION = 1
FLAG_PINNED = 1
FLAG_PAYLOAD_SUM = 2  # payload_sum is set; otherwise only the pieces can be checked
FLAG_ALONE = 4  # its text was encoded alone: a better source of segments (segment_index)

_ROW = struct.Struct("<BBHIIIII16s8s16s16s")
ROW_HEAD_BYTES = _ROW.size
SCOPE = slice(24, 48)  # of an encoded row: namespace and salt digest
NAMESPACE = slice(24, 40)
_namespace_of = itemgetter(NAMESPACE)
_expiry_of = itemgetter(slice(20, 24))  # of an encoded row: the bytes of expires_s
_NEVER = bytes(4)


class Row(NamedTuple):
    """One chunk in one tier."""

    flags: int
    depth: int  # ordinal of the chunk in its prompt
    slot: int
    slot_bytes: int
    created_s: int
    expires_s: int  # 0: never
    namespace: bytes
    salt: bytes  # keys.salt_digest
    trailer_sum: bytes
    payload_sum: bytes
    tag: bytes
    preimage: bytes

    def pack(self) -> bytes:
        """Encode."""
        head = _ROW.pack(
            ROW_VERSION,
            self.flags,
            len(self.tag),
            self.depth,
            self.slot,
            self.slot_bytes,
            self.created_s,
            self.expires_s,
            self.namespace,
            self.salt,
            self.trailer_sum,
            self.payload_sum,
        )
        return head + self.tag + self.preimage

    @classmethod
    def unpack(cls, data: bytes) -> Row:
        """Decode. Raises ValueError for bytes that are no row."""
        if len(data) < ROW_HEAD_BYTES:
            raise ValueError(f"not an index row: {len(data)} bytes")
        if data[0] != ROW_VERSION:
            raise ValueError(f"not an index row of version {ROW_VERSION}, but of {data[0]}")
        head = _ROW.unpack_from(data)
        body = ROW_HEAD_BYTES + head[2]
        flags, _, depth, slot, slot_bytes, created_s, expires_s, *digests = head[1:]
        namespace, salt, trailer_sum, payload_sum = digests
        if slot_bytes == 0 or slot_bytes % PAGE_BYTES:
            raise ValueError(f"not an index row: slots of {slot_bytes} bytes")
        return cls(
            flags, depth, slot, slot_bytes, created_s, expires_s,
            namespace, salt, trailer_sum, payload_sum, data[ROW_HEAD_BYTES:body], data[body:],
        )  # fmt: skip

    @property
    def pinned(self) -> bool:
        """Whether the row is exempt from eviction."""
        return bool(self.flags & FLAG_PINNED)

    def with_pin(self, pinned: bool) -> Row:
        """The same row, pinned or not."""
        flags = self.flags | FLAG_PINNED if pinned else self.flags & ~FLAG_PINNED
        return self._replace(flags=flags)

    def without_payload_sum(self) -> Row:
        """The same row, to be checked by its pieces."""
        return self._replace(flags=self.flags & ~FLAG_PAYLOAD_SUM)

    def at(self, slot: int) -> Row:
        """The same chunk in another slot."""
        return self._replace(slot=slot)


def readable(data: bytes) -> Row | None:
    """The row; None for a damaged page of the index (a read heals it)."""
    try:
        return Row.unpack(data)
    except ValueError:
        return None


def same_place(one: bytes, other: bytes) -> bool:
    """Whether two encoded rows speak of the same slot with the same content (pins may differ)."""
    return one[8:16] == other[8:16] and one[24:80] == other[24:80]


def stands_in(data: bytes, slot_bytes: int, slot: int) -> bool:
    """Whether an encoded row says that its chunk is in that slot; so does one that is no row."""
    row = readable(data)
    return row is None or (row.slot_bytes, row.slot) == (slot_bytes, slot)


def usable_rows(
    rows: Sequence[bytes | None], preimages: Sequence[bytes], namespace: bytes, now_s: int
) -> int:
    """How many leading rows are there, are of these preimages and have not expired."""
    there = rows[: rows.index(None)] if None in rows else rows
    preimages = preimages[: len(there)]
    there = cast("Sequence[bytes]", there)
    for i, found in enumerate(map(_namespace_of, there)):
        if found != namespace:  # somebody came with another's key
            there = there[:i]
            break
    for i, same in enumerate(map(bytes.endswith, there, preimages)):
        if not same or len(there[i]) < ROW_HEAD_BYTES + len(preimages[i]):
            there = there[:i]
            break
    for i, expires in enumerate(map(_expiry_of, there)):
        if expires != _NEVER and int.from_bytes(expires, "little") <= now_s:
            return i
    return len(there)


_ADDRESS = struct.Struct(">BII")


def pack_address(tier: int, slot_bytes: int, slot: int) -> bytes:
    """Nine bytes naming a slot; big-endian, so that a tier and a slot size are key prefixes."""
    return _ADDRESS.pack(tier, slot_bytes, slot)


def unpack_address(data: bytes) -> tuple[int, int, int]:
    """(tier, slot_bytes, slot)."""
    tier, slot_bytes, slot = _ADDRESS.unpack_from(data)
    return tier, slot_bytes, slot


_POOL = struct.Struct(">BI")


def pool_key(tier: int, slot_bytes: int) -> bytes:
    """Key of the ledger's table ``pool``; addresses of those slots begin with it."""
    return _POOL.pack(tier, slot_bytes)


_CLAIM = struct.Struct("<IB16s")
CLAIM_SPILL, CLAIM_EVICT, CLAIM_LIMBO, CLAIM_HELD = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot between two states: being filled from memory, being evicted, still leased, or held
    (`holding`)."""

    owner: int
    kind: int
    key: bytes

    def pack(self) -> bytes:
        """Encode."""
        return _CLAIM.pack(self.owner, self.kind, self.key)

    @classmethod
    def unpack(cls, data: bytes) -> Claim:
        """Decode."""
        return cls(*_CLAIM.unpack(data))


_PENDING = struct.Struct("<IIQd16s8sH")


@dataclass(frozen=True, slots=True)
class Pending:
    """A chunk that is being filled: which slot, for whom, by whom, and the checksums that arrived.

    ``sums`` and ``present`` are empty until the first part of several arrives: a chunk written in
    one piece never stores them.
    """

    slot: int
    slot_bytes: int
    group: int
    deadline_s: float
    namespace: bytes
    salt: bytes
    writers: tuple[int, ...]  # owners with a copy under way
    present: bytes  # one byte a piece: 1 when it has arrived
    sums: bytes

    def pack(self) -> bytes:
        """Encode."""
        head = _PENDING.pack(
            self.slot, self.slot_bytes, self.group, self.deadline_s, self.namespace, self.salt,
            len(self.writers),
        )  # fmt: skip
        writers = struct.pack(f"<{len(self.writers)}I", *self.writers)
        return head + writers + self.present + self.sums

    @classmethod
    def unpack(cls, data: bytes) -> Pending:
        """Decode."""
        slot, slot_bytes, group, deadline_s, namespace, salt, count = _PENDING.unpack_from(data)
        at = _PENDING.size + 4 * count
        writers = struct.unpack_from(f"<{count}I", data, _PENDING.size)
        pieces = (len(data) - at) // 9
        return cls(
            slot,
            slot_bytes,
            group,
            deadline_s,
            namespace,
            salt,
            writers,
            data[at : at + pieces],
            data[at + pieces :],
        )


ENTRY = struct.Struct("<IIII16s8s")


class Entry(NamedTuple):
    """What the eviction order knows of a chunk without reading its row."""

    slot_bytes: int
    slot: int
    depth: int
    expires_s: int  # 0: never
    namespace: bytes
    salt: bytes
