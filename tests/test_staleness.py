"""Staleness of chunks: what was noted is read again for as long as the chunk is there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from prefixstore import Store, admin
from prefixstore.errors import LayoutError
from prefixstore.staleness import note_staleness, staleness_of
from tests.store_helpers import LAYOUT, WAIT_S, Place, namespace_in, put_content, refs_of

pytest_plugins = ["tests.store_fixtures"]

SIZE = LAYOUT.chunk_tokens
VALUES = np.arange(4 * SIZE, dtype=np.float32).reshape(4, SIZE) / 8


@pytest.fixture(params=["16MiB", 0], ids=["disk", "memory only"])
def store(request: pytest.FixtureRequest, place: Place) -> Iterator[Store]:
    with place.open(disk_bytes=request.param) as opened:
        yield opened


def test_what_was_noted_is_read_until_the_chunk_goes(store: Store) -> None:
    namespace = namespace_in(store)
    refs = refs_of(namespace, 1, 4)
    put_content(namespace, refs)
    store.flush(WAIT_S)
    assert staleness_of(namespace, refs) == [None] * 4
    assert note_staleness(namespace, refs, VALUES) == 4
    for found, noted in zip(staleness_of(namespace, refs), VALUES, strict=True):
        assert found is not None
        assert found.tolist() == noted.tolist()

    admin.remove(store, admin.Selection(key=refs[2].key))
    put_content(namespace, refs)
    store.flush(WAIT_S)
    assert [found is None for found in staleness_of(namespace, refs)] == [False, False, True, False]
    assert admin.verify(store).sound


def test_it_outlives_the_process_and_the_memory_tier(place: Place) -> None:
    with place.open() as store:
        namespace = namespace_in(store)
        refs = refs_of(namespace, 1, 4)
        put_content(namespace, refs)
        store.flush(WAIT_S)
        note_staleness(namespace, refs, VALUES)
        admin.empty_memory(store)
        assert all(found is not None for found in staleness_of(namespace, refs))
    with place.open() as store:
        found = staleness_of(namespace_in(store), refs)
    assert np.array_equal(np.stack([f for f in found if f is not None]), VALUES)


def test_a_chunk_that_is_not_there_takes_none(store: Store) -> None:
    namespace = namespace_in(store)
    refs = refs_of(namespace, 1, 4)
    put_content(namespace, refs[:1])
    store.flush(WAIT_S)
    assert note_staleness(namespace, refs, VALUES) == 1
    assert [found is None for found in staleness_of(namespace, refs)] == [False, True, True, True]


def test_verify_finds_and_mends_staleness_without_a_chunk(store: Store) -> None:
    env = store.index if store.has_disk else store.live
    env.write(lambda txn: txn.put("staleness", bytes(16), bytes(2 * SIZE)))
    wrong = {"staleness of a chunk that is not there": 1}
    assert admin.verify(store).segments == wrong
    assert admin.verify(store, fix=True).sound


def test_what_was_not_measured_stays_unknown(store: Store) -> None:
    namespace = namespace_in(store)
    refs = refs_of(namespace, 1, 4)
    put_content(namespace, refs)
    store.flush(WAIT_S)
    values = VALUES.copy()
    values[0, :3] = np.nan
    assert note_staleness(namespace, refs, values) == 4
    found = staleness_of(namespace, refs)[0]
    assert found is not None
    assert np.array_equal(found, values[0], equal_nan=True)


def test_numbers_too_large_are_cut_and_negative_ones_are_refused(store: Store) -> None:
    namespace = namespace_in(store)
    refs = refs_of(namespace, 1, 4)
    put_content(namespace, refs)
    store.flush(WAIT_S)
    note_staleness(namespace, refs, VALUES + np.float32(1e9))
    assert all(f is not None and np.isfinite(f).all() for f in staleness_of(namespace, refs))
    with pytest.raises(LayoutError, match="negative"):
        note_staleness(namespace, refs, VALUES - 1)
    with pytest.raises(LayoutError, match="one number a token"):
        note_staleness(namespace, refs, VALUES[:, 1:])
