"""What things cost in `benchmarks.scale`: curves through figures that were measured.

Owns how a figure becomes a cost. What must hold: no figure is written here; each is read from the
file of results that it stands in, so a new measurement changes the simulation, and a table that
lost its row is an error. What was never measured here (prices, networks, disks) is no cost but an
assumption, and stands in `benchmarks.scale_fleet`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.model import REPO_ROOT
from prefixstore.config import MIB

RESULTS = REPO_ROOT / "benchmarks" / "results"
GPU_FILE, POOL_FILE = "2026-11-27-gpu-vllm026.md", "2026-11-27-pool-cpu.json"
CARD, CONTEXTS = "H200", ("4,096", "16,384", "32,768")
BLENDED = {8192: "16 x 512", 16384: "32 x 512", 32768: "64 x 512"}
SAVED_TOKENS, SAVED_CHUNKS, CHUNK_BYTES = 16 * 8192, 2048, 8 * MIB  # of `benchmarks.saving`
DECODED_AT_ONCE = 64
POOL_ENGINE, POOL_KIB = "redis", 8192


@dataclass(frozen=True)
class Curve:
    """Seconds for a number of tokens: a parabola, since attention grows with the square."""

    terms: tuple[float, ...]  # of the highest power first

    def __call__(self, tokens: float) -> float:
        value = 0.0
        for term in self.terms:
            value = value * tokens + term
        return value

    @classmethod
    def through(cls, tokens: Sequence[float], seconds: Sequence[float], degree: int) -> Curve:
        """The least squares. Raises ValueError for fewer points than terms."""
        if len(tokens) <= degree or len(tokens) != len(seconds):
            raise ValueError(f"{len(tokens)} lengths, {len(seconds)} times for degree {degree}")
        return cls(tuple(map(float, np.polyfit(tokens, seconds, degree))))


@dataclass(frozen=True)
class Costs:
    """Times and speeds of one engine and its store.

    cold, floor: seconds to the first token of a prompt of which nothing, or all, is in the engine's
    own cache. blend: the same where all of it is blended, without the load. step_s: one step of the
    engine. answer_token_s: engine time of a token of an answer. The others are bytes per second of
    one engine, and the time of one question to the pool.
    """

    kv_bytes: int  # of a token
    cold: Curve
    floor: Curve
    blend: Curve
    step_s: float
    answer_token_s: float
    load_bytes_s: float
    save_bytes_s: float
    pool_get_bytes_s: float
    pool_put_bytes_s: float
    pool_lookup_s: float

    def compute_s(self, have: int, total: int) -> float:
        """Engine time of the tokens from ``have`` to ``total``; one step at least."""
        done = self.cold(have) if have else 0.0
        return max(self.step_s, self.cold(total) - done)

    def blend_s(self, moved: int, have: int, total: int) -> float:
        """The same where ``moved`` of them are blended: their share of what blending all costs."""
        fresh = 1 - moved / (total - have)
        blended = self.blend(total) * moved / total
        return max(self.step_s, blended + fresh * self.compute_s(have, total))


def cell(file: str, starts: Sequence[str], column: int, skip: int = 0) -> float:
    """The number a cell of a table of Markdown begins with: of the row after ``skip`` others whose
    first cells are ``starts``. Raises ValueError."""
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    found = [row for row in rows if row[: len(starts)] == list(starts)]
    number = re.match(r"[\d,]*\.?\d+", found[skip][column]) if len(found) > skip else None
    if number is None:
        raise ValueError(f"{file} has no row {starts} with a number in column {column}")
    return float(number[0].replace(",", ""))


def pool_figure(what: str) -> float:
    """Of the pool's benchmark: GB/s or ms, as its row says. Raises ValueError."""
    rows = json.loads((RESULTS / POOL_FILE).read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if (row["engine"], row["chunk_kib"], row["what"]) == (POOL_ENGINE, POOL_KIB, what):
            return float(row["ours"])
    raise ValueError(f"{POOL_FILE} has no row {POOL_ENGINE}, {POOL_KIB} KiB, {what}")


def bytes_per_s(tokens: Sequence[int], seconds: Sequence[float], kv_bytes: int) -> float:
    """Of loads of so many tokens: the line through the origin nearest to them."""
    sizes, times = np.array(tokens) * float(kv_bytes), np.array(seconds)
    return float((sizes @ sizes) / (sizes @ times))


def measured() -> Costs:
    """Llama-3.1-8B in shape, bfloat16, on the GPU of CARD; the pool's client on two CPU cores.

    Sources: GPU_FILE, the first table of exact prefixes, that of blending at 15 %, that of saving
    (what was stored of a batch of SAVED_CHUNKS chunks, in the time of its tokens); POOL_FILE.
    """
    kv_bytes = CHUNK_BYTES // 64
    tokens = [int(text.replace(",", "")) for text in CONTEXTS]
    cold, own, memory = (
        [cell(GPU_FILE, (text, CARD), column) / 1000 for text in CONTEXTS] for column in (2, 3, 4)
    )
    load = bytes_per_s(tokens, [m - o for m, o in zip(memory, own, strict=True)], kv_bytes)
    blended = [
        cell(GPU_FILE, (name,), 2) / 1000 - size * kv_bytes / load for size, name in BLENDED.items()
    ]
    prefill, decode = "prefill: 16 x (8,192 + 1)", "decode: 64 x (512 + 256)"
    answers_s = cell(GPU_FILE, (decode, "H100"), 2)
    stored = SAVED_CHUNKS - cell(GPU_FILE, (prefill, "H100"), 5)
    return Costs(
        kv_bytes=kv_bytes,
        cold=Curve.through(tokens, cold, 2),
        floor=Curve.through(tokens, own, 1),
        blend=Curve.through(list(BLENDED), blended, 2),
        step_s=DECODED_AT_ONCE / answers_s,
        answer_token_s=1 / answers_s,
        load_bytes_s=load,
        save_bytes_s=stored * CHUNK_BYTES * cell(GPU_FILE, (prefill, "H100"), 3) / SAVED_TOKENS,
        pool_get_bytes_s=1e9 * pool_figure("get"),
        pool_put_bytes_s=1e9 * pool_figure("put"),
        pool_lookup_s=pool_figure("look-up") / 1000,
    )
