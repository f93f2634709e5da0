"""The bytes of a slot: which (layer, plane, head) piece lies where, and their checksums.

A slot holds one chunk: ``payload | trailer | padding to 4 KiB``. The payload is
``[layer][plane][kv_head][token][dim]`` in the engine's own bytes; planes are K and V (one latent
plane for MLA). So a layer range with all heads is one contiguous run, and a head range is one run
per (layer, plane): tensor-parallel ranks fill and read their part in place, and a chunk written by
two ranks reads on one.

The trailer is ``magic | key | xxh3_64 of each piece``. The index row holds xxh3_128 of the trailer
(so a misdirected or stale slot fails, not only a torn one) and, when one writer had the whole
payload in hand, xxh3_128 of the payload: one hash over 8 MiB runs at 32 GB/s where 512 hashes of
16 KiB run at 15 GB/s, so whole-chunk reads use it and range reads use the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from prefixstore.config import PAGE_BYTES
from prefixstore.errors import LayoutError

Sums = npt.NDArray[np.uint64]  # xxh3_64 of pieces, in order

TRAILER_MAGIC = b"PFXSLOT1"
TRAILER_HEAD_BYTES = 32  # magic 8, key 16, reserved 8
SLOT_BYTES_MAX = 1 << 30

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Roi:
    """A region of a chunk: a half-open range of layers x a half-open range of KV heads."""

    layer_start: int
    layer_stop: int
    head_start: int
    head_stop: int


@dataclass(frozen=True)
class Run:
    """A contiguous part of a region: its place in the slot, its place in the caller's buffer."""

    slot_offset: int
    buffer_offset: int
    num_bytes: int

    def in_slot(self, slot: memoryview) -> memoryview:
        """The run in a view of the slot."""
        return slot[self.slot_offset : self.slot_offset + self.num_bytes]

    def in_buffer(self, buffer: memoryview) -> memoryview:
        """The run in the caller's buffer."""
        return buffer[self.buffer_offset : self.buffer_offset + self.num_bytes]


@dataclass(frozen=True)
class Layout:
    """Sizes of one chunk of a namespace. ``head_bytes`` = head size x bytes per element."""

    num_layers: int
    num_planes: int
    num_heads: int
    chunk_tokens: int
    head_bytes: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_planes", "num_heads", "chunk_tokens", "head_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise LayoutError(f"{name}={value!r} in a layout", "give a whole number above 0")
        if self.slot_bytes > SLOT_BYTES_MAX:
            raise LayoutError(
                f"a chunk of {self.slot_bytes} bytes is over the limit of {SLOT_BYTES_MAX}",
                "choose a smaller chunk_tokens",
            )

    @cached_property
    def piece_bytes(self) -> int:
        """Bytes of one (layer, plane, head)."""
        return self.chunk_tokens * self.head_bytes

    @cached_property
    def num_pieces(self) -> int:
        """Pieces of a chunk."""
        return self.num_layers * self.num_planes * self.num_heads

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of KV in a chunk."""
        return self.num_pieces * self.piece_bytes

    @cached_property
    def trailer_bytes(self) -> int:
        """Bytes of the trailer behind the payload."""
        return TRAILER_HEAD_BYTES + 8 * self.num_pieces

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of 4 KiB."""
        total = self.payload_bytes + self.trailer_bytes
        return -(-total // PAGE_BYTES) * PAGE_BYTES

    @cached_property
    def whole(self) -> Roi:
        """The region that is the whole chunk."""
        return Roi(0, self.num_layers, 0, self.num_heads)

    @cached_property
    def trailer_run(self) -> Run:
        """Where the trailer stands in the slot."""
        return Run(self.payload_bytes, 0, self.trailer_bytes)

    @cached_property
    def tail_run(self) -> Run:
        """The trailer and the padding behind it."""
        return Run(self.payload_bytes, 0, self.slot_bytes - self.payload_bytes)

    @cached_property
    def slot_run(self) -> Run:
        """The whole slot, trailer and padding included."""
        return Run(0, 0, self.slot_bytes)

    def check(self, roi: Roi) -> None:
        """Raise LayoutError unless the region is inside the chunk and not empty."""
        if not (
            0 <= roi.layer_start < roi.layer_stop <= self.num_layers
            and 0 <= roi.head_start < roi.head_stop <= self.num_heads
        ):
            raise LayoutError(
                f"region {roi} is outside of {self.num_layers} layers x {self.num_heads} heads",
                "give half-open ranges inside the model",
            )

    def roi_bytes(self, roi: Roi) -> int:
        """Bytes of a region."""
        layers, heads = roi.layer_stop - roi.layer_start, roi.head_stop - roi.head_start
        return layers * self.num_planes * heads * self.piece_bytes

    def runs(self, roi: Roi) -> list[Run]:
        """The contiguous runs of a region, in the order of the caller's buffer."""
        heads = roi.head_stop - roi.head_start
        plane_bytes = self.num_heads * self.piece_bytes
        first = roi.layer_start * self.num_planes
        last = roi.layer_stop * self.num_planes
        if heads == self.num_heads:
            return [Run(first * plane_bytes, 0, (last - first) * plane_bytes)]
        skip, length = roi.head_start * self.piece_bytes, heads * self.piece_bytes
        return [
            Run(plane * plane_bytes + skip, (plane - first) * length, length)
            for plane in range(first, last)
        ]

    def piece_indices(self, roi: Roi) -> list[int]:
        """Indices into the checksum table, in the order of the caller's buffer."""
        return [
            plane * self.num_heads + head
            for plane in range(roi.layer_start * self.num_planes, roi.layer_stop * self.num_planes)
            for head in range(roi.head_start, roi.head_stop)
        ]

    def piece_sums(self, buffer: Buffer) -> list[int]:
        """xxh3_64 of each piece of a region held in a contiguous buffer."""
        view, size = memoryview(buffer), self.piece_bytes
        digest = xxhash.xxh3_64_intdigest
        return [digest(view[at : at + size]) for at in range(0, len(view), size)]

    def trailer(self, key: bytes, sums: bytes) -> bytes:
        """Trailer of a slot; ``sums`` is the table of little-endian u64."""
        assert len(key) == 16
        assert len(sums) == 8 * self.num_pieces
        return TRAILER_MAGIC + key + bytes(8) + sums

    def padded(self, trailer: bytes) -> memoryview:
        """The trailer with the padding behind it: a slot is written to its very end."""
        return memoryview(trailer.ljust(self.slot_bytes - self.payload_bytes, b"\0"))

    def to_json(self) -> dict[str, int]:
        """Fields for the namespace record."""
        return {
            "num_layers": self.num_layers,
            "num_planes": self.num_planes,
            "num_heads": self.num_heads,
            "chunk_tokens": self.chunk_tokens,
            "head_bytes": self.head_bytes,
        }


def pack_sums(sums: Sequence[int] | Sums) -> bytes:
    """The checksum table: little-endian u64."""
    return np.asarray(sums, "<u8").tobytes()


def checksum(data: Buffer) -> bytes:
    """xxh3_128, big-endian digest: the checksum of payloads and trailers."""
    return xxhash.xxh3_128_digest(data)
