"""A worker that saves and loads rounded chunks, in all the ways it has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from blend.rounding import Kernels, Rounding, RoundingError
from connector.device_tier import DEVICE
from connector.messages import BlendPiece
from prefixstore.codec import FP8, INT8, LOSSY_NAMES
from tests.connector.played_loads import BLOCKS_OF, INTO, LoadsByDma, Moving, pieces_placed
from tests.connector.played_worker import (
    BLOCK,
    CHUNK,
    DIM,
    HEADS,
    LAYERS,
    LAYOUT,
    Worker,
    refs_of,
    save_all,
    snapshot,
    stored,
    untouched,
)
from tests.rounding_by_hand import one_by_one, payload_by_hand

Start = Callable[..., Worker]


def rounded_content(worker: Worker, codec: str, blocks: list[int]) -> tuple[bytes, bytes]:
    """What must be stored of the chunk in these blocks, and come back."""
    return payload_by_hand(codec, worker.canonical(blocks), LAYOUT, worker.layout)


@pytest.fixture(params=["all at once", "one by one"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one by one":
        one_by_one(monkeypatch)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("codec", LOSSY_NAMES)
@pytest.mark.parametrize("way", ["host", "DMA", "device tier"])
def test_a_worker(start: Start, request: pytest.FixtureRequest, codec: str, way: str) -> None:
    """Saves and loads, with part of a block that is vLLM's own, and touches nothing else."""
    dma: LoadsByDma | None = request.getfixturevalue("loads_by_dma") if way == "DMA" else None
    worker = start(codec=codec, device=(1 << 20) * (way == "device tier"))
    assert worker.layout.payload_bytes == LAYOUT.payload_bytes // 2
    refs = refs_of(worker, len(BLOCKS_OF))
    save_all(worker, refs, BLOCKS_OF)
    told = [rounded_content(worker, codec, blocks) for blocks in BLOCKS_OF]
    assert stored(worker, refs) == [data for data, _ in told]
    for skip in (0, 1, 0):
        before = snapshot(worker)
        kept = worker.canonical(INTO[0][:1])
        assert worker.load(refs, INTO, skip) == set()
        for number, (_, back) in enumerate(told):
            if number or not skip:
                assert worker.canonical(INTO[number]) == back
        assert not skip or worker.canonical(INTO[0][:1]) == kept
        assert untouched(worker, before, [block for row in INTO for block in row])
        counts = worker.counted()
        for pages in worker.kv:
            pages[[block for row in INTO for block in row]] = 0.0
    assert dma is None or dma.loaded == [4, 4, 4]
    if way == "device tier":
        assert counts[f"bytes_loaded_{DEVICE}"] == 4 * worker.layout.payload_bytes


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("codec", LOSSY_NAMES)
@pytest.mark.parametrize("way", ["host", "DMA", "device tier"])
def test_pieces_of_a_blend(
    start: Start, request: pytest.FixtureRequest, codec: str, way: str
) -> None:
    """K is moved after it came back."""
    if way == "DMA":
        request.getfixturevalue("loads_by_dma")
    worker = start(codec=codec, device=(1 << 20) * (way == "device tier"))
    worker.rank.engine = Moving(worker)  # type: ignore[assignment]
    refs = refs_of(worker, len(BLOCKS_OF))
    save_all(worker, refs, BLOCKS_OF)
    pieces = [
        BlendPiece(refs[2], 1, 5, 3, 17), BlendPiece(refs[0], 0, CHUNK, 8, 0),
        BlendPiece(refs[3], 2, 4, 17, 26),
    ]  # fmt: skip
    blocks = [10, 12, 14, 16, 18, 19]
    expected = torch.zeros(LAYERS, len(blocks) * BLOCK, HEADS, 2 * DIM)
    for ref, offset, count, place, source, _ in pieces:
        _, back = rounded_content(worker, codec, BLOCKS_OF[refs.index(ref)])
        chunk = torch.frombuffer(bytearray(back), dtype=torch.float32)
        keys, values = chunk.view(LAYERS, 2, HEADS, CHUNK, DIM).movedim(3, 2).unbind(1)
        both = torch.cat((keys + (place - source), values), -1)
        expected[:, place : place + count] = both[:, offset : offset + count]
    for _ in range(3):  # the third time from the device tier
        placed = pieces_placed(worker, pieces, blocks)
        assert torch.equal(placed, expected)
        counts = worker.counted()
    if way == "device tier":
        assert counts[f"bytes_loaded_{DEVICE}"] == 3 * worker.layout.payload_bytes


def test_two_ranks_fill_a_chunk_and_one_reads_it(start: Start) -> None:
    """Each rounds its heads; pieces do not know of others."""
    left, right = start(0, 2, codec=INT8), start(2, 4, codec=INT8)
    whole = start(group=2, codec=INT8)
    refs = refs_of(whole, len(BLOCKS_OF))
    left.save(refs, BLOCKS_OF)
    left.side.close()  # ranks of one process would find each other's chunks busy
    right.save(refs, BLOCKS_OF)
    data = stored(whole, refs)
    for first, worker in ((0, left), (2, right)):
        for pages, part in zip(whole.kv, worker.kv, strict=True):
            pages[:, first : first + 2] = part
    told = [rounded_content(whole, INT8, blocks) for blocks in BLOCKS_OF]
    assert data == [one for one, _ in told]
    assert whole.load(refs, INTO) == set()
    assert [whole.canonical(row) for row in INTO] == [back for _, back in told]


def test_what_is_staged_is_exact(start: Start) -> None:
    """The thread that saves rounds, not the step; and a self-test compares what is staged."""
    worker = start(codec=FP8)
    out = torch.empty((len(BLOCKS_OF), worker.rank.staged_bytes), dtype=torch.uint8)
    worker.rank.read_pages(BLOCKS_OF, out)
    assert [row.numpy().tobytes() for row in out] == [worker.canonical(row) for row in BLOCKS_OF]


@pytest.mark.parametrize("why", ["", "too large", "no compiler", "other bits"])
def test_where_the_kernel_cannot_torch_rounds(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """On a GPU, here by name only."""
    rank = start(codec=INT8).rank
    checked: list[Kernels | None] = []

    def check(rounding: Rounding, device: Any) -> None:
        checked.append(rounding._kernels)
        if why == "other bits" and rounding._kernels is not None:
            raise RoundingError(why)

    monkeypatch.setattr(Rounding, "check", check)
    if why == "too large":
        monkeypatch.setattr("connector.rounding_kernel.ROWS_MAX", 1)
    if why == "no compiler":
        monkeypatch.setitem(sys.modules, "connector.rounding_kernel", None)
    monkeypatch.setattr(rank, "device", SimpleNamespace(type="cuda"))
    rounding = rank._make_rounding((LAYERS, 2, HEADS, CHUNK, DIM))
    assert (rounding._kernels is None) == (why != "")
    assert checked[-1] is rounding._kernels
    assert ("KV is rounded without a kernel" in caplog.text) == (why != "")
