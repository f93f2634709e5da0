"""The device tier in real vLLM, on a device that is the host: answers are those of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Engine
from tests.engine.support import (
    CHUNK_TOKENS,
    PROMPTS,
    Metrics,
    Truth,
    ask,
    counting,
    distance,
    same,
    start,
    tokens,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

ROUNDING = 1e-4
SYSTEM, QUESTION = tokens(304, 64), tokens(305, 30)
DOCUMENTS = [tokens(301, 150), tokens(302, 200)]
MIXED = [*SYSTEM, *DOCUMENTS[1], *tokens(306, 20), *DOCUMENTS[0], *QUESTION]
OFF: dict[str, Any] = {"prefixstore": {"blend": False}}
ONLY_READ_OFF: dict[str, Any] = {"prefixstore": {"blend": False, "write": False}}


def blend(selector: str) -> dict[str, Any]:
    return {"prefixstore": {"write": False, "blend": {"selector": selector, "budget": 1.0}}}


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path) -> Iterator[Engine]:
    extra = {"device": "4MiB", "blend": {"step_rows": 128}}
    with start(model, folder, extra=extra) as engine:
        yield engine


def loaded(found: Metrics, tier: str) -> float:
    return found.get(f'bytes_loaded{{tier="{tier}"}}', 0.0)


def test_an_exact_prefix_is_the_same_from_the_device(
    engine: Engine, folder: Path, truth: Truth
) -> None:
    chunk = "five"
    ask(engine, chunk, params=OFF)
    wait_for_chunks(folder, 5)
    for _ in range(2):
        assert same(ask(engine, chunk, params=ONLY_READ_OFF), truth[chunk])
    with counting(engine) as found:
        assert same(ask(engine, chunk, params=ONLY_READ_OFF), truth[chunk])
    assert loaded(found, "device") > 0
    assert loaded(found, "memory") == loaded(found, "disk") == 0
    assert found["device_chunks_hit"] == len(PROMPTS[chunk]) // CHUNK_TOKENS
    with counting(engine) as found:  # its first four chunks only
        assert same(ask(engine, "fork", params=ONLY_READ_OFF), truth["fork"])
    assert found["device_chunks_hit"] == 4


def test_a_blend_is_the_same_from_the_device(engine: Engine, folder: Path) -> None:
    cold = ask(engine, MIXED, params={"prefixstore": {"read": False, "write": False}})
    before = 5
    for document in DOCUMENTS:
        ask(engine, SYSTEM + document + tokens(1, 5), params=OFF)
    wait_for_chunks(folder, before + 1 + sum((64 + len(d)) // 64 - 1 for d in DOCUMENTS))
    with counting(engine) as found:
        placed = ask(engine, MIXED, params=blend("none"))
    assert loaded(found, "device") == 0
    assert found["blend_reused_tokens"] > 100
    ask(engine, MIXED, params=blend("none"))
    with counting(engine) as found:
        assert same(ask(engine, MIXED, params=blend("none")), placed)
        assert distance(ask(engine, MIXED, params=blend("all")), cold) < ROUNDING
    assert loaded(found, "device") > 0
    assert loaded(found, "memory") == loaded(found, "disk") == 0
