"""Keys against golden vectors and against a second implementation written from the docstring."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from prefixstore import keys
from prefixstore.errors import ConfigError
from prefixstore.keys import KeyChain, MultimodalItem, preimage_tokens, root_key, salt_digest

NAMESPACE = bytes(range(16))
IMAGE = MultimodalItem(offset=3, num_tokens=4, digest=bytes.fromhex("00ff10"))

# (chunk_tokens, token ids, salt, items, keys). Every process, platform and version must agree.
VECTORS: list[tuple[int, list[int], bytes, list[MultimodalItem], list[str]]] = [
    (4, [1, 2, 3], b"", [], []),
    (4, [1, 2, 3, 4], b"", [], ["4b21bc00567398bc90a0bf9fd2f953a8"]),
    (
        4,
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        b"",
        [],
        ["4b21bc00567398bc90a0bf9fd2f953a8", "299c72ab589eff3169e237e845ec2bbb"],
    ),
    (
        4,
        [1, 2, 3, 4, 5, 6, 7, 8],
        b"tenant",
        [],
        ["1a26d2e0f6854440229758ab9cafafdd", "62b1fb66d77a89d2be70ccd736ed2954"],
    ),
    (
        4,
        [1, 2, 3, 4, 5, 6, 7, 8],
        b"",
        [IMAGE],
        ["cce7b34f5f59d3011bfa01768b27817b", "b6faef2e254ec369bfd2fd13bd2101b2"],
    ),
    (
        2,
        [0, 2**31 - 1, -1, -(2**31)],
        b"",
        [],
        ["dae8d6c5fcb55e2c7e0adb1bf97587b2", "42497151508033d2b5379f18d26c1790"],
    ),
]
ROOT_KEYS = {b"": "708208d15c09038e9008b72f09af1bc4", b"tenant": "bb32932c463eb4c536c4a4a204931190"}
SALT_DIGESTS = {b"": "0000000000000000", b"tenant": "037931eb555ace57"}


def reference_keys(
    chunk_tokens: int, tokens: Sequence[int], salt: bytes, items: Sequence[MultimodalItem]
) -> list[str]:
    """The specification in the module's docstring, by hand: no numpy and no state."""
    parent = hashlib.blake2b(b"prefixstore-root\0" + NAMESPACE + salt, digest_size=16).digest()
    found = []
    for number in range(len(tokens) // chunk_tokens):
        start, stop = number * chunk_tokens, (number + 1) * chunk_tokens
        preimage = parent
        for token in tokens[start:stop]:
            preimage += struct.pack("<i", token)
        for item in sorted(items, key=lambda item: item.offset):
            if item.offset < stop and item.offset + item.num_tokens > start:
                preimage += struct.pack("<iIH", item.offset - start, item.num_tokens,
                                        len(item.digest)) + item.digest  # fmt: skip
        parent = hashlib.blake2b(preimage, digest_size=16).digest()
        found.append(parent.hex())
    return found


@pytest.mark.parametrize(("chunk_tokens", "tokens", "salt", "items", "expected"), VECTORS)
def test_golden_vectors(
    chunk_tokens: int,
    tokens: list[int],
    salt: bytes,
    items: list[MultimodalItem],
    expected: list[str],
) -> None:
    assert reference_keys(chunk_tokens, tokens, salt, items) == expected
    chain = KeyChain(NAMESPACE, chunk_tokens, tokens, salt, items)
    assert [key.hex() for key in chain.keys] == expected


def test_golden_roots_and_salts() -> None:
    assert {salt: root_key(NAMESPACE, salt).hex() for salt in ROOT_KEYS} == ROOT_KEYS
    assert {salt: salt_digest(salt).hex() for salt in SALT_DIGESTS} == SALT_DIGESTS


@pytest.mark.parametrize("seed", range(50))
def test_random_chains_agree_with_the_reference(seed: int) -> None:
    """Also when they grow by pieces of any length, as a list or as an array."""
    rng = random.Random(seed)
    chunk = rng.choice([1, 2, 7, 16, 64])
    tokens = [rng.randrange(-5, 2**31) for _ in range(rng.randrange(10 * chunk))]
    salt = rng.randbytes(rng.choice([0, 1, 8, 100]))
    items = [
        MultimodalItem(rng.randrange(len(tokens) + 1), rng.randrange(1, 2 * chunk + 2),
                       rng.randbytes(rng.choice([0, 16, 32])))
        for _ in range(rng.randrange(4))
    ]  # fmt: skip
    chain = KeyChain(NAMESPACE, chunk, (), salt, items)
    at = 0
    while at < len(tokens):
        step = rng.randrange(1, 3 * chunk)
        part = tokens[at : at + step]
        chain.extend(np.array(part, dtype=np.int32) if rng.random() < 0.5 else part)
        at += step
    assert [key.hex() for key in chain.keys] == reference_keys(chunk, tokens, salt, items)
    assert chain.num_tokens == len(tokens)
    for number, ref in enumerate(chain.refs()):
        assert hashlib.blake2b(ref.preimage, digest_size=16).digest() == ref.key
        assert (ref.depth, ref.salt) == (number, salt_digest(salt))
        span = tokens[number * chunk : (number + 1) * chunk]
        assert preimage_tokens(ref.preimage, chunk).tolist() == span
    start, stop = rng.randrange(5), rng.randrange(12)
    assert chain.refs(start, stop) == chain.refs()[start:stop]


def test_every_input_counts() -> None:
    """One changed bit of anything that goes in changes all keys from there on."""
    tokens = list(range(16))
    base = KeyChain(NAMESPACE, 4, tokens, b"s", [IMAGE]).keys
    changed = [
        KeyChain(bytes(16), 4, tokens, b"s", [IMAGE]).keys,
        KeyChain(NAMESPACE, 4, tokens, b"t", [IMAGE]).keys,
        KeyChain(NAMESPACE, 4, tokens, b"", [IMAGE]).keys,
        KeyChain(NAMESPACE, 4, [9, *tokens[1:]], b"s", [IMAGE]).keys,
        KeyChain(NAMESPACE, 4, tokens, b"s").keys,
        KeyChain(NAMESPACE, 4, tokens, b"s", [MultimodalItem(2, 4, IMAGE.digest)]).keys,
        KeyChain(NAMESPACE, 4, tokens, b"s", [MultimodalItem(3, 5, IMAGE.digest)]).keys,
        KeyChain(NAMESPACE, 4, tokens, b"s", [MultimodalItem(3, 4, b"\0\xff\x11")]).keys,
    ]
    everything = [base, *changed]
    assert len({key for found in everything for key in found}) == 4 * len(everything)


def test_an_item_counts_from_its_own_chunk_on() -> None:
    tokens = list(range(12))
    plain = KeyChain(NAMESPACE, 4, tokens).keys
    shown = KeyChain(NAMESPACE, 4, tokens, items=[MultimodalItem(4, 4, b"x")]).keys
    assert plain[0] == shown[0]
    assert plain[1] != shown[1]
    assert plain[2] != shown[2]


@pytest.mark.parametrize(
    "bad",
    [
        [2**31],
        [-(2**31) - 1],
        [1.5],
        ["1"],
        ["x"],
        [None],
        [[1, 2], [3, 4]],
        5,
        np.array([2**32 + 5], dtype=np.int64),
        np.array([2**31], dtype=np.uint32),
        np.array([1.0]),
    ],
    ids=repr,
)
def test_what_is_no_token_id_is_refused(bad: Sequence[int]) -> None:
    """An id that is silently bent to another one would give one prompt another prompt's KV."""
    with pytest.raises(ConfigError):
        KeyChain(NAMESPACE, 1, bad)


def test_wide_arrays_of_small_ids_are_the_same_tokens() -> None:
    expected = KeyChain(NAMESPACE, 2, [5, 6]).keys
    for dtype in (np.int64, np.uint16, np.dtype(">i4")):
        assert KeyChain(NAMESPACE, 2, np.array([5, 6]).astype(dtype)).keys == expected


def test_bad_namespace_and_salt_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        root_key(bytes(15))
    with pytest.raises(ConfigError, match="salt"):
        root_key(NAMESPACE, bytes(1025))
    assert len(root_key(NAMESPACE, bytes(1024))) == 16


def test_why_keys_are_cryptographic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing a row's own tokens does not save a hash that can be collided.

    With a hash of eight bits, two prompts whose first chunks differ and collide have children with
    one key and one preimage: the child's row says "parent k, tokens t" and both prompts honestly
    agree, though it was computed behind another first chunk.
    """

    class Weak:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self._data, self._size = data, digest_size

        def digest(self) -> bytes:
            return hashlib.blake2b(self._data, digest_size=1).digest() * self._size

    def chain_of(first: int) -> KeyChain:
        return KeyChain(NAMESPACE, 1, [first, 77])

    def collision(make: Callable[[int], KeyChain]) -> tuple[KeyChain, KeyChain] | None:
        seen: dict[bytes, KeyChain] = {}
        for first in range(1000):
            chain = make(first)
            if chain.keys[0] in seen:
                return seen[chain.keys[0]], chain
            seen[chain.keys[0]] = chain
        return None

    assert collision(chain_of) is None
    monkeypatch.setattr(keys, "blake2b", Weak)
    pair = collision(chain_of)
    assert pair is not None
    one, other = pair
    assert one.preimages[0] != other.preimages[0]
    assert one.refs()[1] == other.refs()[1]
