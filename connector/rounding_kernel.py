"""KV rounded to 8 bits and back, by one Triton kernel each way: `blend.rounding` takes a dozen
operations for it, each of which reads and writes it all.

What must hold: the same bits as there, so divisions are those of IEEE 754, and no product is fused
with a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from connector.compiling import compiling
from prefixstore.codec import FP8, INT8
from prefixstore.codec.rounded import SCALE_BYTES, SCALE_MIN, scales_bytes

ROWS_MAX = 8192  # tokens of a piece, and elements of each
TILE = 2048  # elements of a program: more do not fit its registers, with so many
WARPS = 4
_LARGEST, _STEPS = 448.0, 255.0  # in e4m3; of a byte
_TO_WHOLE = 1.5 * 2.0**23  # what it is added to has no bits left behind the point


@triton.jit
def _larger(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit
def _smaller(one, other):  # type: ignore[no-untyped-def]
    return tl.minimum(one, other)


@triton.jit
def _scale(span, parts, least):  # type: ignore[no-untyped-def]
    scale = tl.div_rn(span, parts)
    finite = (scale < float("inf")) & (scale > float("-inf"))
    return tl.where(finite, tl.maximum(scale, least), float("nan"))


@triton.jit
def _steps(x, inside, axis: tl.constexpr, steps, least):  # type: ignore[no-untyped-def]
    """The smallest of each row or column, and its step."""
    low = tl.reduce(tl.where(inside, x, float("inf")), axis, _smaller)
    high = tl.reduce(tl.where(inside, x, float("-inf")), axis, _larger)
    known = tl.reduce(tl.where(x != x, 1, 0), axis, _larger) == 0
    low = tl.where(known, low, float("nan"))
    return low, _scale(high - low, steps, least)


@triton.jit
def _codes(x, inside, low, step, to_whole):  # type: ignore[no-untyped-def]
    scaled = (tl.div_rn(x - low, step) + to_whole) - to_whole
    return tl.where(inside & (scaled == scaled), scaled, 0.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _channels(tokens, size, tall: tl.constexpr, channels: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's part of a piece of K by channel: all tokens of some channels. Those; where
    they are; which are there at all."""
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    token = tl.arange(0, tall)[:, None]
    inside = (token < tokens) & (channel < size)[None, :]
    return channel, token * size + channel[None, :], inside


@triton.jit
def _rows(tokens, size, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of other pieces: some tokens."""
    token = tl.program_id(1) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)[None, :]
    inside = (token < tokens)[:, None] & (column < size)
    return token, token[:, None] * size + column, inside


@triton.jit
def _encode_channels(  # type: ignore[no-untyped-def]
    source, piece, tokens, size, steps, least, to_whole, tall: tl.constexpr, channels: tl.constexpr
):  # fmt: skip
    channel, at, inside = _channels(tokens, size, tall, channels)
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    low, step = _steps(x, inside, 0, steps, least)
    scales = piece.to(tl.pointer_type(tl.float32))
    tl.store(scales + channel, low, mask=channel < size)
    tl.store(scales + size + channel, step, mask=channel < size)
    codes = _codes(x, inside, low[None, :], step[None, :], to_whole)
    tl.store(piece + 8 * size + at, codes, mask=inside)


@triton.jit
def _encode_rows(  # type: ignore[no-untyped-def]
    source, piece, tokens, size, largest, steps, least, to_whole,
    fp8: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    token, at, inside = _rows(tokens, size, rows, columns)
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    scales = piece.to(tl.pointer_type(tl.float32))
    if fp8:
        span = tl.reduce(tl.abs(x), 1, _larger)
        known = tl.reduce(tl.where(x != x, 1, 0), 1, _larger) == 0
        scale = _scale(tl.where(known, span, float("nan")), largest, least)
        tl.store(scales + token, scale, mask=token < tokens)
        codes = tl.div_rn(x, scale[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(piece + 4 * tokens + at, codes, mask=inside)
    else:
        low, step = _steps(x, inside, 1, steps, least)
        tl.store(scales + token, low, mask=token < tokens)
        tl.store(scales + tokens + token, step, mask=token < tokens)
        codes = _codes(x, inside, low[:, None], step[:, None], to_whole)
        tl.store(piece + 8 * tokens + at, codes, mask=inside)


# Else it would compile within a save or load: the first call is for one head.
@triton.jit(do_not_specialize=["heads"])
def _encode(  # type: ignore[no-untyped-def]
    kv, rounded, piece_bytes, heads, tokens, size, largest, steps, least, to_whole,
    fp8: tl.constexpr, by_plane: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    tall: tl.constexpr, channels: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    source, piece = kv + number * tokens * size, rounded + number * piece_bytes
    begin = (4 if fp8 else 8) * tokens
    if by_plane:
        if number // heads % 2 == 0:
            begin = 8 * size
            _encode_channels(
                source, piece, tokens, size, steps, least, to_whole, tall, channels
            )  # fmt: skip
        else:
            _encode_rows(
                source, piece, tokens, size, largest, steps, least, to_whole, fp8, rows, columns
            )  # fmt: skip
    else:
        _encode_rows(
            source, piece, tokens, size, largest, steps, least, to_whole, fp8, rows, columns
        )  # fmt: skip
    if tl.program_id(1) == 0:
        behind = begin + tokens * size + tl.arange(0, rest)
        tl.store(piece + behind, tl.full((rest,), 0, tl.uint8), mask=behind < piece_bytes)


@triton.jit
def _decode_channels(  # type: ignore[no-untyped-def]
    piece, out, tokens, size, tall: tl.constexpr, channels: tl.constexpr
):  # fmt: skip
    channel, at, inside = _channels(tokens, size, tall, channels)
    scales = piece.to(tl.pointer_type(tl.float32))
    low = tl.load(scales + channel, mask=channel < size, other=0.0)[None, :]
    step = tl.load(scales + size + channel, mask=channel < size, other=0.0)[None, :]
    codes = tl.load(piece + 8 * size + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (codes * step + low).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _decode_rows(  # type: ignore[no-untyped-def]
    piece, out, tokens, size, fp8: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    token, at, inside = _rows(tokens, size, rows, columns)
    scales = piece.to(tl.pointer_type(tl.float32))
    first = tl.load(scales + token, mask=token < tokens, other=0.0)[:, None]
    if fp8:
        codes = tl.load(piece + 4 * tokens + at, mask=inside, other=0)
        exact = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        tl.store(out + at, (exact * first).to(out.dtype.element_ty), mask=inside)
    else:
        step = tl.load(scales + tokens + token, mask=token < tokens, other=0.0)[:, None]
        codes = tl.load(piece + 8 * tokens + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, (codes * step + first).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _decode(  # type: ignore[no-untyped-def]
    rounded, kv, piece_bytes, heads, tokens, size,
    fp8: tl.constexpr, by_plane: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    tall: tl.constexpr, channels: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    piece, out = rounded + number * piece_bytes, kv + number * tokens * size
    if by_plane:
        if number // heads % 2 == 0:
            _decode_channels(piece, out, tokens, size, tall, channels)
        else:
            _decode_rows(piece, out, tokens, size, fp8, rows, columns)
    else:
        _decode_rows(piece, out, tokens, size, fp8, rows, columns)


class RoundingKernel:
    """For pieces of so many tokens of ``size`` elements; work is enqueued on the current stream."""

    def __init__(self, codec: str, tokens: int, size: int, piece_bytes: int) -> None:
        """Raises ValueError for pieces that are too large."""
        if max(tokens, size) > ROWS_MAX:
            raise ValueError(f"pieces of {tokens} x {size} elements; {ROWS_MAX} each way at most")
        self._tokens, self._size, self._piece_bytes = tokens, size, piece_bytes
        self._codec = codec
        tall, columns = triton.next_power_of_2(tokens), triton.next_power_of_2(size)
        rows, channels = min(tall, max(1, TILE // columns)), min(columns, max(1, TILE // tall))
        self._tiles = max(triton.cdiv(tokens, rows), triton.cdiv(size, channels))
        scales = min(scales_bytes(codec, is_key, tokens, size) for is_key in (True, False))
        self._rest = triton.next_power_of_2(max(1, piece_bytes - scales - tokens * size))
        self._options = {
            "fp8": codec == FP8, "rows": rows, "columns": columns, "tall": tall,
            "channels": channels, "num_warps": WARPS, "enable_fp_fusion": False,
        }  # fmt: skip

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        """``kv``: ``[n, layer, plane, head, token, element]``, ``out``: uint8 ``[n, bytes of a
        rounded chunk]``, both contiguous. Raises RuntimeError if the kernel cannot be compiled."""
        with compiling():
            _encode[(self._count(kv, out), self._tiles)](
                kv, out, self._piece_bytes, kv.shape[3], self._tokens, self._size,
                _LARGEST, _STEPS, SCALE_MIN, _TO_WHOLE,
                by_plane=self._by_plane(kv), rest=self._rest, **self._options,
            )  # fmt: skip

    def decode(self, rounded: torch.Tensor, kv: torch.Tensor) -> None:
        """The reverse, into ``kv``."""
        with compiling():
            _decode[(self._count(kv, rounded), self._tiles)](
                rounded, kv, self._piece_bytes, kv.shape[3], self._tokens, self._size,
                by_plane=self._by_plane(kv), **self._options,
            )  # fmt: skip

    def _by_plane(self, kv: torch.Tensor) -> bool:
        return self._codec == INT8 and kv.shape[2] == 2

    def _count(self, kv: torch.Tensor, rounded: torch.Tensor) -> int:
        """Pieces."""
        count = kv.shape[:4].numel()
        assert kv.is_contiguous()
        assert rounded.is_contiguous()
        assert kv.shape[4:] == (self._tokens, self._size)
        assert rounded.dtype == torch.uint8
        assert rounded.numel() == count * self._piece_bytes
        return count


assert SCALE_BYTES == 4  # as the kernels have it
