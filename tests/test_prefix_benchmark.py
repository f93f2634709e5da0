"""What `benchmarks.prefix` makes of an engine's answers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks import prefix
from benchmarks.messages import Answer
from benchmarks.prefix import BEHIND_TOKENS, COLD, DISK_AUTO, KILLED, MEMORY, NATIVE, OWN, Bench


class FakeEngine:
    """Stores all of a prompt the second time it is asked; ``lies`` says another token on a hit."""

    def __init__(self, *, lies: bool = False, forgets: bool = False) -> None:
        self.lies, self.forgets = lies, forgets
        self.asked: dict[tuple[int, ...], int] = {}
        self.own: set[tuple[int, ...]] = set()

    def generate(self, prompts: list[list[int]], **_: Any) -> list[Answer]:
        prompt = tuple(prompts[0])
        times = self.asked[prompt] = self.asked.get(prompt, 0) + 1
        hit = prompt in self.own or (times > 2 and not self.forgets)
        self.own.add(prompt)
        token = 7 if self.lies and hit else 5
        cached = len(prompt) - BEHIND_TOKENS if hit else 0
        return [
            Answer(
                [token], "", None, None, cached, 10.0 if hit else 100.0, 110.0, 1, 1, "length", None
            )
        ]

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        self.own.clear()
        return True


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def filled(engine: Any) -> Bench:
    bench = Bench([128, 256], 2, 3)
    bench.fill(engine, MEMORY, keep=True)
    return bench


def test_rows_and_bars() -> None:
    engine: Any = FakeEngine()
    bench = filled(engine)
    bench.hits(engine, KILLED, [128, 256])
    bench.fill(engine, NATIVE, keep=False)
    rows = bench.rows()
    assert [(row["tokens"], row["case"]) for row in rows] == [
        (count, case) for count in (128, 256) for case in (COLD, OWN, MEMORY, KILLED, NATIVE)
    ]
    assert [row["n"] for row in rows[:4]] == [2, 2, 6, 6]
    assert [row["of_cold"] for row in rows[:4]] == [1.0, 0.1, 0.1, 0.1]
    assert len(bench.bars(peer=True)) == 5
    assert all(bar.ok for bar in bench.bars(peer=True))


def test_a_disk_that_is_slower_than_computing_is_no_success() -> None:
    engine: Any = FakeEngine()
    bench = filled(engine)
    cooled: list[int] = []
    bench.hits(engine, DISK_AUTO, [128, 256], lambda: cooled.append(1), whole=False)
    assert len(cooled) == 2 * 4 * 2, "before each prompt of each round"
    assert [bar.ok for bar in bench.bars(peer=False)] == [True, True, True]
    slow = Answer([5], "", None, None, 0, 104.0, 110.0, 1, 1, "length", None)
    for _ in range(20):
        bench.results[128].add(DISK_AUTO, 0, slow)
    assert [bar.ok for bar in bench.bars(peer=False)] == [True, False, True]


def test_another_token_is_counted() -> None:
    engine: Any = FakeEngine(lies=True)
    [bar] = filled(engine).bars(peer=False)
    assert not bar.ok


def test_what_is_not_stored_is_an_error() -> None:
    engine: Any = FakeEngine(forgets=True)
    with pytest.raises(RuntimeError, match="stored"):
        filled(engine)


def test_the_peer_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        prefix.main(["--peer", "native"])
    assert "needs a GPU" in capsys.readouterr().err
