"""Groups of KV caches: which blocks make a chunk, when a window still has them, what is written.

Block tables are played; the pages are real ones of a stand-in backend (`played_worker`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import groups
from connector.destination import Destination
from connector.groups import KvGroup
from connector.options import EngineOptions, RequestOptions
from connector.rank import Rank
from connector.tracked import Tracked
from prefixstore.keys import KeyChain
from tests.connector.played_worker import BLOCK, BLOCKS, CHUNK, LAYERS, LAYOUT, Worker, untouched

FULL, WINDOWED = KvGroup(BLOCK, 0), KvGroup(BLOCK, 1, window=10)


def test_a_row_is_each_groups_blocks_in_turn() -> None:
    both = (KvGroup(4, 0), KvGroup(8, 1))
    tables = [[1, 2, 3, 4, 5], [21, 22]]
    assert groups.blocks_of_chunks(both, tables, 8, 0, 2) == [[1, 2, 21], [3, 4, 22]]
    assert groups.blocks_of_chunks(both, tables, 8, 1, 2) == [[3, 4, 22]]
    assert groups.blocks_of_chunks(both, tables, 8, 1, 1) == []


@pytest.mark.parametrize("window", range(8, 40))
@pytest.mark.parametrize("step", [1, 3, 8, 20])
def test_what_a_step_completes_its_window_still_has(window: int, step: int) -> None:
    """By vLLM's rule: when ``c`` tokens are computed, the first ``c - window + 1`` are let go."""
    group, saved = KvGroup(4, 0, window), []
    for start in range(0, 200, step):
        kept_from = max(0, start - window + 1) // 4 * 4
        first = groups.first_savable((group,), 8, start)
        assert first * 8 >= kept_from
        saved += [i for i in range(start // 8, (start + step) // 8) if i >= first]
    assert saved == list(range((start + step) // 8))


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["model.layers.0.attn", "model.layers.1.attn", "model.layers.2.attn"], [0, 1]),
        (["draft_model.model.layers.0.attn", "model.layers.1.attn"], [1]),
        (["language_model.model.layers.1.self_attn.attn"], [0]),
        (["attn"], [0]),  # refused later, by name
    ],
)
def test_layers_of_a_draft_are_left_out(names: list[str], kept: list[int]) -> None:
    assert groups.without_drafts(names, 2) == [names[i] for i in kept]
    assert groups.without_drafts(names, None) == names


# ---------------------------------------------------------------------- scheduler
def tracked(*of: KvGroup, num_tokens: int = 40) -> Tracked:
    request = SimpleNamespace(
        request_id="r", num_tokens=num_tokens, all_token_ids=list(range(num_tokens))
    )
    chain: Any = KeyChain(bytes(16), 8)
    return Tracked(request, RequestOptions(), None, chain, of)  # type: ignore[arg-type]


def test_blocks_are_taken_by_vllms_number_of_the_group() -> None:
    mine = tracked(KvGroup(4, 2), KvGroup(4, 0))
    mine.take_blocks([[1], [9], [2]])
    assert mine.tables == [[2], [1]]
    mine.take_blocks([[3], [9], []], replace=False)
    assert mine.tables == [[2], [1, 3]]
    mine.take_blocks([[5], [9], [6]])
    assert mine.tables == [[6], [5]]


def test_chunks_a_window_has_let_go_are_not_saved() -> None:
    mine = tracked(KvGroup(4, 0), KvGroup(4, 1, window=8))
    mine.take_blocks([list(range(1, 11)), [0, 0, 0, 0, 15, 16, 17, 18, 19, 20]])
    job = mine.save_job(40, step_start=24)  # from token 17 on there are blocks
    assert job is not None
    assert [ref.depth for ref in job.refs] == [3, 4]
    assert job.blocks == [[7, 8, 17, 18], [9, 10, 19, 20]]


@pytest.mark.parametrize(("num_tokens", "most"), [(40, 4), (41, 5), (8, 0), (9, 1)])
def test_the_last_token_is_left_to_a_window(num_tokens: int, most: int) -> None:
    assert tracked(FULL, WINDOWED).chunks_to_load(num_tokens) == most
    assert tracked(FULL).chunks_to_load(num_tokens) is None


def test_a_load_that_failed_is_not_promised_again() -> None:
    mine = tracked(FULL, WINDOWED)
    mine.next_save, mine.promised = 5, (2, 5)
    mine.note_failed_load()
    assert (mine.next_save, mine.may_load) == (2, False)


# ---------------------------------------------------------------------- worker
@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    played = Worker(EngineOptions(dir=str(tmp_path / "store"), memory="4MiB", disk="4MiB"))
    yield played
    played.close()


@pytest.fixture(params=["layer by layer", "by kernels"])
def rank(worker: Worker, request: pytest.FixtureRequest) -> Rank:
    """The worker's pages; the middle layer has a window."""
    old = worker.rank
    rank = Rank(old.pages, LAYOUT, old.roi, 1, True, None, (FULL, WINDOWED), [0, 1, 0])
    if request.param == "by kernels":
        make = request.getfixturevalue("kernel").PageKernel
        rank.page_kernels = {
            0: make([old.pages[0], old.pages[2]], [0, 2]),
            1: make(old.pages[1:2], [1]),
        }
    return rank


ROWS = [[3, 4, 13, 14], [5, 6, 15, 16]]  # of the full layers, then of those with a window


def canonical(worker: Worker, rows: list[list[int]]) -> torch.Tensor:
    """What these rows are, each layer read at its own group's blocks: [chunk, layer, bytes]."""
    parts = []
    for row in rows:
        of_group = [worker.canonical(row[:2]), worker.canonical(row[2:])]
        size = len(of_group[0]) // LAYERS
        parts += [of_group[i == 1][i * size : (i + 1) * size] for i in range(LAYERS)]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).view(len(rows), -1)


def test_each_layer_is_read_at_its_groups_blocks(worker: Worker, rank: Rank) -> None:
    out = torch.empty(2, LAYOUT.payload_bytes, dtype=torch.uint8)
    rank.read_pages(ROWS, out)
    assert torch.equal(out, canonical(worker, ROWS))


def test_chunks_with_others_between_go_to_their_blocks(worker: Worker, rank: Rank) -> None:
    """As a device tier has some, among others that it has."""
    rows = [*ROWS, [7, 8, 17, 18]]
    before = canonical(worker, rows)
    data = torch.randint(0, 256, (4, LAYOUT.payload_bytes)).byte()
    Destination(rank, rows, 0).write([0, 2], data, [3, 1])
    assert torch.equal(canonical(worker, rows), torch.stack([data[3], before[1], data[1]]))


def test_nothing_is_written_before_it_is_told_where(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device: another stream told it."""
    waited: list[object] = []
    stream, told = SimpleNamespace(wait_event=waited.append), object()
    monkeypatch.setattr("connector.destination.mark", lambda device: told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    destination = Destination(rank, ROWS, 0)
    monkeypatch.setattr(destination, "_write", lambda *_: waited.append("written"))
    destination.write([0, 1], torch.zeros((2, LAYOUT.payload_bytes), dtype=torch.uint8))
    assert waited == [told, "written"]


@pytest.mark.parametrize("skip", [0, 1])
def test_a_window_gets_the_blocks_it_has(worker: Worker, rank: Rank, skip: int) -> None:
    data = torch.empty(2, LAYOUT.payload_bytes, dtype=torch.uint8)
    rank.read_pages(ROWS, data)
    for kv in worker.kv:
        kv.random_(0, 9)
    before = [kv.clone() for kv in worker.kv]
    Destination(rank, [[3, 4, 0, 0], [5, 6, 0, 16]], skip).write(range(2), data)
    after, whole = canonical(worker, ROWS), data.view(2, LAYERS, 2, -1, CHUNK, 32)
    written = after.view(2, LAYERS, 2, -1, CHUNK, 32)
    assert torch.equal(written[1, 1, :, :, BLOCK:], whole[1, 1, :, :, BLOCK:])
    assert torch.equal(written[1, ::2], whole[1, ::2])
    assert torch.equal(written[0, ::2, :, :, skip * BLOCK :], whole[0, ::2, :, :, skip * BLOCK :])
    touched = [[3, 4, 5, 6][skip:], [16], [3, 4, 5, 6][skip:]]
    for kv, old, blocks in zip(worker.kv, before, touched, strict=True):
        rest = [block for block in range(BLOCKS) if block not in blocks]
        assert torch.equal(kv[rest], old[rest])


def test_nothing_is_written_where_a_window_has_no_block(worker: Worker, rank: Rank) -> None:
    before = [kv.clone() for kv in worker.kv]
    data = torch.zeros(1, LAYOUT.payload_bytes, dtype=torch.uint8)
    Destination(rank, [[3, 4, 0, 0]], 0).write(range(1), data)
    assert untouched(worker, before, but=[3, 4])
    assert torch.equal(worker.kv[1], before[1])


def test_blocks_below_zero_are_refused(worker: Worker, rank: Rank) -> None:
    """A bug somewhere must not become a chunk that was not read, or a load that was not written."""
    before = [kv.clone() for kv in worker.kv]
    data = torch.zeros(1, LAYOUT.payload_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="block"):
        rank.read_pages([[3, -1, 13, 14]], data)
    with pytest.raises(ValueError, match="block"):
        Destination(rank, [[3, -1, 13, 14]], 0).write(range(1), data)
    assert untouched(worker, before)
