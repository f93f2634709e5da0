"""How long it takes to find a prompt in an index of 100,000 chunks.  Part of `benchmarks.store`.

The payload is 4 KiB a chunk so that the index, not the data, is what is large.  Prompts are numpy
int32 arrays of random tokens, all chunks of which are stored; each sample takes another one.
``chain`` is the hashing of the tokens, ``match`` the look-up, ``both`` one after the other, as a
request pays for them.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.store_sizes import identity_for, temporary_store
from prefixstore import Layout, Store, admin
from prefixstore.namespace import Namespace

LAYOUT = Layout(num_layers=1, num_planes=1, num_heads=1, chunk_tokens=64, head_bytes=64)
CHAIN_TOKENS = 131_072
LENGTHS = (4_096, 32_768, 131_072)
CHUNKS = 100_000
DEADLINE_S = 300.0

Tokens = npt.NDArray[np.int32]
Times = dict[tuple[str, int, str], list[float]]


def match_times(folder: Path, *, quick: bool = False) -> Times:
    """Seconds of every sample, by (tier the rows are in, tokens, stage)."""
    chunks = 2_000 if quick else CHUNKS
    lengths = LENGTHS[:1] if quick else LENGTHS
    per_chain = max(lengths) // LAYOUT.chunk_tokens
    rng = np.random.default_rng(0)
    prompts: list[Tokens] = [
        rng.integers(0, 128_000, max(lengths), dtype=np.int32)
        for _ in range(-(-chunks // per_chain))
    ]
    room = len(prompts) * per_chain * LAYOUT.slot_bytes * 3 // 2 + (64 << 20)
    times: Times = {}
    with temporary_store(folder, room, room) as store:
        space = store.namespace(identity_for(LAYOUT), LAYOUT)
        for prompt in prompts:
            _fill(store, space, prompt)
        for tier, name in ((1, "memory"), (2, "disk")):
            if tier == 2:
                admin.empty_memory(store, DEADLINE_S)
            for tokens in lengths:
                samples = 20 if quick else 500 if tokens == max(lengths) else 1000
                _measure(space, prompts, tokens, samples, tier, name, times)
    return times


def _fill(store: Store, space: Namespace, prompt: Tokens) -> None:
    payload = bytes(LAYOUT.payload_bytes)
    refs = space.chain(prompt).refs()
    space.put(refs, [payload] * len(refs))
    if not store.flush(DEADLINE_S):
        raise RuntimeError(f"the store did not flush within {DEADLINE_S:g} s")


def _measure(
    space: Namespace,
    prompts: list[Tokens],
    tokens: int,
    samples: int,
    tier: int,
    name: str,
    times: Times,
) -> None:
    found: dict[str, list[float]] = {"chain": [], "match": [], "both": []}
    wanted = (tier,) * (tokens // LAYOUT.chunk_tokens)
    for number in range(samples):
        prompt = prompts[number % len(prompts)][:tokens]
        began = time.perf_counter()
        chain = space.chain(prompt)
        chained = time.perf_counter()
        match = space.match(chain)
        ended = time.perf_counter()
        if match.tiers != wanted:
            raise RuntimeError(f"{match.num_chunks} of {len(wanted)} chunks found in the {name}")
        found["chain"].append(chained - began)
        found["match"].append(ended - chained)
        found["both"].append(ended - began)
    for stage, seconds in found.items():
        times[name, tokens, stage] = seconds
