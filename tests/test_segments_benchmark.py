"""The benchmark of segments: what it prints, when it fails, that it would see a wrong result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import segments
from benchmarks.segments import Bench, Row
from prefixstore.namespace import Namespace
from prefixstore.segments import Segment

KEYS = ["case", "unit", "median", "p99", "cpu_p99", "max", "found", "n"]
SEARCHES = 5


def test_quick_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segments.main(["--quick", "--json", "--check", "--dir", str(tmp_path)])
    result = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in result["rows"]] == [KEYS] * len(result["rows"])
    assert result["bars"] == []
    found = {entry["case"]: entry for entry in result["rows"]}
    searched = {name: entry for name, entry in found.items() if name.startswith("search, ")}
    assert len(searched) == SEARCHES
    for name, entry in searched.items():
        assert 0 < entry["median"] <= entry["p99"] <= entry["max"]
        share = {"nothing": 0.0, "half": 0.5, "all": 1.0}[name.split()[1]]
        assert entry["found"] == pytest.approx(share, abs=0.01)
    assert found["planted runs of 128 tokens or more found"]["median"] == 1.0
    assert found["false segments"]["median"] == 0.0
    assert found["false segments"]["n"] >= 20_000
    assert not list(tmp_path.iterdir())


def rows(p99: float, planted: float, false: float, share: float) -> list[Row]:
    return [
        segments.row("search, nothing found", "ms", [1.0, p99]),
        segments.row("search, all found, one run", "ms", [1.0, 2.0]),
        segments.row("planted runs of 128 tokens or more found", "share", [planted]),
        segments.row("false segments", "count", [false]),
        segments.row("index / chunks of 8 MiB", "share", [share]),
    ]


def test_bars_read_the_rows_they_name() -> None:
    assert all(bar.ok for bar in segments.bars(rows(24.9, 1.0, 0.0, 0.02)))
    for wrong, name in (
        (rows(25.0, 1.0, 0.0, 0.01), "p99 ms, search, nothing found"),
        (rows(1.0, 0.999, 0.0, 0.01), "planted runs of 128 tokens or more found"),
        (rows(1.0, 1.0, 1.0, 0.01), "false segments"),
        (rows(1.0, 1.0, 0.0, 0.021), "index / chunks of 8 MiB"),
    ):
        assert [bar.name for bar in segments.bars(wrong) if not bar.ok] == [name]
    assert [bar.ok for bar in segments.bars([])] == [False] * 3


def test_a_wrong_segment_would_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search that gives each segment one token late, and forgets the last one."""
    right = Namespace.find_segments

    def wrong(self: Namespace, *arguments: object) -> list[Segment]:
        return [
            replace(one, start=one.start + 1, num_tokens=one.num_tokens - 1)
            for one in right(self, *arguments)[:-1]  # type: ignore[arg-type]
        ]

    monkeypatch.setattr(Namespace, "find_segments", wrong)
    monkeypatch.setattr(Bench, "times", lambda *_: segments.row("search", "ms", [1.0]))
    segments.main(["--quick", "--json", "--dir", str(tmp_path)])
    found = {entry["case"]: entry for entry in json.loads(capsys.readouterr().out)["rows"]}
    assert found["planted runs of 128 tokens or more found"]["median"] < 1.0
    assert found["false segments"]["median"] > 10
