"""Hashes that collide, by craft or because all but a few bits were taken away: a miss at worst,
never another's KV.

What each hash is trusted with: BLAKE2b that nobody finds two preimages (keys); xxh3 that damage by
chance does not pass, and no more: who can choose a payload, or write to the store's folder, can
make collisions. Fingerprints of texts are trusted with nothing.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from prefixstore import Layout, Namespace, layout, wire
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.slots import SlotFile
from prefixstore.testing_data import outputs, tokens_of
from prefixstore.winnow import GRAM_TOKENS, fingerprints, gram_hashes, seed_of
from tests.store_helpers import LAYOUT, Place, namespace_in

pytest_plugins = ["tests.store_fixtures"]

# Two texts of 16 bytes with one xxh3_64: for 9 to 16 bytes it multiplies the two ends, less a
# constant; with 1 on the one side what is on the other is doubled, and loses its highest bit.
TWINS = (
    bytes.fromhex("b83942ea7b7382673f5296093bbc56af"),
    bytes.fromhex("b83942ea7b7382673f5296093bbc562f"),
)
# Added to eight tokens in a row it changes no hash of a gram around them: the sum of DRIFT[j] *
# BASE**j is 0 modulo 2**64. Found by lattice reduction, in less than a second.
DRIFT = (-97, 23, 0, 158, 63, -16, -73, -142)
SMALL = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=1, head_bytes=16)


class FewBits:
    """BLAKE2b of which one byte is left, repeated."""

    bits = 5

    def __init__(self, data: bytes, digest_size: int = 64, person: bytes = b"") -> None:
        real = hashlib.blake2b(data, digest_size=1, person=person).digest()
        self._byte, self._size = bytes([real[0] % (1 << self.bits)]), digest_size

    def digest(self) -> bytes:
        return self._byte * self._size


def kv_of(ref: ChunkRef, size: int) -> bytes:
    """KV that depends on all that the chunk is of, whatever its key."""
    return hashlib.shake_128(b"kv" + ref.preimage).digest(size)


def put(ns: Namespace, refs: list[ChunkRef]) -> None:
    ns.put(refs, [kv_of(ref, ns.layout.payload_bytes) for ref in refs])


def served(ns: Namespace, refs: list[ChunkRef], roi: Roi | None = None) -> int:
    """How many leading chunks are served; each must be its own."""
    count = ns.match(refs).num_chunks
    outs = outputs(ns.layout, len(refs), roi)
    tiers = ns.get(refs, outs, roi)
    for ref, tier, out in list(zip(refs, tiers, outs, strict=True))[:count]:
        whole = kv_of(ref, ns.layout.payload_bytes)
        assert tier == MISS or roi is not None or out == whole, "another's KV"
    assert MISS not in tiers[:count], "found, and then not given"
    return count


@pytest.mark.parametrize("disk_bytes", [0, "4MiB"])
def test_keys_that_collide_are_misses(
    place: Place, monkeypatch: pytest.MonkeyPatch, disk_bytes: int | str
) -> None:
    """300 prompts, 32 keys: who comes second is not stored, and is never given the first's KV."""
    monkeypatch.setattr("prefixstore.keys.blake2b", FewBits)
    with place.open("8MiB", disk_bytes) as store:
        ns = namespace_in(store)
        prompts = [ns.chain(tokens_of(n, 3, LAYOUT)).refs() for n in range(300)]
        assert len({refs[0].key for refs in prompts}) <= 1 << FewBits.bits
        for refs in prompts:
            put(ns, refs)
        store.flush()
        first = [served(ns, refs[:1]) for refs in prompts]
        assert 0 < sum(first) <= 1 << FewBits.bits
        assert all(ns.get(refs[:1], outputs(LAYOUT, 1)) == [MISS] for refs, hit
                   in zip(prompts, first, strict=True) if not hit)  # fmt: skip


def test_a_salt_of_another_whose_short_name_collides_shares_nothing_exact(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows name a salt by eight bytes; keys hold all of it."""
    monkeypatch.setattr("prefixstore.keys.salt_digest", lambda salt: bytes(8))
    with place.open() as store:
        ns = namespace_in(store)
        tokens = tokens_of(1, 4, LAYOUT)
        put(ns, ns.chain(tokens, b"alice").refs())
        assert served(ns, ns.chain(tokens, b"alice").refs()) == 4
        assert served(ns, ns.chain(tokens, b"bob").refs()) == 0


# ---------------------------------------------------------------------- checksums
def test_the_crafted_pieces_do_collide() -> None:
    one, other = TWINS
    assert one != other
    assert xxhash.xxh3_64_intdigest(one) == xxhash.xxh3_64_intdigest(other)
    assert xxhash.xxh3_128_digest(one) != xxhash.xxh3_128_digest(other)


@pytest.mark.parametrize("weak", [False, True])
def test_chunks_with_one_checksum_stay_apart(
    place: Place, monkeypatch: pytest.MonkeyPatch, weak: bool
) -> None:
    """Nothing is found by its checksum: neither crafted pieces, nor (weak) one sum for all."""
    if weak:
        monkeypatch.setattr("prefixstore.layout.xxhash.xxh3_64_intdigest", lambda data: 7)
        monkeypatch.setattr("prefixstore.layout.xxhash.xxh3_128_digest", lambda data: b"s" * 16)
    with place.open() as store:
        ns = namespace_in(store, layout=SMALL)
        refs = [ns.chain(tokens_of(n, 1, SMALL)).refs()[0] for n in range(2)]
        data = [twin * SMALL.num_pieces for twin in TWINS]
        ns.put(refs, data)
        store.flush()
        for roi in (None, Roi(0, 1, 0, 2)):
            outs = outputs(SMALL, 2, roi)
            assert MISS not in ns.get(refs, outs, roi)
            assert [bytes(out) for out in outs] == [whole[: len(outs[0])] for whole in data]


def test_a_slot_that_was_swapped_is_a_miss_though_its_checksums_collide(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trailer has the key in it, by itself and not only in a sum: as good as no checksums."""
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store, layout=SMALL)
        refs = [ns.chain(tokens_of(n, 1, SMALL)).refs()[0] for n in range(2)]
        ns.put(refs, [twin * SMALL.num_pieces for twin in TWINS])
        [path] = Path(store.live_dir).glob("*.slots")
        file = SlotFile(path, SMALL.slot_bytes, mapped=False)
        whole = [layout.Run(0, 0, SMALL.slot_bytes)]
        slots = [memoryview(bytearray(SMALL.slot_bytes)) for _ in refs]
        for n, slot in enumerate(slots):
            file.read(n, whole, slot)
        for n, slot in enumerate(reversed(slots)):
            file.write(n, slot)
        file.close()
        monkeypatch.setattr("prefixstore.reading.checksum", _any_sum)
        part = Roi(0, 1, 0, 2)
        assert ns.get(refs, outputs(SMALL, 2, part), part) == [MISS, MISS]


class _AnySum:
    """A checksum that is equal to every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def _any_sum(data: Any) -> Any:
    return _AnySum()


def test_a_changed_payload_with_the_same_piece_sums_is_seen_when_read_whole(place: Place) -> None:
    """Which only who can write the files can do; of a part of a chunk it is not seen."""
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store, layout=SMALL)
        refs = ns.chain(tokens_of(1, 1, SMALL)).refs()
        ns.put(refs, [TWINS[0] * SMALL.num_pieces])
        [path] = Path(store.live_dir).glob("*.slots")
        file = SlotFile(path, SMALL.slot_bytes, mapped=False)
        file.write(0, memoryview(TWINS[1]))
        file.close()
        assert ns.get(refs, outputs(SMALL, 1)) == [MISS]


def test_a_payload_with_the_piece_sums_of_another_needs_the_whole_sum_on_the_network() -> None:
    """A put is summed whole, by 128 bits of which no collision is known to be crafted so simply."""
    sums = [layout.checksum(twin * 4) for twin in TWINS]
    assert sums[0] != sums[1]
    record = wire.Record(1, wire.SUM_WHOLE, sums[0], 64)
    assert not wire.payload_is(record, memoryview(TWINS[1] * 4))


# ---------------------------------------------------------------------- fingerprints
def drifted(text: list[int], at: int) -> list[int]:
    """A text that is another at eight places, and has the same hashes of all grams around them."""
    changed = [token + d for token, d in zip(text[at:], DRIFT, strict=False)]
    return text[:at] + changed + text[at + len(DRIFT) :]


def tokens_are_stored(found: list[Segment], prompt: list[int], stored: list[int]) -> None:
    for one in found:
        source = stored[one.source_start : one.source_start + one.num_tokens]
        assert prompt[one.start : one.stop] == source, "tokens that nobody stored"


def test_the_crafted_grams_do_collide() -> None:
    text = tokens_of(1, 10, LAYOUT)
    other = drifted(text, 30)
    hashes = [gram_hashes(np.array(one, np.int32), 99) for one in (text, other)]
    same = hashes[0] == hashes[1]
    reach = slice(30 + len(DRIFT) - GRAM_TOKENS, 31)  # grams that hold all of it
    assert text != other
    assert same[reach].all()
    assert not same[30 + 1]


@pytest.mark.parametrize("disk_bytes", [0, "4MiB"])
def test_fingerprints_that_collide_are_misses(place: Place, disk_bytes: int | str) -> None:
    """Texts made of grams whose hashes are those of a stored text: found, compared, and refused."""
    with place.open("4MiB", disk_bytes) as store:
        ns = namespace_in(store)
        text = [1000 + token for token in tokens_of(2, 40, LAYOUT)]
        put(ns, ns.chain(text).refs())
        store.flush()
        assert [one.num_tokens for one in ns.find_segments([5, *text])] == [len(text)]
        seed = seed_of(ns.name + bytes(8))
        known = dict(zip(*(a.tolist() for a in fingerprints(np.array(text, np.int32), seed)),
                         strict=True))  # fmt: skip
        rng, collided = random.Random(3), 0
        for at in range(GRAM_TOKENS, len(text) - 2 * GRAM_TOKENS, 3):
            first = at + len(DRIFT) - GRAM_TOKENS
            forged = drifted(text, at)[first : first + 2 * GRAM_TOKENS - len(DRIFT)]
            noise = [rng.randrange(200_000, 300_000) for _ in range(80)]
            prompt = [*noise, *forged, *noise]
            mine = fingerprints(np.array(prompt, np.int32), seed)[1].tolist()
            collided += bool(set(mine) & set(known.values()))
            assert ns.find_segments(prompt) == []
            found = ns.find_segments(drifted(text, at))
            tokens_are_stored(found, drifted(text, at), text)
            assert all(one.stop <= at + len(DRIFT) or one.start > at for one in found)
        assert collided > 20, "the forged grams are looked up, and lead to the stored text"


def test_fingerprints_of_three_bits_give_only_what_agrees(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly every gram is said to be every other."""

    def few(tokens: Any, seed: int) -> Any:
        return gram_hashes(tokens, seed) & np.uint64(7)

    for module in ("winnow", "segment_index"):
        monkeypatch.setattr(f"prefixstore.{module}.gram_hashes", few)
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store)
        text, size = tokens_of(4, 16, LAYOUT), LAYOUT.chunk_tokens
        put(ns, ns.chain(text).refs())
        assert ns.find_segments(tokens_of(5, 16, LAYOUT)) == []
        for at in (0, 8, 13):
            prompt = [1, 2, 3, *text[at : at + MIN_SEGMENT_TOKENS + size], 4, 5]
            tokens_are_stored(ns.find_segments(prompt), prompt, text)
