"""What `benchmarks.prefix` makes of an engine's answers."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks import cores, prefix, prefix_bench, table
from benchmarks.engine import Engine, EngineDied
from benchmarks.engine_process import descendants, session_members
from benchmarks.messages import Answer
from benchmarks.prefix_bench import (
    BEHIND_TOKENS,
    COLD,
    DISK_AUTO,
    FIRST,
    KILLED,
    LMCACHE,
    MEMORY,
    NATIVE,
    OWN,
    OWN_KILLED,
    Bench,
)
from prefixstore.testing_data import wait_for


class FakeEngine:
    """Stores all of a prompt the second time it is asked; ``lies`` says another token on a hit;
    ``dies`` at a prompt's fourth time."""

    def __init__(
        self, *, lies: bool = False, forgets: bool = False, dies: bool = False, hit_ms: float = 10.0
    ) -> None:
        self.lies, self.forgets, self.dies, self.hit_ms = lies, forgets, dies, hit_ms
        self.asked: dict[tuple[int, ...], int] = {}
        self.own: set[tuple[int, ...]] = set()

    def generate(self, prompts: list[list[int]], **_: Any) -> list[Answer]:
        prompt = tuple(prompts[0])
        times = self.asked[prompt] = self.asked.get(prompt, 0) + 1
        if self.dies and times > 3:
            raise EngineDied("submit: the engine died\nits log")
        hit = prompt in self.own or (times > 2 and not self.forgets)
        self.own.add(prompt)
        token = 7 if self.lies and hit else 5
        cached = len(prompt) - BEHIND_TOKENS if hit else 0
        return [
            Answer(
                [token], "", None, None, cached, self.hit_ms if hit else 100.0, 110.0, 1, 1,
                "length", None,
            )
        ]  # fmt: skip

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        self.own.clear()
        return True


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many engines shared a core, each time they were made to."""
    times: list[int] = []

    def share(engines: Iterable[Engine]) -> dict[int, float]:
        times.append(len(list(engines)))
        return {0: 1e-6, 1: 3e-6}

    monkeypatch.setattr(prefix_bench, "share_quickest", share)
    return times


def filled(engine: Any) -> Bench:
    bench = Bench([128, 256], 2, 3)
    bench.fill(engine, cold=True)
    bench.turns({MEMORY: engine}, own=OWN)
    return bench


def test_rows_and_bars() -> None:
    bench = Bench([128, 256], 2, 3)
    engine, theirs, again = FakeEngine(), FakeEngine(hit_ms=20.0), FakeEngine(hit_ms=30.0)
    for one in (engine, theirs, again):
        bench.fill(cast(Engine, one), cold=one is engine)
    bench.turns({MEMORY: cast(Engine, engine), NATIVE: cast(Engine, theirs)}, own=OWN)
    bench.turns(
        {KILLED: cast(Engine, again), NATIVE: cast(Engine, theirs)}, first=FIRST, own=OWN_KILLED
    )
    rows = bench.rows()
    beside = [f"{ours} / {NATIVE}, by turns" for ours in (MEMORY, KILLED)]
    assert [(row["tokens"], row["case"]) for row in rows] == [
        (count, case)
        for count in (128, 256)
        for case in (COLD, OWN, MEMORY, OWN_KILLED, KILLED, FIRST, NATIVE, *beside)
    ]
    assert [row["n"] for row in rows[:9]] == [2, 6, 6, 6, 6, 2, 12, 6, 6]
    assert [row["of_cold"] for row in rows[:7]] == [1.0, 0.1, 0.1, 0.3, 0.3, 0.3, 0.2]
    assert [row["ratio"] for row in rows[5:9]] == [None, None, 0.5, 1.5]
    assert [bar.ok for bar in bench.bars(["native"])] == [True, True, False, True, False]
    assert len(bench.bars(["native", "lmcache"])) == 9
    unmeasured = bench.bars(["lmcache"])[1:]
    assert [bar.value for bar in unmeasured] == [None] * 4, "LMCache was not measured"


def test_everyone_is_first_and_follows_everyone_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    engines = {case: FakeEngine() for case in (MEMORY, NATIVE, LMCACHE)}
    bench = Bench([128], 2, 3)
    for case, one in engines.items():
        bench.fill(cast(Engine, one), cold=False)
        monkeypatch.setattr(one, "settle", lambda case=case: asked.append(case))
    bench.turns({case: cast(Engine, one) for case, one in engines.items()})
    turns = [asked[at : at + 3] for at in range(6, 24, 3)]  # behind the round that warms
    assert all(set(turn) == set(engines) for turn in turns)
    assert Counter(turn[0] for turn in turns) == dict.fromkeys(engines, 2)
    follows = Counter(pair for turn in turns for pair in pairwise(turn))
    assert follows == dict.fromkeys(permutations(engines, 2), 2)


@pytest.mark.parametrize("gpu", [True, False])
def test_on_a_gpu_those_that_are_compared_share_a_core(
    gpu: bool, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    ours, theirs = cast(Engine, FakeEngine()), cast(Engine, FakeEngine())
    bench = Bench([128], 1, 2)
    for one in (ours, theirs):
        bench.fill(one, cold=False)
    bench.turns({MEMORY: ours})
    assert shared == []
    bench.turns({MEMORY: ours, NATIVE: theirs})
    assert shared == ([2, 2, 2] if gpu else [])
    assert bench.cores() == ("the same loop took 1 to 3 us on these cores" if gpu else "")


def test_engines_share_the_quickest_core(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {3: 0.2, 5: 0.1, 6: 0.3}
    monkeypatch.setattr(cores, "seconds_of_loops", lambda: took)
    bound: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    monkeypatch.setattr(cores, "descendants", lambda: [70, 71, 72])
    monkeypatch.setattr(cores, "_threads", lambda pid: {pid, pid + 100})
    engines = [cast(Engine, SimpleNamespace(pid=pid)) for pid in (70, 71)]
    assert cores.share_quickest(engines) == took
    others = {thread: {3, 6} for thread in (170, 171, 72, 172)}
    assert bound == {70: {5}, 71: {5}, **others}


def test_what_its_processes_have_started_is_found() -> None:
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    with subprocess.Popen(command, start_new_session=True) as child:
        try:
            wait_for(lambda: len(session_members(child.pid)) == 2, "it does not start another one")
            assert set(session_members(child.pid)) <= set(descendants())
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def test_every_core_is_tried_and_none_kept() -> None:
    allowed = os.sched_getaffinity(0)
    assert cores.seconds_of_loops().keys() == allowed
    assert os.sched_getaffinity(0) == allowed


def test_a_disk_that_is_slower_than_computing_is_no_success() -> None:
    engine: Any = FakeEngine()
    bench = filled(engine)
    cooled: list[int] = []
    bench.turns({DISK_AUTO: engine}, lambda: cooled.append(1), whole=False)
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
    bench.fill(liar, cold=False)
    bench.turns({MEMORY: engine, LMCACHE: liar})
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


def test_a_peer_that_dies_is_not_asked_again() -> None:
    ours, peer = cast(Engine, FakeEngine()), FakeEngine(dies=True)
    bench = Bench([128, 256], 2, 3)
    for one in (ours, cast(Engine, peer)):
        bench.fill(one, cold=one is ours)
    bench.turns({MEMORY: ours, NATIVE: cast(Engine, peer)})
    assert [str(error) for error in bench.failed.values()] == ["submit: the engine died\nits log"]
    assert len(bench.results[256].answers[MEMORY]) == 6
    assert sum(times > 3 for times in peer.asked.values()) == 1
    assert [bar.value for bar in bench.bars(["native"])[1:]] == [None] * 4


def test_what_is_measured_apart_is_compared_by_its_median(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there: list[str] = []

    @contextmanager
    def engine_of(name: str, *_: Any) -> Iterator[FakeEngine]:
        assert not there
        there.append(name)
        yield FakeEngine(hit_ms=40.0) if name in prefix_bench.PEERS else ours
        there.clear()

    ours = FakeEngine()
    monkeypatch.setattr(prefix, "peer_engine", engine_of)
    monkeypatch.setattr(prefix.Setting, "engine", lambda _, name: engine_of(name))
    bench = Bench([128], 2, 3)
    setting = prefix.setting_for(128, tmp_path, tmp_path, 1, {})
    prefix.measure(bench, setting, peers=["native", "lmcache"], apart=True)
    assert bench.failed == {}
    assert [bar.value for bar in bench.bars(["native", "lmcache"])] == [0, *[0.25] * 4]
    assert all(row["ratio"] is None for row in bench.rows())


def test_a_peers_end_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither of one that cannot be ended, nor of one that died: its own end is told why."""
    ends: list[str] = []

    @contextmanager
    def engine_of(name: str, *_: Any) -> Iterator[FakeEngine]:
        engine = FakeEngine(dies=name == "lmcache")
        try:
            yield engine
        except EngineDied as error:
            ends.append(f"{name}: {error}")
            raise
        if name == "native":
            raise OSError("its folder is not empty")

    ours = FakeEngine()
    monkeypatch.setattr(prefix, "peer_engine", engine_of)
    monkeypatch.setattr(prefix.Setting, "engine", lambda *_: nullcontext(ours))
    bench = Bench([128], 2, 3)
    setting = prefix.setting_for(128, tmp_path, tmp_path, 1, {})
    prefix.measure(bench, setting, peers=["native", "lmcache"])
    assert ends == ["lmcache: submit: the engine died\nits log"]
    assert set(bench.failed) == {NATIVE, LMCACHE}
    assert len(bench.results[128].answers[NATIVE]) == 12


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
