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

ELEMENTS_MAX = 1 << 16  # of a piece: one program has them all in registers
PER_WARP = 512  # more do not fit the registers
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


# Else it would compile within a save or load: the first call is for one head.
@triton.jit(do_not_specialize=["heads"])
def _encode(  # type: ignore[no-untyped-def]
    kv, rounded, piece_bytes, heads, tokens, size, largest, steps, least, to_whole,
    fp8: tl.constexpr, by_plane: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    rest: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    piece = rounded + number * piece_bytes
    scales = piece.to(tl.pointer_type(tl.float32))
    line, row = tl.arange(0, rows), tl.arange(0, rows)[:, None]
    pillar, column = tl.arange(0, columns), tl.arange(0, columns)[None, :]
    inside = (row < tokens) & (column < size)
    at = row * size + column
    x = tl.load(kv + number * tokens * size + at, mask=inside, other=0.0).to(tl.float32)
    if fp8:
        span = tl.reduce(tl.abs(x), 1, _larger)
        known = tl.reduce(tl.where(x != x, 1, 0), 1, _larger) == 0
        scale = _scale(tl.where(known, span, float("nan")), largest, least)
        tl.store(scales + line, scale, mask=line < tokens)
        codes = tl.div_rn(x, scale[:, None]).to(tl.float8e4nv)
        begin = 4 * tokens
        tl.store(piece + begin + at, codes.to(tl.uint8, bitcast=True), mask=inside)
    elif by_plane and number // heads % 2 == 0:
        # Names of its own: it is decided as it runs, and shapes must not depend on that.
        lows, widths = _steps(x, inside, 0, steps, least)
        tl.store(scales + pillar, lows, mask=pillar < size)
        tl.store(scales + size + pillar, widths, mask=pillar < size)
        begin = 8 * size
        codes = _codes(x, inside, lows[None, :], widths[None, :], to_whole)
        tl.store(piece + begin + at, codes, mask=inside)
    else:
        low, step = _steps(x, inside, 1, steps, least)
        tl.store(scales + line, low, mask=line < tokens)
        tl.store(scales + tokens + line, step, mask=line < tokens)
        begin = 8 * tokens
        codes = _codes(x, inside, low[:, None], step[:, None], to_whole)
        tl.store(piece + begin + at, codes, mask=inside)
    behind = begin + tokens * size + tl.arange(0, rest)
    tl.store(piece + behind, tl.full((rest,), 0, tl.uint8), mask=behind < piece_bytes)


@triton.jit(do_not_specialize=["heads"])
def _decode(  # type: ignore[no-untyped-def]
    rounded, kv, piece_bytes, heads, tokens, size,
    fp8: tl.constexpr, by_plane: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    piece = rounded + number * piece_bytes
    scales = piece.to(tl.pointer_type(tl.float32))
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, columns)[None, :]
    inside = (row < tokens) & (column < size)
    at = row * size + column
    out = kv + number * tokens * size + at
    if fp8:
        scale = tl.load(scales + row, mask=row < tokens, other=0.0)
        codes = tl.load(piece + 4 * tokens + at, mask=inside, other=0)
        exact = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        tl.store(out, (exact * scale).to(kv.dtype.element_ty), mask=inside)
    elif by_plane and number // heads % 2 == 0:
        lows = tl.load(scales + column, mask=column < size, other=0.0)
        widths = tl.load(scales + size + column, mask=column < size, other=0.0)
        codes = tl.load(piece + 8 * size + at, mask=inside, other=0).to(tl.float32)
        tl.store(out, (codes * widths + lows).to(kv.dtype.element_ty), mask=inside)
    else:
        low = tl.load(scales + row, mask=row < tokens, other=0.0)
        step = tl.load(scales + tokens + row, mask=row < tokens, other=0.0)
        codes = tl.load(piece + 8 * tokens + at, mask=inside, other=0).to(tl.float32)
        tl.store(out, (codes * step + low).to(kv.dtype.element_ty), mask=inside)


class RoundingKernel:
    """For pieces of so many tokens of ``size`` elements; work is enqueued on the current stream."""

    def __init__(self, codec: str, tokens: int, size: int, piece_bytes: int) -> None:
        """Raises ValueError for pieces that are too large."""
        self._tokens, self._size, self._piece_bytes = tokens, size, piece_bytes
        self._codec = codec
        shape = triton.next_power_of_2(tokens), triton.next_power_of_2(size)
        elements = shape[0] * shape[1]
        if elements > ELEMENTS_MAX:
            raise ValueError(f"pieces of {tokens} x {size} elements; {ELEMENTS_MAX} at most")
        heads = (scales_bytes(codec, is_key, tokens, size) for is_key in (True, False))
        self._rest = triton.next_power_of_2(max(1, piece_bytes - min(heads) - tokens * size))
        self._options = {
            "fp8": codec == FP8, "rows": shape[0], "columns": shape[1],
            "num_warps": min(32, max(4, elements // PER_WARP)), "enable_fp_fusion": False,
        }  # fmt: skip

    def encode(self, kv: torch.Tensor, out: torch.Tensor) -> None:
        """``kv``: ``[n, layer, plane, head, token, element]``, ``out``: uint8 ``[n, bytes of a
        rounded chunk]``, both contiguous. Raises RuntimeError if the kernel cannot be compiled."""
        with compiling():
            _encode[(self._count(kv, out),)](
                kv, out, self._piece_bytes, kv.shape[3], self._tokens, self._size,
                _LARGEST, _STEPS, SCALE_MIN, _TO_WHOLE,
                by_plane=self._by_plane(kv), rest=self._rest, **self._options,
            )  # fmt: skip

    def decode(self, rounded: torch.Tensor, kv: torch.Tensor) -> None:
        """The reverse, into ``kv``."""
        with compiling():
            _decode[(self._count(kv, rounded),)](
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
