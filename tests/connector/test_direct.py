"""Loading without the host: played on the CPU, with a kernel that is interpreted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import pytest

pytest.importorskip("vllm")

import torch

from connector import direct, load_work, loading
from connector.direct import Direct, Write
from connector.messages import BlendJob, BlendLoaded, BlendPiece, LoadJob, StepMetadata
from connector.rank import Rank
from connector.registered import RegisteredSlots
from prefixstore import admin
from prefixstore.keys import ChunkRef
from prefixstore.lending import Lent, lend
from prefixstore.namespace import Namespace
from prefixstore.slots import SlotFile
from tests.connector.played_worker import (
    BLOCK,
    CHUNK,
    DEADLINE_S,
    DIM,
    HEADS,
    IDENTITY,
    LAYOUT,
    STALL_S,
    SideBySide,
    Worker,
    refs_of,
    stored,
)

BLOCKS_OF = [[0, 1], [2, 3], [4, 5], [6, 7]]
INTO = [[20, 21], [9, 8], [17, 23], [11, 30]]


class Registrar:
    """Registers what it is asked to, or not."""

    def __init__(self) -> None:
        self.registered = 0
        self.refuses = False

    def begin(self) -> None:
        pass

    def register(self, memory: torch.Tensor) -> bool:
        self.registered += not self.refuses
        return not self.refuses

    def unregister(self, memory: torch.Tensor) -> None:
        self.registered -= 1


class Played:
    """What workers have instead of CUDA."""

    def __init__(self) -> None:
        self.cuda = Registrar()
        self.slots: RegisteredSlots
        self.made: list[Direct] = []
        self.loaded: list[int] = []  # chunks of each load that did not go by way of the host


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, sum_kernel: ModuleType) -> Played:
    """Workers that start now load like this, two chunks at a time."""
    played = Played()
    monkeypatch.setattr(direct, "LANE_BYTES", 2 * LAYOUT.payload_bytes)

    class Counted(Direct):
        def load(self, namespace: Namespace, refs: Sequence[ChunkRef], write: Write) -> int:
            played.loaded.append(super().load(namespace, refs, write))
            return played.loaded[-1]

    def make(rank: Rank, slots: RegisteredSlots) -> Direct:
        played.slots = slots
        sums = sum_kernel.SumKernel(LAYOUT.piece_bytes, rank.device)
        played.made.append(Counted(rank.device, LAYOUT, rank.roi, sums, slots))
        return played.made[-1]

    monkeypatch.setattr(loading, "Cuda", lambda device: played.cuda)
    monkeypatch.setattr(load_work, "direct_for", make)
    return played


Start = Callable[..., Worker]


@pytest.fixture
def worker(played: Played, start: Start) -> Worker:
    """One whose four chunks are stored."""
    worker = start()
    refs = refs_of(worker, len(BLOCKS_OF))
    worker.save(refs, BLOCKS_OF)
    stored(worker, refs)
    return worker


def load(worker: Worker, played: Played, count: int = 4, skip: int = 0) -> int:
    """Load, and compare with what was stored; how many chunks passed the host by."""
    refs = refs_of(worker, count)
    before = worker.canonical(INTO[0][:1])
    for pages in worker.kv:
        pages[[block for row in INTO for block in row]] = 0.0
    assert worker.load(refs, INTO[:count], skip) == set()
    assert played.slots.wait(DEADLINE_S)
    for number in range(count):
        if number or not skip:
            assert worker.canonical(INTO[number]) == worker.canonical(BLOCKS_OF[number]), number
    if skip:
        assert worker.canonical(INTO[0][:1]) == bytes(len(before)), "a block that is not its own"
    return played.loaded[-1]


def test_the_second_load_passes_the_host_by(worker: Worker, played: Played) -> None:
    assert load(worker, played) == 0
    assert load(worker, played, skip=1) == 4
    assert load(worker, played, 3) == 3, "two batches, one of one"
    assert played.cuda.registered == 4


def test_some_that_are_not_registered_go_by_way_of_the_host(worker: Worker, played: Played) -> None:
    load(worker, played, 3)
    assert load(worker, played, 4) == 3


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


def pieces_placed(worker: Worker, pieces: list[BlendPiece], blocks: list[int]) -> torch.Tensor:
    """Load pieces; K and V then in these blocks, [layer, token, head, K and V]."""
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
    assert report.blends["r"] == BlendLoaded(1, frozenset(), False)
    return torch.stack([kv[blocks].transpose(1, 2).flatten(0, 1) for kv in worker.kv])


def test_pieces_of_a_blend_pass_the_host_by(worker: Worker, played: Played) -> None:
    worker.rank.engine = cast(Any, Moving(worker))
    refs = refs_of(worker, 4)
    pieces = [
        BlendPiece(refs[2], 0, CHUNK, 3, 2 * CHUNK),
        BlendPiece(refs[0], 5, 2, 11, 5),
        BlendPiece(refs[3], 1, CHUNK - 1, 19, 3 * CHUNK + 1),
    ]
    blocks = [20, 9, 8, 30, 11, 23, 17]
    expected = torch.zeros(len(worker.kv), len(blocks) * BLOCK, HEADS, 2 * DIM)
    for ref, offset, count, start, source_start, _ in pieces:
        chunk = BLOCKS_OF[refs.index(ref)]
        tokens = torch.stack([kv[chunk].transpose(1, 2).flatten(0, 1) for kv in worker.kv])
        expected[:, start : start + count] = tokens[:, offset : offset + count]
        expected[:, start : start + count, :, :DIM] += start - source_start
    for passed_by in (0, 3):
        assert torch.equal(pieces_placed(worker, pieces, blocks), expected)
        assert played.loaded[-1] == passed_by
        assert played.slots.wait(DEADLINE_S)


def lent_of(worker: Worker, number: int) -> Lent:
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    [lent] = lend(namespace, [refs_of(worker, number + 1)[number]], LAYOUT.whole)
    return lent


def test_damage_is_found_and_healed(worker: Worker, played: Played) -> None:
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


def test_memory_that_is_no_longer_the_slots_is_not_used_again(
    worker: Worker, played: Played
) -> None:
    """As after a hole was punched: CUDA has the old pages."""
    load(worker, played)
    lent = lent_of(worker, 1)
    old = played.slots.get(lent.file, lent.slot)
    assert old is not None
    played.slots._slots[lent.file, lent.slot] = old.clone().add_(1)
    assert load(worker, played) == 1, "the rest came by way of the host"
    assert load(worker, played) == 1
    assert played.slots.get(lent.file, lent.slot) is None


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


def test_a_rank_reads_its_heads(played: Played, start: Start) -> None:
    whole, part = start(), start(1, 3, group=2)
    refs = refs_of(whole, 2)
    whole.save(refs, BLOCKS_OF[:2])
    stored(whole, refs)
    for _ in range(2):
        for kv in part.kv:
            kv.zero_()
        assert part.load(refs, INTO[:2]) == set()
        assert played.slots.wait(DEADLINE_S)
    assert played.loaded[-1] == 2
    for mine, kv in zip(part.kv, whole.kv, strict=True):
        assert torch.equal(mine[INTO[0] + INTO[1]], kv[:4, 1:3])


def test_where_cuda_refuses_all_goes_by_way_of_the_host(
    worker: Worker, played: Played, caplog: pytest.LogCaptureFixture
) -> None:
    played.cuda.refuses = True
    assert load(worker, played) == 0
    assert load(worker, played) == 0
    assert caplog.text.count("is read by way of the host") == 1


def test_a_load_that_was_given_up_writes_no_more(worker: Worker, played: Played) -> None:
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


def test_slots_of_a_store_that_was_closed_are_let_go(worker: Worker, played: Played) -> None:
    """When the first slot of its successor is registered."""
    load(worker, played)
    assert played.cuda.registered == 4
    old, slot = lent_of(worker, 0).file, lent_of(worker, 0).slot
    successor = SlotFile(old.path, LAYOUT.slot_bytes, mapped=True)
    old.close()
    assert played.slots.get(successor, slot) is None
    assert played.slots.wait(DEADLINE_S)
    assert played.cuda.registered == 1
    assert played.slots.get(successor, slot) is not None
    with pytest.raises(OSError, match="closed"):
        old.map_slot(slot)
    successor.close()
