"""The client's calls: what counts against a server, and what does not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore import Store
from prefixstore.client.about import about
from prefixstore.client.breaker import FAILURES_MAX, PROBE_S
from prefixstore.client.connection import BlockingConnection, BrokenError, finish
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import RemoteError, StoreTimeoutError
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for
from tests.serve.support import running
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("4MiB", 0) as store:
        yield store


def test_a_probe_on_a_stale_connection_is_made_again(store: Store, tmp_path: Path) -> None:
    """The immediate retry is the same call, which the breaker has admitted."""
    uds = str(tmp_path / "socket")
    with RemoteStore(f"unix:{uds}") as client:
        with running(store, uds=uds):
            client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        with running(store, uds=uds):
            assert len(client.caller.calls._idle) == 1, "a connection of the server that has gone"
            breaker = client.caller.breaker
            breaker._failures, breaker._open_until = FAILURES_MAX, time.monotonic()
            client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            assert not breaker.is_open


def test_idle_connections_go_when_the_breaker_opens(store: Store) -> None:
    with running(store) as server, server.open() as client:
        client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        for _ in range(FAILURES_MAX):
            assert len(client.caller.calls._idle) == 1
            client.caller.calls._failed(ConnectionResetError(), time.monotonic())
        assert client.caller.calls._idle == []
        assert client.caller.breaker.is_open


def test_a_callers_own_deadline_is_no_failure_of_the_server(store: Store) -> None:
    """Neither one that is over before the call, nor one that leaves no time for an answer."""
    with running(store) as server, server.open() as client:
        for deadline_s in (0.0, -1.0) * FAILURES_MAX:
            with pytest.raises(StoreTimeoutError):
                client.caller.json("POST", "/v1/flush", {}, deadline_s=deadline_s)
        assert not client.caller.breaker.is_open
        client.namespace(identity_for("a"), CONTRACT_LAYOUT)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,  # says nothing, however late one looks
        RemoteStore(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
    ):
        for _ in range(FAILURES_MAX):
            with pytest.raises(StoreTimeoutError):
                client.caller.json("POST", "/v1/flush", {}, deadline_s=1e-4)
        assert not client.caller.breaker.is_open


def test_a_probe_without_time_leaves_the_next_one_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # says nothing
        client = RemoteStore(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=0.02)
        breaker = client.caller.breaker
        breaker._failures, breaker._open_until = FAILURES_MAX, time.monotonic()
        for _ in range(3):
            with pytest.raises(StoreTimeoutError):
                client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        client.deadline_s = 0.3
        with pytest.raises(StoreTimeoutError):
            client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        with pytest.raises(RemoteError, match="lately"):
            client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert breaker._open_until < time.monotonic() + PROBE_S
        client.close()


def test_an_answer_is_no_longer_than_it_says() -> None:
    """A length in an answer allocates nothing that was not announced."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789")
        connection = BlockingConnection(ours, "x")
        connection.deadline = time.monotonic() + 10
        finish(connection.ask("GET", "/", {}, []))
        with pytest.raises(BrokenError, match="shorter"):
            finish(connection.read(1 << 50))
        assert finish(connection.read(10)) == b"0123456789"


def test_calls_say_what_they_are_about(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """The id of an engine's request and its trace stand in the server's log."""
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    with (
        place.open("2MiB", 0) as store,
        running(store, json_log=True) as server,
        server.open() as client,
    ):
        with about("cmpl-1-0", trace):
            client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        with about("not one\r\nX-Evil: 1", "00-zz"):
            client.check_open()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    assert (lines[0]["request_id"], lines[0]["traceparent"]) == ("cmpl-1-0", trace)
    assert lines[1]["request_id"] != "not one"
    assert lines[1]["traceparent"] is None
