"""Fingerprints against the definition in docs/format.md, written out in Python's own integers."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import numpy as np
import pytest

from prefixstore import winnow
from prefixstore.keys import salt_digest
from prefixstore.winnow import GRAM_TOKENS, SPAN_TOKENS, WINDOW_GRAMS

FORMAT = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text()
WORD = 2**64


def value_of(gram: list[int], seed: int) -> int:
    h = sum(token % 2**32 * pow(0x9E3779B97F4A7C15, j, WORD) for j, token in enumerate(gram))
    h = h % WORD ^ seed
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD % WORD
    h ^= h >> 33
    h = h * 0xC4CEB9FE1A85EC53 % WORD
    h ^= h >> 33
    repeats = any(gram[p:] == gram[:-p] for p in (1, 2, 3, 4))
    return (h >> 1) + (2**63 if repeats else 0)


def values_of(tokens: list[int], seed: int) -> list[int]:
    return [value_of(tokens[i : i + 24], seed) for i in range(len(tokens) - 23)]


def text(seed: int, count: int, vocabulary: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


TEXTS = {
    "random": text(1, 700, 128_000),
    "ids of any sign": [token - 2**31 for token in text(2, 200, 2**32)],
    "two tokens": text(3, 500, 2),
    "one token": [7] * 200,
    "repeats": [1, 2] * 30 + text(4, 40, 9) + [1, 2, 3] * 30 + [4, 3, 2, 1] * 20 + [*range(5)] * 9,
    "too short": text(5, 23, 9),
    "one gram": text(6, 24, 9),
    "no window": text(7, 63, 9),
    "one window": text(8, 64, 9),
    "none": [],
}  # fmt: skip


def test_the_shortest_run_is_the_floor_that_was_asked_for() -> None:
    assert (GRAM_TOKENS + WINDOW_GRAMS - 1, SPAN_TOKENS) == (64, 64)


@pytest.mark.parametrize("name", TEXTS)
def test_hashes_are_as_defined(name: str) -> None:
    tokens = TEXTS[name]
    for seed in (0, 2**64 - 1, 0x123456789ABCDEF0):
        found = winnow.gram_hashes(np.array(tokens, np.int32), seed)
        assert found.tolist() == values_of(tokens, seed)


@pytest.mark.parametrize("offset", range(12))
def test_a_single_gram_that_repeats_is_marked(offset: int) -> None:
    """At any offset, and none of one token less."""
    for period in range(1, 6):
        for count in (23, 24):
            repeat = [i % period for i in range(count)]
            tokens = [*range(100, 140 + offset), *repeat, *range(200, 240)]
            found = winnow.gram_hashes(np.array(tokens, np.int32), 5).tolist()
            assert found == values_of(tokens, 5)
            assert (max(found) >= 2**63) == (period < 5 and count == 24)


@pytest.mark.parametrize("name", TEXTS)
def test_fingerprints_are_the_minima_of_windows(name: str) -> None:
    tokens = TEXTS[name]
    values = values_of(tokens, 99)
    chosen: set[int] = set()
    first = []
    for start in range(len(values) - 40):
        window = values[start : start + 41]
        chosen |= {start + i for i, value in enumerate(window) if value == min(window)}
        first.append(start + window.index(min(window)))
    offsets, hashes = winnow.fingerprints(np.array(tokens, np.int32), 99)
    assert offsets.tolist() == sorted(chosen)
    assert hashes.tolist() == [values[at] for at in sorted(chosen)]
    assert winnow.window_minima(values) == first


@pytest.mark.parametrize("around", [-1, 0, 1, 63, 64, winnow._BLOCK + 700])
@pytest.mark.parametrize("vocabulary", [3, 128_000])
def test_blocks_do_not_show(around: int, vocabulary: int) -> None:
    """A text of more than one block is hashed and winnowed as if it were one."""
    tokens = np.array(text(around, winnow._BLOCK + around, vocabulary), np.int32)
    hashes = winnow.gram_hashes(tokens, 5)
    pieces = [winnow.gram_hashes(tokens[at : at + 1023], 5) for at in range(0, len(tokens), 1000)]
    assert np.array_equal(hashes, np.concatenate(pieces))
    minima = np.lib.stride_tricks.sliding_window_view(hashes, 41).min(axis=1)
    expected = [
        at for at, value in enumerate(hashes) if (minima[max(0, at - 40) : at + 1] == value).any()
    ]
    offsets, found = winnow.fingerprints(tokens, 5)
    assert offsets.tolist() == expected
    assert np.array_equal(found, hashes[expected])


def test_about_one_gram_in_21_is_chosen() -> None:
    offsets, _ = winnow.fingerprints(np.array(text(9, 100_000, 128_000), np.int32), 5)
    assert 0.95 < len(offsets) * 21 / 100_000 < 1.05


def test_vectors() -> None:
    """Those of docs/format.md, by its own words and by the code."""
    rows = re.findall(
        r"^\| `?([\w-]*)`? ?\| `(\w{16})` \| `(\w{16})` \| `(\w{16})` \| ([\d ]+) \|$", FORMAT, re.M
    )
    assert [row[0] for row in rows] == ["", "tenant-a"]
    for salt, *told, chosen in rows:
        scope = bytes(range(16)) + salt_digest(salt.encode())
        digest = hashlib.blake2b(scope, digest_size=8, person=b"prefixstore-gram").digest()
        seed = int.from_bytes(digest, "little")
        values = [seed, value_of(list(range(1, 25)), seed), value_of([7] * 24, seed)]
        assert told == [f"{value:016x}" for value in values]
        assert winnow.seed_of(scope) == seed
        offsets, _ = winnow.fingerprints(np.arange(1, 201, dtype=np.int32), seed)
        assert chosen == " ".join(map(str, offsets.tolist()))
