"""One rank's part of the KV: its pages, its region of a chunk, its copy to and from host memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from connector.messages import BlendPiece
from connector.pages import LayerPages
from prefixstore.errors import StoreError
from prefixstore.layout import Layout, Roi
from prefixstore.namespace import Namespace
from prefixstore.store import Store

if TYPE_CHECKING:
    from connector.blend_host import Engine

_of_thread = threading.local()


@dataclass
class Rank:
    """``pages`` are this rank's layers in order, ``roi`` its region of each chunk, ``group`` the
    number its engine's ranks share. ``saves`` is false for a rank whose heads another one saves.
    """

    pages: list[LayerPages]
    layout: Layout
    roi: Roi
    group: int
    saves: bool
    engine: Engine | None = None  # for blending; None when this rank cannot
    _namespaces: dict[bytes, Namespace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roi = self.roi
        self.device = self.pages[0].device
        # One rank of the engine counts what all of them do together.
        self.leads = int(roi.head_start == 0 and roi.layer_start == 0 and self.saves)
        self.unit_bytes = self.layout.roi_bytes(roi)
        self._dims = (
            roi.layer_stop - roi.layer_start,
            self.layout.num_planes,
            roi.head_stop - roi.head_start,
            self.layout.chunk_tokens,
            self.layout.head_bytes,
        )

    def namespace(self, store: Store, name: bytes) -> Namespace:
        """The store's namespace of that name. Raises StoreError when its chunks are not ours."""
        known = self._namespaces.get(name)
        if known is None or known.store is not store:
            known = store.namespace_of(name)
            if known.layout != self.layout:
                raise StoreError(f"namespace {name.hex()} has another layout than this engine")
            self._namespaces[name] = known
        return known

    def read_pages(self, blocks: list[list[int]], out: torch.Tensor) -> None:
        """Copy chunks from their blocks to host memory ``[n, unit_bytes]``.

        On CUDA the copy is only enqueued, on the current stream.
        """
        on_host = self.device.type == "cpu"
        near = out if on_host else torch.empty_like(out, device=self.device)
        shaped = near.view(len(blocks), *self._dims)
        table = self.pages[0].page_map.block_table(blocks, self.device)
        for layer, pages in enumerate(self.pages):
            pages.read_chunks(table, shaped[:, layer])
        if not on_host:
            out.copy_(near, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """The point the engine's stream has reached; None where there are no streams."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def own_stream(self) -> AbstractContextManager[object]:
        """For a thread that writes pages: a stream of its own, made at the first call."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(_of_thread, "stream"):
            _of_thread.stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(_of_thread.stream)

    def write_pages(
        self,
        blocks: list[list[int]],
        skip_blocks: int,
        rows: torch.Tensor,
        after: torch.cuda.Event | None,
    ) -> None:
        """Copy chunks from host memory ``[n, unit_bytes]`` to their blocks, and wait for it.

        The first ``skip_blocks`` blocks of the first chunk are left as they are. On CUDA the blocks
        may still be in use by steps begun before: nothing is written before ``after``.
        """
        if not blocks:
            return
        if after is not None:
            torch.cuda.current_stream(self.device).wait_event(after)
        data = rows.to(self.device, non_blocking=True).view(len(rows), *self._dims)
        if skip_blocks:
            tokens = skip_blocks * (self.layout.chunk_tokens // len(blocks[0]))
            self._write([blocks[0][skip_blocks:]], data[:1, :, :, :, tokens:])
            data, blocks = data[1:], blocks[1:]
        if blocks:
            self._write(blocks, data)
        self.wait_for_writes()

    def write_piece(
        self,
        piece: BlendPiece,
        row: torch.Tensor,
        blocks: list[int],
        after: torch.cuda.Event | None,
    ) -> None:
        """Write a part of a chunk (``row`` is all of it, in host memory) at its new position.

        K is rotated by the difference of positions. On CUDA it is only enqueued.
        """
        engine = self.engine
        assert engine is not None
        if after is not None:
            torch.cuda.current_stream(self.device).wait_event(after)
        part = slice(piece.offset, piece.offset + piece.num_tokens)
        data = row.to(self.device, non_blocking=True).view(self._dims)[:, :, :, part]
        keys, values = data.view(engine.kv_dtype).transpose(2, 3).unbind(1)
        keys = engine.rope.rotate(keys, piece.start - piece.source_start)
        stop = piece.start + piece.num_tokens
        slots = engine.slots(blocks, torch.arange(piece.start, stop, device=self.device))
        for index in range(len(keys)):
            engine.write(index, slots, keys[index], values[index])

    def read_layer(self, index: int, blocks: Sequence[int]) -> torch.Tensor:
        """K and V of one layer in these blocks: [2, heads, tokens, head size], a copy."""
        pages, roi = self.pages[index], self.roi
        tokens = len(blocks) * pages.page_map.block_tokens
        shape = (1, 2, roi.head_stop - roi.head_start, tokens, pages.page_map.head_size)
        out = torch.empty(shape, dtype=pages.dtype, device=self.device)
        pages.read_chunks([list(blocks)], out)
        return out[0]

    def wait_for_writes(self) -> None:
        """Wait until the pages have what was enqueued by this thread."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _write(self, blocks: list[list[int]], data: torch.Tensor) -> None:
        table = self.pages[0].page_map.block_table(blocks, self.device)
        for layer, pages in enumerate(self.pages):
            pages.write_chunks(table, data[:, layer])
