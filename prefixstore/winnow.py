"""Winnowing: which k-grams of a text are its fingerprints (Schleimer, Wilkerson, Aiken 2003).

A gram is GRAM_TOKENS tokens in a row; a window is WINDOW_GRAMS grams in a row, which together span
SPAN_TOKENS tokens. The fingerprints of a text are the hashes that are minimal in some window, so
two texts that share SPAN_TOKENS tokens in a row share a fingerprint there, at any offset. About
2 / (WINDOW_GRAMS + 1) of the grams are chosen: one in 21.

What must hold: the hash of a gram depends on nothing but its tokens and the seed (golden vectors in
``docs/format.md``); it is not secret and may collide, so whoever finds a fingerprint compares the
tokens. Pure functions; a crash has nothing to break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

# 24 + 41 - 1 = 64 is the shortest run that is sure to be found. With 32 + 33 a prompt has 23 % more
# fingerprints to look up; with 16 + 49 it has 16 % fewer, but texts have more 16-grams in common
# that are not part of any longer run.
GRAM_TOKENS = 24
WINDOW_GRAMS = 41
PERIODS = (1, 2, 3, 4)
SPAN_TOKENS = GRAM_TOKENS + WINDOW_GRAMS - 1

_BASE = 0x9E3779B97F4A7C15
_REPEATS = np.uint64(1 << 63)
_BLOCK = 16_384  # grams hashed at a time: what is worked on stays in the CPU's cache
Tokens = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]


def _powers(base: int) -> Words:
    powers = np.full(_BLOCK + SPAN_TOKENS, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_UP, _DOWN = _powers(_BASE), _powers(pow(_BASE, -1, 2**64))


def seed_of(scope: bytes) -> int:
    """Seed of a scope: namespace and salt digest, as they stand in a row (24 bytes)."""
    digest = blake2b(scope, digest_size=8, person=b"prefixstore-gram").digest()
    return int.from_bytes(digest, "little")


def gram_hashes(tokens: Tokens, seed: int) -> Words:
    """Hash of the gram at each offset: uint64 [n - GRAM_TOKENS + 1], of int32 [n].

    The polynomial sum of token[j] * BASE**j (j from 0) modulo 2**64, from prefix sums, so that it
    costs the same whatever GRAM_TOKENS is; then xor with the seed and MurmurHash3's fmix64, which
    is a bijection: it makes the order of the hashes random and adds no collision. The lowest bit
    gives way to a highest one, set for grams of a period in PERIODS (padding, rules of tables): in
    a long run of them all grams are equal, so they must not be chosen where there is another.
    """
    count = len(tokens) - GRAM_TOKENS + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    if len(tokens) > len(_UP):
        parts = tokens[: _BLOCK + GRAM_TOKENS - 1], tokens[_BLOCK:]
        return np.concatenate([gram_hashes(part, seed) for part in parts])
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(tokens.view(np.uint32).astype(np.uint64) * _UP[: len(tokens)], out=sums[1:])
    hashes = sums[GRAM_TOKENS:] - sums[:-GRAM_TOKENS]
    hashes *= _DOWN[:count]
    hashes ^= np.uint64(seed)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(factor)
    hashes ^= hashes >> np.uint64(33)
    hashes >>= np.uint64(1)
    for period in PERIODS if _may_repeat(tokens) else ():
        same = tokens[period:] == tokens[:-period]
        pairs = GRAM_TOKENS - period
        sums = np.concatenate(([0], np.cumsum(same)))
        hashes[sums[pairs:] - sums[:-pairs] == pairs] |= _REPEATS
    return hashes


def _may_repeat(tokens: Tokens) -> bool:
    """Whether there may be a gram of a period in PERIODS; seldom if there is none.

    It has a period of 12 tokens too: 12 pairs in a row, of which three are looked at here.
    """
    same = tokens[12::4] == tokens[:-12:4]
    return bool((same[2:] & same[1:-1] & same[:-2]).any())


def window_minima(hashes: Sequence[int]) -> list[int]:
    """For each window of a short text, the first gram of it that is minimal."""
    minima: list[int] = []
    best = -1
    for start in range(len(hashes) - WINDOW_GRAMS + 1):
        last = start + WINDOW_GRAMS - 1
        if best < start:
            best = min(range(start, last + 1), key=hashes.__getitem__)
        elif hashes[last] < hashes[best]:
            best = last
        minima.append(best)
    return minima


def fingerprints(tokens: Tokens, seed: int) -> tuple[npt.NDArray[np.int64], Words]:
    """Offsets, ascending, and hashes of all grams of a text that are minimal in some window.

    Of equal minima in one window all are given: in a run of one and the same token each gram is.
    """
    offsets, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for at in range(0, len(tokens) - SPAN_TOKENS + 1, _BLOCK):
        block = gram_hashes(tokens[at : at + _BLOCK + SPAN_TOKENS - 1], seed)
        minima = _slide(np.minimum, block, WINDOW_GRAMS)
        # The windows a gram is in are the WINDOW_GRAMS that end with it: it is minimal in one of
        # them if the largest of their minima is its own hash.
        around = np.zeros(len(block) + WINDOW_GRAMS - 1, np.uint64)
        around[WINDOW_GRAMS - 1 : len(block)] = minima
        chosen = np.flatnonzero(_slide(np.maximum, around, WINDOW_GRAMS) == block)
        if len(offsets[-1]):  # grams of two blocks' windows
            chosen = chosen[chosen + at > offsets[-1][-1]]
        offsets.append(chosen + at)
        hashes.append(block[chosen])
    return np.concatenate(offsets), np.concatenate(hashes)


def _slide(operation: Callable[..., Any], values: Words, width: int) -> Words:
    """Minimum or maximum of each ``width`` values in a row, by doubling: log2(width) passes."""
    have = 1
    while have < width:
        step = min(have, width - have)
        values = operation(values[:-step], values[step:])
        have += step
    return values
