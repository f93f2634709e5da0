"""What `benchmarks.split` makes of an engine's answers, and its slow tier; no engine starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.messages import Answer
from benchmarks.restart import NEVER
from benchmarks.slow_tier import COLD
from benchmarks.split import CASES, bars, by_turns
from benchmarks.split_tier import POLICIES, Throttle, Told

TOLD_BYTES_S = 1e6


class FakeEngine:
    """Takes as long as ``ms`` says of the case it was told; stored answers have ``token``."""

    def __init__(self, folder: Path, ms: dict[str, float], token: int = 5) -> None:
        self.told, self.ms, self.token = Told(folder), ms, token
        self.cold_of: list[str] = []

    def generate(self, prompts: Any, *, kv_transfer_params: Any, **_: Any) -> list[Answer]:
        load, bytes_s = self.told.read()
        assert bytes_s == TOLD_BYTES_S
        cold = kv_transfer_params == [NEVER]
        self.cold_of += [load] * cold
        ms, token = (self.ms[COLD], 5) if cold else (self.ms[load], self.token)
        return [Answer([token], "", None, None, 0, ms, ms, 1, 1, "length", None)]

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        return True


def missed(folder: Path, ms: list[float], rate: float = 1.0, token: int = 5) -> list[str]:
    """The bars that are missed."""
    engine: Any = FakeEngine(folder, dict(zip(CASES, ms, strict=True)), token)
    found = by_turns(engine, engine.told, [[1], [2], [3]], 2, TOLD_BYTES_S)
    assert [(row["case"], row["n"]) for row in found.rows()] == [(case, 6) for case in CASES]
    assert set(engine.cold_of) == set(POLICIES)  # each has measured what computing takes
    return [bar.name for bar in bars({rate: found}) if not bar.ok]


def test_bars(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert missed(folder, [100.0, 90.0, 95.0, 60.0]) == []
    assert missed(folder, [100.0, 90.0, 95.0, 95.0]) == [
        "rate 1: both / the better of cold, always"
    ]
    assert missed(folder, [100.0, 40.0, 95.0, 50.0], rate=2.0) == []
    assert missed(folder, [100.0, 200.0, 95.0, 120.0], rate=0.5) == ["rate 0.5: both / cold"]
    [differs] = missed(folder, [100.0, 90.0, 95.0, 60.0], token=6)
    assert "differ" in differs


def test_the_tier_is_as_slow_as_it_is_told(tmp_path: Path) -> None:
    """Reads come one after the other, however many ask at once."""
    told = Told(tmp_path / "store")
    throttle = Throttle(told)
    assert throttle.due(1 << 30) == 0.0
    told.tell("both", 1000.0)
    began = time.monotonic()
    first = throttle.due(500_000)
    assert first >= began + 500.0
    assert throttle.due(250_000) == first + 250.0
