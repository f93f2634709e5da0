"""Slots that CUDA reads by itself: with CUDA, where there is a device, else with a part that plays
it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from connector import registered
from connector.registered import Cuda, RegisteredSlots
from prefixstore import Namespace, Store, admin
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.lending import Lent, lend
from prefixstore.slots import SlotFile
from prefixstore.testing_data import content_of
from tests.store_helpers import (
    LAYOUT,
    WAIT_S,
    Place,
    namespace_in,
    put_content,
    refs_of,
    small_file_system,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]

SIZE = LAYOUT.slot_bytes


class PlayedCuda(Cuda):
    """Knows which memory is registered; a device that is the host."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now: set[int] = set()

    def begin(self) -> bool:
        return True

    def register(self, memory: torch.Tensor) -> bool:
        assert memory.data_ptr() not in self.now
        self.now.add(memory.data_ptr())
        return True

    def unregister(self, memory: torch.Tensor) -> bool:
        self.now.remove(memory.data_ptr())
        return True


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [
    pytest.param(PlayedCuda, id="played"),
    pytest.param(lambda: Cuda(torch.device("cuda", 0)), id="cuda", marks=NEEDS_CUDA),
]


@pytest.fixture
def ns(place: Place, monkeypatch: pytest.MonkeyPatch, no_late_readers: None) -> Iterator[Namespace]:
    monkeypatch.setattr(registered, "LOOK_S", 0.05)
    with place.open("4MiB", 0) as store:
        yield namespace_in(store)


def lent_of(ns: Namespace, refs: list[ChunkRef]) -> list[Lent]:
    found = lend(ns, refs, ns.layout.whole)
    assert len(found) == len(refs)
    return found


def read(slots: RegisteredSlots, ns: Namespace, refs: list[ChunkRef], device: str) -> None:
    """Chunks that are registered, as a device sees them."""
    for ref, lent in zip(refs, lent_of(ns, refs), strict=True):
        [memory] = slots.take([lent])
        assert memory is not None
        assert memory.is_pinned() is (device == "cuda")
        seen = memory[: ns.layout.payload_bytes].to(device, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()
        slots.give_back([lent])
        assert seen.cpu().numpy().tobytes() == content_of(ref.key, ns.layout.payload_bytes)


def registered_now(slots: RegisteredSlots, lent: list[Lent]) -> None:
    assert None not in [slots.register(one) for one in lent]
    slots.give_back(lent)


@pytest.mark.parametrize("make", DEVICES)
def test_slots_come_and_go(ns: Namespace, make: Callable[[], Cuda]) -> None:
    """They are registered, given back, filled again, and registered anew: what is read is right."""
    cuda = make()
    device, slots = "cpu" if isinstance(cuda, PlayedCuda) else "cuda", RegisteredSlots(cuda)
    for seed in range(1, 6):
        refs = refs_of(ns, seed, 8)
        put_content(ns, refs)
        assert slots.take(lent_of(ns, refs)) == [None] * 8
        registered_now(slots, lent_of(ns, refs))
        read(slots, ns, refs, device)
        assert len(slots._slots) == 8
        ns.delete(refs)
        admin.empty_memory(ns.store)
        wait_for(lambda: not slots._slots, "slots to be let go of")
    slots.close(time.monotonic() + WAIT_S)


@pytest.mark.parametrize("make", DEVICES)
def test_slots_that_are_filled_again_before_anybody_looks(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Cuda]
) -> None:
    monkeypatch.setattr(registered, "LOOK_S", 1000.0)
    cuda = make()
    device, slots = "cpu" if isinstance(cuda, PlayedCuda) else "cuda", RegisteredSlots(cuda)
    first: set[int] = set()
    for seed in range(1, 6):
        refs = refs_of(ns, seed, 8)
        put_content(ns, refs)
        lent = lent_of(ns, refs)
        first = first or {one.slot for one in lent}
        assert {one.slot for one in lent} == first, "the same slots"
        assert slots.take(lent) == [None] * 8
        registered_now(slots, lent)
        read(slots, ns, refs, device)
        ns.delete(refs)
        admin.empty_memory(ns.store)
    slots.close(time.monotonic() + WAIT_S)


def test_where_there_is_no_memory_a_claimed_slot_is_not_registered(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "5m") as small:
        where = tmp_path / "store"
        with Store.open(where, memory_bytes="1GiB", disk_bytes=0, memory_dir=str(small)) as store:
            file, slots = store.file_of(MEMORY, SIZE), RegisteredSlots(PlayedCuda())
            new = [Lent(store, file, slot, 0, np.zeros(0, np.uint64)) for slot in range(200)]
            with pytest.raises(OSError, match="No space left"):
                list(map(slots.claim, new))
            made = len(slots.of(file))
            assert 50 < made < 160
            assert slots.of(file) == set(range(made))
            assert slots.possible
            slots.close(time.monotonic() + WAIT_S)


def test_a_slot_that_cannot_be_mapped_for_once_is_no_reason_to_give_up(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, slots = refs_of(ns, 1, 1), RegisteredSlots(PlayedCuda())
    put_content(ns, refs)
    [lent] = lent_of(ns, refs)

    def none(file: SlotFile, slot: int) -> None:
        raise OSError(errno.ENOSPC, "planted")

    with monkeypatch.context() as patched:
        patched.setattr(SlotFile, "map_slot", none)
        assert slots.register(lent) is None
    registered_now(slots, [lent])
    slots.close(time.monotonic() + WAIT_S)
