"""Where the chunks of a load go, told to the device once: they arrive in parts, on several streams.

What must hold: only the blocks of the chunks that are written are touched. What was told is given
up when all streams that read it have come to their end (a load waits for its lanes before it ends),
since torch would give its memory to others as soon as the stream it was made on is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from connector.groups import NULL_BLOCK, KvGroup
from connector.rank import Rank, mark
from connector.sending import sent

OfLayer = Callable[[int], torch.Tensor]  # a layer of chunks: ``[n, plane, head, token, byte]``


class Destination:
    """``blocks``: a row for each chunk, one at least, as `groups.blocks_of_chunks` makes it. The
    first ``skip_blocks`` blocks (of the first group) of the first chunk are left as they are, and
    so are tokens for which a group with a window has no block.

    Raises ValueError for blocks that do not exist or are named twice, where a kernel moves the
    pages; else `write` does, for those it writes.
    """

    def __init__(self, rank: Rank, blocks: Sequence[Sequence[int]], skip_blocks: int) -> None:
        self._rank = rank
        skip_tokens = skip_blocks * rank.kv_groups[0].block_tokens
        self._groups = []
        for group, layers, rows in rank.by_group(blocks):
            skip = skip_tokens // group.block_tokens
            kernel, table = rank.page_kernels.get(layers[0]), None
            if kernel is not None:
                table = kernel.table(rows, skip, NULL_BLOCK if group.window is not None else None)
            self._groups.append((group, layers, rows, skip, kernel, table))
        self._ready = mark(rank.device)

    def write(
        self, numbers: Sequence[int], rows: torch.Tensor, chosen: Sequence[int] | None = None
    ) -> None:
        """Write the chunks of those numbers, ascending: ``rows``, in host memory or on the device,
        ``[n, unit_bytes]``; ``chosen``: which of the rows they are, None: all, in order. On CUDA it
        is only enqueued, on the current stream. Raises ValueError."""
        if not numbers:
            return
        if self._ready is not None:
            torch.cuda.current_stream(self._rank.device).wait_event(self._ready)
        for part, data, rows_of_data in self._rank.as_pages_have(rows, chosen):
            self._write(numbers[part], data, rows_of_data)

    def _write(
        self, numbers: Sequence[int], data: torch.Tensor, chosen: Sequence[int] | None
    ) -> None:
        for group, layers, rows, skip, kernel, table in self._groups:
            if kernel is not None and table is not None:
                kernel.write(_rows_of(table, numbers), data, chosen)
                continue
            mine = [list(rows[number]) for number in numbers]
            first = skip if numbers[0] == 0 else 0
            self._layer_by_layer(group, layers, mine, first, partial(_layer_of, data, chosen))

    def _layer_by_layer(
        self,
        group: KvGroup,
        layers: Sequence[int],
        blocks: list[list[int]],
        skip: int,
        of_layer: OfLayer,
    ) -> None:
        """Chunks to all their blocks but the first ``skip``."""
        if group.window is not None:
            blocks[0][:skip] = [NULL_BLOCK] * skip
            self._write_kept(layers, blocks, of_layer)
        elif skip:
            begin = skip * group.block_tokens
            self._write_whole(layers, [blocks[0][skip:]], lambda i: of_layer(i)[:1, :, :, begin:])
            self._write_whole(layers, blocks[1:], lambda i: of_layer(i)[1:])
        else:
            self._write_whole(layers, blocks, of_layer)

    def _write_whole(
        self, layers: Sequence[int], blocks: list[list[int]], of_layer: OfLayer
    ) -> None:
        """Write chunks to all their blocks."""
        pages = self._rank.pages
        if not blocks:
            return
        table = pages[layers[0]].page_map.block_table(blocks, self._rank.device)
        for layer in layers:
            pages[layer].write_chunks(table, of_layer(layer))

    def _write_kept(
        self, layers: Sequence[int], blocks: list[list[int]], of_layer: OfLayer
    ) -> None:
        """Write those blocks of chunks that there are: a window ends anywhere in a chunk."""
        pages, ids = self._rank.pages, torch.tensor(blocks)
        kept = ids != NULL_BLOCK
        if not kept.any():
            return
        table = pages[layers[0]].page_map.block_table(
            ids[kept].unsqueeze(1).tolist(), self._rank.device
        )
        chosen = kept.to(self._rank.device)
        for layer in layers:
            by_block = of_layer(layer).unflatten(3, (ids.shape[1], -1)).movedim(3, 1)
            pages[layer].write_chunks(table, by_block[chosen])


def _layer_of(chunks: torch.Tensor, chosen: Sequence[int] | None, layer: int) -> torch.Tensor:
    return chunks[:, layer] if chosen is None else chunks[chosen, layer]


def _rows_of(table: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """Rows of a table on the device; those in sequence, as nearly all are, by no work there."""
    first, stop = numbers[0], numbers[0] + len(numbers)
    if list(numbers) == list(range(first, stop)):
        return table[first:stop]
    return table[sent(torch.tensor(numbers), table.device)]
