"""What `benchmarks.slow_tier` makes of an engine's answers; none starts here."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.messages import Answer
from benchmarks.restart import NEVER
from benchmarks.slow_tier import COLD, FAST, FROM_START, SLOWED, bars, by_turns


class FakeEngine:
    """Takes 100 ms cold, and ``stored_ms`` otherwise, ``first_ms`` the first time; then it also
    says ``token``."""

    def __init__(self, stored_ms: float, first_ms: float, token: int = 5) -> None:
        self.stored_ms, self.first_ms, self.token = stored_ms, first_ms, token
        self.asked: list[bool] = []
        self.fresh = False

    def generate(self, prompts: Any, *, kv_transfer_params: Any, **_: Any) -> list[Answer]:
        assert self.fresh, "vLLM's own prefix cache has it"
        self.fresh, cold = False, kv_transfer_params == [NEVER]
        stored_ms = self.stored_ms if False in self.asked else self.first_ms
        self.asked.append(cold)
        ttft_ms, token = (100.0, 5) if cold else (stored_ms, self.token)
        return [Answer([token], "", None, None, 0, ttft_ms, ttft_ms, 1, 1, "length", None)]

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        self.fresh = True
        return True


def missed(
    slowed_ms: float, from_start_ms: float, first_ms: float = 110.0, token: int = 5
) -> list[str]:
    """The bars that are missed."""
    times = {FAST: 10.0, SLOWED: slowed_ms, FROM_START: from_start_ms}
    found = {}
    for disk, ms in times.items():
        engine: Any = FakeEngine(ms, first_ms, token)
        cold_first = disk != FROM_START
        found[disk] = by_turns(engine, [[1], [2], [3]], disk, cold_first=cold_first)
        assert engine.asked == [cold_first, not cold_first] * 3
    return [bar.name for bar in bars(found) if not bar.ok]


def test_bars() -> None:
    assert missed(104.0, 109.0) == []
    assert missed(120.0, 109.0) == [f"{SLOWED} / {COLD}"]
    assert missed(104.0, 300.0) == [f"{FROM_START} / {COLD}"]
    assert missed(104.0, 109.0, first_ms=131.0) == [f"{FROM_START}, its first prompt / {COLD}"]
    [differs] = missed(104.0, 109.0, token=6)
    assert "differ" in differs
