"""Hosts that store one chunk of several parts at once, interleaved at each object that they write.

Their bytes differ, as those of two engines may in their last bits: so a chunk that is a mix of both
is damaged, and seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from prefixstore.codec import LOSSLESS, NONE
from prefixstore.found import REMOTE
from prefixstore.layout import Roi
from prefixstore.namespace import MISS
from prefixstore.pool.backend import LOST, Get, Put, Written
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.objects import Shape
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for, region_of, tokens_of
from tests.pool.contract import part_names
from tests.pool.servers import Redis, redis

LAYOUT = CONTRACT_LAYOUT
ROIS = (LAYOUT.whole, Roi(0, 1, 1, 2), Roi(LAYOUT.num_layers - 1, LAYOUT.num_layers, 0, 1))
PLACES = count()


class DiedError(Exception):
    """The host is no more."""


class Host(RedisBackend):
    """Writes object by object; ``before`` is told how many it has written, and may raise. So many
    as there is ``room`` for."""

    part_bytes = LAYOUT.payload_bytes // 5
    written = 0
    room = 1 << 20  # objects

    def put(
        self,
        puts: Sequence[Put],
        *,
        deadline_s: float,
        ttl_s: float | None = None,
        replace: bool = False,
    ) -> list[Written]:
        done: list[Written] = []
        for one in puts:
            if "/models/" not in one.name:
                self.before(self.written)
                self.written += 1
            if self.written > self.room:
                done.append(Written.FULL)
                continue
            done += super().put([one], deadline_s=deadline_s, ttl_s=ttl_s, replace=replace)
        return done

    def before(self, number: int) -> None:
        """Something may happen."""


class Writer:
    """A host's store, and what it has of the chunk."""

    def __init__(self, server: Redis, stack: ExitStack, place: str, codec: str, seed: int) -> None:
        self.backend = Host(server.url)
        store = PooledStore(self.backend, prefix=place, codec=codec)
        stack.enter_context(store)
        model = replace(identity_for("a"), kv_dtype="float32", head_size=LAYOUT.head_bytes // 4)
        self.ns: PooledNamespace = store.namespace(model, LAYOUT)
        [self.ref] = self.ns.chain(tokens_of(1, 1, LAYOUT)).refs()
        rng = np.random.default_rng(seed)
        self.payload = rng.integers(0, 8, LAYOUT.payload_bytes // 4).astype("<f4").tobytes()

    def put(self) -> PutState:
        [state] = self.ns.put([self.ref], [self.payload])
        return state

    def die_at(self, step: int) -> None:
        """Write so many objects of the chunk."""

        def before(number: int) -> None:
            if number == step:
                raise DiedError

        self.backend.before = before  # type: ignore[method-assign]
        with suppress(DiedError):
            self.put()

    def first(self, step: int, work: Callable[[], object]) -> None:
        """Do something before the object of that number is written."""

        def before(number: int) -> None:
            if number == step:
                work()

        self.backend.before = before  # type: ignore[method-assign]

    def has(self, *payloads: bytes) -> bool:
        """Whether the chunk is there; then it is one of these, in any region, and not damaged."""
        tiers = set()
        for roi in ROIS:
            out = memoryview(bytearray(LAYOUT.roi_bytes(roi)))
            [tier] = self.ns.get([self.ref], [out], roi)
            tiers.add(tier)
            assert tier == MISS or out in [region_of(one, LAYOUT, roi) for one in payloads]
        assert self.ns.store.counts["damaged"] == 0
        assert len(tiers) == 1
        return tiers == {REMOTE}


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture(params=[(NONE, NONE), (LOSSLESS, LOSSLESS), (NONE, LOSSLESS)], ids="-".join)
def pair(server: Redis, request: pytest.FixtureRequest) -> Iterator[Callable[[], list[Writer]]]:
    """Makes two hosts of one place, where nothing is."""
    with ExitStack() as stack:

        def make() -> list[Writer]:
            place = f"prefixstore/writers/{next(PLACES)}"
            return [Writer(server, stack, place, codec, i) for i, codec in enumerate(request.param)]

        yield make


def steps(pair: Callable[[], list[Writer]], which: int = 0) -> range:
    """Numbers of the objects that a host writes."""
    one = pair()[which]
    assert one.put() is PutState.STORED
    assert one.backend.written >= 4
    return range(one.backend.written)


def test_who_dies_while_another_has_stored_the_chunk_leaves_it(
    pair: Callable[[], list[Writer]],
) -> None:
    """The first is done before the second, who has found nothing there, writes anything."""
    for step in steps(pair, 1):
        one, two = pair()
        asked = two.ns.exist

        def exist(
            keys: Sequence[bytes],
            asked: Callable[[Sequence[bytes]], list[bool]] = asked,
            one: Writer = one,
        ) -> list[bool]:
            there = asked(keys)
            assert one.put() is PutState.STORED
            return there

        two.ns.exist = exist  # type: ignore[method-assign]
        two.die_at(step)
        assert one.has(one.payload), step
        assert two.has(one.payload), step


def test_who_is_interrupted_at_any_object(pair: Callable[[], list[Writer]]) -> None:
    """By one who stores the chunk: it is the chunk of who was first, and nothing else is left."""
    for step in steps(pair):
        one, two = pair()
        one.first(step, lambda one=one, two=two: two.put())  # type: ignore[misc]
        assert one.put() is PutState.EXISTS
        assert one.has(two.payload), step
        assert two.has(two.payload), step
        names = part_names(one.ns, one.ref)
        assert len({name.split(".")[1] for name in names}) == 1, "parts of who was second"
        assert two.ns.delete([two.ref]) == 1
        assert part_names(one.ns, one.ref) == []


def test_who_is_interrupted_by_one_who_dies(pair: Callable[[], list[Writer]]) -> None:
    """At any object by who has written any number of his: a reader finds nothing until it is the
    chunk of who lives."""
    numbers = steps(pair, 1)
    for step in steps(pair):
        for last in numbers:
            one, two = pair()

            def interrupt(one: Writer = one, two: Writer = two, last: int = last) -> None:
                two.die_at(last)
                assert not one.has()
                assert not two.has()

            one.first(step, interrupt)
            assert one.put() is PutState.STORED
            assert one.has(one.payload), (step, last)
            assert two.has(one.payload), (step, last)


def test_who_died_and_comes_again_leaves_nothing_more(pair: Callable[[], list[Writer]]) -> None:
    """A try that failed, and is made again with the same bytes, writes the same parts."""
    for step in steps(pair):
        one, two = pair()
        one.die_at(step)
        assert not two.has()
        one.first(-1, lambda: None)
        assert one.put() is PutState.STORED
        assert two.has(one.payload)
        assert two.ns.delete([two.ref]) == 1
        assert part_names(one.ns, one.ref) == [], step


def test_a_last_part_that_was_sent_twice_is_ones_own(pair: Callable[[], list[Writer]]) -> None:
    """The connection broke before the answer: the second time it is there already. Its parts are
    not those of somebody who was late."""
    one, two = pair()
    put = one.backend.put

    def twice(puts: Sequence[Put], *, deadline_s: float, **how: object) -> list[Written]:
        put(puts, deadline_s=deadline_s, **how)  # type: ignore[arg-type]
        return put(puts, deadline_s=deadline_s, **how)  # type: ignore[arg-type]

    one.backend.put = twice  # type: ignore[method-assign]
    assert one.put() is PutState.EXISTS
    assert two.has(one.payload)


def test_parts_stay_if_nobody_can_say_whose_chunk_it_is(pair: Callable[[], list[Writer]]) -> None:
    """The connection that broke before the answer breaks again when it is asked."""
    one, two = pair()
    put, get = one.backend.put, one.backend.get

    def twice(puts: Sequence[Put], *, deadline_s: float, **how: object) -> list[Written]:
        put(puts, deadline_s=deadline_s, **how)  # type: ignore[arg-type]
        one.backend.get = lost  # type: ignore[method-assign]
        return put(puts, deadline_s=deadline_s, **how)  # type: ignore[arg-type]

    def lost(gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        return [LOST] * len(gets)

    one.backend.put = twice  # type: ignore[method-assign]
    assert one.put() is PutState.EXISTS
    one.backend.get = get  # type: ignore[method-assign]
    assert two.has(one.payload)


@pytest.mark.parametrize("fails", [Written.NO, Written.FULL])
def test_two_threads_of_one_host(pair: Callable[[], list[Writer]], fails: Written) -> None:
    """One that cannot write a part does not remove those of the other, which is not done yet."""
    one, two = pair()
    put, last = one.backend.put, steps(pair)[-1]

    def failing(puts: Sequence[Put], **how: Any) -> list[Written]:
        return [fails] * len(puts)

    def other() -> None:
        one.backend.put = failing  # type: ignore[method-assign]
        assert one.put() is not PutState.STORED
        one.backend.put = put  # type: ignore[method-assign]

    one.first(last, other)
    assert one.put() is PutState.STORED
    assert two.has(one.payload)


def test_a_chunk_that_is_replaced_while_it_is_read(pair: Callable[[], list[Writer]]) -> None:
    """Is a miss to that reader, and whole to the next."""
    one, two = pair()
    assert one.put() is PutState.STORED
    get, done = two.backend.get, list[PutState]()
    parts = part_names(one.ns, one.ref)

    def replaced(gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        if not done and any(wanted.name.endswith(tuple(parts)) for wanted in gets):
            assert one.ns.delete([one.ref]) == 1
            done.append(two.put())
        return get(gets, deadline_s=deadline_s)

    two.backend.get = replaced  # type: ignore[method-assign]
    out = memoryview(bytearray(LAYOUT.payload_bytes))
    assert two.ns.get([two.ref], [out]) == [MISS]
    assert done == [PutState.STORED]
    assert two.ns.store.counts["damaged"] == 0
    assert one.has(two.payload)


def test_what_a_full_engine_did_not_take_is_removed(pair: Callable[[], list[Writer]]) -> None:
    """Whichever object it was."""
    for step in steps(pair):
        one, _ = pair()
        one.backend.room = step
        assert one.put() is PutState.FULL
        assert part_names(one.ns, one.ref) == [], step


def test_chunks_of_before_there_were_writers(
    pair: Callable[[], list[Writer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are read, and removed with their parts."""
    one, two = pair()
    with monkeypatch.context() as before:
        before.setattr(Shape, "by", lambda self, writer: self)
        assert one.put() is PutState.STORED
    name = one.ns.shape.object_of(one.ref.key)
    names = [part.removeprefix(name) for part in part_names(one.ns, one.ref)]
    mark = "c" * (one.ns.choice.codec == LOSSLESS)
    assert names == [f".{mark}{i}" for i in range(len(names))]
    assert len(names) >= 3
    assert two.put() is PutState.EXISTS
    assert two.has(one.payload)
    assert two.ns.delete([two.ref]) == 1
    assert part_names(one.ns, one.ref) == []
    assert not two.has()
