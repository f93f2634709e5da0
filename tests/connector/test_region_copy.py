"""Regions between slots and chunks: beside the runs one by one, and with CUDA where it is."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("vllm")

import torch

from connector.rank import Rank
from connector.region_copy import BatchCopy, RegionCopy, batch_copy
from prefixstore.layout import Layout, Roi

LAYOUT = Layout(num_layers=3, num_planes=2, num_heads=8, chunk_tokens=16, head_bytes=32)
ROIS = [LAYOUT.whole, Roi(1, 2, 0, 8), Roi(0, 3, 4, 8), Roi(1, 3, 2, 3), Roi(2, 3, 7, 8)]


def played(here: torch.Tensor, there: torch.Tensor, sizes: torch.Tensor) -> None:
    """What vLLM says of swap_blocks_batch."""
    assert here.dtype == there.dtype == sizes.dtype == torch.int64
    assert here.shape == there.shape == sizes.shape
    for source, target, size in zip(*(t.tolist() for t in (here, there, sizes)), strict=True):
        ctypes.memmove(target, source, size)


def random_bytes(count: int, seed: int) -> torch.Tensor:
    chosen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=chosen)


def _bytes(array: npt.NDArray[np.uint8]) -> memoryview:
    return memoryview(array)  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize("batch", [None, played], ids=["one by one", "at once"])
@pytest.mark.parametrize("roi", ROIS)
def test_beside_the_runs_one_by_one(roi: Roi, batch: BatchCopy | None) -> None:
    region = RegionCopy(LAYOUT.runs(roi), batch)
    unit = LAYOUT.roi_bytes(roi)
    slots = random_bytes(2 * LAYOUT.slot_bytes, 1).view(2, -1)
    chunks = random_bytes(5 * unit, 2).view(5, unit)
    old, before = slots.numpy().copy(), chunks.numpy().copy()

    region.to_chunks(slots.unbind(), [chunks[3], chunks[1]])
    wanted = before.copy()
    for slot, chunk in ((0, 3), (1, 1)):
        for run in LAYOUT.runs(roi):
            run.in_buffer(_bytes(wanted[chunk]))[:] = run.in_slot(_bytes(old[slot]))
    assert np.array_equal(chunks.numpy(), wanted)

    region.to_slots(slots.unbind(), [chunks[2], chunks[4]])
    for slot, chunk in ((0, 2), (1, 4)):
        for run in LAYOUT.runs(roi):
            run.in_slot(_bytes(old[slot]))[:] = run.in_buffer(_bytes(before[chunk]))
    assert np.array_equal(slots.numpy(), old)


@pytest.mark.parametrize("error", [RuntimeError("cuMemcpyBatchAsync failed"), AttributeError("op")])
def test_where_it_is_refused_they_go_one_by_one(error: Exception) -> None:
    asked = []

    def refuses(*arguments: torch.Tensor) -> None:
        asked.append(arguments)
        raise error

    region = RegionCopy(LAYOUT.runs(ROIS[2]), refuses)
    slot = random_bytes(LAYOUT.slot_bytes, 1)
    chunks = [torch.zeros(LAYOUT.roi_bytes(ROIS[2]), dtype=torch.uint8) for _ in range(3)]
    for chunk in chunks[:2]:
        region.to_chunks([slot], [chunk])
    RegionCopy(LAYOUT.runs(ROIS[2])).to_chunks([slot], [chunks[2]])
    assert torch.equal(chunks[0], chunks[2])
    assert torch.equal(chunks[1], chunks[2])
    assert len(asked) == 1


def test_memory_that_is_too_short_is_refused() -> None:
    """Nothing behind it is read or written, whatever CUDA would do."""
    region, unit = RegionCopy(LAYOUT.runs(LAYOUT.whole), played), LAYOUT.roi_bytes(LAYOUT.whole)
    slot, chunk = random_bytes(LAYOUT.slot_bytes, 1), random_bytes(unit, 2)
    for one, other in ((slot[: unit - 1], chunk), (slot, chunk[:-1])):
        with pytest.raises(AssertionError, match="behind the memory"):
            region.to_chunks([one], [other])
        with pytest.raises(AssertionError, match="behind the memory"):
            region.to_slots([one], [other])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("roi", ROIS)
def test_with_cuda(roi: Roi) -> None:
    batch = batch_copy()
    assert batch is not None
    region, unit = RegionCopy(LAYOUT.runs(roi), batch), LAYOUT.roi_bytes(roi)
    slots = [random_bytes(LAYOUT.slot_bytes, seed).pin_memory() for seed in range(3)]
    chunks = torch.zeros((3, unit), dtype=torch.uint8, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        region.to_chunks(slots, chunks.unbind())
        back = [torch.zeros(LAYOUT.slot_bytes, dtype=torch.uint8).pin_memory() for _ in slots]
        region.to_slots(back, chunks.unbind())
        torch.cuda.current_stream().synchronize()
    assert region._batch is batch, "it was refused"
    for slot, found in zip(slots, back, strict=True):
        wanted = np.zeros(LAYOUT.slot_bytes, np.uint8)
        for run in LAYOUT.runs(roi):
            run.in_slot(_bytes(wanted))[:] = run.in_slot(_bytes(slot.numpy()))
        assert np.array_equal(found.numpy(), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_threads_first_copies_are_one_call() -> None:
    torch.cuda.Stream()  # the first of a process is made with many others, by the runtime
    rank = cast(Rank, SimpleNamespace(device=torch.device("cuda")))
    region = RegionCopy(LAYOUT.runs(LAYOUT.whole), batch_copy())
    unit = LAYOUT.roi_bytes(LAYOUT.whole)
    slots = [random_bytes(LAYOUT.slot_bytes, seed).pin_memory() for seed in range(2)]
    chunks = torch.zeros((2, unit), dtype=torch.uint8, device="cuda")

    def copy() -> None:
        with Rank.own_stream(rank):
            region.to_chunks(slots, chunks.unbind())
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert region._batch is not None, "it was refused"
