"""Attention of rows that stand anywhere in a prompt, over the engine's pages, by a Triton kernel.

To a backend each chosen row is a sequence of its own, which reads all K and V before it: of 5,000
rows scattered over 32,768 tokens each layer reads 300 GB. Here a program takes neighbouring rows
and all query heads of one KV head, reads each key once for them, and masks by position. Algorithm:
FlashAttention-2 (Dao 2023), forward, with the rows' positions in place of a triangular mask.

The page's layout is a table, as in `page_kernel`. What must hold: K and V of the rows are in the
pages before; only pages of the given blocks are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from connector.pages import LayerPages

QUERIES = 128  # rows times query heads of a KV head that one program takes
KEYS = 64  # read at once
WARPS, STAGES = 8, 2
ALIGNED = 16  # elements: so that they are read 16 bytes at a time
_LOG2_E = 1.4426950408889634


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _greater(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries, out, base, block_stride, table, offsets, positions, num_rows, scale,
    group: tl.constexpr, heads: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    page_tokens: tl.constexpr, size: tl.constexpr, precision: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    page = base.to(tl.pointer_type(queries.dtype.element_ty))
    # Those with the most keys first: they take longest.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_rows
    each = tl.arange(0, block_rows * group)
    row = first + each // group
    there = row < num_rows
    position = tl.load(positions + row, mask=there, other=0)
    column = tl.arange(0, size)
    place = (row * heads + head) * group + each % group
    place = place.to(tl.int64)[:, None] * size + column[None, :]
    query = tl.load(queries + place, mask=there[:, None], other=0.0)
    key_offsets = offsets + head * page_tokens
    value_offsets = key_offsets + heads * page_tokens
    last = tl.load(positions + tl.minimum(first + block_rows, num_rows) - 1)
    all_see = (tl.load(positions + first) + 1) // block_keys * block_keys  # keys before: no mask

    greatest = tl.full((block_rows * group,), -float("inf"), tl.float32)
    total = tl.full((block_rows * group,), 0.0, tl.float32)
    summed = tl.full((block_rows * group, size), 0.0, tl.float32)
    for start in range(0, last + 1, block_keys):
        key = start + tl.arange(0, block_keys)
        inside = key <= last
        block = tl.load(table + key // page_tokens, mask=inside, other=0) * block_stride
        token = key % page_tokens
        at = tl.multiple_of(block + tl.load(key_offsets + token), [aligned])
        keys = tl.load(page + at[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=precision) * scale
        if start >= all_see:
            scores = tl.where(key[None, :] <= position[:, None], scores, -float("inf"))
        now = tl.maximum(greatest, tl.reduce(scores, 1, _greater))
        weights = tl.exp2(scores - now[:, None])
        fade = tl.exp2(greatest - now)
        total = total * fade + tl.reduce(weights, 1, _plus)
        at = tl.multiple_of(block + tl.load(value_offsets + token), [aligned])
        values = tl.load(page + at[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        summed = tl.dot(
            weights.to(values.dtype), values, summed * fade[:, None], input_precision=precision
        )
        greatest = now
    result = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, result, mask=there[:, None])


class RowAttention:
    """``pages`` are a rank's layers in order, all of one layout. Work is enqueued on the current
    stream."""

    def __init__(self, pages: Sequence[LayerPages]) -> None:
        """Raises ValueError where the pages are not as the kernel needs them."""
        page_map = pages[0].page_map
        self._dtype = pages[0].dtype
        if not self._dtype.is_floating_point or page_map.num_planes != 2:
            raise ValueError(f"pages are {self._dtype}, with {page_map.num_planes} planes")
        lane, offsets = pages[0].row_offsets()
        for other in pages:
            other_lane, other_offsets = other.row_offsets()
            if other_lane != lane or not torch.equal(other_offsets, offsets):
                raise ValueError("the layers have pages of several layouts")
        size, element_bytes = page_map.head_size, page_map.element_bytes
        if size & (size - 1) or page_map.kernel_blocks_per_block != 1:
            raise ValueError(f"heads of {size}, or blocks of several parts")
        self._page_tokens, self._size = page_map.block_tokens, size
        self._heads = page_map.num_kv_heads
        self._bases = [layer.base() for layer in pages]
        self._strides = [layer.block_stride() // element_bytes for layer in pages]
        offsets = offsets * (lane.itemsize // element_bytes)
        bases = [base // element_bytes for base in self._bases]
        if torch.tensor([*bases, *self._strides, *offsets.tolist()]).remainder(ALIGNED).any():
            raise ValueError(f"rows do not begin at multiples of {ALIGNED} elements")
        self._offsets = offsets.to(pages[0].device)

    def __call__(
        self,
        index: int,
        query: torch.Tensor,
        out: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        scale: float,
    ) -> None:
        """Attention of one layer: ``query`` and ``out`` are ``[r, query heads, size]``, contiguous;
        ``positions`` int64 ``[r]``, ascending; ``table`` int64, the blocks of the prompt's tokens.

        Raises ValueError for other shapes, RuntimeError if the kernel cannot be compiled.
        """
        rows, heads, size = query.shape
        group = heads // self._heads
        if size != self._size or query.dtype != self._dtype or group & (group - 1):
            raise ValueError(f"queries are {query.dtype} {tuple(query.shape)}")
        if not (query.is_contiguous() and out.is_contiguous()):
            raise ValueError("queries must be contiguous")
        block_rows = max(1, QUERIES // group)
        grid = self._heads, triton.cdiv(rows, block_rows)
        try:
            _attend[grid](
                query, out, self._bases[index], self._strides[index], table, self._offsets,
                positions, rows, scale * _LOG2_E,
                group=group, heads=self._heads, block_rows=block_rows, block_keys=KEYS,
                page_tokens=self._page_tokens, size=size, num_warps=8, num_stages=2,
                precision="ieee" if self._dtype == torch.float32 else "tf32", aligned=ALIGNED,
            )  # fmt: skip
        except (TritonError, CalledProcessError) as error:  # the compilers'
            raise RuntimeError(f"the kernel does not compile: {error}") from error


class Attending:
    """An attention layer's implementation, of which `RowAttention` does the forward pass."""

    def __init__(self, impl: Any, attend: Any) -> None:
        self._impl, self._attend = impl, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def forward(
        self, layer: Any, query: torch.Tensor, key: Any, value: Any, *args: Any,
        output: torch.Tensor, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """As vLLM calls it; K and V are in the pages."""
        self._attend(query.contiguous(), output)
        return output
