"""What a process finds out about a pool in the background, when some of it does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from prefixstore.errors import RemoteError
from prefixstore.pool import scout as scouting
from prefixstore.pool import store as stores
from prefixstore.pool.backend import ABSENT, LOST, Get
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.store import PooledStore
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for, tokens_of, wait_for
from tests.pool.contract import put
from tests.pool.servers import redis


@pytest.fixture
def store() -> Iterator[PooledStore]:
    with redis() as server, PooledStore(RedisBackend(server.url)) as store:
        yield store


def mirrored(ns: PooledNamespace) -> set[bytes]:
    mirror = ns.store.scout.mirror(ns)
    return set() if mirror is None else set(mirror.keys)


@pytest.mark.parametrize("what", [LOST, ABSENT])
def test_what_could_not_be_read_is_read_when_it_is_listed_again(
    store: PooledStore, monkeypatch: pytest.MonkeyPatch, what: int
) -> None:
    """A part of a text whose server does not answer, or that goes and comes in between."""
    monkeypatch.setattr(scouting, "NEWS_PERIOD_S", 0.1)
    text = tokens_of(1, 60)
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    refs = ns.chain(text).refs()
    put(ns, refs)
    away = {ns.shape.object_of(ref.key) for ref in refs[20:]}
    real, misses = RedisBackend.get, 0

    def get(self: RedisBackend, gets: Sequence[Get], **told: Any) -> list[int]:
        nonlocal misses
        came = real(self, gets, **told)
        misses += sum(one.name in away for one in gets)
        return [what if one.name in away else n for one, n in zip(gets, came, strict=True)]

    monkeypatch.setattr(RedisBackend, "get", get)
    wait_for(lambda: mirrored(ns) == {ref.key for ref in refs[:20]}, "the others")
    wait_for(lambda: misses > 80, "them to be tried again")
    mirror = store.scout.mirror(ns)
    assert mirror is not None
    assert mirror.is_complete == (what == ABSENT)
    away.clear()
    wait_for(lambda: mirrored(ns) == {ref.key for ref in refs}, "all of them")
    wait_for(lambda: mirror.is_complete, "the end of the listing")
    [found] = ns.find_segments([7, *text[1:]])
    assert (found.start, found.num_tokens) == (1, len(text) - 1)


@pytest.mark.parametrize("bound", ["LISTING_PARTS_MAX", "LISTING_S"])
def test_a_listing_without_an_end_is_given_up(
    store: PooledStore, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Parts of names that nobody asked for, or of none, for ever."""
    monkeypatch.setattr(stores, bound, 20 if bound == "LISTING_PARTS_MAX" else 0.2)
    given = 0

    def names(prefix: str, *, deadline_s: float) -> Iterator[list[str]]:
        nonlocal given
        while given < 100_000:
            given += 1
            yield [] if given % 2 else ["another/name"]
            time.sleep(0.001)

    monkeypatch.setattr(store.backend, "names", names)
    with pytest.raises(RemoteError, match="comes to no end"):
        store.models()
    assert 20 <= given < 5000
    began = given
    with pytest.raises(RemoteError, match="comes to no end"):
        store.scout._list()
    assert given < began + 5000


def test_there_are_not_endlessly_many_models(
    store: PooledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label in "abc":
        store.namespace(identity_for(label), CONTRACT_LAYOUT)
    assert len(store.models()) == 3
    monkeypatch.setattr(stores, "MODELS_MAX", 2)
    with pytest.raises(RemoteError, match="more than 2 models"):
        store.models()
