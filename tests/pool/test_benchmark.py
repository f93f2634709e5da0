"""The benchmark of pools: what it prints, and that both sides move the same bytes."""

from __future__ import annotations

import json

import pytest

from benchmarks import codec, pool
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


def test_codecs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the model in `models/`, every byte compared; and the network has its speed."""
    with redis():
        pass  # skips where there is none
    codec.main(["--quick", "--json", "--check"])
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    left = {row["dtype"]: row["left"] for row in rows if row["what"] == "codec"}
    assert list(left) == list(codec.DTYPES)
    assert left["bfloat16"] < 0.75
    assert max(left.values()) < 0.9
    gets = {row["codec"].partition(":")[0]: row for row in rows if row["what"] == "get"}
    assert list(gets) == ["none", "auto", "lossless"]
    for row in gets.values():
        assert row["network_mb_s"] == 400
        assert row["get_ms"] > 0
    assert gets["none"]["get_ms"] > 1000 * (4 << 20) / 400e6


def test_bars_of_codecs() -> None:
    row = {**codec.EMPTY, "what": "get", "network_mb_s": 25, "of_none": 0.85}
    good, bad = codec.bars_of([{**row, "codec": "lossless"}, {**row, "codec": "auto: lossless",
                                                              "of_none": 0.95}])  # fmt: skip
    assert good.ok
    assert not bad.ok
    [auto] = codec.bars_of([{**row, "codec": "auto: none", "network_mb_s": 400}])
    assert auto.limit == 1.1
