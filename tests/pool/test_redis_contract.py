"""The contracts of a backend and of a store, over one Redis server and over a cluster of three."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefixstore.pool.backend import Backend
from prefixstore.pool.redis import RedisBackend
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_backend import BackendContract
from tests.pool.contract import PoolContract, PoolSegments, Strict, pooled
from tests.pool.servers import Redis, redis, redis_cluster


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Redis]]:
    with redis_cluster() as nodes:
        yield nodes


class TestServer(BackendContract):
    @pytest.fixture
    def backend(self, server: Redis) -> Iterator[Backend]:
        backend = RedisBackend(server.url)
        yield backend
        backend.close()


class TestCluster(BackendContract):
    """One server is named; it tells of the others."""

    @pytest.fixture
    def backend(self, cluster: list[Redis]) -> Iterator[Backend]:
        backend = RedisBackend(cluster[1].url)
        yield backend
        backend.close()
        assert len(backend._owners) == 3


class TestStore(PoolContract):
    @pytest.fixture
    def namespace(self, server: Redis) -> Iterator[NamespaceFactory]:
        with pooled(RedisBackend(server.url)) as namespace:
            yield namespace


class TestStoreOfCluster(PoolContract):
    """With chunks that are cut into several objects."""

    @pytest.fixture
    def namespace(
        self, cluster: list[Redis], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[NamespaceFactory]:
        monkeypatch.setattr(RedisBackend, "part_bytes", 700)
        with pooled(RedisBackend(cluster[0].url)) as namespace:
            yield namespace


class TestStoreOfLittle(PoolContract):
    """Over an engine that gives as little past the end of an object as any."""

    @pytest.fixture
    def namespace(self, server: Redis) -> Iterator[NamespaceFactory]:
        with pooled(Strict(server.url)) as namespace:
            yield namespace


class TestSegments(PoolSegments):
    @pytest.fixture
    def namespace(self, cluster: list[Redis]) -> Iterator[NamespaceFactory]:
        with pooled(RedisBackend(cluster[0].url)) as namespace:
            yield namespace
