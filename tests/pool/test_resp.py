"""What a server may answer over one connection, and how much of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from prefixstore.pool import resp
from prefixstore.pool.resp import BrokenError, Command, Connection
from tests.store_helpers import WAIT_S


@contextmanager
def answered(head: bytes, more: bytes = b"", times: int = 0) -> Iterator[Connection]:
    """A connection over which this comes, and more so often, unless it is closed before."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with suppress(OSError):
            theirs.sendall(head)
            for _ in range(times):
                theirs.sendall(more)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield Connection(ours)
    finally:
        ours.close()
        thread.join(WAIT_S)
        theirs.close()


def ask(connection: Connection, count: int = 1) -> list[Any]:
    return connection.run([Command([b"X"])] * count, time.monotonic() + WAIT_S)


def test_lists_in_lists() -> None:
    with answered(b"*2\r\n*2\r\n:1\r\n$2\r\nab\r\n*0\r\n+OK\r\n") as connection:
        assert ask(connection, 2) == [[[1, b"ab"], []], "OK"]
    with (
        answered(b"*1\r\n" * 5000) as connection,
        pytest.raises(BrokenError, match="begins with b'\\*1"),
    ):
        ask(connection)


@pytest.mark.parametrize(
    ("head", "item"),
    [
        (b"*1000000000\r\n", b"*0\r\n"),
        (b"*1000000000\r\n", b":1\r\n"),
        (b"*1000000000\r\n", b"*2\r\n:1\r\n:1\r\n"),
        (b"*1000000000\r\n", b"$1000\r\n" + b"x" * 1000 + b"\r\n"),
        (b"", b"$1000000000\r\n"),
    ],
)
def test_an_answer_has_a_bound_with_all_that_is_in_it(
    monkeypatch: pytest.MonkeyPatch, head: bytes, item: bytes
) -> None:
    """Not each list and value of it."""
    monkeypatch.setattr(resp, "REPLY_BYTES_MAX", 1 << 20)
    with (
        answered(head, item * 1000, 1000) as connection,
        pytest.raises(BrokenError, match="more than 1048576 bytes"),
    ):
        ask(connection)


def test_the_bound_is_of_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resp, "REPLY_BYTES_MAX", 4096)
    value = b"$3000\r\n" + b"x" * 3000 + b"\r\n"
    with answered(value * 10) as connection:
        assert ask(connection, 10) == [b"x" * 3000] * 10
