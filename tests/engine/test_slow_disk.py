"""A disk slower than computing: its load ends early, and the answer is the plain engine's. So does
the first load of an engine that has computed nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_shim import Shim
from connector import kept_speed
from connector.plan import RETRY_AFTER
from tests.engine.support import (
    NEVER,
    ask,
    counting,
    hit_tokens,
    misses,
    same,
    start,
    to_disk_only,
    tokens,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

CHUNK = 128  # also a step's tokens: the fewest by which prefill is measured
CHUNK_BYTES = 256 << 10
COLD_S = 0.1  # of a chunk from the slow disk; computing it takes some milliseconds


def test_a_slow_disk_is_left_for_computing_and_found_again(
    model: Path, own_folder: Path, tmp_path: Path
) -> None:
    prompts = [tokens(seed, 5 * CHUNK + 10) for seed in (51, 52)]
    settings: dict[str, Any] = {"max_num_batched_tokens": CHUNK, "block_size": CHUNK}
    with start(model, own_folder, **settings) as engine:
        truth = [ask(engine, prompt, params=NEVER) for prompt in prompts]
        for prompt in prompts:
            ask(engine, prompt)
        wait_for_chunks(own_folder, 2 * 5, on_disk=True)
    [(name, tokens_per_s)] = kept_speed.read(own_folder).items()
    assert name.endswith(", TP 1, PP 1")
    assert tokens_per_s > 0
    to_disk_only(own_folder)
    shim = Shim(tmp_path / "faults", own_folder)
    settings |= {"extra": {"load": "auto"}, "env": shim.environment, "forked": False}
    with start(model, own_folder, **settings) as engine:
        with shim.during(bytes_s=int(CHUNK_BYTES / COLD_S)):
            with counting(engine) as found:
                assert same(ask(engine, prompts[0]), truth[0])
            assert found["loads_cut"] == 1
            assert hit_tokens(found, "disk") == 5 * CHUNK
            assert not {"loads_failed", "loads_stalled", "chunks_saved"} & found.keys()
            with counting(engine) as found:
                assert same(ask(engine, prompts[1]), truth[1])
            assert misses(found) == {"slower_to_load": 1}
        for _ in range(RETRY_AFTER):  # the disk is as it was, and nobody knows
            with counting(engine) as found:
                assert same(ask(engine, prompts[1]), truth[1])
        assert hit_tokens(found) == 5 * CHUNK
        assert "loads_cut" not in found
