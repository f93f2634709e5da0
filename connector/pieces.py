"""Pieces of a blend: parts of stored chunks, put where the prompt has them, K rotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from connector.messages import BlendPiece
from connector.sending import sent

if TYPE_CHECKING:
    from connector.blend_engine import Engine


class Placing:
    """Where pieces go, told to the device once: they arrive in parts, on several streams. It is
    given up as a `Destination` is.

    Pieces are parts of chunks of ``per_chunk`` tokens; ``blocks`` are the request's. Raises
    ValueError for blocks that do not exist.
    """

    def __init__(
        self,
        engine: Engine,
        pieces: Sequence[BlendPiece],
        blocks: Sequence[int],
        per_chunk: int,
    ) -> None:
        self._engine, self._per_chunk = engine, per_chunk
        kernel = engine.piece_kernel
        if kernel is not None and not 0 <= min(blocks, default=0) <= max(blocks, default=0) < (
            kernel.num_blocks
        ):  # checked on the host: on CUDA an index out of range takes the engine down
            raise ValueError(f"blocks {min(blocks)} to {max(blocks)} of {kernel.num_blocks}")
        told = [(p.num_tokens, p.offset, p.start, p.start - p.source_start) for p in pieces]
        counts, offsets, starts, moves = np.array(told, np.int64).reshape(-1, 4).T
        ends = counts.cumsum()
        self._bounds = [0, *ends.tolist()]
        number = np.arange(len(pieces)).repeat(counts)
        each = np.arange(self._bounds[-1]) - (ends - counts)[number]
        places, size = starts[number] + each, engine.block_tokens
        slots = np.array(blocks, np.int64)[places // size] * size + places % size
        tokens = np.stack([number * per_chunk + offsets[number] + each, slots, number])
        self._tokens = sent(torch.from_numpy(tokens), engine.device)
        self._moves = sent(torch.from_numpy(moves.copy()), engine.device)
        self._turns = engine.rope.cos_sin(self._moves)
        self._ready: torch.cuda.Event | None = None
        if engine.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(engine.device))

    def write(self, at: int, chunks: torch.Tensor, chosen: Sequence[int] | None = None) -> None:
        """Write pieces ``at`` and on, a chunk each, to their places; all go together.

        ``chunks``: all of each, ``[n, layer, plane, head, token, size]`` of the KV cache's dtype,
        on its device; ``chosen``: which of them these pieces are in; None: all, in order. On CUDA
        it is only enqueued, on the current stream.
        """
        stop = at + len(chunks if chosen is None else chosen)
        if stop == at:
            return
        engine, first = self._engine, at * self._per_chunk
        sources, slots, pieces = self._tokens[:, self._bounds[at] : self._bounds[stop]]
        if self._ready is not None:
            torch.cuda.current_stream(engine.device).wait_event(self._ready)
        if chosen is not None:
            rows = sent(torch.tensor(chosen), engine.device)
            first, sources = 0, rows[pieces - at] * self._per_chunk + sources % self._per_chunk
        if engine.piece_kernel is not None:
            engine.piece_kernel.write(chunks, first, sources, slots, pieces, self._turns)
            return
        sources = sources - first
        numbers, tokens = sources // self._per_chunk, sources % self._per_chunk
        keys, values = chunks.movedim(4, 1)[numbers, tokens].movedim(0, 2).unbind(1)
        turns = (turn[pieces] for turn in self._turns)
        keys = engine.rope.rotate_by(keys, *turns)  # [layer, token, head, size], as are values
        for index in range(len(keys)):
            engine.write(index, slots, keys[index], values[index])
