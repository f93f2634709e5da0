"""Look-ups: how long the scheduler's thread waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import lookup as module
from connector.found import Found
from connector.groups import KvGroup
from connector.lookup import FRESH_S, QUEUE_S, WAIT_S, Lookup, Lookups
from connector.states import form_of
from connector.tally import Tally
from prefixstore import Layout, Store
from prefixstore.errors import StoreError
from prefixstore.keys import KeyChain
from prefixstore.namespace import Lease, Namespace
from prefixstore.testing_data import identity_for

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=16)
STALL_S = 0.1
IDENTITY = identity_for("model", LAYOUT)


class Clock:
    """Stands in for the module ``time``; waiting for a future moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(Future[Found]):
    """A future that is not done, and notes how long it was waited for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.waited_s = clock, 0.0

    def result(self, timeout: float | None = None) -> Found:
        assert timeout is not None
        assert timeout >= 0
        self.clock.now += timeout
        self.waited_s += timeout
        raise FutureTimeout


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Asked:
    """`Lookups` with questions that are never answered."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.counts, self.stalls = clock, Tally(), list[str]()
        handle: Any = SimpleNamespace(
            stalled=self.stalls.append, answered=self.fail, is_remote=False, get=lambda: None
        )
        self.lookups = Lookups(handle, LAYOUT, STALL_S)

    def fail(self) -> None:
        raise AssertionError("nothing was answered")

    def begin(self) -> tuple[Lookup, Slow]:
        future = Slow(self.clock)
        return Lookup(future=future, num_tokens=8, began_at=self.clock.now), future


@pytest.fixture
def asked(clock: Clock) -> Iterator[Asked]:
    asked = Asked(clock)
    yield asked
    asked.lookups.close()


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_step_waits_no_longer_however_many_ask(asked: Asked, count: int) -> None:
    waiting = [asked.begin() for _ in range(count)]
    for step in range(1, 4):
        asked.lookups.new_step()
        for lookup, _ in waiting:
            assert asked.lookups.answer(lookup) is None
        total = sum(future.waited_s for _, future in waiting)
        assert total == pytest.approx(step * WAIT_S)
    assert asked.stalls == []


def test_without_a_new_step_there_is_no_more_waiting(asked: Asked) -> None:
    lookup, future = asked.begin()
    for _ in range(5):
        asked.lookups.answer(lookup)
    assert future.waited_s == pytest.approx(WAIT_S)


def test_a_question_is_given_up_when_it_is_too_old(asked: Asked, clock: Clock) -> None:
    lookup, future = asked.begin()
    lookup.started_at = clock.now
    clock.now += STALL_S - WAIT_S
    assert asked.lookups.answer(lookup) is None
    assert lookup.future is future
    assert asked.stalls == []
    clock.now += WAIT_S
    assert asked.lookups.answer(lookup) is None
    assert lookup.future is None
    assert asked.stalls == ["a look-up"]


def test_waiting_behind_other_questions_is_no_stall(asked: Asked, clock: Clock) -> None:
    lookup, future = asked.begin()
    clock.now += QUEUE_S
    assert asked.lookups.answer(lookup) is None
    assert lookup.future is future
    assert asked.stalls == []
    clock.now += 2 * STALL_S  # not for ever, though
    assert asked.lookups.answer(lookup) is None
    assert lookup.future is None
    assert asked.stalls == ["a look-up"]


@pytest.mark.parametrize("end", [Lookups.end, Lookups.decline])
def test_a_late_answer_gives_its_lease_back(
    asked: Asked, end: Callable[[Lookups, Lookup], None]
) -> None:
    released: list[Any] = []
    namespace = SimpleNamespace(release=released.append)
    found: Any = SimpleNamespace(leases=((namespace, "lease"),))
    lookup, future = asked.begin()
    assert future.set_running_or_notify_cancel()
    end(asked.lookups, lookup)
    assert released == []
    monkey = Future[Any].result
    future.result = lambda timeout=None: monkey(future, timeout)  # type: ignore[method-assign]
    future.set_result(found)
    assert released == ["lease"]


def test_the_lease_ends_when_the_states_cannot_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Lease] = []

    def fails(self: Namespace, refs: Any) -> list[int]:
        raise StoreError("no answer")

    monkeypatch.setattr(Namespace, "match_each", fails)
    monkeypatch.setattr(Namespace, "release", lambda self, lease: released.append(lease))
    spec = SimpleNamespace(
        shapes=((4,),), dtypes=(torch.float32,), mamba_type=SimpleNamespace(name="GDN")
    )
    form = form_of([(KvGroup(LAYOUT.chunk_tokens), spec)], 1, 1, LAYOUT.chunk_tokens, "cpu")
    with Store.open(tmp_path / "store", memory_bytes=1 << 24, disk_bytes=1 << 24) as store:
        handle: Any = SimpleNamespace(get=lambda: store, is_remote=False)
        lookups = Lookups(handle, LAYOUT, 20.0, states=form)
        chains = [
            KeyChain(name, LAYOUT.chunk_tokens, range(3 * LAYOUT.chunk_tokens))
            for name in lookups.names_of(IDENTITY)
        ]
        refs = chains[0].refs()
        store.namespace_of(chains[0].namespace).put(refs, [bytes(LAYOUT.payload_bytes)] * 3)
        lookup = Lookup()
        lookups.begin(lookup, IDENTITY, chains[0], chains[0].num_tokens, None, chains[1])
        assert lookup.future is not None
        assert isinstance(lookup.future.exception(20), StoreError)
        lookups.close()
    assert len(released) == 1


def test_an_answer_is_for_its_prompt_and_for_a_while(clock: Clock) -> None:
    lookup = Lookup(num_tokens=8, began_at=clock.now)
    assert lookup.is_for(8)
    assert not lookup.is_for(9)
    clock.now += FRESH_S
    assert lookup.is_for(8)
    clock.now += 1.0
    assert not lookup.is_for(8)


def test_a_lease_of_a_server_is_released_where_nobody_waits(asked: Asked) -> None:
    """The call may hang on a server that has frozen; the scheduler must not."""
    handle: Any = asked.lookups._handle
    handle.is_remote, handle.get = True, object
    threads: list[str] = []
    let_go, released = threading.Event(), threading.Event()

    def release(lease: str) -> None:
        threads.append(threading.current_thread().name)
        assert let_go.wait(20)
        released.set()

    found: Any = SimpleNamespace(leases=((SimpleNamespace(release=release), "lease"),))
    future: Future[Found] = Future()
    future.set_result(found)
    asked.lookups.end(Lookup(future=future))
    assert not released.is_set()
    let_go.set()
    assert released.wait(20)
    assert threads[0].startswith("prefixstore-release")
