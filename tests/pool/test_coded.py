"""The head of a coded chunk: the golden vector of docs/format.md, heads that are none or hostile;
and whether a codec pays."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash

from prefixstore.codec import AUTO, LOSSLESS, NONE, lossless
from prefixstore.errors import RemoteError
from prefixstore.found import REMOTE
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem
from prefixstore.layout import Layout, checksum
from prefixstore.pool import choosing
from prefixstore.pool.backend import Get
from prefixstore.pool.choosing import Figures, judge, measure
from prefixstore.pool.coded import MAGIC, Head, head_bytes, make_head, read_head
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.objects import Shape, make_trailer
from prefixstore.pool.reading import read_heads
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import Labels, PutState
from prefixstore.testing_data import tokens_of
from tests.pool.servers import redis
from tests.pool.test_codecs import identity

FORMAT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
LAYOUT = Layout(2, 2, 2, 4, 8)
NAMESPACE = bytes(range(16))
SHAPE = Shape.of(NAMESPACE, LAYOUT, 4 << 20)
PIECES = [bytes([number]) * (number + 1) for number in range(8)]


@pytest.fixture
def ref(monkeypatch: pytest.MonkeyPatch) -> ChunkRef:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    items = [MultimodalItem(2, 4, bytes(range(8)))]
    return KeyChain(NAMESPACE, 4, range(1, 9), items=items).refs()[0]


def head_of(ref: ChunkRef) -> bytes:
    return make_head(make_trailer(SHAPE, ref, NAMESPACE, bytes(range(256)), Labels()), PIECES)


def test_golden_vector(ref: ChunkRef) -> None:
    data = head_of(ref)
    digest = xxhash.xxh3_128_hexdigest(data)
    assert f"its head has {len(data)} bytes and the xxh3_128\n`{digest}`" in FORMAT
    assert len(data) <= head_bytes(SHAPE, ref)
    head = read_head(memoryview(data + b"more"), SHAPE, NAMESPACE, ref)
    assert head is not None
    assert head.starts.tolist() == [0, 1, 3, 6, 10, 15, 21, 28, 36]
    assert (head.shape.stream_bytes, head.shape.head_bytes) == (36, len(data))
    assert head.runs([0, 1, 4, 6, 7]) == [(0, 3), (10, 5), (21, 15)]
    stream = memoryview(b"".join(PIECES))
    found = head.pieces([1, 2], stream[1:6])
    assert found is not None
    assert [bytes(piece) for piece in found] == PIECES[1:3]
    assert head.pieces([1, 2], stream[2:7]) is None
    assert head.trailer.row.preimage == ref.preimage


def test_no_other_bytes_are_a_head(ref: ChunkRef) -> None:
    """Each bit flipped, each length, another chunk or namespace; a codec that is not ours."""
    data = head_of(ref)
    for at in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[at // 8] ^= 1 << at % 8
        assert read_head(memoryview(wrong), SHAPE, NAMESPACE, ref) is None, at
    for size in range(len(data)):
        assert read_head(memoryview(data[:size]), SHAPE, NAMESPACE, ref) is None
    other = KeyChain(NAMESPACE, 4, range(2, 10)).refs()[0]
    assert read_head(memoryview(data), SHAPE, NAMESPACE, other) is None
    assert read_head(memoryview(data), SHAPE, bytes(16), ref) is None
    for number in (0, 2, 3):  # 2 and 3 were codecs once
        other_codec = bytearray(data)
        struct.pack_into("<I", other_codec, 24, number)
        other_codec[8:24] = checksum(bytes(other_codec[24:]))
        assert read_head(memoryview(other_codec), SHAPE, NAMESPACE, ref) is None


@pytest.mark.parametrize("size", [0, 33, 1 << 20, 2**32 - 1])
def test_sums_that_fit_do_not_make_sizes_right(ref: ChunkRef, size: int) -> None:
    """Who writes a head can make its sum; a piece that is longer than it was is none."""
    data = head_of(ref)
    trailer_bytes = struct.unpack_from("<I", data, 28)[0]
    bad = bytearray(data)
    struct.pack_into("<I", bad, 32 + trailer_bytes + 4 * 3, size)
    bad[8:24] = checksum(bytes(bad[24:]))
    assert read_head(memoryview(bad), SHAPE, NAMESPACE, ref) is None
    struct.pack_into("<I", bad, 28, 2**32 - 1)  # a trailer longer than all there is
    bad[8:24] = checksum(bytes(bad[24:]))
    assert read_head(memoryview(bad), SHAPE, NAMESPACE, ref) is None
    assert bytes(bad[:8]) == MAGIC


# ---------------------------------------------------------------------- does it pay
@pytest.mark.parametrize(
    ("get_s", "ratio", "decode_s", "round_trip_s", "pays"),
    [
        (0.100, 0.7, 0.010, 0.001, True),  # 100 ms become 81
        (0.100, 0.7, 0.030, 0.001, False),  # and 101
        (0.100, 0.7, 0.024, 0.001, False),  # and 95.1, for which it is not worth while
        (0.100, 0.7, 0.023, 0.001, True),  # and 94.1
        (0.004, 0.7, 0.010, 0.001, False),  # a fast network
        (0.100, 1.0, 0.000, 0.000, False),  # nothing gets smaller
        (0.100, 0.9, 0.001, 0.020, False),  # a round trip costs more than it saves
        (0.100, 0.5, 0.001, 0.020, True),
    ],
)
def test_judge(
    get_s: float, ratio: float, decode_s: float, round_trip_s: float, pays: bool
) -> None:
    figures = Figures(10**6, int(ratio * 10**6), get_s, round_trip_s, 0.5, decode_s)
    verdict = judge(figures)
    assert verdict.pays is pays
    if ratio == 1.0:
        assert "nothing gets smaller" in verdict.why
        return
    for told in (f"{1000 * get_s:.1f} ms", f"{ratio:.2f} of the bytes", "0.95 MiB"):
        assert told in verdict.why


LARGE = Layout(4, 2, 4, 64, 64 * 4)  # 512 KiB


class Slow(RedisBackend):
    """With a network of some bytes a second, and none that fails unless it is asked to."""

    bytes_s = float("inf")
    is_away = False

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        if self.is_away:
            raise RemoteError("away")
        came = super().get(gets, deadline_s=deadline_s)
        time.sleep(sum(count for count in came if count > 0) / self.bytes_s)
        return came


@pytest.fixture
def ns() -> Iterator[PooledNamespace]:
    with redis() as server, PooledStore(Slow(server.url), codec=AUTO) as store:
        yield store.namespace(identity(), LARGE)


def put(ns: PooledNamespace, seed: int, count: int = 1) -> list[bool]:
    """Store chunks of normal numbers, rounded like bfloat16; which of them are coded. What comes
    back is compared."""
    values = np.random.default_rng(seed).standard_normal(LARGE.payload_bytes // 4, np.float32)
    payload = (values.view(np.uint32) & 0xFFFF0000).tobytes()
    refs = ns.chain(tokens_of(seed, count, LARGE)).refs()
    assert ns.put(refs, [payload] * count) == [PutState.STORED] * count
    outs = [memoryview(bytearray(LARGE.payload_bytes)) for _ in refs]
    assert ns.get(refs, outs) == [REMOTE] * count
    assert outs == [payload] * count
    heads = read_heads(ns, refs, time.monotonic() + 5)
    return [isinstance(head, Head) for head in heads]


def test_auto_on_a_slow_network(ns: PooledNamespace) -> None:
    """The first is stored as it is, and measured; from then on they are coded, until it is time to
    measure again."""
    assert isinstance(ns.backend, Slow)
    ns.backend.bytes_s = 2e6
    assert not ns.choice.encodes
    assert put(ns, 1) == [False]
    verdict = ns.choice.verdict
    assert verdict is not None
    assert verdict.pays, verdict.why
    assert put(ns, 2, 2) == [True, True]
    ns.choice._until = 0.0
    assert put(ns, 3) == [False]
    assert ns.choice.verdict is not verdict


def test_figures_are_what_was_measured(ns: PooledNamespace) -> None:
    """By the sizes and the network's known speed."""
    assert isinstance(ns.backend, Slow)
    values = np.random.default_rng(1).standard_normal(LARGE.payload_bytes // 4, np.float32)
    payload = memoryview(values.tobytes())
    refs = ns.chain(tokens_of(1, 3, LARGE)).refs()
    ns.choice._until = float("inf")  # not by itself
    ns.put(refs, [payload] * 3)
    ns.backend.bytes_s = 4e6
    figures = measure(ns, refs, [payload] * 3)
    assert figures is not None
    assert figures.plain_bytes == 3 * LARGE.payload_bytes
    pieces = lossless.encode(ns.form, payload)
    assert pieces is not None
    assert figures.coded_bytes == 3 * sum(map(len, pieces))
    assert figures.get_s > figures.plain_bytes / 4e6
    assert min(figures.encode_s, figures.decode_s, figures.round_trip_s) > 0
    ns.delete(refs)
    assert measure(ns, refs, [payload] * 3) is None


def test_auto_that_does_not_pay(ns: PooledNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def found(ns: object, refs: Sequence[ChunkRef], payloads: object) -> Figures:
        asked.append(len(refs))
        return Figures(100, 70, 0.001, 0.0, 0.1, 0.1)

    monkeypatch.setattr(choosing, "measure", found)
    assert put(ns, 1, 2) == [False] * 2
    assert put(ns, 2) == [False]
    assert asked == [2]
    assert ns.choice.verdict is not None
    assert not ns.choice.verdict.pays


def test_a_measurement_that_fails_is_tried_again_later(
    ns: PooledNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the put is none the worse."""
    assert isinstance(ns.backend, Slow)
    refs = ns.chain(tokens_of(7, 1, LARGE)).refs()
    ns.backend.is_away = True
    before = time.monotonic()
    assert ns.put(refs, [bytes(LARGE.payload_bytes)]) == [PutState.STORED]
    ns.backend.is_away = False
    assert ns.choice.verdict is None
    assert before < ns.choice._until - choosing.RETRY_S + 5 < time.monotonic() + 5
    assert put(ns, 1) == [False]
    assert ns.choice.verdict is None
    ns.choice._until = 0.0
    put(ns, 2)
    assert ns.choice.verdict is not None


def test_other_choices_measure_nothing(ns: PooledNamespace) -> None:
    for codec in (NONE, LOSSLESS):
        ns.choice = choosing.Choice(codec)
        assert put(ns, 10 + len(codec)) == [codec == LOSSLESS]
        assert ns.choice.verdict is None
