"""Loading without the host: played on the CPU, with a kernel that is interpreted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("vllm")

import torch

from connector import direct, registered
from connector.direct import Direct
from connector.messages import BlendPiece
from prefixstore import admin
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.lending import Lent, lend
from prefixstore.slots import SlotFile
from tests.connector.played_loads import (
    BLOCKS_OF,
    INTO,
    LoadsByDma,
    Moving,
    pieces_placed,
    pieces_stored,
)
from tests.connector.played_worker import (
    CHUNK,
    DEADLINE_S,
    IDENTITY,
    LAYOUT,
    Worker,
    refs_of,
    stored,
)

Start = Callable[..., Worker]


@pytest.fixture
def played(loads_by_dma: LoadsByDma) -> LoadsByDma:
    """Where it is needed, a worker's loads are by DMA."""
    return loads_by_dma


@pytest.fixture
def worker(played: LoadsByDma, start: Start) -> Worker:
    """One whose four chunks are stored."""
    worker = start()
    refs = refs_of(worker, len(BLOCKS_OF))
    worker.save(refs, BLOCKS_OF)
    stored(worker, refs)
    return worker


def load(worker: Worker, played: LoadsByDma, count: int = 4, skip: int = 0) -> int:
    """Load, and compare with what was stored; how many chunks passed the host by."""
    refs = refs_of(worker, count)
    before = worker.canonical(INTO[0][:1])
    for pages in worker.kv:
        pages[[block for row in INTO for block in row]] = 0.0
    assert worker.load(refs, INTO[:count], skip) == set()
    for number in range(count):
        if number or not skip:
            assert worker.canonical(INTO[number]) == worker.canonical(BLOCKS_OF[number]), number
    if skip:
        assert worker.canonical(INTO[0][:1]) == bytes(len(before)), "a block that is not its own"
    return played.loaded[-1]


def test_loads_pass_the_host_by(worker: Worker, played: LoadsByDma) -> None:
    assert load(worker, played) == 4
    assert load(worker, played, skip=1) == 4
    assert load(worker, played, 3) == 3, "two batches, one of one"
    assert played.cuda.registered == 4


def test_one_that_cannot_be_registered_goes_by_way_of_the_host(
    worker: Worker, played: LoadsByDma
) -> None:
    load(worker, played, 3)
    played.cuda.refuses = True
    assert load(worker, played, 4) == 3
    assert all(one.readers == 0 for one in played.slots._slots.values())


def test_what_stands_behind_one_that_cannot_is_given_back(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, left = played.cuda.register, [True, False, True, True]
    monkeypatch.setattr(registered.RegisteredSlots, "_give_up", lambda *_: None)
    monkeypatch.setattr(direct, "helpers_for", lambda _: 0)
    monkeypatch.setattr(played.cuda, "register", lambda one: left.pop(0) and register(one))
    assert load(worker, played, 2) == 1
    assert load(worker, played, 2) == 2
    assert all(one.readers == 0 for one in played.slots._slots.values())


def test_pieces_of_a_blend_pass_the_host_by(worker: Worker, played: LoadsByDma) -> None:
    worker.rank.engine = cast(Any, Moving(worker))
    refs = refs_of(worker, 4)
    pieces = [
        BlendPiece(refs[2], 0, CHUNK, 3, 2 * CHUNK),
        BlendPiece(refs[0], 5, 2, 11, 5),
        BlendPiece(refs[3], 1, CHUNK - 1, 19, 3 * CHUNK + 1),
    ]
    blocks = [20, 9, 8, 30, 11, 23, 17]
    expected = pieces_stored(worker, refs, pieces, len(blocks))
    for _ in range(2):
        assert torch.equal(pieces_placed(worker, pieces, blocks), expected)
        assert played.loaded[-1] == 3
        assert played.placed == [2, 3]


def lent_of(worker: Worker, number: int) -> Lent:
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    [lent] = lend(namespace, [refs_of(worker, number + 1)[number]], LAYOUT.whole)
    return lent


def test_damage_is_found_and_healed(worker: Worker, played: LoadsByDma) -> None:
    """In the second batch: the load fails from there on, and the chunk can be stored again."""
    load(worker, played)
    lent = lent_of(worker, 2)
    with lent.file.path.open("r+b") as file:
        file.seek(lent.slot * LAYOUT.slot_bytes + 300)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    assert worker.load(refs_of(worker, 4), INTO) == set(), "it is on disk as well"
    assert played.loaded[-1] == 2
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    end = time.monotonic() + DEADLINE_S
    while not admin.stats(worker.store)["counters"].get("corrupt_memory"):
        assert time.monotonic() < end, "what is damaged is not dropped"
        time.sleep(0.01)


def test_memory_that_is_no_longer_the_slots_is_let_go(worker: Worker, played: LoadsByDma) -> None:
    """CUDA has other pages than the slot, though nobody said so: it is registered anew."""
    load(worker, played)
    lent = lent_of(worker, 1)
    one = played.slots._slots[lent.file, lent.slot]
    one.memory = one.memory.clone().add_(1)
    assert load(worker, played) == 1, "the rest came by way of the host"
    assert load(worker, played) == 4
    assert played.cuda.registered == 4


def given_back(worker: Worker, refs: Sequence[ChunkRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those chunks are removed, and their slots' space goes back to the system."""
    store = worker.store
    assert store.flush(DEADLINE_S)
    store.on_keeper(lambda: store.remove_now([ref.key for ref in refs]))
    with monkeypatch.context() as patched:
        patched.setattr("prefixstore.ledger.PUNCH_AFTER_S", 0.0)
        freed = store.live.write(
            lambda txn: sum(store.ledger.give_back_one(txn, MEMORY) for _ in refs)
        )
    assert freed == len(refs)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_slots_whose_space_was_given_back_are_let_go(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loads them again; the pages that CUDA had pinned would stay for good."""
    monkeypatch.setattr(registered, "LOOK_S", 0.05)
    load(worker, played)
    kept = lent_of(worker, 0)
    given_back(worker, refs_of(worker, 4)[1:], monkeypatch)
    wait_until(lambda: played.cuda.registered == 1, "they stay registered")
    [memory] = played.slots.take([kept])
    assert memory is not None
    played.slots.give_back([kept])


def test_a_slot_that_has_other_pages_is_not_read_by_dma(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its space was given back and it was filled again before anybody looked."""
    monkeypatch.setattr(registered, "LOOK_S", 1000.0)
    load(worker, played)
    before = lent_of(worker, 1)
    refs = refs_of(worker, 4)
    given_back(worker, refs[1:2], monkeypatch)
    worker.save(refs, BLOCKS_OF)
    stored(worker, refs)
    lent = lent_of(worker, 1)
    assert (lent.file, lent.slot) == (before.file, before.slot)
    assert lent.version == before.version + 1
    assert load(worker, played) == 4, "it was registered anew"
    assert played.cuda.registered == 4


def test_what_a_load_reads_is_not_let_go_of(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered, "LOOK_S", 0.05)
    load(worker, played)
    lent = lent_of(worker, 1)
    assert played.slots.take([lent])[0] is not None
    given_back(worker, refs_of(worker, 2)[1:], monkeypatch)
    wait_until(lambda: played.slots._slots[lent.file, lent.slot].stale, "it is not found out")
    time.sleep(0.3)
    assert played.cuda.registered == 4
    assert played.slots.take([lent]) == [None], "nor is it read again"
    played.slots.give_back([lent])
    wait_until(lambda: played.cuda.registered == 3, "it stays registered")


def test_a_slot_that_is_free_is_not_registered(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be given back at any time: pinning would then make new pages."""
    lent = lent_of(worker, 1)
    load(worker, played, 1)
    store = worker.store
    assert store.flush(DEADLINE_S)
    store.live.write(lambda txn: store.ledger.drop_memory(txn, refs_of(worker, 2)[1].key))
    assert played.slots.register(lent) is None
    assert played.cuda.registered == 1


def test_a_load_that_fails_gives_its_slots_back(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(worker, played)
    made = played.made[0]
    monkeypatch.setattr(made, "_sums", SimpleNamespace(compare=lambda *_: 1 // 0))
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    with pytest.raises(ZeroDivisionError):
        Direct.load(made, namespace, refs_of(worker, 4), lambda *_: True)
    assert all(one.readers == 0 for one in played.slots._slots.values())


def test_whoever_is_told_may_fail(worker: Worker, played: LoadsByDma) -> None:
    """Nothing is under way then, and the next load is like any other."""
    load(worker, played)
    namespace = worker.store.namespace(IDENTITY, LAYOUT)

    def told(*_: Any) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Direct.load(played.made[0], namespace, refs_of(worker, 4), lambda *_: True, told)
    assert all(one.readers == 0 for one in played.slots._slots.values())
    assert load(worker, played) == 4


@pytest.mark.parametrize("how", ["it says so", "it raises"])
def test_what_was_not_written_is_not_told_of(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    load(worker, played)
    made, told, count = played.made[0], list[int](), -1
    monkeypatch.setattr(made, "_count", 1)
    monkeypatch.setattr(made, "_first", 1)
    namespace = worker.store.namespace(IDENTITY, LAYOUT)

    def write(at: int, chunks: torch.Tensor) -> bool:
        if at == 2 and how == "it raises":
            raise ValueError("blocks 3 to 9 of 5")
        return at < 2

    with pytest.raises(ValueError, match="of 5") if how == "it raises" else nullcontext():
        refs = refs_of(worker, 4)
        count = Direct.load(made, namespace, refs, write, lambda at, *_: told.append(at))
    assert all(one.readers == 0 for one in played.slots._slots.values())
    assert (told, count) == ([0, 1], -1 if how == "it raises" else 2)


class Over:
    """A turn that is over when somebody waits for it."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.query = log, lambda: False

    def synchronize(self) -> None:
        self.log.append("waited")


@pytest.mark.parametrize("held", [False, True])
def test_the_host_waits_between_turns_only_for_what_is_read_there(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """One is received before the one before is written."""
    load(worker, played)
    made, log = played.made[0], list[str]()
    monkeypatch.setattr(made, "_count", 1)
    monkeypatch.setattr(made, "_first", 1)

    def marked(_: torch.device) -> Over:
        log.append("marked")
        return Over(log)

    monkeypatch.setattr(direct, "mark", marked)
    compare = played.sums.compare

    def compared(*given: Any) -> None:
        log.append("received")
        compare(*given)

    monkeypatch.setattr(made, "_sums", SimpleNamespace(compare=compared))

    def write(at: int, chunks: torch.Tensor) -> bool:
        log.append(f"written {at}")
        return True

    def checked(at: int, *_: Any) -> None:
        log.append(f"checked {at}")

    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    found = Direct.load(made, namespace, refs_of(worker, 4), write, checked, held=held)
    assert found == 4
    written = [[f"written {n}", "marked"] for n in range(4)]
    ends = [["waited", f"checked {n}"] for n in range(4)]
    turns = [["received"], *(["received", *written[n]] for n in range(3)), written[3]]
    steps = [*turns[:2], ends[0], turns[2], ends[1], turns[3], turns[4], *ends[2:]]
    expected = steps if held else [*turns, *ends]
    assert log == [word for step in expected for word in step]


def test_so_many_turns_are_under_way_at_most(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own place for the hashes it must have."""
    load(worker, played)
    made, log, under_way = played.made[0], list[str](), list[int]()
    for name in ("_count", "_first"):
        monkeypatch.setattr(made, name, 1)
    monkeypatch.setattr(direct, "AHEAD", 3)
    monkeypatch.setattr(direct, "mark", lambda _: Over(log))

    def write(at: int, chunks: torch.Tensor) -> bool:
        under_way.append(at + 1 - log.count("waited"))
        return True

    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    assert Direct.load(made, namespace, refs_of(worker, 4), write) == 4
    assert under_way == [1, 2, 2, 3]


@pytest.mark.parametrize("damage", ["trailer", "absent", "expired"])
def test_what_cannot_be_vouched_for_is_not_lent(worker: Worker, damage: str) -> None:
    refs = refs_of(worker, 3)
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    assert len(lend(namespace, refs, LAYOUT.whole)) == 3
    if damage == "trailer":
        lent = lent_of(worker, 1)
        lent.file.write(lent.slot, memoryview(b"no sum.."), LAYOUT.payload_bytes + 40)
    elif damage == "absent":
        namespace.delete(refs[1:2])
    else:
        namespace.set_ttl(refs[1:2], 1.0)
        time.sleep(2.0)
    assert len(lend(namespace, refs, LAYOUT.whole)) == 1
    other = refs[0]._replace(preimage=b"another text")
    assert lend(namespace, [other], LAYOUT.whole) == []


def test_a_rank_reads_its_heads(played: LoadsByDma, start: Start) -> None:
    whole, part = start(), start(1, 3, group=2)
    refs = refs_of(whole, 2)
    whole.save(refs, BLOCKS_OF[:2])
    stored(whole, refs)
    for _ in range(2):
        for kv in part.kv:
            kv.zero_()
        assert part.load(refs, INTO[:2]) == set()
    assert played.loaded[-1] == 2
    for mine, kv in zip(part.kv, whole.kv, strict=True):
        assert torch.equal(mine[INTO[0] + INTO[1]], kv[:4, 1:3])


def test_where_cuda_refuses_all_goes_by_way_of_the_host(
    worker: Worker, played: LoadsByDma, caplog: pytest.LogCaptureFixture
) -> None:
    played.cuda.refuses = True
    assert load(worker, played) == 0
    assert load(worker, played) == 0
    assert caplog.text.count("goes by way of the host") == 1


def test_a_load_that_was_given_up_writes_no_more(worker: Worker, played: LoadsByDma) -> None:
    load(worker, played)
    wrote = []

    def write(at: int, chunks: torch.Tensor) -> bool:
        wrote.append(at)
        return False

    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    worker.side.loader.close(time.monotonic() + DEADLINE_S)
    assert len(played.made) == 1
    played.made[0].load(namespace, refs_of(worker, 4), write)
    assert wrote == [0]


def test_slots_of_a_store_that_was_closed_are_let_go(
    worker: Worker, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if none of its successor is registered."""
    monkeypatch.setattr(registered, "LOOK_S", 0.05)
    load(worker, played)
    assert played.cuda.registered == 4
    lent = lent_of(worker, 0)
    old = lent.file
    successor = replace(lent, file=SlotFile(old.path, LAYOUT.slot_bytes, mapped=True))
    old.close()
    assert played.slots.take([successor]) == [None]
    wait_until(lambda: played.cuda.registered == 0, "they stay registered")
    assert played.slots.register(successor) is not None
    with pytest.raises(OSError, match="descriptor"):
        old.map_slot(lent.slot)
    successor.file.close()


@pytest.mark.parametrize(("gib", "mib"), [(24, 96), (64, 256), (141, 256)])
def test_lanes_are_small_beside_the_devices_memory(
    monkeypatch: pytest.MonkeyPatch, gib: int, mib: int
) -> None:
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(direct, "LANE_BYTES", 256 << 20)
    assert direct.lane_bytes(torch.device("cuda")) == mib << 20
