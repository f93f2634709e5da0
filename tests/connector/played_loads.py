"""Loads without CUDA: what stands for DMA and for the engine of a blend, and chunks to load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from connector import direct, load_work, worker_side
from connector.device_tier import HostSums
from connector.direct import Checked, Direct, Sums, Write
from connector.messages import BlendJob, BlendLoaded, BlendPiece, LoadJob, StepMetadata
from connector.rank import Rank
from connector.registered import RegisteredSlots
from prefixstore.keys import ChunkRef
from prefixstore.namespace import Namespace
from tests.connector.played_worker import (
    BLOCK,
    DEADLINE_S,
    DIM,
    HEADS,
    IDENTITY,
    LAYOUT,
    STALL_S,
    SideBySide,
    Worker,
)

BLOCKS_OF = [[0, 1], [2, 3], [4, 5], [6, 7]]
INTO = [[20, 21], [9, 8], [17, 23], [11, 30]]


class Registrar:
    """Registers what it is asked to, or not."""

    def __init__(self) -> None:
        self.registered = 0
        self.refuses = False

    def begin(self) -> bool:
        return True

    def register(self, memory: torch.Tensor) -> bool:
        self.registered += not self.refuses
        return not self.refuses

    def unregister(self, memory: torch.Tensor) -> bool:
        self.registered -= 1
        return True


class LoadsByDma:
    """What workers that start now have instead of CUDA: they load two chunks at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sum_kernel: ModuleType) -> None:
        self.cuda = Registrar()
        self.slots: RegisteredSlots
        self.made: list[Direct] = []
        self.placed: list[int] = []  # pieces of the last blend's load, as they were in place
        self.loaded: list[int] = []  # chunks of each load that did not go by way of the host
        self.held: list[bool] = []  # of each load: its lanes were
        loaded, noted = self.loaded, self.held
        for name in ("LANE_BYTES", "FIRST_BYTES"):
            monkeypatch.setattr(direct, name, 2 * LAYOUT.payload_bytes)

        kernel = sum_kernel.SumKernel(LAYOUT.piece_bytes, torch.device("cpu"))
        interpreter = threading.Lock()  # it is for one thread

        class OneByOne:
            def __call__(self, data: Tensor, sums: Tensor, rows: Tensor | None = None) -> None:
                with interpreter:
                    kernel(data, sums, rows)

            def compare(self, data: Tensor, sums: Tensor, wanted: Tensor, wrong: Tensor) -> None:
                with interpreter:
                    kernel.compare(data, sums, wanted, wrong)

        self.sums: Sums = OneByOne()

        class Counted(Direct):
            def load(
                self,
                namespace: Namespace,
                refs: Sequence[ChunkRef],
                write: Write,
                checked: Checked | None = None,
                *,
                held: bool = False,
            ) -> int:
                noted.append(held)
                loaded.append(super().load(namespace, refs, write, checked, held=held))
                return loaded[-1]

        def make(rank: Rank, slots: RegisteredSlots) -> Direct:
            self.slots = slots
            # Pieces that were rounded are here too short for the kernel.
            sums = self.sums if rank.layout == LAYOUT else HostSums(rank.layout)
            self.made.append(Counted(rank.device, rank.layout, rank.roi, sums, slots))
            return self.made[-1]

        receive: Callable[..., int] = load_work.LoadWork._receive

        def noting(*args: Any) -> int:
            if len(args) < 6:  # chunks, not pieces
                return receive(*args)
            *others, placed = args
            self.placed.clear()

            def noted(count: int) -> None:
                self.placed.append(count)
                placed(count)

            return receive(*others, noted)

        monkeypatch.setattr(worker_side, "Cuda", lambda device: self.cuda)
        monkeypatch.setattr(load_work, "direct_for", make)
        monkeypatch.setattr(load_work.LoadWork, "_receive", noting)


class Moving:
    """What stands for the engine of a blend: K that moves by n has n added to it."""

    kv_dtype, block_tokens, piece_kernel = torch.float32, BLOCK, None
    device = torch.device("cpu")

    def __init__(self, worker: Worker) -> None:
        self.kv, self.rope, self._backend = worker.kv, self, SideBySide()

    def cos_sin(self, moves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return moves, moves

    def rotate_by(self, keys: torch.Tensor, moves: torch.Tensor, _: Any) -> torch.Tensor:
        return keys + moves[:, None, None]

    def write(self, index: int, slots: torch.Tensor, keys: Any, values: Any) -> None:
        self._backend.do_kv_cache_update(None, keys, values, self.kv[index], slots)


def pieces_placed(
    worker: Worker, pieces: list[BlendPiece], blocks: list[int], failed: Sequence[int] = ()
) -> torch.Tensor:
    """Load pieces, but for those that fail; K and V then in these blocks, [layer, token, head,
    K and V]."""
    for kv in worker.kv:
        kv[blocks] = 0.0
    span = len(blocks) * BLOCK
    job = BlendJob(list(range(span)), 0, blocks, pieces, "none", 0.0, 1, 16)
    load = LoadJob("r", IDENTITY.namespace, [], [], 0, STALL_S, job)
    worker.side.start_loads(StepMetadata(loads=[load]))
    end = time.monotonic() + DEADLINE_S
    while (report := worker.side.report()) is None or not report.blends:
        assert time.monotonic() < end
        assert worker.side.loader.finished(idle=True) == set()
    assert report.blends["r"] == BlendLoaded(1, frozenset(failed), False)
    return torch.stack([kv[blocks].transpose(1, 2).flatten(0, 1) for kv in worker.kv])


def pieces_stored(
    worker: Worker, refs: list[ChunkRef], pieces: list[BlendPiece], count: int
) -> torch.Tensor:
    """What so many blocks must have then: the chunks of BLOCKS_OF are those of ``refs``."""
    expected = torch.zeros(len(worker.kv), count * BLOCK, HEADS, 2 * DIM)
    for ref, offset, num_tokens, start, source_start, _ in pieces:
        chunk = BLOCKS_OF[refs.index(ref)]
        tokens = torch.stack([kv[chunk].transpose(1, 2).flatten(0, 1) for kv in worker.kv])
        expected[:, start : start + num_tokens] = tokens[:, offset : offset + num_tokens]
        expected[:, start : start + num_tokens, :, :DIM] += start - source_start
    return expected
