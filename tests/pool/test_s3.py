"""The contracts over S3-compatible object storage, and its own ways to fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from prefixstore.errors import ConfigError, RemoteError
from prefixstore.found import REMOTE
from prefixstore.interface import open_store
from prefixstore.layout import Roi
from prefixstore.namespace import MISS
from prefixstore.pool.backend import Backend, Get, Put, open_backend
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_backend import BackendContract
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    identity_for,
    outputs,
    region_of,
    wait_for,
)  # fmt: skip
from tests.pool.contract import PoolContract, PoolSegments, chunks, pooled, put, read
from tests.pool.servers import S3, free_ports, s3
from tests.pool.test_codecs import content_for, identity

SIZE = CONTRACT_LAYOUT.payload_bytes


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3() as one:
        yield one


@pytest.fixture
def backend(server: S3) -> Iterator[Backend]:
    backend = open_backend(server.url)
    yield backend
    backend.close()


class TestBackend(BackendContract):
    many, batch, turns = 1010, 200, 3

    @pytest.fixture
    def backend(self, server: S3) -> Iterator[Backend]:
        backend = open_backend(server.url)
        yield backend
        backend.close()


class TestStore(PoolContract):
    @pytest.fixture
    def namespace(self, server: S3) -> Iterator[NamespaceFactory]:
        with pooled(open_backend(server.url)) as namespace:
            yield namespace


class TestSegments(PoolSegments):
    @pytest.fixture
    def namespace(self, server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[NamespaceFactory]:
        monkeypatch.setattr("prefixstore.pool.scout.PERIOD_S", 0.2)
        with pooled(open_backend(server.url)) as namespace:
            yield namespace


@pytest.mark.parametrize("at", [5, SIZE - 1, SIZE + 2, SIZE + 60, -3])
def test_a_flipped_byte_is_a_miss_and_the_chunk_is_dropped(server: S3, at: int) -> None:
    with PooledStore(open_backend(server.url), prefix=f"prefixstore/flip/{at}") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        put(ns, refs)
        name = f"pool/{ns.shape.object_of(refs[1].key)}"
        data = bytearray(server.request("GET", name))
        data[at] ^= 1
        server.request("PUT", name, bytes(data))
        assert read(ns, refs) == [REMOTE, MISS, REMOTE, REMOTE]
        assert put(ns, refs)[1] is PutState.STORED
        assert read(ns, refs) == [REMOTE] * 4


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, SIZE + 30])
def test_an_object_that_is_cut_short_is_a_miss(server: S3, size: int) -> None:
    """Read as a whole or by a region whose first byte it has not."""
    with PooledStore(open_backend(server.url), prefix=f"prefixstore/cut/{size}") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        put(ns, refs)
        for i, roi in enumerate([Roi(0, 2, 0, 2), Roi(1, 2, 1, 2)]):
            name = f"pool/{ns.shape.object_of(refs[i].key)}"
            server.request("PUT", name, server.request("GET", name)[:size])
            outs = outputs(CONTRACT_LAYOUT, 1, roi)
            assert ns.get(refs[i : i + 1], outs, roi) == [MISS]
        assert read(ns, refs) == [MISS, MISS, REMOTE, REMOTE]
        assert put(ns, refs)[:2] == [PutState.STORED] * 2
        assert read(ns, refs) == [REMOTE] * 4


def test_misses_cost_no_request(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the names were listed; what others store is found after the next listing."""
    monkeypatch.setattr("prefixstore.pool.scout.PERIOD_S", 0.5)
    with (
        PooledStore(open_backend(server.url), prefix="prefixstore/known") as store,
        PooledStore(open_backend(server.url), prefix="prefixstore/known") as other,
    ):
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        theirs = other.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns, 40)
        ns.match(refs)
        wait_for(lambda: store.scout.may_have(ns.name, [b"x" * 16]) == [False], "a listing")
        asked = Mock(wraps=store.backend.exist)
        monkeypatch.setattr(store.backend, "exist", asked)
        for _ in range(5):
            assert ns.match(refs).num_chunks == 0
            assert ns.match_each(refs) == [MISS] * 40
        assert [call.args[0] for call in asked.call_args_list if call.args[0]] == []
        put(theirs, refs[:3])
        wait_for(lambda: ns.match(refs).num_chunks == 3, "the next listing")


def test_a_server_that_is_killed_and_comes_back() -> None:
    with s3() as server, PooledStore(open_backend(server.url), deadline_s=2.0) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        assert put(ns, refs) == [PutState.STORED] * 4
        server.kill()
        for _ in range(4):
            assert read(ns, refs) == [MISS] * 4
        assert not store.usable
        with pytest.raises(RemoteError):
            put(ns, refs)
        server.start()

        def stored() -> bool:
            try:
                return PutState.STORED in put(ns, refs)
            except RemoteError:
                return False

        wait_for(stored, "it to be found again")
        assert read(ns, refs) == [REMOTE] * 4


def test_a_late_answer_is_not_written_to_a_buffer(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its owner may have given to another read by then."""
    backend.put([Put("late/object", [b"z" * 100])], deadline_s=10.0)
    go_on, came = threading.Event(), threading.Event()
    real = backend._fetch  # type: ignore[attr-defined]

    def slow(*words: object) -> object:
        assert go_on.wait(30.0)
        found = real(*words)
        came.set()
        return found

    monkeypatch.setattr(backend, "_fetch", slow)
    out = bytearray(100)
    with pytest.raises(RemoteError, match="deadline"):
        backend.get([Get("late/object", [(0, memoryview(out))])], deadline_s=0.1)
    go_on.set()
    assert came.wait(30.0)
    assert out == bytes(100)


def test_a_region_is_read_in_few_requests(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are near each other."""
    with PooledStore(backend, prefix="prefixstore/region") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = chunks(ns)
        put(ns, refs)
        asked = Mock(wraps=backend._fetch)  # type: ignore[attr-defined]
        monkeypatch.setattr(backend, "_fetch", asked)
        roi = Roi(0, 2, 1, 2)
        assert isinstance(ns, PooledNamespace)
        assert ns.get(refs, outputs(CONTRACT_LAYOUT, 4, roi), roi) == [REMOTE] * 4
        assert asked.call_count == 4


@pytest.mark.parametrize("url", [
    "s3://", "s3:///prefix", "s3://bucket?colour=red", "s3://key:secret@bucket", "s3://bucket#x",
    "s3://[bucket",
])  # fmt: skip
def test_what_is_no_address(server: S3, url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there(server: S3) -> None:
    elsewhere = server.url.replace("kvbucket", "another")
    with open_store(elsewhere) as store, pytest.raises(RemoteError, match="another"):
        store.check_open()
    nobody = server.url.replace(str(server.port), str(free_ports(1)[0]))
    with open_store(nobody) as store, pytest.raises(RemoteError):
        store.check_open()
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        open_store(server.url, token="x")


def test_hosts_with_a_codec_and_without(server: S3) -> None:
    """Each reads what the other stored, whole and a region."""
    prefix = "prefixstore/codecs"
    with (
        PooledStore(open_backend(server.url), prefix=prefix, codec="lossless") as coded,
        PooledStore(open_backend(server.url), prefix=prefix) as plain,
    ):
        one, two = (store.namespace(identity(), CONTRACT_LAYOUT) for store in (coded, plain))
        refs = chunks(one)
        payloads = [content_for(r.key, CONTRACT_LAYOUT.payload_bytes) for r in refs]
        assert one.put(refs[:2], payloads[:2]) == [PutState.STORED] * 2
        assert two.put(refs, payloads) == [PutState.EXISTS] * 2 + [PutState.STORED] * 2
        for ns in (two, one):
            outs = [memoryview(bytearray(len(payload))) for payload in payloads]
            assert ns.get(refs, outs) == [REMOTE] * 4
            assert outs == payloads
            roi = Roi(0, 2, 1, 2)
            outs = [memoryview(bytearray(CONTRACT_LAYOUT.roi_bytes(roi))) for _ in refs]
            assert ns.get(refs, outs, roi) == [REMOTE] * 4
            assert outs == [region_of(each, CONTRACT_LAYOUT, roi) for each in payloads]
