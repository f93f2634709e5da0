"""Slots that CUDA reads by itself: with CUDA, where there is a device, else with a part that plays
it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from connector import registered
from connector.registered import Cuda, RegisteredSlots
from prefixstore import Namespace, admin
from prefixstore.keys import ChunkRef
from prefixstore.lending import Lent, lend
from prefixstore.testing_data import content_of
from tests.store_helpers import WAIT_S, Place, namespace_in, put_content, refs_of, wait_for

pytest_plugins = ["tests.store_fixtures"]


class PlayedCuda(Cuda):
    """Knows which memory is registered; a device that is the host."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now: set[int] = set()

    def begin(self) -> None:
        pass

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
        memory = slots.take(lent)
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
        assert [slots.take(lent) for lent in lent_of(ns, refs)] == [None] * 8
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
        assert [slots.take(one) for one in lent] == [None] * 8
        registered_now(slots, lent)
        read(slots, ns, refs, device)
        ns.delete(refs)
        admin.empty_memory(ns.store)
    slots.close(time.monotonic() + WAIT_S)
