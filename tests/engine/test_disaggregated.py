"""Prefill and decode engines, a router and a server, as `scripts/demo-disaggregated` has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo import forget_memory
from benchmarks.disaggregated import run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
# Of the prompt tokens; the benchmark's bar is .9, which five engines on two busy cores can miss.
SHARED_MIN = 0.5


def test_every_answer_is_that_of_one_plain_engine(tmp_path: Path) -> None:
    """Without a server, with it, roles swapped, engines added and killed, the server restarted."""
    try:
        parts, bars = run(20, tmp_path)
    finally:
        forget_memory(tmp_path / "store")
    assert [row["wrong"] for row in parts.rows] == [0] * 7, parts.rows
    shared = next(bar for bar in bars if bar.name.startswith("prompt tokens from the store"))
    assert shared.value is not None
    assert shared.value >= SHARED_MIN, shared.shortfall()
    back = next(bar for bar in bars if bar.name.startswith("hits are back"))
    assert back.value is not None, "no hit after the restart"
