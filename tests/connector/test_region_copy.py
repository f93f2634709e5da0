"""Regions between slots and chunks: beside the runs one by one, and with CUDA where it is."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("vllm")

import torch

from connector.region_copy import Copy2d, RegionCopy, copy_2d
from prefixstore.layout import Layout, Roi, Run

LAYOUT = Layout(num_layers=3, num_planes=2, num_heads=8, chunk_tokens=16, head_bytes=32)
ROIS = [LAYOUT.whole, Roi(1, 2, 0, 8), Roi(0, 3, 4, 8), Roi(1, 3, 2, 3), Roi(2, 3, 7, 8)]


def played(
    to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, kind: int, stream: int
) -> int:
    """What CUDA's manual says of cudaMemcpy2DAsync."""
    assert (kind, stream) == (4, 0)
    if width > to_pitch or width > pitch:
        return 12  # cudaErrorInvalidPitchValue
    for row in range(rows):
        ctypes.memmove(to + row * to_pitch, source + row * pitch, width)
    return 0


def random_bytes(count: int, seed: int) -> torch.Tensor:
    chosen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=chosen)


def _bytes(array: npt.NDArray[np.uint8]) -> memoryview:
    return memoryview(array)  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize("copy", [None, played], ids=["run by run", "at once"])
@pytest.mark.parametrize("roi", ROIS)
def test_beside_the_runs_one_by_one(roi: Roi, copy: Copy2d | None) -> None:
    region = RegionCopy(LAYOUT.runs(roi), copy)
    unit = LAYOUT.roi_bytes(roi)
    slot, chunks = random_bytes(LAYOUT.slot_bytes, 1), random_bytes(3 * unit, 2).view(3, unit)
    old, before = slot.numpy().copy(), chunks.numpy().copy()

    region.to_chunk(slot, chunks[1])
    wanted = before.copy()
    for run in LAYOUT.runs(roi):
        run.in_buffer(_bytes(wanted[1]))[:] = run.in_slot(_bytes(old))
    assert np.array_equal(chunks.numpy(), wanted)

    region.to_slot(slot, chunks[2])
    for run in LAYOUT.runs(roi):
        run.in_slot(_bytes(old))[:] = run.in_buffer(_bytes(before[2]))
    assert np.array_equal(slot.numpy(), old)


def test_runs_at_other_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="run 2 of a region"):
        RegionCopy([Run(0, 0, 8), Run(32, 8, 8), Run(60, 16, 8)])


def test_where_cuda_refuses_it_is_run_by_run() -> None:
    asked = []

    def refuses(*arguments: int) -> int:
        asked.append(arguments)
        return 1

    region = RegionCopy(LAYOUT.runs(ROIS[2]), refuses)
    slot = random_bytes(LAYOUT.slot_bytes, 1)
    chunks = [torch.zeros(LAYOUT.roi_bytes(ROIS[2]), dtype=torch.uint8) for _ in range(3)]
    for chunk in chunks[:2]:
        region.to_chunk(slot, chunk)
    RegionCopy(LAYOUT.runs(ROIS[2])).to_chunk(slot, chunks[2])
    assert torch.equal(chunks[0], chunks[2])
    assert torch.equal(chunks[1], chunks[2])
    assert len(asked) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("roi", ROIS)
def test_with_cuda(roi: Roi) -> None:
    copy = copy_2d()
    assert copy is not None
    region, unit = RegionCopy(LAYOUT.runs(roi), copy), LAYOUT.roi_bytes(roi)
    slot = random_bytes(LAYOUT.slot_bytes, 1).pin_memory()
    chunk = torch.zeros(unit, dtype=torch.uint8, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        region.to_chunk(slot, chunk)
        back = torch.zeros(LAYOUT.slot_bytes, dtype=torch.uint8).pin_memory()
        region.to_slot(back, chunk)
        torch.cuda.current_stream().synchronize()
    wanted = np.zeros(LAYOUT.slot_bytes, np.uint8)
    for run in LAYOUT.runs(roi):
        run.in_slot(_bytes(wanted))[:] = run.in_slot(_bytes(slot.numpy()))
    assert np.array_equal(back.numpy(), wanted)
