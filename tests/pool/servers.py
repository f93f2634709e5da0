"""The real servers of engines for a test, which is skipped where one is not installed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TypeVar

import pytest

from benchmarks import pool_servers
from benchmarks.pool_servers import (
    LOCAL,
    S3,
    Mooncake,
    NotInstalledError,
    Places,
    Redis,
    free_ports,
)

__all__ = [
    "S3",
    "Mooncake",
    "Redis",
    "answers",
    "free_ports",
    "mooncake",
    "redis",
    "redis_cluster",
    "s3",
]
T = TypeVar("T")


@contextmanager
def _or_skip(server: AbstractContextManager[T]) -> Iterator[T]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(server)
        except NotInstalledError as error:
            pytest.skip(str(error))
        yield running


def redis(*options: str) -> AbstractContextManager[Redis]:
    """A Redis server."""
    return _or_skip(pool_servers.redis(*options))


def redis_cluster(places: Places = LOCAL) -> AbstractContextManager[list[Redis]]:
    """A cluster of masters."""
    return _or_skip(pool_servers.redis_cluster(places))


def s3() -> AbstractContextManager[S3]:
    """An S3 server with a bucket, and credentials in the environment."""
    return _or_skip(pool_servers.s3())


def mooncake(nodes: int = 1) -> AbstractContextManager[Mooncake]:
    """A Mooncake master with nodes that lend memory."""
    return _or_skip(pool_servers.mooncake(nodes))


@contextmanager
def answers(answer: bytes, stays: bool = False) -> Iterator[str]:
    """The address of what says this to each who asks something, once; then it ends the connection,
    or stays without a word."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with one, suppress(OSError):
                one.recv(65536)
                one.sendall(answer)
                if stays:
                    one.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10.0)
