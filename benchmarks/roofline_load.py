"""Stages of `benchmarks.roofline` that read the memory tier by DMA: the copies, and a whole load.

Owns a store with the chunks in it, whose slots are registered with CUDA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_timing import REPEATS, WARM, timed
from benchmarks.roofline_rows import BYTES, Limit, Stage
from benchmarks.store_sizes import identity_for, temporary_store
from connector.destination import Destination
from connector.direct import Direct
from connector.pages import LayerPages
from connector.rank import Rank
from connector.registered import Cuda, RegisteredSlots
from prefixstore import Layout, PutState
from prefixstore.lending import Lent, lend

DEADLINE_S = 120.0
PUT_CHUNKS = 32


class Loaded:
    """``chunks``: uint8, on a device, one a row; they are put into a store of their own."""

    def __init__(self, folder: Path, layout: Layout, chunks: Tensor) -> None:
        self._layout, self._chunks = layout, chunks.view(len(chunks), -1)
        self._stack = ExitStack()
        with ExitStack() as undo:
            room = len(chunks) * layout.slot_bytes * 5 // 4 + (64 << 20)
            store = undo.enter_context(temporary_store(folder, room, 0))
            self._space = store.namespace(identity_for(layout), layout)
            tokens = np.arange(len(chunks) * layout.chunk_tokens, dtype=np.int32)
            self._refs = self._space.chain(tokens).refs()
            for at in range(0, len(chunks), PUT_CHUNKS):
                part = self._chunks[at : at + PUT_CHUNKS].cpu().numpy()
                states = self._space.put(
                    self._refs[at : at + PUT_CHUNKS], [one.data for one in part]
                )
                if any(state is not PutState.STORED for state in states):
                    raise RuntimeError(f"a put gave {set(states)}; every chunk should be stored")
            self._slots = RegisteredSlots(Cuda(chunks.device))
            undo.callback(lambda: self._slots.close(time.monotonic() + DEADLINE_S))
            self._stack = undo.pop_all()

    def __enter__(self) -> Loaded:
        """The chunks are stored."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The store goes."""
        self._stack.close()

    def stages(
        self,
        pages: list[LayerPages],
        blocks: list[list[int]],
        limit: Limit,
        parts_ms: Mapping[str, float],
    ) -> list[Stage]:
        """The copies alone, the look-up alone, and a whole load to these blocks; ``parts_ms`` are
        those of the kernels. Raises RuntimeError if CUDA does not register the slots."""
        lent, memory = self._registered()
        near = torch.empty_like(self._chunks)
        num_bytes, payload = near.numel(), self._layout.payload_bytes

        def copy() -> None:
            for target, source in zip(near, memory, strict=True):
                target.copy_(source[:payload], non_blocking=True)

        took = timed(copy)
        if not torch.equal(near, self._chunks):
            raise RuntimeError("the GPU read other bytes from the memory tier than were put")
        self._slots.give_back(lent)
        looked = self._look_up_ms()
        whole = self._loads(pages, blocks)
        parts = {
            "copy": num_bytes / limit.value / 1e6 if limit.value else 0.0,
            "look-up on the host": statistics.median(looked),
            **parts_ms,
        }
        return [
            Stage("memory tier to device", num_bytes, 0.0, took.ms, limit, took.host_ms),
            Stage("look-up of chunks on the host", 0.0, 0.0, looked, Limit("", BYTES, None)),
            Stage("whole load, memory tier to pages, checked", num_bytes, 0.0, whole, limit,
                  parts=parts),
        ]  # fmt: skip

    def _registered(self) -> tuple[list[Lent], list[Tensor]]:
        lent = lend(self._space, self._refs, self._layout.whole)
        for one in lent:
            self._slots.register(one)
        there = [one for one in self._slots.take(lent) if one is not None]
        if len(there) != len(self._refs):
            raise RuntimeError(f"CUDA reads {len(there)} of {len(self._refs)} slots")
        return lent, there

    def _look_up_ms(self) -> list[float]:
        took = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            lend(self._space, self._refs, self._layout.whole)
            took.append(1e3 * (time.perf_counter() - began))
        return took

    def _loads(self, pages: list[LayerPages], blocks: list[list[int]]) -> list[float]:
        """As a thread of the connector does it; ms until all is in the pages and checked."""
        rank = Rank(pages, self._layout, self._layout.whole, group=1, saves=True)
        assert rank.sum_kernel is not None
        direct = Direct(rank.device, rank.layout, rank.roi, rank.sum_kernel, self._slots)
        write = partial(_write, Destination(rank, blocks, 0))
        took = []
        for number in range(WARM + REPEATS):
            began = time.perf_counter()
            done = direct.load(self._space, self._refs, write)
            torch.cuda.synchronize()
            if done != len(self._refs):
                raise RuntimeError(f"{done} of {len(self._refs)} chunks were loaded by DMA")
            if number >= WARM:
                took.append(1e3 * (time.perf_counter() - began))
        return took


def _write(destination: Destination, at: int, chunks: Tensor) -> bool:
    destination.write(range(at, at + len(chunks)), chunks)
    return True
