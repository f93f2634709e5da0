"""What became of copies to a pool behind a folder, as Prometheus shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from prometheus_client import generate_latest

from connector.handle import StoreHandle
from connector.options import EngineOptions
from connector.stats import PrefixStoreStats
from prefixstore.fronted import FrontedStore
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for, wait_for
from tests.connector.test_stats import Samples
from tests.pool.contract import chunks, put
from tests.pool.servers import Redis, redis


@pytest.fixture
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture
def handle(server: Redis, tmp_path: Path) -> Iterator[StoreHandle]:
    options = EngineOptions(
        url=server.url, dir=str(tmp_path / "store"), memory="4MiB", disk=0,
        memory_dir=str(tmp_path),
    )  # fmt: skip
    handle = StoreHandle(options)
    yield handle
    handle.close()


def scraped(samples: Samples) -> dict[str, float]:
    """What the page says of copies, of the engine that reported and of the other one."""
    found = {}
    for line in generate_latest(samples.registry).decode().splitlines():
        if line.startswith("prefixstore:copies_") and "_created{" not in line:
            name, _, rest = line.partition("{")
            labels, _, value = rest.partition("} ")
            if 'engine="0"' in labels:
                found[name.removeprefix("prefixstore:copies_")] = float(value)
            else:
                assert float(value) == 0.0
    return found


def test_copies_are_scraped(server: Redis, handle: StoreHandle) -> None:
    """While the pool is full, while it is away, and when it is back; of two workers the sum."""
    store, samples = handle.get(), Samples()
    assert isinstance(store, FrontedStore)

    def report() -> None:
        mine = PrefixStoreStats.of(handle.take_copies(), [], [])
        other = PrefixStoreStats.of({"copies_made": 1}, [], [])
        samples.prom.observe(mine.aggregate(other).data)

    assert scraped(samples) == {"waiting": 0, "made_total": 0, "lost_total": 0, "refused_total": 0}
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    put(ns, chunks(ns, 5))
    assert store.flush()
    report()
    assert scraped(samples) == {"waiting": 0, "made_total": 6, "lost_total": 0, "refused_total": 0}
    server.ask("CONFIG", "SET", "maxmemory", "1")
    put(ns, chunks(ns, 3, seed=2))
    assert store.flush()
    server.kill()
    put(ns, chunks(ns, 4, seed=3))
    wait_for(lambda: not store.remote.usable, "the pool to be missed")
    for made in (7, 8):
        report()
        assert scraped(samples) == {
            "waiting": 4, "made_total": made, "lost_total": 0, "refused_total": 3,
        }  # fmt: skip
    server.start()
    assert store.flush(30.0)
    report()
    assert scraped(samples) == {"waiting": 0, "made_total": 13, "lost_total": 0, "refused_total": 3}
    assert handle.take_copies() == {}


def test_a_store_that_is_opened_again_counts_anew(server: Redis, handle: StoreHandle) -> None:
    """What had waited in the one before waits no more."""
    store = handle.get()
    assert isinstance(store, FrontedStore)
    assert store.behind is not None
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    with store.behind._changed:
        put(ns, chunks(ns, 4))
        assert handle.take_copies() == {"copies_waiting": 4}
    assert store.flush()
    (Path(store.front.folder)).rename(Path(store.front.folder).with_name("away"))
    wait_for(lambda: handle.get() not in (None, store), "another store")
    assert handle.take_copies() == {"copies_waiting": -4}
    again = handle.get()
    assert isinstance(again, FrontedStore)
    ns = again.namespace(identity_for("a"), CONTRACT_LAYOUT)
    put(ns, chunks(ns, 2, seed=2))
    assert again.flush()
    assert handle.take_copies() == {"copies_made": 2}
