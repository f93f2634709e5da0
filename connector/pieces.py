"""Pieces of a blend: parts of stored chunks, put where the prompt has them, K rotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from connector.messages import BlendPiece

if TYPE_CHECKING:
    from connector.blend_engine import Engine


def write_pieces(
    engine: Engine, pieces: Sequence[BlendPiece], chunks: torch.Tensor, blocks: Sequence[int]
) -> None:
    """Write parts of chunks to their places in a request's blocks.

    ``chunks`` are all of each, ``[n, layer, plane, head, token, size]`` of the KV cache's dtype, on
    its device. K is rotated by the difference of positions. All pieces go together: a layer is
    written at once, not piece by piece. On CUDA it is only enqueued, on the current stream.
    """
    per_chunk = chunks.shape[4]
    sources, slots, moves = _places(pieces, blocks, engine.block_tokens, per_chunk, chunks.device)
    if engine.piece_kernel is not None:
        engine.piece_kernel.write(chunks, sources, slots, moves)
        return
    numbers, tokens = sources // per_chunk, sources % per_chunk
    keys, values = chunks.movedim(4, 1)[numbers, tokens].movedim(0, 2).unbind(1)
    keys = engine.rope.rotate(keys, moves)  # [layer, token, head, size], as are values
    for index in range(len(keys)):
        engine.write(index, slots, keys[index], values[index])


def _places(
    pieces: Sequence[BlendPiece],
    blocks: Sequence[int],
    block_tokens: int,
    per_chunk: int,
    device: torch.device,
) -> torch.Tensor:
    """int64 [3, tokens]: each token's number in the chunks, its slot, how far it moves."""
    told = torch.tensor([(p.num_tokens, p.offset, p.start, p.source_start) for p in pieces])
    counts, offsets, starts, source_starts = told.T
    each = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    chunk = torch.arange(len(pieces)).repeat_interleave(counts)
    places = starts.repeat_interleave(counts) + each
    table = torch.tensor(blocks)
    found = torch.stack(
        [
            chunk * per_chunk + offsets.repeat_interleave(counts) + each,
            table[places // block_tokens] * block_tokens + places % block_tokens,
            (starts - source_starts).repeat_interleave(counts),
        ]
    )
    if device.type == "cuda":  # from pageable memory the copy would wait for the stream
        return found.pin_memory().to(device, non_blocking=True)
    return found
