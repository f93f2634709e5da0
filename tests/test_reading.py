"""Work shared out over threads: all of it is done, once, whatever becomes of the helpers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

from prefixstore.reading import share_out


@pytest.mark.parametrize("helpers", [0, 1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_each_piece_is_done_once(count: int, helpers: int) -> None:
    done: Counter[int] = Counter()
    here: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        share_out(count, lambda i: done.update([i]), pool, helpers, lambda: here.append(1))
    assert done == Counter(range(count))
    assert len(here) <= count


def test_a_busy_pool_holds_nothing_up() -> None:
    release = threading.Event()
    done: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        blocker = pool.submit(release.wait, 30)
        share_out(10, done.append, pool, 1)  # returns though no helper ever ran
        release.set()
        assert blocker.result()
    assert done == list(range(10))


def test_a_closed_pool_only_makes_it_slower() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    done: list[int] = []
    share_out(5, done.append, pool, 3)
    assert done == list(range(5))


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_failure_ends_the_work_and_is_raised(bad: int) -> None:
    running: Counter[str] = Counter()

    def work(i: int) -> None:
        running["now"] += 1
        try:
            if i == bad:
                raise OSError(f"piece {i}")
        finally:
            running["now"] -= 1

    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(OSError, match=f"piece {bad}"):
            share_out(10, work, pool, 3)
        assert running["now"] == 0  # nobody still writes into the caller's buffers


def test_a_helper_that_was_queued_all_the_same_is_waited_for() -> None:
    """No thread can be started, and one of the pool's own takes what was queued before that."""
    queued: list[Callable[[], None]] = []
    began, go_on = threading.Event(), threading.Event()
    here = threading.get_ident()
    done: list[int] = []

    class Full(Executor):
        def submit(self, work: Any, /, *_: Any, **__: Any) -> Any:
            queued.append(work)
            raise RuntimeError("can't start new thread")

    def work(number: int) -> None:
        if number == 0 and threading.get_ident() == here:
            threading.Thread(target=queued[0]).start()
            assert began.wait(30)
            threading.Timer(0.2, go_on.set).start()
        elif threading.get_ident() != here:
            began.set()
            assert go_on.wait(30)
        done.append(number)

    share_out(5, work, Full(), 1)
    assert sorted(done) == list(range(5))
