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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from connector.compiling import compiling

_LOG2_E = 1.4426950408889634


class Shape(NamedTuple):
    """Of one program."""

    queries: int  # rows times query heads of a KV head that it takes
    keys: int  # read at once
    warps: int
    stages: int


# The fastest on an H200 first; those behind need less of a GPU's shared memory.
SHAPES = (Shape(128, 128, 8, 3), Shape(128, 64, 8, 2), Shape(64, 32, 4, 2), Shape(32, 16, 4, 1))


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


# Else it would compile within a request.
@triton.jit(do_not_specialize=["num_rows", "positions"])
def _attend(  # type: ignore[no-untyped-def]
    queries, out, keys, values, positions, num_rows, head_stride, scale,
    group: tl.constexpr, padded: tl.constexpr, heads: tl.constexpr, block_rows: tl.constexpr,
    block_keys: tl.constexpr, size: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    # Those with the most keys first: they take longest.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_rows
    each = tl.arange(0, block_rows * padded)
    row = first + each // padded
    there = (row < num_rows) & (each % padded < group)
    position = tl.load(positions + row, mask=row < num_rows, other=0)
    column = tl.arange(0, size)[None, :]
    place = ((row * heads + head) * group + each % padded).to(tl.int64)[:, None] * size + column
    query = tl.load(queries + place, mask=there[:, None], other=0.0)
    last = tl.load(positions + tl.minimum(first + block_rows, num_rows) - 1)
    all_see = (tl.load(positions + first) + 1) // block_keys * block_keys  # keys before: no mask

    greatest = tl.full((block_rows * padded,), -float("inf"), tl.float32)
    total = tl.full((block_rows * padded,), 0.0, tl.float32)
    summed = tl.full((block_rows * padded, size), 0.0, tl.float32)
    for start in range(0, all_see, block_keys):
        at = (start + tl.arange(0, block_keys))[:, None] * size + column
        some = tl.load(keys + at)
        scores = tl.dot(query, tl.trans(some), input_precision=precision) * scale
        some = tl.load(values + at)
        greatest, total, summed = _more(greatest, total, summed, scores, some, precision)
    # What is behind the last row's position is not read: it may be anything, while it is loaded
    # NaN, and a weight of 0 would not undo that.
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


class RowAttention:
    """For layers with so many heads on one device; ``size`` is a head's."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Compiles it. Raises ValueError for what it cannot do, RuntimeError where no shape of a
        program can be compiled or fits the GPU."""
        if size < 16 or size & (size - 1) or num_heads % num_kv_heads:
            raise ValueError(f"heads of {size}, {num_heads} for {num_kv_heads}")
        self._heads = num_heads, num_kv_heads, size
        self._dtype = dtype
        query = torch.zeros((1, num_heads, size), dtype=dtype, device=device)
        keys = torch.zeros((num_kv_heads, 1, size), dtype=dtype, device=device)
        position = torch.zeros(1, dtype=torch.int64, device=device)
        for self._shape in SHAPES:
            try:
                return self(query, keys, keys, position, 1.0, torch.empty_like(query))
            except RuntimeError as error:
                problem = error
        raise problem

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Attention of rows to all positions up to their own; enqueued on the current stream.

        ``query`` and ``out``: ``[r, query heads, size]``; ``keys`` and ``values``: ``[kv heads,
        tokens, size]``, all contiguous; ``positions``: int64 ``[r]``, ascending. Raises ValueError
        for other shapes or dtypes, RuntimeError if the kernel cannot be compiled.
        """
        rows, num_heads, size = query.shape
        heads = keys.shape[0]
        given = (num_heads, heads, size), query.dtype, keys.dtype, keys.shape[2]
        whole = all(one.is_contiguous() for one in (query, keys, values, out))
        if given != (self._heads, self._dtype, self._dtype, size) or not whole:
            raise ValueError(
                f"queries {query.dtype} {tuple(query.shape)}, keys {keys.dtype} "
                f"{tuple(keys.shape)}, contiguous: {whole}; it is for {self._heads}, {self._dtype}"
            )
        group = num_heads // heads
        padded = triton.next_power_of_2(group)
        block_rows = max(1, self._shape.queries // padded)
        with compiling():
            _attend[(heads, triton.cdiv(rows, block_rows))](
                query, out, keys, values, positions, rows, keys.stride(0), scale * _LOG2_E,
                group=group, padded=padded, heads=heads, block_rows=block_rows,
                block_keys=self._shape.keys, size=size,
                precision="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=self._shape.warps, num_stages=self._shape.stages,
            )  # fmt: skip


class Attending:
    """An attention layer's implementation while `RowAttention` does its forward pass. ``attend``
    gets queries and where to put what they see."""

    def __init__(self, impl: Any, attend: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._impl, self._attend = impl, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def forward(
        self, layer: Any, query: torch.Tensor, *args: Any, output: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As vLLM calls it; K and V are in the pages."""
        self._attend(query.contiguous(), output)
        return output
