"""What a chunk looks like in a pool: its names there, its trailer, how its bytes are cut.

::

    PREFIX/NAMESPACE/KEY        the last part of the payload, then the trailer
    PREFIX/NAMESPACE/KEY.W.I    part I of the payload, if it is longer than ``part_bytes``; W, eight
                                hex digits, says whose it is
    PREFIX/NAMESPACE/KEY.W.cI   part I of a coded payload (`coded`, which says what KEY is then)
    PREFIX/NAMESPACE/KEY.s      what was measured of its tokens (`staleness`): xxh3_128 of KEY and
                                what follows | float16
    PREFIX/models/NAMESPACE     xxh3_128 | the model's identity and layout, JSON

    trailer: magic 8 | xxh3_128 of what follows, up to the table | u32 bytes of the row
             | u32 part_bytes | row (see `rows`; its slot is W, 0 if there are no parts)
             | table of the pieces' xxh3_64

The object without a number is written last, so a chunk is there with all its parts or not at all.
Its parts are nobody else's: who stores the same chunk at the same time writes others, and of both
objects without a number the first stays. Older versions wrote parts as KEY.I and KEY.cI, with slot
0: those are read as ever.
The payload comes first, so any region can be read by a range. What must hold: nothing that an
engine gives is used before `read_trailer` has found that it is this very chunk, and its bytes what
the trailer says.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace

from prefixstore.config import TAG_BYTES_MAX
from prefixstore.keys import KEY_BYTES, ChunkRef, key_of
from prefixstore.layout import Buffer, Layout, Roi, checksum, pack_sums
from prefixstore.putting import Labels
from prefixstore.rows import FLAG_ALONE, FLAG_PAYLOAD_SUM, ROW_HEAD_BYTES, Row
from prefixstore.serve.limits import ITEMS_BYTES_MAX

PREFIX = "prefixstore/1"  # raise it if older objects cannot be read: then they are not seen
MAGIC = b"PFXPOOL1"
_HEAD = struct.Struct("<8s16sII")
_SUMMED = 24  # where what is summed begins


@dataclass(frozen=True, slots=True)
class Shape:
    """How the chunks of a layout are cut; or one that is coded: its bytes stand in the payload's
    place, and ``head_bytes`` before the last part of them. Pure."""

    prefix: str  # of all names of the namespace
    layout: Layout
    part_bytes: int
    stream_bytes: int  # that are cut into parts
    head_bytes: int = 0
    writer: int = 0  # in the names of its parts; 0: there is none in them

    @classmethod
    def of(cls, name: bytes, layout: Layout, part_bytes: int, prefix: str = PREFIX) -> Shape:
        """That of a namespace."""
        return cls(f"{prefix}/{name.hex()}", layout, part_bytes, layout.payload_bytes)

    def coded(self, stream_bytes: int, head_bytes: int) -> Shape:
        """That of one coded chunk."""
        return replace(self, stream_bytes=stream_bytes, head_bytes=head_bytes)

    def by(self, writer: int) -> Shape:
        """That of one writer's chunk."""
        return replace(self, writer=writer)

    @property
    def last_start(self) -> int:
        """Where in the payload the part begins that is in the object with the trailer."""
        return (self.stream_bytes - 1) // self.part_bytes * self.part_bytes

    @property
    def last_bytes(self) -> int:
        """Bytes of that part: where the trailer begins, if it stands behind it."""
        return self.stream_bytes - self.last_start

    @property
    def num_parts(self) -> int:
        """Other parts."""
        return self.last_start // self.part_bytes

    def object_of(self, key: bytes) -> str:
        """The name of the object with the trailer."""
        return f"{self.prefix}/{key.hex()}"

    def part_of(self, key: bytes, number: int) -> str:
        """The name of another part. Nobody may write over it while there is an object that says it
        is there, so it is another one for another writer, and for the same with a codec."""
        writer = f".{self.writer:08x}" * bool(self.writer)
        return f"{self.prefix}/{key.hex()}{writer}.{'c' * bool(self.head_bytes)}{number}"

    def staleness_of(self, key: bytes) -> str:
        """The name of what was measured of a chunk."""
        return f"{self.prefix}/{key.hex()}.s"

    def names_of(self, key: bytes) -> list[str]:
        """All names of a writer's chunk, coded or not, the one with the trailer first."""
        shapes = (self, self.coded(self.stream_bytes, 1))
        parts = (one.part_of(key, i) for one in shapes for i in range(self.num_parts))
        return [self.object_of(key), *parts, self.staleness_of(key)]

    def cut(
        self, key: bytes, start: int, out: memoryview
    ) -> list[tuple[str, tuple[int, memoryview]]]:
        """Where bytes of the payload from ``start`` on are: the object, the offset in it, and the
        part of ``out`` that they fill."""
        found = []
        while out.nbytes:
            number = min(start // self.part_bytes, self.num_parts)
            last = number == self.num_parts
            name = self.object_of(key) if last else self.part_of(key, number)
            offset = start - number * self.part_bytes
            found_at = self.head_bytes + offset if last else offset
            taken = out.nbytes if last else min(out.nbytes, self.part_bytes - offset)
            found.append((name, (found_at, out[:taken])))
            start, out = start + taken, out[taken:]
        return found

    def row_bytes(self, ref: ChunkRef) -> int:
        """Bytes of a chunk's trailer before its table, at most: of a tag, and of items if the
        preimage is not told, nobody knows the length."""
        most = KEY_BYTES + 4 * self.layout.chunk_tokens + ITEMS_BYTES_MAX
        return head_bytes(len(ref.preimage) or most)

    def trailer_bytes(self, ref: ChunkRef) -> int:
        """Bytes of a chunk's trailer, at most."""
        return self.row_bytes(ref) + 8 * self.layout.num_pieces


def head_bytes(preimage_bytes: int) -> int:
    """Bytes of a trailer before its table, at most."""
    return _HEAD.size + ROW_HEAD_BYTES + TAG_BYTES_MAX + preimage_bytes


@dataclass(frozen=True, slots=True)
class Trailer:
    """A trailer that was found to be sound."""

    row: Row
    table: memoryview  # of u64; empty if only the head was read

    def vouches_for(self, out: memoryview, layout: Layout, roi: Roi) -> bool:
        """Whether bytes are those of a region of the chunk."""
        if roi == layout.whole:
            return checksum(out) == self.row.payload_sum
        return [self.table[i] for i in layout.piece_indices(roi)] == layout.piece_sums(out)


def trailer_size(shape: Shape, ref: ChunkRef, labels: Labels) -> int:
    """Bytes of what `make_trailer` makes."""
    row = ROW_HEAD_BYTES + len(labels.tag) + len(ref.preimage)
    return _HEAD.size + row + 8 * shape.layout.num_pieces


def make_trailer(
    shape: Shape, ref: ChunkRef, namespace: bytes, payload: Buffer, labels: Labels
) -> bytes:
    """The trailer of a chunk."""
    table = pack_sums(shape.layout.piece_sums(payload))
    row = Row(
        flags=FLAG_PAYLOAD_SUM | (FLAG_ALONE if labels.alone else 0),
        depth=ref.depth,
        slot=shape.writer,
        slot_bytes=shape.layout.slot_bytes,
        created_s=int(time.time()),
        expires_s=labels.expires_s,
        namespace=namespace,
        salt=ref.salt,
        trailer_sum=checksum(table),
        payload_sum=checksum(payload),
        tag=labels.tag,
        preimage=ref.preimage,
    ).pack()
    rest = struct.pack("<II", len(row), shape.part_bytes) + row
    return MAGIC + checksum(rest) + rest + table


def read_head(data: memoryview, shape: Shape, namespace: bytes, key: bytes) -> Row | None:
    """The row in a trailer, or in what stands before its table; None for bytes that are not of
    this chunk, of this namespace, cut like this, or that are out of date."""
    if data.nbytes < _HEAD.size:
        return None
    magic, told, row_bytes, part_bytes = _HEAD.unpack_from(data)
    stop = _HEAD.size + row_bytes
    if magic != MAGIC or stop > data.nbytes or checksum(data[_SUMMED:stop]) != told:
        return None
    try:
        row = Row.unpack(bytes(data[_HEAD.size : stop]))
    except ValueError:
        return None
    if (row.namespace, row.slot_bytes, part_bytes) != (
        namespace, shape.layout.slot_bytes, shape.part_bytes,
    ):  # fmt: skip
        return None
    if key_of(row.preimage) != key or 0 < row.expires_s <= time.time():
        return None
    return row


def read_trailer(data: memoryview, shape: Shape, namespace: bytes, ref: ChunkRef) -> Trailer | None:
    """A trailer that is of a chunk of these very tokens, and whose table is what its row says."""
    row = read_head(data, shape, namespace, ref.key)
    if row is None or (ref.preimage and row.preimage != ref.preimage):
        return None
    start = _HEAD.size + len(row.pack())
    table = data[start : start + 8 * shape.layout.num_pieces]
    if table.nbytes != 8 * shape.layout.num_pieces or checksum(table) != row.trailer_sum:
        return None
    return Trailer(row, memoryview(bytes(table)).cast("Q"))
