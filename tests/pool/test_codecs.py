"""Pools with a codec, over a real Redis: the contract, chunks of hosts with it and without, damage,
and that exact KV and what an engine has rounded never meet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from prefixstore import testing_data
from prefixstore.codec import (
    FP8,
    INT8,
    LOSSLESS,
    LOSSY_NAMES,
    NONE,
    POOL_CHOICES,
    lossless,
)
from prefixstore.codec.rounded import rounded_layout
from prefixstore.errors import ConfigError
from prefixstore.found import REMOTE
from prefixstore.identity import ModelIdentity
from prefixstore.interface import open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi, checksum
from prefixstore.namespace import MISS
from prefixstore.pool.backend import LOST, Get
from prefixstore.pool.coded import MAGIC
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.reading import State, read_plain
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_data import CONTRACT_LAYOUT, tokens_of
from tests.pool import contract
from tests.pool.contract import PoolContract, PoolSegments, Strict
from tests.pool.servers import Redis, redis

LAYOUT = CONTRACT_LAYOUT
PLACES = iter(range(1_000_000))


def identity(label: str = "a") -> ModelIdentity:
    """With KV in float32, of which the codec makes something smaller."""
    return replace(testing_data.identity_for(label), kv_dtype="float32", head_size=32)


def content_for(key: bytes, num_bytes: int) -> bytes:
    """What the codec makes smaller: small whole numbers."""
    rng = np.random.default_rng(list(key))
    return rng.integers(0, 8, num_bytes // 4).astype("<f4").tobytes()


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture(autouse=True)
def content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such chunks in all helpers of the contracts."""
    for module in ("testing", "segment_testing", "testing_data"):
        monkeypatch.setattr(sys.modules[f"prefixstore.{module}"], "content_of", content_for)
    monkeypatch.setattr(contract, "content_of", content_for)


@contextmanager
def opened(server: Redis, codec: str, place: str = "") -> Iterator[PooledStore]:
    prefix = f"prefixstore/codecs/{place or next(PLACES)}"
    with PooledStore(RedisBackend(server.url), prefix=prefix, codec=codec) as store:
        yield store


def pair(
    server: Redis, stack: pytest.FixtureRequest, first: str, second: str
) -> tuple[PooledNamespace, PooledNamespace]:
    """The same place by two hosts."""
    place, found = str(next(PLACES)), []
    for codec in (first, second):
        host = opened(server, codec, place)
        store = host.__enter__()
        stack.addfinalizer(partial(host.__exit__, None, None, None))
        found.append(store.namespace(identity(), LAYOUT))
    return found[0], found[1]


def chunks(ns: PooledNamespace, count: int = 4) -> list[ChunkRef]:
    return ns.chain(tokens_of(1, count)).refs()


def stored(server: Redis, ns: PooledNamespace, ref: ChunkRef) -> bytes:
    data = server.ask("GET", ns.shape.object_of(ref.key))
    assert isinstance(data, bytes)
    return data


# ---------------------------------------------------------------------- contracts
class TestContract(PoolContract):
    @pytest.fixture
    def namespace(self, server: Redis) -> Iterator[NamespaceFactory]:
        with opened(server, LOSSLESS) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


class TestContractInParts(PoolContract):
    """With chunks whose coded pieces are in several objects."""

    @pytest.fixture
    def namespace(
        self, server: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[NamespaceFactory]:
        monkeypatch.setattr(RedisBackend, "part_bytes", 300)
        with opened(server, LOSSLESS) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


class TestSegments(PoolSegments):
    @pytest.fixture
    def namespace(self, server: Redis) -> Iterator[NamespaceFactory]:
        with opened(server, LOSSLESS) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


def test_what_is_stored_is_coded(server: Redis) -> None:
    """Or the contracts above would show nothing."""
    with opened(server, LOSSLESS) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns)
        assert contract.put(ns, refs) == [PutState.STORED] * 4
        for ref in refs:
            data = stored(server, ns, ref)
            assert data[:8] == MAGIC
            assert int.from_bytes(data[24:28], "little") == 1
            assert len(data) < LAYOUT.payload_bytes
        assert contract.read(ns, refs) == [REMOTE] * 4


# ---------------------------------------------------------------------- mixed
@pytest.mark.parametrize("first", [NONE, LOSSLESS])
@pytest.mark.parametrize("part_bytes", [300, 4 << 20])
def test_hosts_with_a_codec_and_without_read_each_other(
    server: Redis,
    first: str,
    part_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Whole chunks and regions, chunks of both in one get; what one stored the other does not
    store again."""
    monkeypatch.setattr(RedisBackend, "part_bytes", part_bytes)
    one, two = pair(server, request, first, LOSSLESS if first == NONE else NONE)
    refs = chunks(one)
    assert contract.put(one, refs[:2]) == [PutState.STORED] * 2
    assert contract.put(two, refs) == [PutState.EXISTS] * 2 + [PutState.STORED] * 2
    for ns in (one, two, one):
        for roi in (None, Roi(0, 1, 0, 2), Roi(0, 2, 1, 2)):
            assert contract.read(ns, refs, roi) == [REMOTE] * 4
    heads = [stored(server, one, ref)[:8] == MAGIC for ref in refs]
    assert heads == [first == LOSSLESS] * 2 + [first == NONE] * 2
    assert one.delete(refs) == 4
    assert server.ask("KEYS", f"{one.shape.prefix}/*") == []


@pytest.mark.parametrize("part_bytes", [300, 1 << 20])
@pytest.mark.parametrize("roi", [Roi(1, 2, 1, 2), Roi(0, 1, 0, 1)])
def test_the_first_that_is_read_of_a_coded_chunk_is_a_region(
    server: Redis, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
    part_bytes: int, roi: Roi,
) -> None:  # fmt: skip
    """Also one that would begin behind all that is there, or in a part that is not."""
    monkeypatch.setattr(RedisBackend, "part_bytes", part_bytes)
    one, two = pair(server, request, LOSSLESS, NONE)
    refs = chunks(one)
    assert contract.put(one, refs) == [PutState.STORED] * 4
    assert contract.read(two, refs, roi) == [REMOTE] * 4
    absent = one.chain(tokens_of(77, 1)).refs()
    assert contract.read(two, absent, roi) == [MISS]


def test_an_engine_that_gives_nothing_past_the_end(server: Redis) -> None:
    """A host without a codec that meets coded chunks."""
    place = str(next(PLACES))
    prefix = f"prefixstore/codecs/{place}"
    with (
        opened(server, LOSSLESS, place) as coded,
        PooledStore(Strict(server.url, beyond_bytes=400), prefix=prefix) as strict,
    ):
        one, two = (store.namespace(identity(), LAYOUT) for store in (coded, strict))
        refs = chunks(one)
        contract.put(one, refs[:2])
        contract.put(two, refs)
        outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in refs]
        assert read_plain(two, refs, outs, LAYOUT.whole, time.monotonic() + 5) == [
            State.LOST, State.LOST, State.GOOD, State.GOOD,
        ]  # fmt: skip
        for roi in (None, Roi(0, 1, 0, 2)):
            assert contract.read(two, refs, roi) == [REMOTE] * 4


@pytest.mark.parametrize("codec", [NONE, LOSSLESS])
@pytest.mark.parametrize("meets_coded", [False, True])
def test_a_part_that_is_lost_for_once_is_a_miss_and_no_damage(
    server: Redis, codec: str, monkeypatch: pytest.MonkeyPatch, meets_coded: bool
) -> None:
    """A node did not answer: what is there stays."""
    monkeypatch.setattr(RedisBackend, "part_bytes", 300)
    place = str(next(PLACES))
    prefix = f"prefixstore/codecs/{place}"
    with (
        opened(server, codec, place) as writer,
        PooledStore(Strict(server.url, beyond_bytes=400), prefix=prefix) as strict,
    ):
        one, two = (store.namespace(identity(), LAYOUT) for store in (writer, strict))
        refs = chunks(one, 2)
        assert contract.put(one, refs) == [PutState.STORED] * 2
        get, two.meets_coded = two.backend.get, meets_coded

        def losing(gets: Sequence[Get], *, deadline_s: float) -> list[int]:
            came = get(gets, deadline_s=deadline_s)
            lost = refs[0].key.hex() + "."  # its parts
            return [
                LOST if lost in one.name else count for one, count in zip(gets, came, strict=True)
            ]

        with monkeypatch.context() as patched:
            patched.setattr(two.backend, "get", losing)
            assert contract.read(two, refs) == [MISS, REMOTE]
        assert contract.read(two, refs) == [REMOTE] * 2


def test_two_that_store_a_chunk_at_once(
    server: Redis, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """One with a codec and one without: neither writes over the other's parts, whoever is first."""
    monkeypatch.setattr(RedisBackend, "part_bytes", 300)
    one, two = pair(server, request, LOSSLESS, NONE)
    refs = chunks(one)
    put = one.backend.put
    interrupted: list[object] = []

    def late(*given: object, **options: object) -> object:
        if not interrupted:  # before the first parts are written, and after they were asked for
            interrupted.append(contract.put(two, refs))
        return put(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(one.backend, "put", late)
    assert contract.put(one, refs) == [PutState.EXISTS] * 4
    assert interrupted == [[PutState.STORED] * 4]
    for ns in (one, two):
        assert contract.read(ns, refs) == [REMOTE] * 4


# ---------------------------------------------------------------------- damage
@pytest.mark.parametrize("roi", [None, Roi(0, 1, 1, 2)], ids=["whole", "region"])
def test_a_flipped_byte_is_a_miss(server: Redis, roi: Roi | None) -> None:
    """Wherever it is in the object: a miss, or, in another's region, nothing that is seen."""
    with opened(server, LOSSLESS) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns, 2)
        contract.put(ns, refs)
        name, data = ns.shape.object_of(refs[1].key), stored(server, ns, refs[1])
        payload = memoryview(content_for(refs[1].key, LAYOUT.payload_bytes))
        head = len(data) - sum(map(len, lossless.encode(ns.form, payload) or []))
        assert head < len(data)
        unseen = 0
        for at in [*range(0, head, 7), *range(head, len(data), 5)]:
            bad = bytearray(data)
            bad[at] ^= 0x10
            assert server.ask("SET", name, bytes(bad)) == "OK"
            tiers = contract.read(ns, refs, roi)
            assert tiers[0] == REMOTE
            if tiers[1] == MISS:
                assert server.ask("EXISTS", name) == 0, at
            else:
                assert roi is not None
                assert at >= head, "what the head says is checked in any case"
                unseen += 1
        assert (unseen > 0) == (roi is not None)
        for size in range(0, len(data), 13):
            assert server.ask("SET", name, data[:size]) == "OK"
            assert contract.read(ns, refs, roi)[0] == REMOTE
            seen = contract.read(ns, refs[1:], roi)
            assert seen == [MISS] or (roi is not None and size > head)
        assert contract.put(ns, refs)[1] in (PutState.STORED, PutState.EXISTS)


def test_a_part_that_was_evicted_is_a_miss(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisBackend, "part_bytes", 300)
    with opened(server, LOSSLESS) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns)
        contract.put(ns, refs)
        part, *_ = contract.part_names(ns, refs[1])
        assert server.ask("DEL", part) == 1
        assert contract.read(ns, refs) == [REMOTE, MISS, REMOTE, REMOTE]
        assert contract.put(ns, refs)[1] is PutState.STORED
        assert contract.read(ns, refs) == [REMOTE] * 4


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_chunk_of_another_codec_is_damage(server: Redis, number: int) -> None:
    """Also of those that pools once had, with a sum that fits."""
    with opened(server, LOSSLESS) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns, 2)
        contract.put(ns, refs)
        data = bytearray(stored(server, ns, refs[0]))
        trailer_bytes = int.from_bytes(data[28:32], "little")
        stop = 32 + trailer_bytes + 12 * LAYOUT.num_pieces
        for told, tiers in ((1, [REMOTE] * 2), (number, [MISS, REMOTE])):
            data[24:28] = told.to_bytes(4, "little")
            data[8:24] = checksum(bytes(data[24:stop]))
            assert server.ask("SET", ns.shape.object_of(refs[0].key), bytes(data)) == "OK"
            assert contract.read(ns, refs) == tiers
        assert ns.match_each(refs) == [MISS, REMOTE]


# ---------------------------------------------------------------------- exact or not
@pytest.mark.parametrize("codec", [NONE, LOSSLESS])
@pytest.mark.parametrize("name", LOSSY_NAMES)
def test_exact_kv_and_what_was_rounded_never_meet(
    server: Redis, name: str, codec: str, tmp_path: Path
) -> None:
    """Not in the pool, nor in the folder in front of it. What an engine has rounded is stored as it
    is given: smaller chunks under another name."""
    server.ask("FLUSHALL")
    smaller = rounded_layout(name, LAYOUT, "float32")
    assert smaller.payload_bytes < LAYOUT.payload_bytes
    marked = identity().with_codec(name)
    with open_store(
        server.url, front=str(tmp_path / "front"), codec=codec,
        memory_bytes="8MiB", disk_bytes=0, memory_dir=str(tmp_path),
    ) as store:  # fmt: skip
        theirs, ours = store.namespace(marked, smaller), store.namespace(identity(), LAYOUT)
        assert (theirs.identity, ours.identity) == (marked, identity())
        assert theirs.name != ours.name
        refs, mine = (contract.chunks(ns, 3) for ns in (theirs, ours))
        assert not {ref.key for ref in refs} & {ref.key for ref in mine}
        assert contract.put(theirs, refs) == [PutState.STORED] * 3
        assert store.flush()
        for asked in (mine, refs):  # with its own keys, and with those of the other
            assert ours.match_each(asked) == [MISS] * 3
            assert contract.read(ours, asked) == [MISS] * 3
        assert contract.put(ours, mine) == [PutState.STORED] * 3
        assert store.flush()
        assert all(contract.read(theirs, refs))
    with open_store(server.url) as far:  # without the folder
        for ns, own, other in ((theirs, refs, mine), (ours, mine, refs)):
            found = far.namespace_of(ns.name)
            assert contract.read(found, own) == [REMOTE] * 3
            assert contract.read(found, other) == [MISS] * 3
        assert far.namespace_of(theirs.name).identity == marked
        assert far.namespace_of(theirs.name).layout == smaller


def test_names_of_codecs() -> None:
    for bad in ("zip", "", 1, None):
        with pytest.raises(ConfigError, match="lossless"):
            open_store("redis://127.0.0.1:1", codec=bad)  # type: ignore[arg-type]
    for name in LOSSY_NAMES:
        with pytest.raises(ConfigError, match=f"{name}.*engines round.*lossless"):
            open_store("redis://127.0.0.1:1", codec=name)
        with pytest.raises(ConfigError, match=f"{name}.*engines round.*lossless"):
            PooledStore(RedisBackend("redis://127.0.0.1:1"), codec=name)
    for url in ("dir:/tmp/nowhere", "http://127.0.0.1:1"):
        with pytest.raises(ConfigError, match="only pools"):
            open_store(url, codec=LOSSLESS)
    for good in POOL_CHOICES:
        open_store("redis://127.0.0.1:1", codec=good).close()
    marked = identity().with_codec(FP8)
    assert marked.with_codec(FP8) == marked
    assert marked.with_codec(INT8).codec == INT8
    assert ModelIdentity.from_json(marked.to_json()).codec == FP8
    assert identity().codec == ""
    assert FP8 in identity().explain_mismatch(marked)
