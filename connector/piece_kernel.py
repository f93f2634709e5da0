"""Pieces of chunks to their new places in the pages of all layers, K rotated, by one Triton kernel.

With torch it is six launches a layer, 4 ms of a thread that holds the interpreter's lock for 64 MiB
that arrive in 1.3. As in `page_kernel` the page's layout is a table of where its rows begin.

What must hold: V, and K that does not move, keep their bits; K that moves is `blend.rope`'s within
rounding; only the named slots are touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from connector.compiling import compiling
from connector.page_kernel import LEFT_ALONE, common_rows
from connector.pages import LayerPages

TOKENS = 32  # that one program moves, of a head of a layer


# Else it would compile within a load: parts of these begin at odd places.
@triton.jit(do_not_specialize=["first", "num_tokens", "sources", "slots", "pieces"])
def _place(  # type: ignore[no-untyped-def]
    chunks, bases, first, sources, slots, pieces, offsets, cosines, sines, num_tokens,
    chunk_stride, layer_stride, plane_stride, head_stride, block_stride, per_chunk, page_tokens,
    heads: tl.constexpr, size: tl.constexpr, half: tl.constexpr, columns: tl.constexpr,
    rest: tl.constexpr, apart: tl.constexpr, step: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    layer, row = tl.program_id(1), tl.program_id(2)
    plane, head = row // heads, row % heads
    token = tl.program_id(0) * tokens + tl.arange(0, tokens)
    there = token < num_tokens
    slot = tl.load(slots + token, mask=there, other=0)
    there &= slot >= 0
    source = tl.load(sources + token, mask=there, other=first) - first
    source = source // per_chunk * chunk_stride + source % per_chunk * size
    source += layer * layer_stride + plane * plane_stride + head * head_stride
    place = tl.load(offsets + row * page_tokens + slot % page_tokens, mask=there, other=0)
    place += slot // page_tokens * block_stride
    near = chunks + source[:, None]
    page = tl.load(bases + layer).to(tl.pointer_type(chunks.dtype.element_ty)) + place[:, None]
    pair = tl.arange(0, columns)[None, :]
    inside = there[:, None] & (pair < half)
    x = tl.load(near + pair * step, mask=inside)
    y = tl.load(near + pair * step + apart, mask=inside)
    if plane == 0:
        angle = tl.load(pieces + token, mask=there, other=0)[:, None] * half + pair
        cosine = tl.load(cosines + angle, mask=inside, other=1.0)
        sine = tl.load(sines + angle, mask=inside, other=0.0)
        wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
        # x - y * 0 would turn -0.0 into 0.0, so what does not turn is copied.
        still = sine == 0
        x = tl.where(still, x, (wide_x * cosine - wide_y * sine).to(x.dtype))
        y = tl.where(still, y, (wide_y * cosine + wide_x * sine).to(y.dtype))
    tl.store(page + pair * step, x, mask=inside)
    tl.store(page + pair * step + apart, y, mask=inside)
    if rest > 0:  # dimensions that RoPE leaves alone
        other = 2 * half + tl.arange(0, rest)[None, :]
        inside = there[:, None] & (other < size)
        tl.store(page + other, tl.load(near + other, mask=inside), mask=inside)


class PieceKernel:
    """``pages`` are a rank's layers in order, ``style`` is RoPE's: neox or gptj. Work is enqueued
    on the current stream."""

    def __init__(self, pages: Sequence[LayerPages], style: str) -> None:
        """Raises ValueError where the pages are not as the kernel needs them."""
        page_map, device = pages[0].page_map, pages[0].device
        lane, offsets = common_rows(pages)
        if page_map.num_planes != 2 or page_map.kernel_blocks_per_block != 1:
            raise ValueError("its pages have no K and V, or blocks of several parts")
        self._neox, self._dtype, self._num_layers = style == "neox", pages[0].dtype, len(pages)
        self._tokens, self._heads = page_map.block_tokens, page_map.num_kv_heads
        self._size = page_map.head_size
        self.num_blocks = min(layer.num_kernel_blocks for layer in pages)
        self._block_stride = pages[0].block_stride() // page_map.element_bytes
        self._offsets = (offsets * (lane.itemsize // page_map.element_bytes)).to(device)
        self._bases = torch.tensor([one.base() for one in pages], dtype=torch.int64, device=device)

    def compile(self, per_chunk: int, half: int) -> None:
        """Move nothing, of a chunk of so many tokens: compiling takes a second or so, and may fail.
        ``half`` of the rotated dimensions. Raises RuntimeError."""
        shape = (1, self._num_layers, 2, self._heads, per_chunk, self._size)
        device = self._bases.device
        turns = torch.zeros((1, half), device=device), torch.zeros((1, half), device=device)
        place = torch.zeros(1, dtype=torch.int64, device=device)
        chunk = torch.zeros(shape, dtype=self._dtype, device=device)
        self.write(chunk, 0, place, place + LEFT_ALONE, place, turns)

    def write(
        self,
        chunks: torch.Tensor,
        first: int,
        sources: torch.Tensor,
        slots: torch.Tensor,
        pieces: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Write tokens of chunks to slots of the pages.

        ``chunks``: ``[n, layer, plane, head, token, size]`` of the pages' dtype, contiguous. Of
        each token, int64 ``[tokens]``: its number, counted so that the first token of ``chunks`` is
        ``first``; its slot in the pages, LEFT_ALONE for none; its row in ``turns``, cosine
        and sine, float32 ``[rows, half of the rotated dimensions]``. All on one device. Raises
        ValueError for other chunks, RuntimeError if the kernel cannot be compiled.
        """
        wanted = (self._num_layers, 2, self._heads, self._size)
        if (
            chunks.dtype != self._dtype
            or not chunks.is_contiguous()
            or (*chunks.shape[1:4], chunks.shape[5]) != wanted
        ):
            raise ValueError(f"chunks are {chunks.dtype} {tuple(chunks.shape)}, or not contiguous")
        half, count = turns[0].shape[1], len(slots)
        rest = self._size - 2 * half
        with compiling():
            _place[(triton.cdiv(count, TOKENS), self._num_layers, 2 * self._heads)](
                chunks, self._bases, first, sources, slots, pieces, self._offsets, *turns, count,
                *chunks.stride()[:4], self._block_stride, chunks.shape[4], self._tokens,
                heads=self._heads, size=self._size, half=half,
                columns=triton.next_power_of_2(half),
                rest=triton.next_power_of_2(rest) if rest else 0,
                apart=half if self._neox else 1, step=1 if self._neox else 2, tokens=TOKENS,
            )  # fmt: skip
