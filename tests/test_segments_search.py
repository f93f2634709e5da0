"""Finding segments: all that is there, nothing that is not, at any offset, within the bounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from prefixstore import MultimodalItem, Namespace, Store, admin, winnow
from prefixstore.errors import ConfigError, StoreClosedError
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.segment_index import SOURCES_MAX
from prefixstore.segment_text import CHILDREN_MAX
from prefixstore.segments import Segment
from prefixstore.testing_data import content_of, outputs
from tests.segments_truth import check, keep, missed, space_of, words
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    """Without a disk, so that what is put is searched at once."""
    with place.open("16MiB", 0) as opened:
        yield opened


@pytest.fixture
def ns(store: Store) -> Namespace:
    return space_of(store)


def spans(segments: list[Segment]) -> list[tuple[int, int, int]]:
    """(start, tokens, start in the source) of each."""
    return [(one.start, one.num_tokens, one.source_start) for one in segments]


@pytest.mark.parametrize("chunk_tokens", [4, 16, 48, 64, 100, 256])
@pytest.mark.parametrize("seed", range(3))
def test_planted_runs_are_found_exactly(store: Store, chunk_tokens: int, seed: int) -> None:
    """Runs of 64 tokens and more of random texts, at random places, are the result: no more."""
    ns = space_of(store, chunk_tokens)
    rng = random.Random(seed)
    texts = [keep(ns, words(100 * seed + i, 2000)) for i in range(4)]
    prompt: list[int] = []
    planted = []
    for _ in range(12):
        prompt += [-2 - rng.randrange(1000) for _ in range(rng.randint(1, 90))]
        text = rng.choice(texts)
        count = rng.choice([64, 65, rng.randint(64, 300)])
        at = rng.randrange(len(text) - count)
        planted.append((len(prompt), count, at))
        prompt += text[at : at + count]
    found = ns.find_segments(prompt)
    assert spans(found) == planted
    check(ns, prompt, found, texts)
    assert ns.find_segments(np.array(prompt, np.int32)) == found


def test_shorter_runs_are_none(ns: Namespace) -> None:
    text = keep(ns, words(1, 600))
    prompt: list[int] = []
    for at in range(0, 600 - 63, 40):
        prompt += [*text[at : at + 63], -5]
    assert ns.find_segments(prompt) == []


def test_min_tokens_is_the_shortest_given(ns: Namespace) -> None:
    text = keep(ns, words(2, 900))
    prompt = [*text[10:210], -5, *text[300:399], -5, *text[500:600]]
    assert spans(ns.find_segments(prompt)) == [(0, 200, 10), (201, 99, 300), (301, 100, 500)]
    assert spans(ns.find_segments(prompt, min_tokens=100)) == [(0, 200, 10), (301, 100, 500)]
    assert ns.find_segments(prompt, min_tokens=201) == []


def test_nothing_before_start(ns: Namespace) -> None:
    text = keep(ns, words(3, 480))
    assert ns.match(ns.chain(text)).num_tokens == 480
    for start in (0, 1, 16, 100, 416):
        assert spans(ns.find_segments(text, start=start)) == [(start, 480 - start, start)]
    for start in (417, 480, 481, 10_000):
        assert ns.find_segments(text, start=start) == []


def test_what_is_asked_wrongly_is_refused(ns: Namespace) -> None:
    for wrong in (63, 0, -1):
        with pytest.raises(ConfigError, match="64 or more"):
            ns.find_segments([1] * 100, min_tokens=wrong)
    with pytest.raises(ConfigError, match="start=-1"):
        ns.find_segments([1] * 100, start=-1)
    with pytest.raises(ConfigError, match="token ids"):
        ns.find_segments(["a"])  # type: ignore[list-item]


def test_short_prompts_have_none(ns: Namespace) -> None:
    text = keep(ns, words(4, 320))
    for count in (0, 1, 23, 24, 63):
        assert ns.find_segments(text[:count]) == []
    assert spans(ns.find_segments(text[:64])) == [(0, 64, 0)]


def test_a_closed_store_says_so(place: Place) -> None:
    with place.open("4MiB", 0) as opened:
        ns = space_of(opened)
    with pytest.raises(StoreClosedError):
        ns.find_segments([1] * 100)


# --- texts that repeat ---------------------------------------------------------------------------

KINDS = {
    "two tokens": lambda seed: words(seed, 400, 2),
    "phrases": lambda seed: [
        token for number in words(seed, 12, 5) for token in words(number, 20 + number)
    ],
    "sections": lambda seed: [
        token for number in words(seed, 5, 4) for token in words(50 + number, 70 + 9 * number)
    ],
    "padded": lambda seed: [*words(seed, 90), *[7] * (20 + 31 * seed), *words(seed + 50, 90)],
    "short periods": lambda seed: [
        *words(seed, 70),
        *[1, 2, 3, 4, 5, 6, 7, 8, 9][: 1 + seed] * 40,
        *words(seed + 50, 70),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_all_that_a_slow_search_finds(store: Store, kind: str, chunk_tokens: int) -> None:
    """Of texts that repeat, in themselves and each other: no stretch of 64 tokens is left out."""
    ns = space_of(store, chunk_tokens)
    texts = [keep(ns, KINDS[kind](seed)) for seed in range(6)]
    for seed in range(8):
        rng = random.Random(seed)
        prompt: list[int] = []
        for _ in range(5):
            text = rng.choice(texts)
            start = rng.randrange(len(text))
            prompt += text[start : start + rng.randint(50, 300)]
            prompt += words(1000 + seed, rng.choice([0, 0, 3, 40]))
        start = rng.choice([0, 0, rng.randrange(len(prompt))])
        found = ns.find_segments(prompt, start=start)
        check(ns, prompt, found, texts, start)
        assert missed(prompt, found, texts, start) == []


def test_one_token_over_and_over_does_not_explode(store: Store, ns: Namespace) -> None:
    """Neither the index nor the work; and it is found, as far as the source reaches each time."""
    text = keep(ns, [7] * 1008)
    with store.live.read() as txn:
        assert txn.count("segment") == 1
        assert [len(value) // 24 for _, value in txn.scan("segment")] == [1]
    assert spans(ns.find_segments([7] * 500)) == [(0, 500, 0)]
    found = ns.find_segments([7] * 2500)
    check(ns, [7] * 2500, found, [text])
    assert missed([7] * 2500, found, [text]) == []
    assert len(found) == 3
    other = keep(ns, words(5, 320))
    prompt = [*other[100:200], *[7] * 100, *other[200:300], *[8] * 1000]
    assert spans(ns.find_segments(prompt)) == [(0, 100, 100), (100, 100, 0), (200, 100, 200)]


def test_texts_that_are_versions_of_each_other(ns: Namespace) -> None:
    """Sources that seem to be of one text, as far apart as the prompt has them, and are of four."""
    versions = [keep(ns, words(40 + i, 1600)) for i in range(4)]
    prompt: list[int] = []
    for at in range(0, 1600, 100):
        prompt += versions[at // 100 % 4][at : at + 100]
    found = ns.find_segments(prompt)
    assert spans(found) == [(at, 100, at) for at in range(0, 1600, 100)]
    check(ns, prompt, found, versions)


def test_the_work_is_bounded(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of what leads nowhere, for long: the search ends with what it has by then."""
    text = keep(ns, words(6, 12_800))
    near = [token for at in range(0, 12_700, 64) for token in [*text[at : at + 60], -9]]
    prompt = [*text[1000:2000], -9, *near]
    rows = 0
    lookup = ns.store.live.lookup

    @contextmanager
    def counted(table: str) -> Iterator[Callable[[bytes], bytes | None]]:
        with lookup(table) as get:

            def one(key: bytes) -> bytes | None:
                nonlocal rows
                rows += table == "chunk"
                return get(key)

            yield one

    monkeypatch.setattr(ns.store.live, "lookup", counted)
    used = {}
    for limit in (4096, -1000, -1500):
        monkeypatch.setattr("prefixstore.segments.ROWS_MAX", limit)
        rows = 0
        found = ns.find_segments(prompt)
        check(ns, prompt, found, [text])
        used[limit] = rows
    slack, allowed = SOURCES_MAX * (CHILDREN_MAX + 2), 2 * (len(prompt) // 16)  # slack: one place
    assert used[4096] > allowed - 1000 + slack, "the limit is never reached here"
    for limit in (-1000, -1500):
        assert used[limit] <= allowed + limit + slack


# --- whose it is ---------------------------------------------------------------------------------


def test_other_salts_and_namespaces_find_nothing(store: Store) -> None:
    ns, other = space_of(store), space_of(store, label="b")
    text = words(7, 320)
    keep(ns, text, salt=b"alice")
    assert spans(ns.find_segments(text[5:], salt=b"alice")) == [(0, 315, 5)]
    for salt in (b"", b"bob"):
        assert ns.find_segments(text[5:], salt=salt) == []
    for salt in (b"", b"alice"):
        assert other.find_segments(text[5:], salt=salt) == []
    keep(ns, text, salt=b"bob")
    [found] = ns.find_segments(text[5:], salt=b"bob")
    assert found.refs == tuple(ns.chain(text, salt=b"bob").refs())


def test_a_fingerprint_is_not_believed(store: Store, ns: Namespace) -> None:
    """Each fingerprint made to point to chunks of another text, of another salt, and to nothing."""
    text = keep(ns, words(8, 320))
    keep(ns, words(9, 320), salt=b"bob")
    chunks = [ref.key for salt, seed in ((b"", 10), (b"bob", 9))
              for ref in ns.chain(words(seed, 320), salt=salt).refs()]  # fmt: skip
    keep(ns, words(10, 320))
    with store.live.read() as txn:
        names = [name for name, _ in txn.scan("segment")]
    rng = random.Random(0)

    def forge(txn: Txn) -> None:
        for name in names:
            places = [(rng.randrange(2**32), rng.choice([0, 7, 15, 16, 2**32 - 1]), key)
                      for key in [*rng.sample(chunks, 3), b"nothing has this"]]  # fmt: skip
            value = b"".join(
                rank.to_bytes(4, "big") + offset.to_bytes(4, "big") + key
                for rank, offset, key in places
            )
            txn.put("segment", name, value + b"cut")

    assert spans(ns.find_segments(text[3:])) == [(0, 317, 3)]
    store.live.write(forge)
    for prompt in (text[3:], words(9, 320), words(10, 320)):
        check(ns, prompt, ns.find_segments(prompt), [text, words(10, 320)])


@pytest.mark.parametrize(("label", "salt"), [("a", b"bob"), ("b", b"")])
def test_a_source_of_another_salt_is_refused(store: Store, label: str, salt: bytes) -> None:
    """Right in all but whose it is: the fingerprints of one salt and namespace made to point to
    the very places of the same text under another."""
    text = words(31, 320)
    ns, asking = space_of(store, label=label), space_of(store)
    keep(ns, text, salt=salt)
    keys = ns.chain(text, salt=salt).keys
    seed = winnow.seed_of(asking.identity.namespace + bytes(8))
    places, hashes = winnow.fingerprints(np.array(text, np.int32), seed)

    def forge(txn: Txn) -> None:
        for gram, name in zip(places.tolist(), hashes.tolist(), strict=True):
            chunk, offset = divmod(gram + winnow.GRAM_TOKENS - 1, 16)
            value = chunk.to_bytes(4, "big") + offset.to_bytes(4, "big") + keys[chunk]
            txn.put("segment", name.to_bytes(8, "big"), value)

    store.live.write(forge)
    assert asking.find_segments(text) == []
    assert spans(ns.find_segments(text, salt=salt)) == [(0, 320, 0)]


def test_no_run_goes_through_an_image(ns: Namespace) -> None:
    """Neither in a stored text nor in the prompt: the KV depends on more than the tokens."""
    text = [*words(11, 160), *[5] * 160, *words(12, 160)]
    image = MultimodalItem(150, 175, b"digest of an image")
    refs = ns.chain(text, items=[image]).refs()
    ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
    prompt = [-3, *text]
    parts = [(1, 144, 0), (337, 144, 336)]
    assert spans(ns.find_segments(prompt)) == parts
    moved = MultimodalItem(151, 175, b"another")
    assert spans(ns.find_segments(prompt, items=[moved])) == parts
    keep(ns, text, salt=b"words only")
    for start, count in ((0, 150), (40, 111)):
        found = ns.find_segments(prompt, b"words only", start, items=[moved])
        assert spans(found) == [(151 - count, count, 150 - count), (326, 155, 325)]
    assert spans(ns.find_segments(prompt, b"words only", 100, items=[moved])) == [(326, 155, 325)]
    assert spans(ns.find_segments(prompt, b"words only", 400, items=[moved])) == [(400, 81, 399)]
    assert spans(ns.find_segments(prompt, b"words only")) == [(1, 480, 0)]


# --- what is found can be read -------------------------------------------------------------------


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_the_pieces_are_read_and_leased(place: Place, tier: int) -> None:
    with place.open("4MiB", "16MiB") as opened:
        ns = space_of(opened)
        text = keep(ns, words(13, 480))
        if tier == DISK:
            admin.empty_memory(opened)
        [found] = ns.find_segments(text[21:455])
        assert found.tiers == (tier,) * len(found.refs)
        assert (found.start, found.stop, found.source_start, found.alone) == (0, 434, 21, False)
        lease, held = ns.lease(found.refs, found.tiers)
        assert held == len(found.refs) == 28
        outs = outputs(ns.layout, held)
        assert MISS not in ns.get(found.refs, outs)
        for ref, out in zip(found.refs, outs, strict=True):
            assert out == content_of(ref.key, ns.layout.payload_bytes)
        ns.release(lease)
        assert [piece.offset for piece in found.pieces] == [5] + [0] * 27
        assert found.pieces[-1].num_tokens == 455 % 16


def test_the_fastest_tier_that_has_each_chunk(place: Place) -> None:
    """Of a text that the memory tier holds in part."""
    with place.open("1MiB", "16MiB") as opened:
        ns = space_of(opened)
        text = keep(ns, words(30, 16 * 300))
        tiers = ns.match(ns.chain(text)).tiers
        assert set(tiers) == {MEMORY, DISK}
        [found] = ns.find_segments(text)
        assert found.tiers == tiers


def test_a_text_that_branches_is_followed_into_the_right_branch(ns: Namespace) -> None:
    """Into children that begin alike, from the shared chunk on, to where each ends."""
    trunk = words(14, 160)
    shared = words(15, 9)
    texts = [keep(ns, [*trunk, *shared[: i % 9 + 1], *words(20 + i, 100)]) for i in range(20)]
    for text in texts:
        prompt = [-1, *text[60:250], -1]
        assert spans(ns.find_segments(prompt)) == [(1, 190, 60)]
    prompt = [*trunk[60:], *shared[:5], -1]
    assert spans(ns.find_segments(prompt)) == [(0, 105, 60)]


def test_what_is_put_is_searched_once_it_is_on_disk(place: Place) -> None:
    with place.open("4MiB", "16MiB") as opened:
        ns = space_of(opened)
        text = keep(ns, words(16, 160))
        with opened.live.read() as txn:
            assert txn.count("segment") == txn.count("indexed") == txn.count("child") == 0
        assert spans(ns.find_segments(text)) == [(0, 160, 0)]
