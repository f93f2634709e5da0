"""The clients that engines come with, as `benchmarks.pool` uses them: whole values by name.

Each is used as its manual says to be fast: pipelines, requests at the same time. None compares what
it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from benchmarks.store_peers import Bytes
from prefixstore.pool.mooncake_objects import parse_url
from prefixstore.pool.s3 import THREADS, open_bucket


class Client(Protocol):
    """See the module docstring."""

    name: str

    def put(self, names: Sequence[str], values: Sequence[memoryview]) -> None:
        """Store values."""

    def get(self, names: Sequence[str], outs: Sequence[memoryview]) -> None:
        """Read values into buffers: where they have to be in the end."""

    def exist(self, names: Sequence[str]) -> None:
        """Ask which are there."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove values."""

    def close(self) -> None:
        """Let go."""


class RedisPyClient:
    """redis-py. A get or put at a time: of large values its pipelines are slower."""

    name = "redis-py"

    def __init__(self, port: int) -> None:
        from redis import Redis

        self._redis: Any = Redis(host="127.0.0.1", port=port)

    def put(self, names: Sequence[str], values: Sequence[memoryview]) -> None:
        """See `Client`."""
        for name, value in zip(names, values, strict=True):
            self._redis.set(name, value)

    def get(self, names: Sequence[str], outs: Sequence[memoryview]) -> None:
        """See `Client`."""
        for name, out in zip(names, outs, strict=True):
            out[:] = self._redis.get(name)

    def exist(self, names: Sequence[str]) -> None:
        """See `Client`."""
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        pipeline.execute()

    def delete(self, names: Sequence[str]) -> None:
        """See `Client`."""
        for name in names:
            self._redis.delete(name)

    def close(self) -> None:
        """See `Client`."""
        self._redis.close()


class RedisPyClusterClient(RedisPyClient):
    """The same for a cluster."""

    def __init__(self, port: int) -> None:
        from redis.cluster import RedisCluster

        self._redis = RedisCluster(host="127.0.0.1", port=port)

    def exist(self, names: Sequence[str]) -> None:
        """See `Client`: a pipeline of a cluster knows no transactions."""
        pipeline = self._redis.pipeline()
        for name in names:
            pipeline.exists(name)
        pipeline.execute()


class ObstoreClient:
    """obstore, with as many requests at the same time as we have."""

    name = "obstore"

    def __init__(self, url: str) -> None:
        self._obstore, self._store = open_bucket(url)
        self._threads = ThreadPoolExecutor(THREADS)

    def put(self, names: Sequence[str], values: Sequence[memoryview]) -> None:
        """See `Client`."""

        def send(name: str, value: memoryview) -> None:
            self._obstore.put(self._store, name, value, use_multipart=False)

        list(self._threads.map(send, names, values))

    def get(self, names: Sequence[str], outs: Sequence[memoryview]) -> None:
        """See `Client`."""

        def read(name: str, out: memoryview) -> None:
            out[:] = memoryview(self._obstore.get(self._store, name).bytes())

        list(self._threads.map(read, names, outs))

    def exist(self, names: Sequence[str]) -> None:
        """See `Client`."""

        def ask(name: str) -> None:
            with suppress(FileNotFoundError):
                self._obstore.head(self._store, name)

        list(self._threads.map(ask, names))

    def delete(self, names: Sequence[str]) -> None:
        """See `Client`."""
        self._obstore.delete(self._store, list(names))

    def close(self) -> None:
        """See `Client`."""
        self._threads.shutdown()


class MooncakeClient:
    """Mooncake's client, in this process, from and into buffers that are registered with it."""

    name = "mooncake"

    def __init__(self, url: str, *buffers: Bytes) -> None:
        from mooncake.store import MooncakeDistributedStore

        settings, _ = parse_url(url)
        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(
            "127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", settings["master"]
        )
        if code or any(self._store.register_buffer(one.ctypes.data, one.nbytes) for one in buffers):
            raise RuntimeError("Mooncake's client does not start")

    def put(self, names: Sequence[str], values: Sequence[memoryview]) -> None:
        """See `Client`."""
        found = self._store.batch_put_from(list(names), *_places(values))
        if any(found):
            raise RuntimeError(f"Mooncake's client put nothing: {set(found)}")

    def get(self, names: Sequence[str], outs: Sequence[memoryview]) -> None:
        """See `Client`."""
        found = self._store.batch_get_into(list(names), *_places(outs))
        if found != [len(out) for out in outs]:
            raise RuntimeError(f"Mooncake's client got nothing: {set(found)}")

    def exist(self, names: Sequence[str]) -> None:
        """See `Client`."""
        self._store.batch_is_exist(list(names))

    def delete(self, names: Sequence[str]) -> None:
        """See `Client`."""
        self._store.batch_remove(list(names), force=True)

    def close(self) -> None:
        """See `Client`."""
        self._store.close()


def _places(views: Sequence[memoryview]) -> tuple[list[int], list[int]]:
    """Addresses and sizes."""
    return [np.frombuffer(view, np.uint8).ctypes.data for view in views], [len(v) for v in views]
