"""The benchmark of pools: what it prints, and that both sides move the same bytes."""

from __future__ import annotations

import json

import pytest

from benchmarks import pool
from tests.pool.servers import redis


def test_quick_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("redis")
    with redis():
        pass  # skips where there is none
    pool.main(["--quick", "--json", "--check", "--engine", "redis"])
    result = json.loads(capsys.readouterr().out)
    assert result["bars"] == []
    told = [(row["chunk_kib"], row["what"]) for row in result["rows"]]
    assert told == [
        (kib, what) for kib in (1024, 8192) for what in ("put", "get", "get of one", "look-up")
    ]
    assert all(min(row["ours"], row["theirs"], row["ratio"]) > 0 for row in result["rows"])


def test_bars() -> None:
    """One a row; a ratio below 0.8 falls short."""
    row = {"engine": "redis", "chunk_kib": 1024, "what": "get", "client": "theirs"}
    good, bad = pool.bars_of([{**row, "ratio": 0.81}, {**row, "ratio": 0.79}])
    assert good.ok
    assert not bad.ok
