"""Connecting by a deadline: names that nobody looks up in time, addresses where nobody answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from prefixstore import dialling
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import ConfigError, RemoteError, StoreTimeoutError
from prefixstore.interface import open_store
from tests.store_helpers import WAIT_S

NAME = "store.example"


def left_behind() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "prefixstore-lookup"]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until this is set, nobody answers who asks for NAME."""
    real, answers = socket.getaddrinfo, threading.Event()

    def look_up(host: str, *words: Any, **told: Any) -> Any:
        if host.endswith(NAME) and not told.get("flags"):
            assert answers.wait(WAIT_S)
            host = "127.0.0.1"
        return real(host, *words, **told)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield answers
    answers.set()
    for one in left_behind():
        one.join(WAIT_S)


@pytest.mark.parametrize("scheme", ["redis", "http"])
def test_a_name_that_is_not_found_in_time(answering: threading.Event, scheme: str) -> None:
    """The call ends while the look-up goes on."""
    with open_store(f"{scheme}://{NAME}:9", deadline_s=0.3) as store:
        with pytest.raises((RemoteError, StoreTimeoutError), match=NAME):
            store.check_open()
        assert not answering.is_set()


def test_look_ups_that_are_left_behind_are_few(
    answering: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "_room", threading.BoundedSemaphore(2))
    for name, told in (
        ("a.", "was not found"), ("a.", "was not found"), ("b.", "was not found"),
        ("c.", "look-ups of names"), ("a.", "was not found"), ("c.", "look-ups of names"),
    ):  # fmt: skip
        with pytest.raises(TimeoutError, match=told):
            dialling.connect(name + NAME, 9, time.monotonic() + 0.1)
    assert len(left_behind()) == 2, "one for a name"
    answering.set()
    for one in left_behind():
        one.join(WAIT_S)
    assert not dialling._under_way
    with pytest.raises(ConnectionRefusedError):
        dialling.connect("a." + NAME, 9, time.monotonic() + WAIT_S)


def test_an_address_where_nobody_answers_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A listener whose queue is full takes no connection, and refuses none."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listens,
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
    ):
        queued = [socket.socket() for _ in range(4)]
        for one in queued:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", at.getsockname()) for at in (full, listens)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **told: found)
        with dialling.connect(NAME, 9, time.monotonic() + 1.0) as sock:
            assert sock.getpeername() == listens.getsockname()
        for one in queued:
            one.close()


def test_what_is_no_name() -> None:
    for name in ("a..b", "x" * 70):
        with pytest.raises(OSError, match="no name of a host"):
            dialling.connect(name, 9, time.monotonic() + WAIT_S)
    with pytest.raises(ConfigError, match="no address"):
        RemoteStore("http://a..b:9")
