"""A chunk in a pool that `codec.lossless` made smaller: its head, and where its pieces are.

::

    KEY      head | the last part of the coded pieces, which stand one after the other
    KEY.W.cI part I of them, if they are longer than ``part_bytes``

    head: magic 8 | xxh3_128 of what follows, up to the coded pieces | u32 number of the codec
          | u32 bytes of the trailer | trailer (`objects`) | u32 bytes of each coded piece
          | u64 xxh3_64 of each

The trailer's sums are of what comes out of the codec: what a reader is given is checked like any
other chunk. What goes into it is checked by the sums of the coded pieces. What must hold: no piece
is longer than it was, so whoever wrote it, no chunk takes more memory to be read than its payload.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import xxhash

from prefixstore.codec import lossless
from prefixstore.codec.form import Form
from prefixstore.errors import DamagedError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Buffer, checksum, pack_sums
from prefixstore.pool.objects import Shape, Trailer, read_trailer

MAGIC = b"PFXCODE1"
_HEAD = struct.Struct("<8s16sII")
_SUMMED = 24  # where what is summed begins
TRAILER_AT = _HEAD.size
_PER_PIECE = 4 + 8
_LOSSLESS = 1  # the codec's number; 2 and 3 were other codecs, and are never used again


def make_head(trailer: bytes, pieces: Sequence[Buffer]) -> bytes:
    """The head of a coded chunk."""
    sizes = np.array([memoryview(piece).nbytes for piece in pieces], "<u4").tobytes()
    sums = pack_sums([xxhash.xxh3_64_intdigest(piece) for piece in pieces])
    rest = struct.pack("<II", _LOSSLESS, len(trailer)) + trailer + sizes + sums
    return MAGIC + checksum(rest) + rest


def head_bytes(shape: Shape, ref: ChunkRef) -> int:
    """Bytes of a head, at most."""
    return _HEAD.size + shape.trailer_bytes(ref) + _PER_PIECE * shape.layout.num_pieces


@dataclass(frozen=True, slots=True)
class Head:
    """A head that was found to be sound."""

    trailer: Trailer
    shape: Shape
    starts: npt.NDArray[np.int64]  # of each coded piece, and where the last ends
    sums: memoryview  # of u64

    def runs(self, which: Sequence[int]) -> list[tuple[int, int]]:
        """Where pieces are that are to be read, rising: (start, bytes), neighbours as one."""
        numbered = groupby(enumerate(which), key=lambda pair: pair[1] - pair[0])
        rows = [[piece for _, piece in group] for _, group in numbered]
        at = self.starts
        return [(int(at[row[0]]), int(at[row[-1] + 1] - at[row[0]])) for row in rows]

    def pieces(self, which: Sequence[int], data: memoryview) -> list[memoryview] | None:
        """Coded pieces that stand in a row; None if one is not what it was."""
        found, start, digest = [], 0, xxhash.xxh3_64_intdigest
        for piece in which:
            stop = start + int(self.starts[piece + 1] - self.starts[piece])
            found.append(data[start:stop])
            if digest(found[-1]) != self.sums[piece]:
                return None
            start = stop
        return found


def read_head(data: memoryview, shape: Shape, namespace: bytes, ref: ChunkRef) -> Head | None:
    """The head of a chunk of these tokens; None for bytes that are none, or of another codec."""
    if data.nbytes < _HEAD.size:
        return None
    magic, told, number, trailer_bytes = _HEAD.unpack_from(data)
    count = shape.layout.num_pieces
    sizes_at = _HEAD.size + trailer_bytes
    stop = sizes_at + _PER_PIECE * count
    if magic != MAGIC or stop > data.nbytes or checksum(data[_SUMMED:stop]) != told:
        return None
    trailer = read_trailer(data[TRAILER_AT:sizes_at], shape, namespace, ref)
    if number != _LOSSLESS or trailer is None:
        return None
    sizes = np.frombuffer(data[sizes_at : sizes_at + 4 * count], "<u4")
    if not (sizes > 0).all() or (sizes > shape.layout.piece_bytes).any():
        return None
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    sums = memoryview(bytes(data[sizes_at + 4 * count : stop])).cast("Q")
    cut = shape.by(trailer.row.slot).coded(int(starts[-1]), stop)
    return Head(trailer, cut, starts, sums)


def decode(head: Head, form: Form, which: Sequence[int], data: memoryview, out: memoryview) -> bool:
    """Fill ``out`` with pieces out of what was read of a chunk; whether they are right so far as
    the coded bytes say."""
    pieces = head.pieces(which, data)
    if pieces is None:
        return False
    try:
        lossless.decode(form, pieces, out)
    except DamagedError:
        return False
    return True
