"""Counters of several threads."""

from __future__ import annotations

import threading

from connector.tally import Tally


def test_counts_are_taken_once() -> None:
    tally = Tally()
    tally.add("a")
    tally.add("a", 2)
    tally.add("b", 0)  # no name without a count
    assert tally.take() == {"a": 3}
    assert tally.take() == {}


def test_no_count_is_lost_between_threads() -> None:
    tally, threads, each = Tally(), 4, 2000
    taken: list[int] = []

    def add() -> None:
        for _ in range(each):
            tally.add("a")

    adding = [threading.Thread(target=add) for _ in range(threads)]
    for thread in adding:
        thread.start()
    while any(thread.is_alive() for thread in adding):
        taken.append(tally.take().get("a", 0))
    for thread in adding:
        thread.join(10)
    taken.append(tally.take().get("a", 0))
    assert sum(taken) == threads * each
