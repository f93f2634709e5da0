"""One rank's part of the KV: its pages, its region of a chunk, its copy to and from host memory."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from blend.rounding import Rounding, RoundingError
from connector.groups import KvGroup
from connector.known import KnownNamespaces
from connector.pages import LayerPages
from connector.pieces import Placing
from connector.sending import sent
from prefixstore.codec import LOSSY_NAMES, NONE
from prefixstore.layout import Layout, Roi

if TYPE_CHECKING:
    from connector.blend_engine import Engine
    from connector.page_kernel import PageKernel
    from connector.states import StatePages
    from connector.sum_kernel import SumKernel

logger = logging.getLogger("vllm.prefixstore")

_of_thread = threading.local()


def mark(device: torch.device) -> torch.cuda.Event | None:
    """The point the current stream of a device has reached; None where there are no streams."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to the engine
    event.record(torch.cuda.current_stream(device))
    return event


def is_past(point: torch.cuda.Event | None) -> bool:
    """Whether the stream of that `mark` has come to it."""
    return point is None or point.query()


@dataclass
class Rank:
    """``pages`` are this rank's layers in order, ``roi`` its region of each chunk, ``group`` the
    number its engine's ranks share. ``saves`` is false for a rank whose heads another one saves.
    ``kv_groups`` are vLLM's groups of KV caches, ``kv_group_of`` each layer's place among them;
    left out, all are in one. Blocks of a chunk are a row as `groups.blocks_of_chunks` makes it.
    ``states`` are those of layers without attention, if there are any. ``codec``: of
    `prefixstore.codec.LOSSY_NAMES`, if chunks are rounded; `layout` is that of rounded ones then.
    Raises RoundingError for a device that cannot.
    """

    pages: list[LayerPages]
    layout: Layout
    roi: Roi
    group: int
    saves: bool
    engine: Engine | None = None  # for blending; None when this rank cannot
    kv_groups: tuple[KvGroup, ...] = ()
    kv_group_of: Sequence[int] = ()
    states: StatePages | None = None
    number: int = 0  # among those of its tensor parallel group
    codec: str = NONE
    namespaces: KnownNamespaces = field(init=False)

    def __post_init__(self) -> None:
        roi = self.roi
        if not self.kv_groups:
            self.kv_groups = (KvGroup(self.pages[0].page_map.block_tokens),)
            self.kv_group_of = [0] * len(self.pages)
        self.device = self.pages[0].device
        self.namespaces = KnownNamespaces(self.layout)
        # One rank of the engine counts what all of them do together.
        self.leads = int(roi.head_start == 0 and roi.layer_start == 0 and self.saves)
        self.unit_bytes = self.layout.roi_bytes(roi)
        page_map = self.pages[0].page_map
        shape = (
            roi.layer_stop - roi.layer_start,
            self.layout.num_planes,
            roi.head_stop - roi.head_start,
            self.layout.chunk_tokens,
        )
        # Of a chunk as the pages have it.
        self._dims = (*shape, page_map.head_size * page_map.element_bytes)
        self.staged_bytes = math.prod(self._dims)
        self._rounding: Rounding | None = None
        if self.codec in LOSSY_NAMES:
            self._rounding = self._make_rounding((*shape, page_map.head_size))
        self.page_kernels: dict[int, PageKernel] = {}  # by the first layer of a group
        self.sum_kernel: SumKernel | None = None
        if self.device.type == "cuda":
            self._make_page_kernels()
            self._make_sum_kernel()

    def _make_rounding(self, shape: tuple[int, int, int, int, int]) -> Rounding:
        """By a kernel where that can be done and rounds as a host does. Raises RoundingError."""
        make = partial(Rounding, self.codec, shape, self.pages[0].dtype, self.layout.piece_bytes)
        if self.device.type == "cuda":
            try:
                from connector.rounding_kernel import RoundingKernel

                rounding = make(RoundingKernel(self.codec, *shape[3:], self.layout.piece_bytes))
                rounding.check(self.device)  # compiles now
                return rounding
            except (ImportError, OSError, RoundingError, ValueError) as error:
                logger.warning("prefixstore: KV is rounded without a kernel: %s", error)
        rounding = make()
        rounding.check(self.device)
        return rounding

    def _make_sum_kernel(self) -> None:
        """Where it cannot be done, the host hashes, and chunks are loaded by way of it."""
        try:
            from connector.sum_kernel import SumKernel

            kernel = SumKernel(self.layout.piece_bytes, self.device)
            kernel.compile()
            self.sum_kernel = kernel
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            logger.warning("prefixstore: chunks are read by way of the host: %s", error)

    def _make_page_kernels(self) -> None:
        """Where it cannot be done, layers are moved one by one."""
        chunk = torch.zeros((1, *self._dims), dtype=torch.uint8, device=self.device)
        for group, layers, _ in self.by_group([[]]):
            try:
                from connector.page_kernel import PageKernel

                kernel = PageKernel([self.pages[i] for i in layers], layers)
                kernel.compile(chunk, self.layout.chunk_tokens // group.block_tokens)
                self.page_kernels[layers[0]] = kernel
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                # No Triton, no compiler, nowhere to keep what it made: it is slower without.
                logger.warning("prefixstore: pages are moved layer by layer: %s", error)

    def read_pages(self, blocks: list[list[int]], out: torch.Tensor) -> None:
        """Copy chunks from their blocks to ``[n, staged_bytes]`` on the same device; on CUDA only
        enqueued, on the current stream."""
        shaped = out.view(len(blocks), *self._dims)
        for _, layers, part in self.by_group(blocks):
            if layers[0] in self.page_kernels:
                self.page_kernels[layers[0]].read(part, shaped)
                continue
            table = self.pages[layers[0]].page_map.block_table(part, self.device)
            for layer in layers:
                self.pages[layer].read_chunks(table, shaped[:, layer])

    def as_stored(self, staged: torch.Tensor) -> torch.Tensor:
        """What `read_pages` gave, as it is stored: ``[n, unit_bytes]`` on the same device; the same
        if nothing is rounded. On CUDA only enqueued, on the current stream."""
        rounding = self._rounding
        if rounding is None:
            return staged
        kv = staged.view(len(staged), *self._dims).view(self.pages[0].dtype)
        out = torch.empty((len(kv), self.unit_bytes), dtype=torch.uint8, device=kv.device)
        for at in range(0, len(kv), rounding.save_chunks):
            part = slice(at, at + rounding.save_chunks)
            rounding.encode(kv[part], out[part])
        return out

    def mark(self, behind: torch.cuda.Event | None = None) -> torch.cuda.Event | None:
        """The point the current stream has reached, the engine's for its thread, once ``behind``
        has come too; None where there are no streams."""
        if behind is not None:
            torch.cuda.current_stream(self.device).wait_event(behind)
        return mark(self.device)

    def own_stream(self) -> AbstractContextManager[object]:
        """For a thread that writes pages: a stream of its own, made at the first call."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(_of_thread, "stream"):
            _of_thread.stream = torch.cuda.Stream(self.device)
            # The driver's own calls (`region_copy`) need a context, which a thread has from its
            # first call of the runtime on.
            _of_thread.stream.query()
        return torch.cuda.stream(_of_thread.stream)

    def as_pages_have(
        self, rows: torch.Tensor, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[slice, torch.Tensor, Sequence[int] | None]]:
        """Chunks ``[n, unit_bytes]``, in host memory or on the device, as the pages have them: on
        the device, uint8 ``[n, layer, plane, head, token, byte]``; in parts if they were rounded.

        ``chosen``: the rows that are wanted; None: all. Yields (which of the wanted ones, chunks,
        the rows of these chunks that they are, None for all in order).
        """
        near = rows.to(self.device, non_blocking=True)
        if self._rounding is None:
            yield slice(0, None), near.view(len(near), *self._dims), chosen
            return
        count, step = len(near if chosen is None else chosen), self._rounding.load_chunks
        for at in range(0, count, step):
            part = slice(at, at + step)
            if chosen is None:
                some = near[part]
            else:
                some = near[sent(torch.tensor(chosen[part]), self.device)]
            kv = self._rounding.decode(some)
            yield part, kv.view(torch.uint8), None

    def scratch_bytes(self, streams: int, save_bytes: int) -> int:
        """Device memory that rounding takes for a moment, if so many streams load, and so much is
        saved at once."""
        if self._rounding is None:
            return 0
        saving, loading = self._rounding.scratch_bytes
        return save_bytes + saving + streams * loading

    def write_pieces(
        self,
        placing: Placing,
        at: int,
        rows: torch.Tensor,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Write pieces ``at`` and on (``rows`` are their whole chunks, in host memory or on the
        device, ``chosen`` as in `as_pages_have`) at their new positions. On CUDA it is only
        enqueued."""
        assert self.engine is not None
        for part, data, rows_of_data in self.as_pages_have(rows, chosen):
            placing.write(at + part.start, data.view(self.engine.kv_dtype), rows_of_data)

    def wait_for_writes(self) -> None:
        """Wait until the pages have what was enqueued by this thread."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def by_group(
        self, blocks: Sequence[Sequence[int]]
    ) -> Iterator[tuple[KvGroup, list[int], list[Sequence[int]]]]:
        """(group, its layers on this rank, its part of each row); groups without layers left out.

        A row whose length is not what the groups need is refused by the pages.
        """
        start = 0
        for number, group in enumerate(self.kv_groups):
            width = self.layout.chunk_tokens // group.block_tokens
            stop = start + width if len(self.kv_groups) > 1 else None
            layers = [i for i, member in enumerate(self.kv_group_of) if member == number]
            if layers:
                yield group, layers, [row[start:stop] for row in blocks]
            start += width
