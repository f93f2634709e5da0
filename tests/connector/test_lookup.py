"""Look-ups: how long the scheduler's thread waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connector import lookup as module
from connector.lookup import FRESH_S, QUEUE_S, WAIT_S, Found, Lookup, Lookups
from connector.tally import Tally
from prefixstore import Layout

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=16)
STALL_S = 0.1


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
        handle: Any = SimpleNamespace(stalled=self.stalls.append, answered=self.fail)
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
    found: Any = SimpleNamespace(
        leases=("lease",), namespace=SimpleNamespace(release=released.append)
    )
    lookup, future = asked.begin()
    assert future.set_running_or_notify_cancel()
    end(asked.lookups, lookup)
    assert released == []
    monkey = Future[Any].result
    future.result = lambda timeout=None: monkey(future, timeout)  # type: ignore[method-assign]
    future.set_result(found)
    assert released == ["lease"]


def test_an_answer_is_for_its_prompt_and_for_a_while(clock: Clock) -> None:
    lookup = Lookup(num_tokens=8, began_at=clock.now)
    assert lookup.is_for(8)
    assert not lookup.is_for(9)
    clock.now += FRESH_S
    assert lookup.is_for(8)
    clock.now += 1.0
    assert not lookup.is_for(8)
