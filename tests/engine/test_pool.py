"""Two engines over one Redis: what one stores the other loads, also after its disk is wiped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Engine
from benchmarks.engine_process import connector_config
from prefixstore.interface import open_store
from prefixstore.pool.coded import MAGIC
from prefixstore.pool.store import PooledStore
from tests.engine.support import (
    ONLY_READ,
    PROMPTS,
    Truth,
    ask,
    counting,
    hit_tokens,
    misses,
    remove_memory_of,
    same,
    start,
    totals,
)
from tests.pool.servers import Redis, redis

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
NAME = "ten"
WHOLE = len(PROMPTS[NAME]) // 64 * 64
WAIT_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@contextmanager
def engine_of(model: Path, server: Redis, folder: Path, codec: str = "none") -> Iterator[Engine]:
    """An engine of a host whose folder stands in front of the pool."""
    config: dict[str, Any] = connector_config(
        folder, url=server.url, memory="64MiB", disk=0, load="always", stall_ms=5000, codec=codec
    )
    with start(model, None, kv_transfer_config=config) as engine:
        yield engine


def wait_for_chunks(server: Redis, count: int) -> None:
    """Until so many are in the pool."""
    end = time.monotonic() + WAIT_S
    while True:
        with open_store(server.url) as store:
            assert isinstance(store, PooledStore)
            models = store.models()
            parts = [
                part
                for model in models
                for part in store.backend.names(
                    f"{store.prefix}/{model.identity.namespace_hex}/", deadline_s=5.0
                )
            ]
        if sum(len(part) for part in parts) >= count:
            return
        assert time.monotonic() < end, "the chunks do not come to the pool"
        time.sleep(0.1)


def test_what_one_engine_stores_another_loads(
    model: Path, server: Redis, truth: Truth, tmp_path: Path
) -> None:
    """Bit for bit, also what the first one's codec made smaller. The first one is killed with its
    folder; the second, which has no codec, outlives the pool."""
    with engine_of(model, server, tmp_path / "one", codec="lossless") as first:
        assert same(ask(first, NAME), truth[NAME])
        wait_for_chunks(server, WHOLE // 64)
        found = totals(first)
        assert found["copies_made"] == found["chunks_saved"] == WHOLE // 64
        assert first.metrics("prefixstore:copies_waiting") == {"prefixstore:copies_waiting": 0}
        names = server.ask("KEYS", "prefixstore/1/*")
        assert isinstance(names, list)
        heads = [server.ask("GETRANGE", name, "0", "7") for name in names if len(name) == 79]
        assert heads == [MAGIC] * (WHOLE // 64)
    remove_memory_of(tmp_path)
    shutil.rmtree(tmp_path / "one")
    with engine_of(model, server, tmp_path / "two") as second:
        with counting(second) as found:
            answer = ask(second, NAME)
        assert same(answer, truth[NAME])
        assert answer.cached_tokens
        assert hit_tokens(found, "remote") == hit_tokens(found) == answer.cached_tokens
        assert misses(found) == {}
        server.kill()
        with counting(second) as found:
            again = ask(second, NAME)
        assert same(again, truth[NAME])
        assert hit_tokens(found, "memory") == answer.cached_tokens, "of its own folder"
        assert same(ask(second, "five"), truth["five"])
    remove_memory_of(tmp_path)


def test_rounded_kv_goes_through_a_pool(model: Path, truth: Truth, tmp_path: Path) -> None:
    """What one host rounded, and took with it, another gives back the same."""
    with redis() as server:
        with engine_of(model, server, tmp_path / "one", codec="fp8") as first:
            assert same(ask(first, NAME), truth[NAME])
            wait_for_chunks(server, WHOLE // 64)
            answer = ask(first, NAME, params=ONLY_READ)
            first.kill()
        assert not same(answer, truth[NAME])
        with engine_of(model, server, tmp_path / "two", codec="fp8") as second:
            with counting(second) as found:
                assert same(ask(second, NAME, params=ONLY_READ), answer)
            assert hit_tokens(found, "remote") == hit_tokens(found) == answer.cached_tokens == WHOLE
    remove_memory_of(tmp_path)
