"""The device tier, on a device that is the host: what is loaded from it is what was stored."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from connector import device_tier, worker_side
from connector.device_tier import DEVICE, DeviceTier, HostSums, tier_for
from connector.messages import BlendPiece
from connector.rank import Rank
from connector.tally import Tally
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from tests.connector.played_loads import (
    BLOCKS_OF,
    INTO,
    LoadsByDma,
    Moving,
    pieces_placed,
    pieces_stored,
)
from tests.connector.played_worker import (
    BLOCKS,
    CHUNK,
    DEADLINE_S,
    IDENTITY,
    LAYOUT,
    Worker,
    refs_of,
    stored,
)

SUM_BYTES = 8 * LAYOUT.num_pieces
SLOT_BYTES = LAYOUT.payload_bytes + SUM_BYTES

Start = Callable[..., Worker]


def with_stored(start: Start, slots: int, **kwargs: Any) -> Worker:
    """A worker whose four chunks are stored."""
    worker = start(device=slots * SLOT_BYTES, **kwargs)
    refs = refs_of(worker, len(BLOCKS_OF))
    worker.save(refs, BLOCKS_OF)
    stored(worker, refs)
    worker.counted()
    return worker


@pytest.fixture
def worker(start: Start) -> Worker:
    return with_stored(start, 8)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks know their tier, so that tests can get at it."""

    def make(rank: Rank, *rest: Any) -> DeviceTier | None:
        rank.tier = tier_for(rank, *rest)  # type: ignore[attr-defined]
        return rank.tier  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(worker_side, "tier_for", make)


def tier_of(worker: Worker) -> DeviceTier:
    return cast(DeviceTier, worker.rank.tier)  # type: ignore[attr-defined]


def load(worker: Worker, numbers: Sequence[int], skip: int = 0) -> Counter[str]:
    """Load these of the four chunks, and compare with what was stored; what was counted."""
    refs = refs_of(worker, 4)
    before = worker.canonical(INTO[numbers[0]][:1])
    for pages in worker.kv:
        pages[[block for row in INTO for block in row]] = 0.0
    assert worker.load([refs[n] for n in numbers], [INTO[n] for n in numbers], skip) == set()
    for number in range(4):
        if number in numbers and (number != numbers[0] or not skip):
            assert worker.canonical(INTO[number]) == worker.canonical(BLOCKS_OF[number]), number
        elif number not in numbers:
            assert not any(worker.canonical(INTO[number])), "nothing was to be loaded there"
    if skip:
        assert worker.canonical(INTO[numbers[0]][:1]) == bytes(len(before)), "not its own"
        half = worker.canonical(BLOCKS_OF[numbers[0]][1:])
        assert worker.canonical(INTO[numbers[0]][1:]) == half
    return Counter(worker.counted())


def from_device(counts: Counter[str]) -> int:
    """Chunks that a load had from the tier."""
    assert counts[f"bytes_loaded_{DEVICE}"] == counts["device_chunks_hit"] * LAYOUT.payload_bytes
    return counts["device_chunks_hit"]


@pytest.mark.parametrize("by_dma", [False, True])
def test_the_third_load_is_from_the_device(
    start: Start, request: pytest.FixtureRequest, by_dma: bool
) -> None:
    dma: LoadsByDma | None = request.getfixturevalue("loads_by_dma") if by_dma else None
    worker = with_stored(start, 4)
    assert load(worker, range(4))["device_chunks_admitted"] == 0
    second = load(worker, range(4))
    assert (from_device(second), second["device_chunks_admitted"]) == (0, 4)
    assert dma is None or (dma.loaded, dma.held) == ([4, 4], [False, True])
    for skip in (0, 1):
        third = load(worker, range(4), skip)
        assert (from_device(third), third[f"bytes_loaded_{MEMORY}"]) == (4, 0)


def test_what_is_not_there_is_loaded_between_what_is(worker: Worker) -> None:
    for number in (0, 2):
        load(worker, [number])
        load(worker, [number])
    found = load(worker, range(4))
    assert from_device(found) == 2
    assert found[f"bytes_loaded_{MEMORY}"] == 2 * LAYOUT.payload_bytes
    assert from_device(load(worker, [1, 2, 3], skip=1)) == 1, "1 and 3 are admitted"
    assert from_device(load(worker, range(4))) == 4


def test_a_chunk_that_fails_between_those_that_are_there(worker: Worker) -> None:
    """vLLM computes from the first block on that failed, whatever is behind it."""
    for number in (0, 2):
        load(worker, [number])
        load(worker, [number])
    refs = refs_of(worker, 4)
    assert worker.store.flush(DEADLINE_S)
    worker.store.namespace(IDENTITY, LAYOUT).delete([refs[1]])
    assert worker.load(refs, INTO) == {*INTO[1], *INTO[2], *INTO[3]}
    assert worker.canonical(INTO[0]) == worker.canonical(BLOCKS_OF[0])
    assert worker.load(refs[2:3], INTO[2:3]) == set()
    assert worker.canonical(INTO[2]) == worker.canonical(BLOCKS_OF[2])


def damage(worker: Worker, slot: int) -> None:
    tier_of(worker).chunks[slot, 300] ^= 4


def test_a_damaged_slot_is_not_used(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        load(worker, range(4))
    damage(worker, 2)
    found = load(worker, range(4))
    assert found["device_chunks_damaged"] == 1
    assert found["device_chunks_admitted"] == 1, "it is wanted still"
    assert found[f"bytes_loaded_{DEVICE}"] == 3 * LAYOUT.payload_bytes
    assert found[f"bytes_loaded_{MEMORY}"] == LAYOUT.payload_bytes
    assert caplog.text.count("in the device tier were damaged") == 1
    assert from_device(load(worker, range(4))) == 4


def test_pieces_come_from_the_device(worker: Worker) -> None:
    worker.rank.engine = cast(Any, Moving(worker))
    refs = refs_of(worker, 4)
    pieces = [
        BlendPiece(refs[2], 0, CHUNK, 3, 2 * CHUNK),
        BlendPiece(refs[0], 5, 2, 11, 5),
        BlendPiece(refs[3], 1, CHUNK - 1, 19, 3 * CHUNK + 1),
        BlendPiece(refs[2], 0, 2, 13, 2 * CHUNK),  # a part of it twice
    ]
    blocks = [20, 9, 8, 30, 11, 23, 17]
    expected = pieces_stored(worker, refs, pieces, len(blocks))
    for hits in (0, 0, 4):
        assert torch.equal(pieces_placed(worker, pieces, blocks), expected)
        assert from_device(Counter(worker.counted())) == hits
    assert worker.store.flush(DEADLINE_S)
    worker.store.namespace(IDENTITY, LAYOUT).delete([refs[0], refs[1]])
    damage(worker, 2)  # of refs[3]
    pieces[1] = BlendPiece(refs[1], 5, 2, 11, 5)
    expected = pieces_stored(worker, refs, [pieces[i] for i in (0, 2, 3)], len(blocks))
    assert torch.equal(pieces_placed(worker, pieces, blocks, failed=[1]), expected)
    assert worker.counted()["device_chunks_damaged"] == 1


def test_a_load_that_was_given_up_writes_nothing(worker: Worker) -> None:
    refs = refs_of(worker, 4)
    for _ in range(2):
        load(worker, range(4))
    tier = tier_of(worker)
    assert tier.load(IDENTITY.namespace, refs, lambda *_: False).numbers == []
    with pytest.raises(ZeroDivisionError):
        tier.load(IDENTITY.namespace, refs, lambda *_: bool(1 // 0))
    assert all(held.readers == 0 for held in tier._residents._main.values())


def test_other_namespaces_have_other_chunks(worker: Worker) -> None:
    for _ in range(2):
        load(worker, range(4))
    refs = refs_of(worker, 4)
    missing = tier_of(worker).load(b"another model...", refs, lambda *_: bool(1 // 0))
    assert list(missing.numbers) == [0, 1, 2, 3], "and nothing was written"


def test_what_the_device_has_is_kept_in_the_store(worker: Worker) -> None:
    """Look-ups must find it there."""
    for _ in range(2):
        load(worker, range(4))
    store, refs = worker.store, refs_of(worker, 4)

    def ranks() -> list[bytes | None]:
        store.on_keeper(store.keeper._flush_notes)
        with store.live.read() as txn:
            return [txn.get("heat", b"%c" % MEMORY + ref.key) for ref in refs]

    before = ranks()
    others = refs_of(worker, 20, seed=1)  # time goes by
    store.namespace(IDENTITY, LAYOUT).put(others, [bytes(LAYOUT.payload_bytes)] * 20)
    load(worker, [0])
    load(worker, [3])
    after = ranks()
    assert None not in before
    assert [one != other for one, other in zip(before, after, strict=True)] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_rank_keeps_its_heads(start: Start) -> None:
    whole, part = with_stored(start, 4), start(1, 3, group=2, device=4 * SLOT_BYTES)
    refs = refs_of(whole, 2)
    for _ in range(3):
        for kv in part.kv:
            kv.zero_()
        assert part.load(refs, INTO[:2]) == set()
        for mine, kv in zip(part.kv, whole.kv, strict=True):
            blocks = [*BLOCKS_OF[0], *BLOCKS_OF[1]]
            assert torch.equal(mine[INTO[0] + INTO[1]], kv[blocks][:, 1:3])
    counted = part.counted()
    assert counted[f"bytes_loaded_{DEVICE}"] == 2 * part.rank.unit_bytes
    assert "device_chunks_hit" not in counted, "the first rank counts for all"


# ---------------------------------------------------------------------- at random
PLACES = 6  # of chunks in the pages, from the second half on


def random_loads(
    worker: Worker, chance: random.Random, refs: list[ChunkRef], at_once: int
) -> tuple[list[str], list[tuple[list[int], list[list[int]]]]]:
    """Start that many loads of a few chunks each, all into places of their own."""
    places = [[BLOCKS - 2 * i - 2, BLOCKS - 2 * i - 1] for i in range(PLACES)]
    chance.shuffle(places)
    jobs = []
    names = [f"load {i}" for i in range(at_once)]
    for name in names:
        chosen = sorted(chance.sample(range(len(refs)), PLACES // at_once))
        if chance.random() < 0.7:  # what is hot
            chosen = sorted(chance.sample(range(4), min(4, PLACES // at_once)))
        into = [places.pop() for _ in chosen]
        worker.start_load([refs[i] for i in chosen], into, name=name)
        jobs.append((chosen, into))
    return names, jobs


@pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_whatever_happens_the_bytes_are_right(start: Start, seed: int, threads: int) -> None:
    """Loads of several threads at once, a tier of three slots, damage, deletes."""
    chance = random.Random(seed)
    worker = start(device=3 * SLOT_BYTES, load_threads=threads)
    count = 8
    refs = refs_of(worker, count)
    own = [[2 * i, 2 * i + 1] for i in range(count)]
    truth = [worker.canonical(blocks) for blocks in own]
    worker.store.namespace(IDENTITY, LAYOUT).put(refs, truth)
    deleted: set[int] = set()
    totals: Counter[str] = Counter()
    tier, namespace = tier_of(worker), worker.store.namespace(IDENTITY, LAYOUT)
    for _ in range(60):
        if chance.random() < 0.2:
            tier.chunks[chance.randrange(3), chance.randrange(LAYOUT.payload_bytes)] ^= 1
        if chance.random() < 0.1 and len(deleted) < 3:
            deleted.add(gone := chance.randrange(count))
            namespace.delete([refs[gone]])
        names, jobs = random_loads(worker, chance, refs, at_once=2 if threads > 1 else 1)
        ended: set[str] = set()
        end = time.monotonic() + DEADLINE_S
        while ended != set(names):
            assert time.monotonic() < end, "a load does not end"
            ended |= worker.side.loader.finished(idle=True)
        failed = worker.side.loader.failed_blocks()
        for chosen, into in jobs:
            for place, (number, blocks) in enumerate(zip(chosen, into, strict=True)):
                if set(blocks) <= failed:
                    assert any(n in deleted for n in chosen[: place + 1]), "it is stored"
                else:
                    assert not set(blocks) & failed
                    assert worker.canonical(blocks) == truth[number]
        totals.update(worker.counted())
    for what in ("hit", "admitted", "evicted", "damaged"):
        assert totals[f"device_chunks_{what}"] > 2, what
    residents = tier._residents
    assert all(held.readers == 0 for held in residents._main.values())
    slots = [held.slot for held in residents._main.values()]
    assert sorted([*slots, *residents._free]) == [0, 1, 2]


# ---------------------------------------------------------------------- what it is made of
def test_sums_of_rows_are_those_of_the_kernel(sum_kernel: ModuleType) -> None:
    chunks = torch.randint(0, 256, (5, LAYOUT.payload_bytes), dtype=torch.uint8)
    rows = torch.tensor([3, 0, 3])
    kernel = sum_kernel.SumKernel(LAYOUT.piece_bytes, torch.device("cpu"))
    found = []
    for sums in (kernel, HostSums(LAYOUT)):
        out = torch.zeros((3, LAYOUT.num_pieces), dtype=torch.int64)
        sums(chunks, out, rows)
        found.append(out)
    wanted = [LAYOUT.piece_sums(chunks[row].numpy().tobytes()) for row in rows.tolist()]
    for out in found:
        assert out.numpy().view(np.uint64).tolist() == wanted


@pytest.mark.parametrize(
    ("num_bytes", "fault", "why"),
    [
        (SLOT_BYTES - 1, None, f"a chunk takes {SLOT_BYTES} bytes"),
        (SLOT_BYTES, RuntimeError("out of memory"), "lower gpu_memory_utilization"),
    ],
)
def test_a_tier_that_cannot_be_is_one_warning(
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_bytes: int,
    fault: Exception | None,
    why: str,
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        assert fault is not None
        raise fault

    monkeypatch.setattr(device_tier, "DeviceTier", refused)
    assert tier_for(worker.rank, num_bytes, None, Tally()) is None
    [record] = caplog.records
    assert why in record.getMessage()


def test_without_the_option_there_is_none(worker: Worker, caplog: Any) -> None:
    assert tier_for(worker.rank, 0, None, Tally()) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("free", "share", "room"),
    [(100, 0.9, 9), (100, 0.5, 49), (20, 0.5, 19), (100, None, 99), (0, None, -1)],
)
def test_what_vllm_was_given_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, free: int, share: float | None, room: int
) -> None:
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * gib, 100 * gib))
    found = device_tier._room(torch.device("cuda", 0), share)
    assert found / gib == pytest.approx(room)
