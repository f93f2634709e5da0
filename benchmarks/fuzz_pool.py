"""Fuzzing targets: what stands in a pool, whose engine others can write to."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np

from benchmarks.fuzz_target import Target
from prefixstore.codec import lossless
from prefixstore.codec.form import Form
from prefixstore.errors import DamagedError
from prefixstore.keys import ChunkRef, key_of
from prefixstore.layout import Buffer, Layout, checksum
from prefixstore.pool import coded, objects
from prefixstore.pool.objects import Shape
from prefixstore.putting import Labels

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=32)
FORM = Form(LAYOUT, "bfloat16")
LONG = Form(Layout(1, 2, 1, 64, 32), "bfloat16")  # pieces of which something smaller is made
NAME = b"N" * 16
SHAPE = Shape.of(NAME, LAYOUT, 512)
_PREIMAGE = bytes(16 + 4 * LAYOUT.chunk_tokens)
REF = ChunkRef(key_of(_PREIMAGE), _PREIMAGE, 0, bytes(8))
_SUM_STOP = 24  # of the magic and the sum, in a trailer and in a head


@lru_cache(2)
def payload(num_bytes: int = LAYOUT.payload_bytes) -> bytes:
    """KV as a model has it."""
    values = np.random.default_rng(1).normal(size=num_bytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def summed(magic: bytes, rest: bytes) -> memoryview:
    """With the sum that a forger would give it."""
    return memoryview(magic + checksum(rest) + rest)


def parse_trailer(data: bytes) -> None:
    """A trailer: of this chunk, or none."""
    forged, data = bool(data[:1] and data[0] & 1), data[1:]
    view = summed(objects.MAGIC, data) if forged else memoryview(data)
    found = objects.read_trailer(view, SHAPE, NAME, REF)
    if found is not None:
        assert found.row.namespace == NAME
        assert key_of(found.row.preimage) == REF.key
        assert len(found.table) == LAYOUT.num_pieces
    objects.read_head(view, SHAPE, NAME, REF.key)


def trailer_seeds() -> list[bytes]:
    """A good one, as it is and without its sum."""
    good = objects.make_trailer(SHAPE, REF, NAME, payload(), Labels(tag=b"tag"))
    return [b"\0" + good, b"\1" + good[_SUM_STOP:]]


def parse_coded(data: bytes) -> None:
    """The head of a coded chunk, and the pieces behind it: what comes out is what its sums say."""
    forged, data = bool(data[:1] and data[0] & 1), data[1:]
    (size,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
    first, rest = data[2 : 2 + size], memoryview(data[2 + size :])
    view = summed(coded.MAGIC, first) if forged else memoryview(first)
    head = coded.read_head(view, SHAPE, NAME, REF)
    if head is None:
        return
    every = range(LAYOUT.num_pieces)
    assert head.starts[-1] <= LAYOUT.payload_bytes
    if rest.nbytes < head.starts[-1]:
        return
    out = memoryview(bytearray(LAYOUT.payload_bytes))
    if coded.decode(head, FORM, every, rest[: int(head.starts[-1])], out):
        head.trailer.vouches_for(out, LAYOUT, LAYOUT.whole)


def parse_pieces(data: bytes) -> None:
    """Pieces, cut anywhere: all that they should fill, or an error."""
    count = 1 + (data[0] % 2 if data else 0)
    body = memoryview(data[1:])
    step = max(1, -(-body.nbytes // count))
    pieces = [body[at * step : (at + 1) * step] for at in range(count)]
    if not all(0 < piece.nbytes <= LONG.layout.piece_bytes for piece in pieces):
        return  # `coded` has seen to that
    out = memoryview(bytearray(count * LONG.layout.piece_bytes))
    lossless.decode(LONG, pieces, out)


def pieces_of(form: Form) -> list[Buffer]:
    """Of a coded payload. RuntimeError if nothing of it gets smaller."""
    pieces = lossless.encode(form, memoryview(payload(form.layout.payload_bytes)))
    if pieces is None:
        raise RuntimeError("a payload that gets no smaller")
    return pieces


def coded_seeds() -> list[bytes]:
    """A chunk, as it is and without its sum."""
    pieces = pieces_of(FORM)
    trailer = objects.make_trailer(SHAPE, REF, NAME, payload(), Labels())
    head, body = coded.make_head(trailer, pieces), b"".join(pieces)
    rest = head[_SUM_STOP:]
    return [
        b"\0" + struct.pack("<H", len(head)) + head + body,
        b"\1" + struct.pack("<H", len(rest)) + rest + body,
    ]


def piece_seeds() -> list[bytes]:
    """The first piece."""
    return [b"\0" + bytes(pieces_of(LONG)[0])]


TARGETS = [
    Target("pool_trailer", parse_trailer, (), trailer_seeds),
    Target("coded_chunk", parse_coded, (), coded_seeds),
    Target("coded_pieces", parse_pieces, (DamagedError,), piece_seeds),
]
