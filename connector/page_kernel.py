"""Chunks to and from the pages of many layers by one Triton kernel.

A copy for each layer and plane is a launch each: 64 of them for 32 layers, on a thread that holds
the interpreter's lock. Here a launch moves all layers of a group of KV caches. The page's layout is
a table, where each row of head-size elements begins in a page, so any layout whose rows are in one
piece will do; others go layer by layer (`pages`).

What must hold: as `pages` — bytes are moved, never converted; only the named blocks are touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from connector.compiling import compiling
from connector.pages import LayerPages
from connector.sending import sent

ROWS = 32  # of a block that one program moves
LEFT_ALONE = -1  # instead of a block's number: nothing is moved


# Else it would compile within a load: they begin at odd places.
@triton.jit(do_not_specialize=["blocks", "sources"])
def _move(  # type: ignore[no-untyped-def]
    bases, numbers, blocks, sources, offsets, chunks,
    chunk_stride, layer_stride, block_stride, num_rows, tokens, per_chunk, width,
    to_pages: tl.constexpr, chosen: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    lane: tl.constexpr,
):  # fmt: skip
    at, layer = tl.program_id(0), tl.program_id(1)
    block = tl.load(blocks + at)
    if block >= 0:
        row = tl.program_id(2) * rows + tl.arange(0, rows)
        column = tl.arange(0, columns)[None, :]
        inside = (row < num_rows)[:, None] & (column < width)
        offset = tl.load(offsets + row, mask=row < num_rows, other=0)
        base = tl.load(bases + layer).to(tl.pointer_type(lane))
        page = base + block * block_stride + offset[:, None] + column
        # A block's row (plane and head, token) is one of the chunk's, which has more tokens.
        placed = (row // tokens) * (tokens * per_chunk) + (at % per_chunk) * tokens + row % tokens
        source = (at // per_chunk).to(tl.int64)
        if chosen:
            source = tl.load(sources + source)
        begin = source * chunk_stride
        begin += tl.load(numbers + layer) * layer_stride
        near = chunks + begin + placed[:, None] * width + column
        if to_pages:
            tl.store(page, tl.load(near, mask=inside), mask=inside)
        else:
            tl.store(near, tl.load(page, mask=inside), mask=inside)


def common_rows(pages: Sequence[LayerPages]) -> tuple[torch.dtype, torch.Tensor]:
    """`LayerPages.row_offsets` of all these layers. Raises ValueError if they differ."""
    lane, offsets = pages[0].row_offsets()
    for other in pages:
        other_lane, other_offsets = other.row_offsets()
        same = other_lane == lane and torch.equal(other_offsets, offsets)
        if not same or other.block_stride() != pages[0].block_stride():
            raise ValueError("its layers have pages of several layouts")
    return lane, offsets


class PageKernel:
    """The layers ``numbers`` of a rank, whose pages have one layout. On CUDA work is enqueued, on
    the current stream. Chunks are uint8 ``[n, layer, plane, head, token, byte]``, contiguous, with
    all layers of the rank."""

    def __init__(self, pages: Sequence[LayerPages], numbers: Sequence[int]) -> None:
        """Raises ValueError where the layers or their rows are not as the kernel needs them."""
        page_map, device = pages[0].page_map, pages[0].device
        lane, offsets = common_rows(pages)
        self._lane, self._block_stride = lane, pages[0].block_stride() // lane.itemsize
        self._ratio, self._num_rows = page_map.kernel_blocks_per_block, offsets.numel()
        self._num_blocks = min(layer.num_kernel_blocks for layer in pages) // self._ratio
        self._tokens = page_map.block_tokens // self._ratio
        self._width = page_map.head_size * page_map.element_bytes // lane.itemsize
        self._offsets = offsets.to(device)
        self._bases = torch.tensor([one.base() for one in pages], dtype=torch.int64, device=device)
        self._last = max(numbers)
        self._numbers = torch.tensor(list(numbers), dtype=torch.int64, device=device)

    def table(
        self, blocks: Sequence[Sequence[int]], skip: int = 0, absent: int | None = None
    ) -> torch.Tensor:
        """Blocks of chunks, a row for each, for `write`: those of the pages, int64 on the device.
        The first ``skip`` of the first chunk are left alone, and so is block ``absent``, which
        stands where there is none.

        Raises ValueError for blocks that do not exist or are named twice.
        """
        ids = self._existing(blocks)
        ids[0, :skip] = LEFT_ALONE
        if absent is not None:
            ids[ids == absent] = LEFT_ALONE
        named = ids[ids != LEFT_ALONE]
        if named.unique().numel() != named.numel():
            raise ValueError("a block is named twice; each can be written once")
        return self._sent(ids)

    def write(
        self, table: torch.Tensor, chunks: torch.Tensor, sources: Sequence[int] | None = None
    ) -> None:
        """Copy chunks to their blocks, rows of a `table`. ``sources``: which of ``chunks`` go to
        them; None: all, in order.

        Raises ValueError for chunks that do not exist, RuntimeError if the kernel cannot be
        compiled.
        """
        self._launch(table, chunks, sources, to_pages=True)

    def read(self, blocks: Sequence[Sequence[int]], out: torch.Tensor) -> None:
        """The reverse. Raises ValueError for blocks that do not exist."""
        self._launch(self._sent(self._existing(blocks)), out, None, to_pages=False)

    def compile(self, chunk: torch.Tensor, blocks: int) -> None:
        """Move nothing, in each way, of one chunk that has so many blocks: compiling takes a second
        or so, and may fail."""
        table = self._sent(torch.full((1, blocks), LEFT_ALONE))
        self._launch(table, chunk, None, to_pages=False)
        for sources in (None, [0]):
            self.write(table, chunk, sources)

    def _launch(
        self,
        table: torch.Tensor,
        chunks: torch.Tensor,
        sources: Sequence[int] | None,
        *,
        to_pages: bool,
    ) -> None:
        count = len(chunks) if sources is None else len(sources)
        inside = sources is None or 0 <= min(sources, default=-1) <= max(sources) < len(chunks)
        if count != len(table) or not inside:
            named = "all" if sources is None else list(sources)
            raise ValueError(f"chunks {named} of {len(chunks)} for {len(table)} rows of blocks")
        rows = chunks.shape[2] * chunks.shape[3] * chunks.shape[4] * len(table)
        if chunks.dtype != torch.uint8 or not chunks.is_contiguous() or (
            rows != table.numel() * self._num_rows
            or chunks.shape[1] <= self._last
            or chunks.shape[5] != self._width * self._lane.itemsize
        ):  # fmt: skip
            raise ValueError(f"chunks are {chunks.dtype} {tuple(chunks.shape)}, or not contiguous")
        where = table if sources is None else sent(torch.tensor(sources), table.device)
        lanes = chunks.view(self._lane)
        grid = table.numel(), len(self._numbers), triton.cdiv(self._num_rows, ROWS)
        with compiling():
            _move[grid](
                self._bases, self._numbers, table, where, self._offsets, lanes,
                lanes.stride(0), lanes.stride(1), self._block_stride,
                self._num_rows, self._tokens, table.shape[1], self._width,
                to_pages=to_pages, chosen=sources is not None, rows=ROWS,
                columns=triton.next_power_of_2(self._width), lane=_TRITON[self._lane],
            )  # fmt: skip

    def _existing(self, blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Checked on the host: on CUDA an index out of range takes the engine down."""
        ids = torch.tensor(blocks, dtype=torch.int64).view(len(blocks), -1)
        if int(ids.min()) < 0 or int(ids.max()) >= self._num_blocks:
            raise ValueError(
                f"blocks {int(ids.min())} to {int(ids.max())}: one does not exist, there are "
                f"{self._num_blocks}"
            )
        return ids

    def _sent(self, ids: torch.Tensor) -> torch.Tensor:
        """The kernel blocks of the engine's blocks, where those left alone stay below 0."""
        table = (ids.unsqueeze(-1) * self._ratio + torch.arange(self._ratio)).flatten(1)
        return sent(table, self._offsets.device)


_TRITON = {
    torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip
