"""Loads by way of the host that the device checks, on a device that is the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import xxhash

pytest.importorskip("vllm")

import torch

from connector import device_check, load_work
from connector.device_check import DeviceCheck, device_check_for
from connector.device_tier import DEVICE, HostSums
from connector.known import KnownNamespaces
from connector.messages import BlendPiece, LoadJob, StepMetadata
from connector.rank import Rank
from prefixstore import admin
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.rows import Row
from prefixstore.slots import SlotFile
from tests.connector.played_loads import BLOCKS_OF, INTO, Moving, pieces_placed, pieces_stored
from tests.connector.played_worker import (
    CHUNK,
    DEADLINE_S,
    IDENTITY,
    LAYOUT,
    Worker,
    refs_of,
    save_all,
    snapshot,
    stored,
    untouched,
)
from tests.connector.test_splits import Split
from tests.test_lending import flip

Start = Callable[..., Worker]
SIZE = LAYOUT.payload_bytes


class Checks(HostSums):
    """What stands for the GPU's hashes, and what was hashed."""

    def __init__(self) -> None:
        super().__init__(LAYOUT)
        self.chunks: list[int] = []  # of each launch
        self.mistaken: list[int] = []  # chunks of the next launch of which it has other bytes

    def __call__(
        self, data: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor | None = None
    ) -> None:
        assert rows is None
        self.chunks.append(len(data))
        while self.mistaken:
            data[self.mistaken.pop(), 300] ^= 4
        found = [
            xxhash.xxh3_64_intdigest(piece.tobytes())
            for piece in data.numpy().reshape(-1, LAYOUT.piece_bytes)
        ]
        there = np.array(found, np.uint64).view(np.int64).reshape(sums.shape)
        sums.copy_(torch.from_numpy(there))


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    """Workers that start now have their device check what the host reads."""
    checks = Checks()

    def make(rank: Rank, most: int) -> DeviceCheck:
        return DeviceCheck(rank.device, LAYOUT, rank.roi, checks, most)

    monkeypatch.setattr(load_work, "device_check_for", make)
    return checks


def only_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the host must check nothing."""
    monkeypatch.setattr(Layout, "piece_sums", lambda *_: pytest.fail("hashed by the host"))
    monkeypatch.setattr("prefixstore.namespace.read_checked", lambda *_: pytest.fail("checked"))


def to_disk(worker: Worker, refs: Sequence[ChunkRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """These chunks are on disk only, stay there, and are without a sum of the payload, as those are
    that a GPU has hashed."""
    store = worker.store
    monkeypatch.setattr("prefixstore.admin.PUNCH_AFTER_S", 0.0)
    monkeypatch.setattr(store.keeper, "promote", lambda key: None)
    admin.empty_memory(store)

    def change(txn: Any) -> None:
        for ref in refs:
            row = Row.unpack(txn.get("chunk", ref.key))
            txn.put("chunk", ref.key, row.without_payload_sum().pack())

    store.index.write(change)
    namespace = store.namespace(IDENTITY, LAYOUT)
    assert namespace.match_each(refs) == [DISK] * len(refs)


def started(start: Start, **options: Any) -> tuple[Worker, list[ChunkRef]]:
    """A worker that has stored the four chunks in BLOCKS_OF."""
    worker = start(**options)
    refs = refs_of(worker, len(BLOCKS_OF))
    save_all(worker, refs, BLOCKS_OF)
    return worker, refs


def corrupt(worker: Worker, tier: str) -> int:
    return int(admin.stats(worker.store)["counters"].get(f"corrupt_{tier}", 0))


def healed(worker: Worker, tier: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not corrupt(worker, tier):
        assert time.monotonic() < end, "what is damaged is not dropped"
        time.sleep(0.01)


@pytest.mark.parametrize("skip", [0, 1])
def test_chunks_on_disk_are_hashed_by_the_device(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch, skip: int
) -> None:
    worker, refs = started(start)
    to_disk(worker, refs, monkeypatch)
    only_by_device(monkeypatch)
    before = snapshot(worker)
    assert worker.load(refs, INTO, skip) == set()
    assert [worker.canonical(blocks) for blocks in INTO[1:]] == [
        worker.canonical(blocks) for blocks in BLOCKS_OF[1:]
    ]
    assert worker.canonical(INTO[0][skip:]) == worker.canonical(BLOCKS_OF[0][skip:])
    assert untouched(worker, before, [*INTO[0][skip:], *INTO[1], *INTO[2], *INTO[3]])
    assert checks.chunks == [4]
    assert worker.counted() == {"bytes_loaded_2": 4 * SIZE}


def test_so_are_those_in_memory_that_it_does_not_read_itself(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, refs = started(start)
    only_by_device(monkeypatch)
    for _ in range(2):
        for kv in worker.kv:
            kv[[block for row in INTO for block in row]] = 0.0
        assert worker.load(refs, INTO) == set()
        assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    assert checks.chunks == [4, 4]
    assert worker.counted() == {"bytes_loaded_1": 8 * SIZE}


def test_what_other_threads_read_last_is_sent(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be at it when the one that sends has nothing left to read."""
    worker, refs = started(start)
    to_disk(worker, refs, monkeypatch)
    only_by_device(monkeypatch)
    read, helping = SlotFile.read, threading.Event()

    def late(self: SlotFile, *args: Any) -> None:
        if threading.current_thread().name == "prefixstore-load":
            assert helping.wait(DEADLINE_S)
        else:
            helping.set()
            time.sleep(0.3)
        read(self, *args)

    monkeypatch.setattr(SlotFile, "read", late)
    monkeypatch.setattr("prefixstore.getting.helpers_for", lambda _: 1)
    job = LoadJob("r", IDENTITY.namespace, refs, INTO, 0, 10 * DEADLINE_S)
    worker.side.start_loads(StepMetadata(loads=[job]))
    worker.finish()
    assert worker.side.loader.failed_blocks() == set()
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))


def test_a_rank_has_its_heads_hashed(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole, refs), part = started(start), start(1, 3, group=2)
    to_disk(whole, refs, monkeypatch)
    only_by_device(monkeypatch)
    monkeypatch.setattr(part.store.keeper, "promote", lambda key: None)
    for kv in part.kv:
        kv.zero_()
    assert part.load(refs, INTO) == set()
    assert checks.chunks == [4]
    for mine, kv in zip(part.kv, whole.kv, strict=True):
        for number, blocks in enumerate(BLOCKS_OF):
            assert torch.equal(mine[INTO[number]], kv[blocks, 1:3])


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("damage", ["payload", "trailer", "expired", "absent"])
def test_what_is_not_right_is_no_hit(
    start: Start,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    by_device: bool,
) -> None:
    """The same, whoever checks: the load ends there, and what is damaged can be stored again."""
    checks: Checks | None = request.getfixturevalue("checks") if by_device else None
    worker, refs = started(start)
    to_disk(worker, refs, monkeypatch)
    namespace, before = worker.store.namespace(IDENTITY, LAYOUT), snapshot(worker)
    if damage == "payload":
        flip(namespace, DISK, refs[2], 300)
    elif damage == "trailer":
        flip(namespace, DISK, refs[2], LAYOUT.payload_bytes + 40)
    elif damage == "absent":
        namespace.delete(refs[2:3])
    else:
        namespace.set_ttl(refs[2:3], 1000.0)
        later = SimpleNamespace(time=lambda: time.time() + 2000.0)
        monkeypatch.setattr("prefixstore.getting.time", later)
    assert worker.load(refs, INTO) == {*INTO[2], *INTO[3]}
    assert checks is None or checks.chunks == [4]
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(2))
    assert untouched(worker, before, [*INTO[0], *INTO[1]])
    assert worker.counted()["bytes_loaded_2"] == 2 * SIZE
    if damage in ("payload", "trailer"):
        healed(worker, "disk")
    assert corrupt(worker, "disk") == (damage in ("payload", "trailer"))
    expected = DISK if damage == "expired" else MISS
    assert namespace.match_each(refs) == [DISK, DISK, expected, DISK]
    if expected == MISS:
        worker.save(refs, BLOCKS_OF)
        stored(worker, refs)
        assert worker.load(refs, INTO) == set()
        assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))


def test_what_is_damaged_in_memory_comes_from_the_disk(start: Start, checks: Checks) -> None:
    worker, refs = started(start)
    assert worker.store.flush(DEADLINE_S)
    flip(worker.store.namespace(IDENTITY, LAYOUT), MEMORY, refs[1], 300)
    assert worker.load(refs, INTO) == set()
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    assert worker.counted() == {"bytes_loaded_1": 3 * SIZE, "bytes_loaded_2": SIZE}
    healed(worker, "memory")
    assert corrupt(worker, "disk") == 0


def test_what_only_the_device_has_wrong_is_read_again(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a slot is reused while it is read: no chunk is damaged, and all are loaded."""
    worker, refs = started(start)
    to_disk(worker, refs, monkeypatch)
    checks.mistaken = [1, 3]
    assert worker.load(refs, INTO) == set()
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    assert corrupt(worker, "disk") == 0
    assert worker.counted() == {"bytes_loaded_2": 4 * SIZE}
    assert worker.store.namespace(IDENTITY, LAYOUT).match_each(refs) == [DISK] * 4


@pytest.mark.parametrize("damaged", [False, True])
def test_pieces_of_a_blend(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Each has its own row, also where one before it is gone."""
    worker, refs = started(start)
    worker.rank.engine = cast(Any, Moving(worker))
    pieces = [
        BlendPiece(refs[2], 0, CHUNK, 3, 2 * CHUNK),
        BlendPiece(refs[0], 5, 2, 11, 5),
        BlendPiece(refs[3], 1, CHUNK - 1, 19, 3 * CHUNK + 1),
    ]
    blocks = [20, 9, 8, 30, 11, 23, 17]
    there = [piece for piece in pieces if not damaged or piece.ref != refs[0]]
    expected = pieces_stored(worker, refs, there, len(blocks))
    to_disk(worker, refs, monkeypatch)
    if damaged:
        flip(worker.store.namespace(IDENTITY, LAYOUT), DISK, refs[0], 300)
    else:
        only_by_device(monkeypatch)
    failed = [1] if damaged else []
    assert torch.equal(pieces_placed(worker, pieces, blocks, failed), expected)
    assert checks.chunks == [3]
    assert worker.counted()["bytes_loaded_2"] == (3 - len(failed)) * SIZE


@pytest.mark.parametrize("damaged", [False, True])
def test_a_split(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """From the back, down to what is damaged."""
    get = KnownNamespaces.get
    split = Split(start, monkeypatch)
    monkeypatch.setattr(KnownNamespaces, "get", get)
    to_disk(split.worker, split.refs, monkeypatch)
    if damaged:
        flip(split.worker.store.namespace(IDENTITY, LAYOUT), DISK, split.refs[1], 300)
    else:
        only_by_device(monkeypatch)
    split.begin()
    split.steps_until(lambda: split.ended)
    assert split.loaded([2, 3] if damaged else range(4))
    assert checks.chunks == [1] * (3 if damaged else 4)
    assert split.placed[-1] == CHUNK * (3 if damaged else 1)
    assert split.worker.side.failed_blocks() == set()


def test_the_device_tier_takes_in_what_was_checked(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, refs = started(start, device=8 * (SIZE + 8 * LAYOUT.num_pieces))
    to_disk(worker, refs, monkeypatch)
    for _ in range(3):
        for kv in worker.kv:
            kv[[block for row in INTO for block in row]] = 0.0
        worker.counted()
        assert worker.load(refs, INTO) == set()
        assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    counts = worker.counted()
    assert (counts[f"bytes_loaded_{DEVICE}"], counts.get("bytes_loaded_2")) == (4 * SIZE, None)
    assert checks.chunks == [4, 4]


@pytest.mark.parametrize("fails", ["get_unchecked", "compare"])
def test_nothing_is_under_way_when_it_fails(
    start: Start, checks: Checks, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The host's memory may be filled again then: what is copied out of it has been waited for."""
    worker, refs = started(start)
    check = DeviceCheck(worker.rank.device, LAYOUT, LAYOUT.whole, checks, 4)
    waited: list[torch.device] = []
    event = SimpleNamespace(synchronize=lambda: waited.append(worker.rank.device))
    monkeypatch.setattr(device_check, "mark", lambda device: event)
    where = checks if fails == "compare" else device_check
    monkeypatch.setattr(where, fails, lambda *_: 1 // 0)
    rows = torch.zeros((4, SIZE), dtype=torch.uint8)
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    with pytest.raises(ZeroDivisionError):
        check.read(namespace, refs, rows, lambda: None, lambda: None)
    assert waited == [worker.rank.device]


def test_where_it_cannot_be_the_host_checks(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank without a kernel, or without memory for it."""
    rank = start().rank
    assert device_check_for(rank, 4) is None
    assert caplog.text == ""

    def full(*_: Any) -> DeviceCheck:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device_check, "DeviceCheck", full)
    rank.device, rank.sum_kernel = torch.device("cuda"), cast(Any, Checks())
    assert device_check_for(rank, 4) is None
    assert "checked by the host: out of memory" in caplog.text
    rank.device = torch.device("cpu")
