"""Saving without the host: played on the CPU, with a kernel that is interpreted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from connector import registered, saving
from connector.direct_save import DirectSave
from connector.rank import Rank
from connector.registered import RegisteredSlots
from prefixstore import Store, admin
from prefixstore.filling import Claimed, Copied, Copy
from prefixstore.ledger import MEMORY
from prefixstore.slots import SlotFile
from tests.connector.played_loads import BLOCKS_OF, INTO, LoadsByDma
from tests.connector.played_worker import (
    DEADLINE_S,
    HEADS,
    LAYOUT,
    Worker,
    refs_of,
    stored,
)
from tests.connector.test_direct import given_back, lent_of, wait_until

Start = Callable[..., Worker]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, loads_by_dma: LoadsByDma) -> LoadsByDma:
    """Workers that start now save by DMA, too."""

    def saver(rank: Rank, slots: RegisteredSlots) -> DirectSave:
        loads_by_dma.slots = slots
        return DirectSave(LAYOUT, rank.roi, loads_by_dma.sums, slots)

    monkeypatch.setattr(saving, "direct_save_for", saver)
    return loads_by_dma


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each write to a slot of a memory tier by the host."""
    sizes: list[int] = []
    write = SlotFile.write

    def noted(self: SlotFile, slot: int, data: memoryview, offset: int = 0) -> None:
        if self.mapped:
            sizes.append(len(data))
        write(self, slot, data, offset)

    monkeypatch.setattr(SlotFile, "write", noted)
    return sizes


def save(worker: Worker, seed: int = 0) -> None:
    """Save four chunks and compare what is stored with the pages; then there is room for more."""
    refs, before = refs_of(worker, len(BLOCKS_OF), seed), len(worker.side.saver.seconds)
    worker.save(refs, BLOCKS_OF)
    assert stored(worker, refs) == [worker.canonical(blocks) for blocks in BLOCKS_OF]
    wait_until(lambda: len(worker.side.saver.seconds) > before, "the save does not end")


def claims(worker: Worker) -> object:
    return admin.stats(worker.store)["pending"]


def test_the_host_copies_nothing(start: Start, played: LoadsByDma, written: list[int]) -> None:
    worker = start()
    save(worker)
    assert set(written) == {LAYOUT.slot_bytes - LAYOUT.payload_bytes}, "trailers only"
    assert played.cuda.registered == 4
    for pages in worker.kv:
        pages[[block for row in INTO for block in row]] = 0.0
    assert worker.load(refs_of(worker, 4), INTO) == set()
    assert worker.counted()["bytes_loaded_1"] == 4 * LAYOUT.payload_bytes
    assert all(worker.canonical(INTO[n]) == worker.canonical(BLOCKS_OF[n]) for n in range(4))
    assert all(one.readers == 0 for one in played.slots._slots.values())


def test_ranks_fill_a_slot_together(start: Start, played: LoadsByDma, written: list[int]) -> None:
    whole, left, right = start(), start(0, 1), start(1, HEADS)
    for number, pages in enumerate(whole.kv):
        left.kv[number], right.kv[number] = pages[:, :1].clone(), pages[:, 1:].clone()
        for rank in (left, right):
            rank.rank.pages[number] = rank.rank.pages[number].page_map.bind(rank.kv[number])
    refs = refs_of(whole, 4)
    left.save(refs, BLOCKS_OF)
    # Ranks are processes; here both are one writer to the store, which has one put of a chunk.
    wait_until(lambda: left.side.saver.seconds != [], "not saved")
    right.save(refs, BLOCKS_OF)
    assert stored(whole, refs) == [whole.canonical(blocks) for blocks in BLOCKS_OF]
    assert set(written) == {LAYOUT.slot_bytes - LAYOUT.payload_bytes}


def test_what_cuda_cannot_register_goes_by_way_of_the_host(
    start: Start, played: LoadsByDma, written: list[int]
) -> None:
    played.cuda.refuses = True
    save(start())
    assert written.count(LAYOUT.payload_bytes) == 4
    assert played.cuda.registered == 0


def test_without_room_nothing_is_left_behind(
    start: Start, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    refs = refs_of(worker, 4)
    map_slot, full = SlotFile.map_slot, {1, 3}

    def none(self: SlotFile, slot: int) -> memoryview:
        found = map_slot(self, slot)
        if slot in full:  # some of its pages were made
            raise OSError(errno.ENOSPC, "full")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(SlotFile, "map_slot", none)
        worker.save(refs, BLOCKS_OF)
        wait_until(lambda: worker.side.saver.seconds != [], "not saved")
    assert worker.counted()["save_refused_chunks"] == 2
    assert claims(worker) == 0
    path = worker.store.file_of(MEMORY, LAYOUT.slot_bytes).path
    assert 2 * LAYOUT.slot_bytes <= os.stat(path).st_blocks * 512 < 3 * LAYOUT.slot_bytes
    save(worker)


def test_what_fails_on_the_device_leaves_nothing_behind(
    start: Start, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    claim = played.slots.claim
    with monkeypatch.context() as patched:
        left = [claim, claim]

        def broken(lent: Any) -> torch.Tensor | None:
            if not left:
                raise RuntimeError("no device")
            return left.pop()(lent)

        patched.setattr(played.slots, "claim", broken)
        worker.save(refs_of(worker, 4), BLOCKS_OF)
        wait_until(lambda: worker.side.saver.seconds != [], "not saved")
    assert worker.counted()["save_errors"] == 1
    wait_until(lambda: claims(worker) == 0, "claims are left")
    assert all(one.readers == 0 for one in played.slots._slots.values())
    save(worker)


def test_a_slot_with_new_pages_is_registered_anew(
    start: Start, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else CUDA would write to pages that are no file's any more."""
    monkeypatch.setattr(registered, "LOOK_S", 1000.0)
    worker = start()
    save(worker)
    given_back(worker, refs_of(worker, 4), monkeypatch)
    save(worker, seed=1)
    assert played.cuda.registered == 4
    save(worker, seed=2)
    assert played.cuda.registered == 8


def test_a_slot_whose_old_pages_are_being_read_is_written_by_the_host(
    start: Start, played: LoadsByDma, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered, "LOOK_S", 1000.0)
    worker = start()
    save(worker)
    lent = lent_of(worker, 1)
    assert played.slots.take([lent])[0] is not None
    given_back(worker, refs_of(worker, 4), monkeypatch)
    del written[:]
    save(worker, seed=1)
    assert written.count(LAYOUT.payload_bytes) == 1
    played.slots.give_back([lent])


def test_what_cuda_wrote_to_other_pages_is_written_by_the_host(
    start: Start, played: LoadsByDma, written: list[int]
) -> None:
    """A process ended between giving back a slot's pages and counting that: CUDA has the old ones,
    and what it writes there nobody else would ever see."""
    worker = start()
    save(worker)
    lost = lent_of(worker, 1).slot
    for (_, slot), one in played.slots._slots.items():
        if slot == lost:
            one.memory = one.memory.clone()
    store = worker.store
    assert store.flush(DEADLINE_S)
    store.on_keeper(lambda: store.remove_now([ref.key for ref in refs_of(worker, 4)]))
    for pages in worker.kv:
        pages += 1.0
    del written[:]
    save(worker, seed=1)
    assert written.count(LAYOUT.payload_bytes) == 1
    assert [slot for (_, slot), one in played.slots._slots.items() if one.stale] == [lost]
    assert all(one.readers == 0 for one in played.slots._slots.values())


def test_a_chunk_of_two_requests_of_one_step_is_saved_once(
    start: Start, played: LoadsByDma
) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 2), BLOCKS_OF[:2]
    worker.save([*refs, *refs], [*blocks, *blocks])
    assert stored(worker, refs) == [worker.canonical(row) for row in blocks]
    wait_until(lambda: worker.side.saver.seconds != [], "not saved")
    assert played.cuda.registered == 2
    assert admin.verify(worker.store).accounting == []


def test_hashes_outlive_the_next_save(
    start: Start, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that waits for the writer lock of the index may be made after it."""
    kept: list[tuple[Any, bytes]] = []
    make = DirectSave.copy

    def noting(self: DirectSave, store: Store, parts: Sequence[torch.Tensor]) -> Copy:
        copy = make(self, store, parts)

        def noted(file: SlotFile, claimed: Sequence[Claimed]) -> Sequence[Copied | None]:
            found = copy(file, claimed)
            kept.extend((one.sums, np.array(one.sums).tobytes()) for one in found if one)
            return found

        return noted

    monkeypatch.setattr(DirectSave, "copy", noting)
    worker = start()
    for seed in (0, 1):
        save(worker, seed)
        for pages in worker.kv:
            pages += 1.0
    assert len(kept) == 8
    assert all(np.array(sums).tobytes() == before for sums, before in kept)


def test_registrations_are_let_go_when_the_space_is_given_back(
    start: Start, played: LoadsByDma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of slots that nobody has loaded."""
    monkeypatch.setattr(registered, "LOOK_S", 0.05)
    worker = start()
    save(worker)
    assert worker.load(refs_of(worker, 1), INTO[:1]) == set()
    given_back(worker, refs_of(worker, 4), monkeypatch)
    wait_until(lambda: played.cuda.registered == 0, "they stay registered")
