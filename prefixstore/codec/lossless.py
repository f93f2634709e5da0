"""Without loss: the exponents of a piece apart from its other bits, and those through zstd.

The exponents of KV are much alike (2.5 to 3 bits of 8 say it all), signs and mantissas are as good
as random, and mixed with them zstd finds nothing. The split is that of ZipNN (Hershcovitch et al.,
arXiv 2411.05239): each element is rotated left by a bit, which brings the exponent into its top
byte and the sign behind the mantissa.

    a piece: zstd frame of the top bytes, element after element | the other bytes, element after
             element, little-endian; or as it was, if that is not shorter

Elements of one byte (fp8) are not rotated and have nothing beside the frame. Level 1: higher ones
are slower and, with nothing to match, not smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from prefixstore.codec.form import Form
from prefixstore.errors import DamagedError
from prefixstore.layout import Buffer

_LEVEL = 1
_BLOCK_BYTES = 64 << 10  # split at a time: its copies stay in the cache
_UNSIGNED = {2: "<u2", 4: "<u4"}
_Bytes = npt.NDArray[np.uint8]


def encode(form: Form, payload: memoryview) -> list[Buffer] | None:
    """Each piece of a payload, none longer than it was; one that is as long is the piece itself.
    None: nothing gets smaller. The version of zstd decides which bytes they are."""
    size, width = form.layout.piece_bytes, form.width
    rows = np.frombuffer(payload, np.uint8).reshape(-1, size)
    step = max(1, _BLOCK_BYTES // size)
    pack = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress
    coded: list[Buffer] = []
    for at in range(0, len(rows), step):
        block = rows[at : at + step]
        tops, rests = _split(block, width)
        for piece, top, rest in zip(block, tops, rests, strict=True):
            found = pack(top.data) + rest.tobytes()
            coded.append(found if len(found) < size else piece.data)
    return coded if sum(map(len, coded)) < payload.nbytes else None


def decode(form: Form, coded: Sequence[memoryview], out: memoryview) -> None:
    """Fill ``out`` with any pieces, one after the other. Raises DamagedError for bytes that are
    none of this codec; takes no more memory than some times what it has to fill."""
    size, width = form.layout.piece_bytes, form.width
    rows = np.frombuffer(out, np.uint8).reshape(-1, size)
    unpack = zstandard.ZstdDecompressor().decompress
    count, rest_bytes = size // width, size - size // width
    step = max(1, _BLOCK_BYTES // size)
    for at in range(0, len(rows), step):
        block = coded[at : at + step]
        packed = [i for i, piece in enumerate(block) if piece.nbytes < size]
        tops = np.empty((len(packed), count), np.uint8)
        rests = np.empty((len(packed), rest_bytes), np.uint8)
        for row, i in enumerate(packed):
            frame_bytes = block[i].nbytes - rest_bytes
            tops[row] = _unpacked(unpack, block[i][: max(0, frame_bytes)], count)
            rests[row] = np.frombuffer(block[i][frame_bytes:], np.uint8)
        if packed:
            rows[[at + i for i in packed]] = _joined(tops, rests, width)
        for i, piece in enumerate(block):
            if piece.nbytes >= size:
                rows[at + i] = np.frombuffer(piece[:size], np.uint8)


def _unpacked(unpack: Any, frame: memoryview, count: int) -> _Bytes:
    """The bytes of a frame, if they are as many as they must be: it is asked what it says before
    anything of that size is taken. Raises DamagedError."""
    try:
        if zstandard.frame_content_size(frame) != count:
            raise DamagedError("a frame of zstd of another size")
        return np.frombuffer(unpack(frame, allow_extra_data=False), np.uint8, count)
    except (zstandard.ZstdError, ValueError) as error:
        raise DamagedError(f"no frame of zstd: {error}") from error


def _split(rows: _Bytes, width: int) -> tuple[_Bytes, _Bytes]:
    """Top bytes and the others of each element, [pieces, ..]."""
    if width == 1:
        return rows, rows[:, :0]
    elements: npt.NDArray[np.unsignedinteger[Any]] = rows.view(_UNSIGNED[width])
    turned = elements << 1
    turned |= elements >> (8 * width - 1)
    parts = turned.view(np.uint8).reshape(len(rows), -1, width)
    rest = np.ascontiguousarray(parts[..., : width - 1]).reshape(len(rows), -1)
    return np.ascontiguousarray(parts[..., width - 1]), rest


def _joined(tops: _Bytes, rests: _Bytes, width: int) -> _Bytes:
    """What `_split` took apart."""
    if width == 1:
        return tops
    parts = np.empty((*tops.shape, width), np.uint8)
    parts[..., width - 1] = tops
    parts[..., : width - 1] = rests.reshape(*tops.shape, width - 1)
    turned: npt.NDArray[np.unsignedinteger[Any]]
    turned = parts.reshape(len(tops), -1).view(_UNSIGNED[width])
    elements = turned >> 1
    elements |= turned << (8 * width - 1)
    return elements.view(np.uint8)
