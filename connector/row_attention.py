"""Attention of rows that stand anywhere in a prompt, by a Triton kernel.

To a backend each row that stands alone is a sequence of its own, which reads all K and V before it:
of 4,915 rows scattered over 32,768 tokens that takes 45 ms a layer on an H200. Here a program takes
neighbouring rows and all query heads of a KV head, reads each key once for them, and masks by
position: 3 ms. Algorithm: FlashAttention-2 (Dao 2023), forward, with the rows' positions in place
of a triangular mask.

K and V are copied out of the pages first (.1 ms), since a loop that follows a block table is not
pipelined and takes 8 ms.
"""

from __future__ import annotations

from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

QUERIES = 128  # rows times query heads of a KV head that one program takes
KEYS = 128  # read at once
WARPS, STAGES = 8, 3
_LOG2_E = 1.4426950408889634


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _greater(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit
def _more(  # type: ignore[no-untyped-def]
    greatest, total, summed, scores, values, precision: tl.constexpr,
):  # fmt: skip
    """The softmax so far, with some keys more."""
    now = tl.maximum(greatest, tl.reduce(scores, 1, _greater))
    weights = tl.exp2(scores - now[:, None])
    fade = tl.exp2(greatest - now)
    total = total * fade + tl.reduce(weights, 1, _plus)
    weights = weights.to(values.dtype)
    return now, total, tl.dot(weights, values, summed * fade[:, None], input_precision=precision)


@triton.jit(do_not_specialize=["num_rows"])  # else it compiles within a request
def _attend(  # type: ignore[no-untyped-def]
    queries, out, keys, values, positions, num_rows, head_stride, scale,
    group: tl.constexpr, heads: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    size: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    # Those with the most keys first: they take longest.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_rows
    each = tl.arange(0, block_rows * group)
    row = first + each // group
    there = row < num_rows
    position = tl.load(positions + row, mask=there, other=0)
    column = tl.arange(0, size)[None, :]
    place = ((row * heads + head) * group + each % group).to(tl.int64)[:, None] * size + column
    query = tl.load(queries + place, mask=there[:, None], other=0.0)
    last = tl.load(positions + tl.minimum(first + block_rows, num_rows) - 1)
    all_see = (tl.load(positions + first) + 1) // block_keys * block_keys  # keys before: no mask

    greatest = tl.full((block_rows * group,), -float("inf"), tl.float32)
    total = tl.full((block_rows * group,), 0.0, tl.float32)
    summed = tl.full((block_rows * group, size), 0.0, tl.float32)
    for start in range(0, all_see, block_keys):
        at = (start + tl.arange(0, block_keys))[:, None] * size + column
        some = tl.load(keys + at)
        scores = tl.dot(query, tl.trans(some), input_precision=precision) * scale
        some = tl.load(values + at)
        greatest, total, summed = _more(greatest, total, summed, scores, some, precision)
    for start in range(all_see, last + 1, block_keys):
        key = start + tl.arange(0, block_keys)
        at, inside = key[:, None] * size + column, (key <= last)[:, None]
        some = tl.load(keys + at, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(some), input_precision=precision) * scale
        scores = tl.where(key[None, :] <= position[:, None], scores, -float("inf"))
        some = tl.load(values + at, mask=inside, other=0.0)
        greatest, total, summed = _more(greatest, total, summed, scores, some, precision)
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, result, mask=there[:, None])


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of rows to all positions up to their own; enqueued on the current stream.

    ``query`` and ``out``: ``[r, query heads, size]``; ``keys`` and ``values``: ``[kv heads, tokens,
    size]``, all contiguous; ``size`` and query heads of a KV head are powers of two; ``positions``:
    int64 ``[r]``, ascending. Raises ValueError for others, RuntimeError if the kernel cannot be
    compiled.
    """
    rows, num_heads, size = query.shape
    heads, _, key_size = keys.shape
    group = num_heads // heads
    powers = not (group & (group - 1) or size & (size - 1))
    fits = powers and size == key_size and query.dtype == keys.dtype
    if not fits or keys.stride() != values.stride() or (
        not all(one.is_contiguous() for one in (query, keys, out))
    ):  # fmt: skip
        raise ValueError(f"queries {tuple(query.shape)} for keys {tuple(keys.shape)}, or no rows")
    block_rows = max(1, QUERIES // group)
    try:
        _attend[(heads, triton.cdiv(rows, block_rows))](
            query, out, keys, values, positions, rows, keys.stride(0), scale * _LOG2_E,
            group=group, heads=heads, block_rows=block_rows, block_keys=KEYS, size=size,
            precision="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    except (TritonError, CalledProcessError) as error:  # the compilers'
        raise RuntimeError(f"the kernel does not compile: {error}") from error


class Attending:
    """An attention layer's implementation while `attend_rows` does its forward pass."""

    def __init__(self, impl: Any, attend: Any) -> None:
        self._impl, self._attend = impl, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def forward(
        self, layer: Any, query: torch.Tensor, *args: Any, output: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As vLLM calls it; K and V are in the pages."""
        self._attend(query.contiguous(), output)
        return output
