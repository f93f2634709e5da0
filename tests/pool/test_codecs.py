"""Pools with codecs, over a real Redis: the contract with each, chunks of hosts with and without,
damage, and that exact KV and what was rounded never meet."""

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
from prefixstore.codec import CHOICES, FP8, INT8, LOSSLESS, LOSSY_NAMES, NONE
from prefixstore.codec.registry import BY_NAME
from prefixstore.errors import ConfigError
from prefixstore.found import REMOTE
from prefixstore.identity import ModelIdentity
from prefixstore.interface import open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
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
from tests.pool.contract import PoolContract, PoolSegments
from tests.pool.servers import Redis, redis

CODECS = (LOSSLESS, FP8, INT8)
LAYOUT = CONTRACT_LAYOUT
PLACES = iter(range(1_000_000))


def identity(label: str = "a") -> ModelIdentity:
    """With KV in float32, which all codecs take."""
    return replace(testing_data.identity_for(label), kv_dtype="float32", head_size=32)


def content_for(codec: str, key: bytes, num_bytes: int) -> bytes:
    """What a codec makes smaller, and a lossy one gives back as it was: whole numbers, among them
    what makes all scales 1 (the largest of fp8 in each token; 0 and 255 in each channel of K and in
    each token of V)."""
    rng = np.random.default_rng(list(key))
    shape = (num_bytes // LAYOUT.piece_bytes // 4, 2, 2, LAYOUT.chunk_tokens, 32)
    values = rng.integers(0, 8, shape).astype(np.float32)
    if codec == INT8:
        values[:, 0, :, 0], values[:, 0, :, 1] = 0, 255
        values[:, 1, :, :, 0], values[:, 1, :, :, 1] = 0, 255
    else:
        values[..., 0] = 448
    return values.tobytes()


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A codec, and chunks for it in all helpers of the contracts."""
    name = str(request.param)
    content = partial(content_for, name)
    for module in ("testing", "segment_testing", "testing_data"):
        monkeypatch.setattr(sys.modules[f"prefixstore.{module}"], "content_of", content)
    monkeypatch.setattr(contract, "content_of", content)
    return name


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
    def namespace(self, server: Redis, codec: str) -> Iterator[NamespaceFactory]:
        with opened(server, codec) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


class TestContractInParts(PoolContract):
    """With chunks whose coded pieces are in several objects."""

    @pytest.fixture
    def namespace(
        self, server: Redis, codec: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[NamespaceFactory]:
        monkeypatch.setattr(RedisBackend, "part_bytes", 300)
        with opened(server, codec) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


class TestSegments(PoolSegments):
    @pytest.fixture
    def namespace(self, server: Redis, codec: str) -> Iterator[NamespaceFactory]:
        with opened(server, codec) as store:
            yield lambda label: store.namespace(identity(label), LAYOUT)


def test_what_is_stored_is_coded(server: Redis, codec: str) -> None:
    """Or the contracts above would show nothing."""
    with opened(server, codec) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns)
        assert contract.put(ns, refs) == [PutState.STORED] * 4
        for ref in refs:
            data = stored(server, ns, ref)
            assert data[:8] == MAGIC
            assert int.from_bytes(data[24:28], "little") == BY_NAME[codec].number
            assert len(data) < LAYOUT.payload_bytes
        assert contract.read(ns, refs) == [REMOTE] * 4


# ---------------------------------------------------------------------- mixed
@pytest.mark.parametrize("first", [NONE, LOSSLESS])
@pytest.mark.parametrize("part_bytes", [300, 4 << 20])
@pytest.mark.parametrize("codec", [LOSSLESS], indirect=True)
def test_hosts_with_a_codec_and_without_read_each_other(
    server: Redis,
    codec: str,
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


@pytest.mark.parametrize("codec", [LOSSLESS], indirect=True)
@pytest.mark.parametrize("part_bytes", [300, 1 << 20])
@pytest.mark.parametrize("roi", [Roi(1, 2, 1, 2), Roi(0, 1, 0, 1)])
def test_the_first_that_is_read_of_a_coded_chunk_is_a_region(
    server: Redis, codec: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
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


class Strict(RedisBackend):
    """As Mooncake: nothing comes of an object of which more is asked for than is there, but for
    some bytes."""

    reads_short = False

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        came = super().get(gets, deadline_s=deadline_s)
        asked = [sum(out.nbytes for _, out in one.cuts) for one in gets]
        ends = [one.cuts[-1][0] + one.cuts[-1][1].nbytes for one in gets]
        sizes = [
            super(Strict, self).get(
                [Get(one.name, [(0, memoryview(bytearray(end)))])], deadline_s=deadline_s
            )[0]
            for one, end in zip(gets, ends, strict=True)
        ]
        return [
            LOST if 0 <= count < wanted and end - size > 400 else count
            for count, wanted, end, size in zip(came, asked, ends, sizes, strict=True)
        ]


@pytest.mark.parametrize("codec", [LOSSLESS], indirect=True)
def test_an_engine_that_gives_nothing_past_the_end(server: Redis, codec: str) -> None:
    """A host without a codec that meets coded chunks."""
    place = str(next(PLACES))
    prefix = f"prefixstore/codecs/{place}"
    with (
        opened(server, LOSSLESS, place) as coded,
        PooledStore(Strict(server.url), prefix=prefix) as strict,
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


@pytest.mark.parametrize("codec", [NONE, LOSSLESS], indirect=True)
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
        PooledStore(Strict(server.url), prefix=prefix) as strict,
    ):
        one, two = (store.namespace(identity(), LAYOUT) for store in (writer, strict))
        refs = chunks(one, 2)
        assert contract.put(one, refs) == [PutState.STORED] * 2
        get, two.meets_coded = two.backend.get, meets_coded

        def lossy(gets: Sequence[Get], *, deadline_s: float) -> list[int]:
            came = get(gets, deadline_s=deadline_s)
            lost = refs[0].key.hex() + "."  # its parts
            return [
                LOST if lost in one.name else count for one, count in zip(gets, came, strict=True)
            ]

        with monkeypatch.context() as patched:
            patched.setattr(two.backend, "get", lossy)
            assert contract.read(two, refs) == [MISS, REMOTE]
        assert contract.read(two, refs) == [REMOTE] * 2


@pytest.mark.parametrize("codec", [LOSSLESS], indirect=True)
def test_two_that_store_a_chunk_at_once(
    server: Redis, codec: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
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
def test_a_flipped_byte_is_a_miss(server: Redis, codec: str, roi: Roi | None) -> None:
    """Wherever it is in the object: a miss, or, in another's region, nothing that is seen."""
    with opened(server, codec) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns, 2)
        contract.put(ns, refs)
        name, data = ns.shape.object_of(refs[1].key), stored(server, ns, refs[1])
        head = len(data) - sum(
            len(piece) for piece in made(ns, content_for(codec, refs[1].key, LAYOUT.payload_bytes))
        )
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


def made(ns: PooledNamespace, payload: bytes) -> list[bytes]:
    found = ns.codecs.encode(memoryview(payload))
    assert found is not None
    return [bytes(piece) for piece in found[1]]


def test_a_part_that_was_evicted_is_a_miss(
    server: Redis, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisBackend, "part_bytes", 300)
    with opened(server, codec) as store:
        ns = store.namespace(identity(), LAYOUT)
        refs = chunks(ns)
        contract.put(ns, refs)
        part = ns.shape.coded(1000, 1).part_of(refs[1].key, 0)
        assert server.ask("DEL", part) == 1
        assert contract.read(ns, refs) == [REMOTE, MISS, REMOTE, REMOTE]
        assert contract.put(ns, refs)[1] is PutState.STORED
        assert contract.read(ns, refs) == [REMOTE] * 4


# ---------------------------------------------------------------------- exact or not
@pytest.mark.parametrize("name", LOSSY_NAMES)
def test_exact_kv_and_what_was_rounded_never_meet(server: Redis, name: str, tmp_path: Path) -> None:
    """Not in the pool, nor in the same folder in front of it; and the folder has what the pool
    gives under the lossy name only."""
    server.ask("FLUSHALL")
    rng = np.random.default_rng(5)
    options = {"memory_bytes": "8MiB", "disk_bytes": 0, "memory_dir": str(tmp_path)}

    def host(codec: str, front: str) -> object:
        return open_store(server.url, front=front and str(tmp_path / front), codec=codec,
                          **(options if front else {}))  # type: ignore[arg-type]  # fmt: skip

    with host(name, "lossy") as lossy, host(NONE, "exact") as exact:  # type: ignore[attr-defined]
        theirs, ours = (one.namespace(identity(), LAYOUT) for one in (lossy, exact))
        assert theirs.name != ours.name
        assert theirs.identity.codec == name
        assert ours.identity == identity()
        refs = theirs.chain(tokens_of(1, 3)).refs()
        mine = ours.chain(tokens_of(1, 3)).refs()
        payload = rng.standard_normal(LAYOUT.payload_bytes // 4).astype("<f4").tobytes()
        assert theirs.put(refs, [payload] * 3) == [PutState.STORED] * 3
        assert lossy.flush()
        assert theirs.match(refs).num_chunks == 3
        assert not {ref.key for ref in refs} & {ref.key for ref in mine}
        for asked in (mine, refs):  # with its own keys, and with those of the other
            assert ours.match_each(asked) == [MISS] * 3
            outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in asked]
            assert ours.get(asked, outs) == [MISS] * 3
        assert theirs.match(refs).num_chunks == 3  # and what the other asked for is still there
    # The same folder, opened for exact KV, has the chunks of the lossy namespace, and no other.
    with host(NONE, "lossy") as exact:  # type: ignore[attr-defined]
        assert exact.namespace(identity(), LAYOUT).match_each(mine) == [MISS] * 3
    # Without a folder: what comes back was rounded; by the name alone it is found as what it is.
    with host(NONE, "") as exact:  # type: ignore[attr-defined]
        ns = exact.namespace_of(theirs.name)
        outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in refs]
        assert ns.get(refs, outs) == [REMOTE] * 3
        assert outs[0] != payload
        found, wanted = np.frombuffer(outs[0], "<f4"), np.frombuffer(payload, "<f4")
        assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
        assert exact.namespace(identity(), LAYOUT).match_each(mine) == [MISS] * 3


def test_a_lossy_chunk_under_an_exact_name_is_damage(
    server: Redis, request: pytest.FixtureRequest
) -> None:
    """Whatever brought it there."""
    one, two = pair(server, request, LOSSLESS, LOSSLESS)
    one.codecs = replace(one.codecs, lossy=BY_NAME[FP8])
    refs = chunks(one, 2)
    payloads = [content_for(FP8, ref.key, LAYOUT.payload_bytes) for ref in refs]
    assert one.put(refs, payloads) == [PutState.STORED] * 2
    outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in refs]
    assert one.get(refs, outs) == [REMOTE] * 2
    assert two.get(refs, outs) == [MISS] * 2
    assert two.match_each(refs) == [MISS] * 2


@pytest.mark.parametrize("name", LOSSY_NAMES)
def test_what_a_lossy_codec_cannot_take_is_kept_exactly(server: Redis, name: str) -> None:
    """NaN; KV of 8 bits; a layout that is not of attention alone."""
    with opened(server, name) as store:
        ns = store.namespace(identity(), LAYOUT)
        values = np.zeros(LAYOUT.payload_bytes // 4, "<f4")
        values[7] = np.nan
        check_exact(ns, values.tobytes())
        eight = replace(identity("b"), kv_dtype="fp8", head_size=128)
        check_exact(store.namespace(eight, LAYOUT), bytes(range(128)) * 32)
        states = replace(LAYOUT, num_planes=1, num_layers=4)
        check_exact(store.namespace(identity("c"), states), bytes(range(128)) * 32)


def check_exact(ns: PooledNamespace, payload: bytes) -> None:
    refs = chunks(ns, 1)
    assert ns.put(refs, [payload]) == [PutState.STORED]
    out = memoryview(bytearray(len(payload)))
    assert ns.get(refs, [out]) == [REMOTE]
    assert out == payload


def test_names_of_codecs() -> None:
    for bad in ("zip", "", 1, None):
        with pytest.raises(ConfigError, match="lossless"):
            open_store("redis://127.0.0.1:1", codec=bad)  # type: ignore[arg-type]
    for url in ("dir:/tmp/nowhere", "http://127.0.0.1:1"):
        with pytest.raises(ConfigError, match="only pools"):
            open_store(url, codec=LOSSLESS)
    for good in CHOICES:
        open_store("redis://127.0.0.1:1", codec=good).close()
    marked = identity().with_codec(FP8)
    assert marked.with_codec(INT8) == marked
    assert ModelIdentity.from_json(marked.to_json()).codec == FP8
    assert identity().codec == ""
    assert "prefixstore_codec" in identity().explain_mismatch(marked)
