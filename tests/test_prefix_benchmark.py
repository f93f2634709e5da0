"""What `benchmarks.prefix` makes of an engine's answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks import prefix, table
from benchmarks.engine import EngineDied
from benchmarks.messages import Answer
from benchmarks.prefix import (
    BEHIND_TOKENS,
    COLD,
    DISK_AUTO,
    KILLED,
    LMCACHE,
    MEMORY,
    NATIVE,
    OWN,
    Bench,
)


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
    assert [row["n"] for row in rows[:4]] == [2, 6, 6, 6]
    assert [row["of_cold"] for row in rows[:4]] == [1.0, 0.1, 0.1, 0.1]
    assert len(bench.bars(["native"])) == 5
    assert all(bar.ok for bar in bench.bars(["native"]))
    assert len(bench.bars(["native", "lmcache"])) == 9
    assert not all(bar.ok for bar in bench.bars(["native", "lmcache"])), "LMCache was not measured"


def test_a_disk_that_is_slower_than_computing_is_no_success() -> None:
    engine: Any = FakeEngine()
    bench = filled(engine)
    cooled: list[int] = []
    bench.hits(engine, DISK_AUTO, [128, 256], lambda: cooled.append(1), whole=False)
    assert len(cooled) == 2 * 4 * 2, "before each prompt of each round"
    assert [bar.ok for bar in bench.bars([])] == [True, True, True]
    slow = Answer([5], "", None, None, 0, 104.0, 110.0, 1, 1, "length", None)
    for _ in range(20):
        bench.results[128].add(DISK_AUTO, 0, slow)
    assert [bar.ok for bar in bench.bars([])] == [True, False, True]


def test_another_token_is_counted() -> None:
    engine: Any = FakeEngine(lies=True)
    [bar] = filled(engine).bars([])
    assert not bar.ok


def test_a_peers_other_token_is_not_ours() -> None:
    engine: Any = FakeEngine()
    bench = filled(engine)
    liar: Any = FakeEngine(lies=True)
    bench.fill(liar, LMCACHE, keep=False)
    assert all(bar.ok for bar in bench.bars([]))
    assert [row["other_tokens"] for row in bench.rows() if row["case"] == LMCACHE] == [6, 6]


def test_a_peer_that_fails_is_a_line_and_the_next_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    @contextmanager
    def engine_of(name: str, *_: Any) -> Iterator[FakeEngine]:
        if name == "native":
            raise EngineDied("the engine did not start: no room\nthe end of its log")
        yield FakeEngine(forgets=True) if name == "lmcache" else ours

    ours = FakeEngine()
    monkeypatch.setattr(prefix, "peer_engine", engine_of)
    monkeypatch.setattr(prefix.Setting, "engine", engine_of)
    bench = Bench([128], 2, 3)
    setting = prefix.setting_for(128, tmp_path, tmp_path, 1, {})
    prefix.measure(bench, setting, peers=["native", "lmcache"])
    assert "the end of its log" in capsys.readouterr().err
    table.report("", bench.rows(), bench.bars(["native", "lmcache"]), argparse.Namespace())
    printed = capsys.readouterr().out
    assert f"{NATIVE} failed: the engine did not start: no room" in printed
    assert f"{LMCACHE} failed: of prompts of 143 tokens only [0, 0] are stored" in printed
    assert "end of its log" not in printed
    assert {row["case"] for row in bench.rows()} >= {COLD, MEMORY, KILLED}
    _, *beside = bench.bars(["native", "lmcache"])
    assert [bar.ok for bar in beside] == [False] * 4, "nobody measured them"


def test_lmcache_has_chunks_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prefix.main(["--peer", "lmcache", "--tokens", "512", "320"])
    assert "multiples of 256" in capsys.readouterr().err


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
