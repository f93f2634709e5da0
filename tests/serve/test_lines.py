"""Lines for whoever reads standard error, or does not."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from prefixstore.serve import lines
from prefixstore.serve.lines import Lines
from tests.store_helpers import wait_for


def test_they_are_written_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    there = io.StringIO()
    monkeypatch.setattr(sys, "stderr", there)
    one = Lines()
    for number in range(100):
        one.put(str(number))
    one.close()
    assert there.getvalue().split() == [str(number) for number in range(100)]


class Stalled(io.StringIO):
    """Nobody reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.go_on.wait(30)
        raise BrokenPipeError


def test_a_reader_that_stalls_or_goes_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LINES_MAX", 10)
    monkeypatch.setattr(lines, "END_S", 0.1)
    stalled = Stalled()
    monkeypatch.setattr(sys, "stderr", stalled)
    one = Lines()
    for number in range(100):
        one.put(str(number))
    one.close()
    assert one._queue.qsize() in (9, 10), "all others are dropped"
    stalled.go_on.set()
    wait_for(one._queue.empty, "what could not be written to be dropped")
