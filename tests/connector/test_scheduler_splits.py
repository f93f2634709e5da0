"""Splits in the scheduler's half: what is promised, what the workers are told, how it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connector.blend_claims import BlendClaims
from connector.messages import SplitJob, WorkerReport
from connector.options import EngineOptions
from connector.scheduler_side import SchedulerSide
from tests.connector.played_scheduler import (
    BLOCK,
    CHUNK,
    IDENTITY,
    LAYOUT,
    Played,
    prompt,
    saved,
)

pytestmark = pytest.mark.timeout(60)

MEMORY = 1
TOKENS = prompt(41, 4 * CHUNK + 3)
TABLE = [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture
def splitting(played: Played, options: EngineOptions) -> Played:
    """Its memory tier is known to be as slow as computing."""
    played.side.close()
    played.side = SchedulerSide(
        replace(options, load="both"), played.handle, lambda _: IDENTITY, LAYOUT, BLOCK,
        blends=BlendClaims(None, LAYOUT.num_layers, 1, split_rows=CHUNK),
    )  # fmt: skip
    speeds = played.side._planner.speeds
    speeds.saw_prefill(1000, 1.0)
    speeds.saw_load(MEMORY, LAYOUT.payload_bytes * 1000 / CHUNK)
    played.put(TOKENS)
    return played


def promised(played: Played, local: int = 0, **fields: Any) -> tuple[Any, Any]:
    """A request and the job its load has become."""
    request = played.new(TOKENS, **fields)
    assert played.ask(request, local) == 4 * CHUNK - local
    played.side.allocated(request, [TABLE], 4 * CHUNK - local)
    [job] = played.step({}).loads
    return request, job


def test_from_the_first_token_to_the_last_answer(splitting: Played) -> None:
    request, job = promised(splitting, local=CHUNK + BLOCK)
    name = request.request_id
    assert job.blend == SplitJob(TOKENS[: 4 * CHUNK], CHUNK + BLOCK, TABLE[: 4 * CHUNK // BLOCK])
    assert (len(job.refs), job.skip_blocks) == (3, 1)
    assert splitting.step({}).blends == []
    splitting.side.worker_news(WorkerReport(placed={name: {0: 4 * CHUNK}}), [], set())
    [command] = splitting.step({"other": 1}).blends
    assert command.until - job.blend.computed in range(1, CHUNK + 1)
    splitting.side.worker_news(WorkerReport(placed={name: {0: command.until}}), [], set())
    [command] = splitting.step({}).blends
    assert command.ends
    splitting.side.worker_news(WorkerReport(placed={name: {0: 0}}), [name], set())
    splitting.wait_for_leases(0)
    assert splitting.step({}).blends == []
    meta = splitting.step({name: 3}, new=[(name, TABLE, 4 * CHUNK)])
    assert saved(meta) == []
    assert splitting.side._blends._under_way == {}


def test_a_request_that_is_gone_is_given_up(splitting: Played) -> None:
    request, _ = promised(splitting)
    name = request.request_id
    splitting.side.worker_news(WorkerReport(placed={name: {0: 4 * CHUNK}}), [], set())
    splitting.side.finished(request)
    [command] = splitting.step({}).blends
    assert command.abort
    splitting.side.worker_news(None, [name], set())
    assert splitting.side._blends._under_way == {}
    assert splitting.side._blends._gone == set()


def test_what_could_not_be_computed_is_stored_again_and_not_promised(splitting: Played) -> None:
    request, _ = promised(splitting)
    name = request.request_id
    splitting.side.worker_news(None, [name], set(TABLE[4:]))
    assert splitting.ask(request, 2 * CHUNK) == 0
    meta = splitting.step({name: 2 * CHUNK + 3}, new=[(name, TABLE, 2 * CHUNK)])
    assert [depths for _, depths, _ in saved(meta)] == [[2, 3]]


def test_loads_that_are_no_splits(splitting: Played) -> None:
    """From a fast tier, of a part only, and where no rank can compute: as with ``auto``."""
    limit = {"prefixstore": {"max_load_tokens": 2 * CHUNK}}
    speeds = splitting.side._planner.speeds
    speeds.tier_bytes_per_s[MEMORY] = LAYOUT.payload_bytes * 1e9
    _, job = promised(splitting)
    assert job.blend is None
    assert job.compute_s > 0
    speeds.tier_bytes_per_s[MEMORY] = LAYOUT.payload_bytes * 1010 / CHUNK
    limited = splitting.new(TOKENS, kv_transfer_params=limit)
    assert splitting.ask(limited) == 2 * CHUNK
    splitting.side.allocated(limited, [TABLE], 2 * CHUNK)
    assert [job.blend for job in splitting.step({}).loads] == [None]
    splitting.side.worker_news(WorkerReport(no_blending="no"), [], set())
    _, job = promised(splitting)
    assert job.blend is None
