"""A store that is lost while it is served: requests are refused, and go on by themselves."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from prefixstore import Namespace, Store, admin
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import RemoteError
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from prefixstore.serve import mending
from prefixstore.serve.eyes import EYES
from prefixstore.serve.run import ServeOptions, Server, serve
from prefixstore.testing import CONTRACT_LAYOUT as LAYOUT
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask
from tests.serve.support import Running
from tests.store_helpers import WAIT_S, Panics, Place, wait_for

pytest_plugins = ["tests.store_fixtures"]


class Mended(Running):
    """A server that can open its store again."""

    def __init__(self, place: Place, **options: Any) -> None:
        self.place, self.fails = place, 0
        super().__init__(place.open(), ServeOptions(**options))

    def make(self, store: Store, options: ServeOptions) -> Server:
        return Server(store, options, self.open_it)

    def open_it(self) -> Store:
        if self.fails > 0:
            self.fails -= 1
            raise OSError(5, "planted: the device is not back")
        return self.place.open()

    def lose(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        """The device fails; returns the store that is of no use now."""
        store = self.server.state.store
        monkeypatch.setattr(store.index, "_env", Panics(store.index._env))
        wait_for(lambda: store.gone, "the keeper to notice")
        return store


@pytest.fixture
def server(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mended]:
    monkeypatch.setattr(mending, "LOOK_S", 0.1)
    server = Mended(place)
    try:
        yield server
    finally:
        server.stop()
        server.server.state.store.close()


def put(client: RemoteStore, seed: int) -> list[Any]:
    ns = client.namespace(identity_for("a", LAYOUT), LAYOUT)
    refs = ns.chain(tokens_of(seed, 2, LAYOUT)).refs()
    ns.put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs])
    return refs


def read(client: RemoteStore, refs: list[Any]) -> list[int]:
    ns = client.namespace(identity_for("a", LAYOUT), LAYOUT)
    outs = outputs(LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        assert tier == MISS or out == content_of(ref.key, LAYOUT.payload_bytes)
    return tiers


def test_an_error_of_the_device_is_got_over(
    server: Mended, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody starts it again: what was there is served, leases of before are over, news go on."""
    with server.open() as client:
        refs = put(client, 1)
        ns = client.namespace(identity_for("a", LAYOUT), LAYOUT)
        ns.lease(refs, [MEMORY] * 2)
        told: list[object] = []
        monkeypatch.setattr(
            server.server.app[EYES].recorder, "changed", lambda news: told.extend(news)
        )
        assert server.server.state.num_leases == 1
        server.fails = 3
        with caplog.at_level(logging.WARNING, "prefixstore"):
            lost = server.lose(monkeypatch)
            wait_for(lambda: read(client, refs) == [MEMORY] * 2, "the store to be there again")
        said = [record.getMessage() for record in caplog.records if record.name == "prefixstore"]
        assert sum("input/output error in its index" in line for line in said) == 1
        assert sum("the device is not back" in line for line in said) == 1
        assert sum("usable again" in line for line in said) == 1
        state = server.server.state
        assert state.store is not lost
        assert state.num_leases == 0
        before = len(told)
        put(client, 2)
        wait_for(lambda: len(told) > before, "news of the new store")
        assert admin.verify(state.store).sound


def test_requests_are_refused_meanwhile_and_clients_come_back(
    server: Mended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a store that is closed for good: who has a front would give it up."""
    server.fails = 10**6
    with server.open(deadline_s=0.5) as client, server.open() as patient:
        refs = put(client, 1)
        ns = client.namespace(identity_for("a", LAYOUT), LAYOUT)
        same = patient.namespace(identity_for("a", LAYOUT), LAYOUT)
        server.lose(monkeypatch)
        with pytest.raises(RemoteError, match="is opened again"):
            ns.match(refs)
        server.fails = 2
        assert same.match(refs).num_chunks == 2, "within the deadline of one call"


@contextmanager
def held_up(
    monkeypatch: pytest.MonkeyPatch, where: type, name: str, path: str, body: bytes, server: Mended
) -> Iterator[tuple[threading.Event, Future[tuple[int, Any]]]]:
    """A request that is in the store until the event is set, and its answer."""
    real, there, go_on = getattr(where, name), threading.Event(), threading.Event()

    def stuck(*args: Any, **told: Any) -> Any:
        there.set()
        assert go_on.wait(WAIT_S)
        return real(*args, **told)

    monkeypatch.setattr(where, name, stuck)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask, server.address, "POST", path, body)
        assert there.wait(WAIT_S)
        monkeypatch.setattr(where, name, real)
        try:
            yield go_on, asked
        finally:
            go_on.set()


def test_a_flush_that_hangs_does_not_keep_the_store_lost(
    server: Mended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mending, "DRAIN_S", 0.2)
    state = server.server.state
    with (
        server.open() as client,
        held_up(monkeypatch, Store, "flush", "/v1/flush", b"{}", server) as (_, asked),
    ):
        refs = put(client, 1)
        lost = server.lose(monkeypatch)
        wait_for(lambda: state.store is not lost, "another store")
        assert read(client, refs) == [MEMORY] * 2
        assert not asked.done()


def test_requests_that_end_are_waited_for(server: Mended, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is not closed under them."""
    state = server.server.state
    with (
        server.open() as client,
        held_up(monkeypatch, Store, "flush", "/v1/flush", b"{}", server) as (go_on, asked),
    ):
        put(client, 1)
        lost = server.lose(monkeypatch)
        time.sleep(3 * mending.LOOK_S)
        assert state.store is lost
        assert lost._users == 1
        go_on.set()
        assert asked.result(WAIT_S)[0] == 200
        wait_for(lambda: state.store is not lost, "another store")


def test_a_store_that_is_lost_is_not_one_that_is_closed(
    server: Mended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to who asks whether it is ready, nor to a request that was in it when it was closed:
    a client would take its namespace for retired."""
    monkeypatch.setattr(mending, "DRAIN_S", 0.2)
    state = server.server.state
    server.fails = 10**6
    with server.open() as client:
        ns = client.namespace(identity_for("a", LAYOUT), LAYOUT)
        tokens = tokens_of(1, 300, LAYOUT)
        body = json.dumps({"namespace": ns.name.hex(), "tokens": tokens}).encode()
        with held_up(monkeypatch, Namespace, "match", "/v1/match", body, server) as (go_on, asked):
            lost = server.lose(monkeypatch)
            status, told = ask(server.address, "GET", "/readyz")
            assert (status, told["error"]["code"]) == (503, "store")
            server.fails = 0
            wait_for(lambda: state.store is not lost, "another store")
            go_on.set()
            status, told = asked.result(WAIT_S)
            assert (status, told["error"]["code"]) == (503, "store")


def test_a_folder_that_was_removed(server: Mended) -> None:
    with server.open() as client:
        refs = put(client, 1)
        (server.place.folder / "store").rename(server.place.folder / "away")
        wait_for(lambda: server.server.state.store.gone, "the keeper to notice")
        wait_for(lambda: not server.server.state.store.gone, "a new store")
        assert read(client, refs) == [MISS] * 2
        assert read(client, put(client, 1)) == [MEMORY] * 2


def test_what_it_was_given_is_closed_if_it_cannot_serve(place: Place, tmp_path: object) -> None:
    opened: list[Store] = []

    def open_it() -> Store:
        opened.append(place.open())
        return opened[-1]

    options = ServeOptions(uds=str(place.folder / "no" / "such" / "socket"))
    with pytest.raises(Exception, match="cannot listen"):
        asyncio.run(serve(open_it, options, print))
    assert len(opened) == 1
    with pytest.raises(Exception, match="is closed"):
        opened[0].check_open()
