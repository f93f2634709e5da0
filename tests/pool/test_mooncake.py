"""The contracts over Mooncake Store, and what becomes of it: its master and nodes are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from prefixstore.errors import ConfigError, RemoteError
from prefixstore.found import REMOTE
from prefixstore.interface import open_store
from prefixstore.layout import Layout, Roi
from prefixstore.namespace import MISS
from prefixstore.pool.backend import Backend, Get, Put, Written, open_backend
from prefixstore.pool.mooncake import MooncakeBackend
from prefixstore.pool.mooncake_objects import PAD_BYTES
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_backend import BackendContract
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    identity_for,
    region_of,
    tokens_of,
    wait_for,
)  # fmt: skip
from tests.pool.contract import WAIT_S, PoolContract, PoolSegments, chunks, pooled, put, read
from tests.pool.servers import Mooncake, answers, mooncake

SIZE = CONTRACT_LAYOUT.payload_bytes


@pytest.fixture(scope="module")
def server() -> Iterator[Mooncake]:
    with mooncake(nodes=2) as one:
        yield one


class TestBackend(BackendContract):
    many = batch = 300

    @pytest.fixture
    def backend(self, server: Mooncake) -> Iterator[Backend]:
        backend = open_backend(server.url)
        yield backend
        backend.close()


class TestStore(PoolContract):
    @pytest.fixture
    def namespace(self, server: Mooncake) -> Iterator[NamespaceFactory]:
        with pooled(open_backend(server.url)) as namespace:
            yield namespace


class TestSegments(PoolSegments):
    @pytest.fixture
    def namespace(
        self, server: Mooncake, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[NamespaceFactory]:
        monkeypatch.setattr("prefixstore.pool.scout.PERIOD_S", 0.2)
        with pooled(open_backend(server.url)) as namespace:
            yield namespace


@pytest.mark.parametrize("at", [0, 20, 16 + SIZE + 3, 16 + SIZE + 60])
def test_a_flipped_byte_is_a_miss(server: Mooncake, at: int) -> None:
    """Of the object as Mooncake has it: our head of it, payload, trailer."""
    with PooledStore(open_backend(server.url), prefix=f"prefixstore/flip/{at}") as store:
        backend = store.backend
        assert isinstance(backend, MooncakeBackend)
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        put(ns, refs)
        name = ns.shape.object_of(refs[1].key)
        raw = bytearray(SIZE + 800)
        [came] = backend.get([Get(name, [(0, memoryview(raw))])], deadline_s=5.0)
        whole = bytearray(16) + raw[:came]
        whole[8:16] = came.to_bytes(8, "little")
        whole[at] ^= 1
        plain = backend._simple("remove", [name], 5.0)
        assert plain == [0]
        write_raw(backend, name, bytes(whole))
        assert read(ns, refs) == [REMOTE, MISS, REMOTE, REMOTE]
        assert put(ns, refs)[1] is PutState.STORED
        assert read(ns, refs) == [REMOTE] * 4


def write_raw(backend: MooncakeBackend, name: str, whole: bytes) -> None:
    """An object as Mooncake shall have it, without what the backend adds."""
    process, deadline = backend._process, time.monotonic() + 10.0
    assert process is not None
    whole += bytes(PAD_BYTES)
    process.arena[: len(whole)] = whole
    process.ask({"verb": "put", "to": [0], "sizes": [len(whole)]}, [name], deadline)
    assert process.hear(deadline) == [0]


def test_the_process_of_the_client_is_killed(server: Mooncake) -> None:
    """A miss; the next call has another one. One that stands still is killed after the deadline."""
    backend = open_backend(server.url)
    with PooledStore(backend, prefix="prefixstore/killed", deadline_s=2.0) as store:
        assert isinstance(backend, MooncakeBackend)
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        put(ns, refs)
        assert read(ns, refs) == [REMOTE] * 4
        for how in (signal.SIGKILL, signal.SIGSTOP):
            assert backend._process is not None
            os.kill(backend._process._child.pid, how)
            assert read(ns, refs) == [MISS] * 4
            assert backend._process is None
            assert read(ns, refs) == [REMOTE] * 4


def test_a_node_and_the_master_are_killed() -> None:
    """A node: no wrong byte, and what is on the others is served. The master: all is a miss, until
    there is one again; then chunks can be stored anew."""
    with (
        mooncake(nodes=2) as server,
        PooledStore(open_backend(server.url), deadline_s=1.0) as store,
    ):
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns, 40)
        assert put(ns, refs) == [PutState.STORED] * 40
        assert read(ns, refs) == [REMOTE] * 40
        server.kill_node()
        wait_for(lambda: REMOTE in read(ns, refs), "what is on the other node")
        assert MISS in read(ns, refs)
        server.kill_master()
        for _ in range(4):
            assert read(ns, refs[:4]) == [MISS] * 4
        assert not store.usable
        server.kill()
        server.start()

        def stored() -> bool:
            try:
                return put(ns, refs) == [PutState.STORED] * 40
            except RemoteError:
                return False

        wait_for(stored, "it to take chunks again")
        assert read(ns, refs) == [REMOTE] * 40


ENDLESS = b"Content-Length: 99999999999\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (b"Content-Length: 21\r\n\r\np/1/a\nq/1/b\np/1/c.t\np/", ["p/1/a"]),
        (b"Content-Length: 17\r\n\r\np/1/a\nq/1/b\np/1/c", ["p/1/a", "p/1/c"]),
        (b"Content-Length: 0\r\n\r\n", []),
        (ENDLESS + b"p/" + b"x" * 200_000, "a name of"),
        (ENDLESS + b"p/1/a\n", "deadline|timed out"),
        (b"\r\n", "Content-Length"),
    ],
)
def test_a_page_of_keys_is_read_by_its_deadline(
    server: Mooncake, answer: bytes, names: list[str] | str
) -> None:
    """And a name has a bound."""
    with answers(b"HTTP/1.1 200 OK\r\n" + answer, stays=True) as address:
        backend = open_backend(f"mooncake://127.0.0.1:1?admin_port={address.rpartition(':')[2]}")
        try:
            if isinstance(names, str):
                with pytest.raises(RemoteError, match=names):
                    list(backend.names("p/1/", deadline_s=0.5))
            else:
                parts = backend.names("p/1/", deadline_s=WAIT_S)
                assert [name for part in parts for name in part] == names
        finally:
            backend.close()


def test_an_object_that_is_too_large(server: Mooncake) -> None:
    backend = open_backend(server.url)
    try:
        done = backend.put([Put("large", [bytes(40 << 20)]), Put("small", [b"x"])], deadline_s=20.0)
        assert done == [Written.NO, Written.YES]
    finally:
        backend.close()


@pytest.mark.parametrize("url", [
    "mooncake://host", "mooncake://:1", "mooncake://host:port", "mooncake://host:1/path",
    "mooncake://host:1?colour=red", "mooncake://host:1?admin_port=x",
])  # fmt: skip
def test_what_is_no_address(server: Mooncake, url: str) -> None:
    with pytest.raises(ConfigError, match="mooncake://master:port"):
        open_store(url)


def test_hosts_with_a_codec_and_without(server: Mooncake) -> None:
    """Each reads what the other stored, though of Mooncake nothing comes past an object's end."""
    prefix, layout = "prefixstore/codecs", Layout(2, 2, 2, 64, 256)  # 128 KiB
    model = replace(identity_for("codec", layout), kv_dtype="float32", head_size=64)
    numbers = np.random.default_rng(1).integers(0, 8, layout.payload_bytes // 4)
    payload = numbers.astype("<f4").tobytes()
    with (
        PooledStore(open_backend(server.url), prefix=prefix, codec="lossless") as coded,
        PooledStore(open_backend(server.url), prefix=prefix) as plain,
    ):
        one, two = (store.namespace(model, layout) for store in (coded, plain))
        refs = one.chain(tokens_of(1, 4, layout)).refs()
        assert one.put(refs[:2], [payload] * 2) == [PutState.STORED] * 2
        assert two.put(refs[2:], [payload] * 2) == [PutState.STORED] * 2
        for ns in (two, one):
            for roi in (layout.whole, Roi(0, 2, 1, 2)):
                outs = [memoryview(bytearray(layout.roi_bytes(roi))) for _ in refs]
                assert ns.get(refs, outs, roi) == [REMOTE] * 4
                assert outs == [region_of(payload, layout, roi)] * 4
