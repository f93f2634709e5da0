"""The harness of `benchmarks.corruption_peers`, on stores whose faults are known."""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import corruption_peer_host, corruption_peers
from benchmarks.corruption_peer_host import CHUNK_BYTES, Peer, content_of, run_use


class Double:
    """A store that has every chunk, and a fault."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def put(self, number: int, data: bytes) -> bool:
        time.sleep(0.01)
        return self._fault != "refuses"

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        if self._fault == "crashes":
            os.kill(os.getpid(), signal.SIGTERM)
        if self._fault == "raises":
            raise ValueError("no")
        if self._fault == "hangs":
            time.sleep(60)
        found: list[bytes | None] = [content_of(number) for number in numbers]
        if self._fault == "serves another":
            found[1] = content_of(0)
        if self._fault == "misses":
            found[2] = None
        return found

    def place(self, number: int) -> tuple[str, int, int]:
        return "", 0, CHUNK_BYTES

    def close(self) -> None: ...


def open_double(name: str, folder: Path, count: int) -> Peer:
    return Double(name)


@pytest.mark.parametrize(
    ("fault", "right", "missing", "wrong"),
    [("", 3, 0, 0), ("serves another", 2, 0, 1), ("misses", 2, 1, 0)],
)
def test_what_is_served_is_judged(fault: str, right: int, missing: int, wrong: int) -> None:
    answer = run_use(open_double, fault, {"do": "check", "folder": "x", "count": 3})
    assert answer["ended"] == "done", answer
    [found] = answer["told"]
    assert [len(found[name]) for name in ("right", "missing", "wrong")] == [right, missing, wrong]


@pytest.mark.parametrize(
    ("fault", "ended"), [("crashes", "crash (-15)"), ("raises", "exception"), ("hangs", "hang")]
)
def test_uses_that_fail_are_noticed(
    fault: str, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corruption_peer_host, "DEADLINE_S", 1.0 if fault == "hangs" else 30.0)
    answer = run_use(open_double, fault, {"do": "check", "folder": "x", "count": 3})
    assert answer["ended"] == ended, answer


def test_a_killed_use_says_what_was_stored_until_then() -> None:
    use = {"do": "fill", "folder": "x", "count": 1000, "kill_after": 9, "kill_delay_s": 0.1}
    answer = run_use(open_double, "", use)
    assert answer["ended"] == "killed"
    assert answer["told"] == list(range(len(answer["told"])))
    assert 9 <= len(answer["told"]) < 1000
    assert run_use(open_double, "refuses", {**use, "count": 5})["told"] == []


@pytest.mark.parametrize("name", corruption_peers.DAMAGE)
def test_damage_is_within_chunks(tmp_path: Path, name: str) -> None:
    for n in range(4):
        (tmp_path / str(n)).write_bytes(b"head" + content_of(n) + b"tail")
    before = [(tmp_path / str(n)).read_bytes() for n in range(4)]
    places = [(tmp_path / str(n), 4, CHUNK_BYTES) for n in range(4)]
    corruption_peers.DAMAGE[name](places, random.Random(1))
    now = [(tmp_path / str(n)).read_bytes() for n in range(4)]
    changed = [n for n in range(4) if now[n] != before[n]]
    assert len(changed) == (2 if name.startswith("swap") else 1)
    assert all(data[:4] == b"head" for data in now)
    if name != "truncate":
        assert all(data[-4:] == b"tail" for data in now)


def test_this_store_serves_nothing_wrong(tmp_path: Path) -> None:
    kinds = [*corruption_peers.DAMAGE, corruption_peers.KILL]
    rows = corruption_peers.run(
        argparse.Namespace(
            cases=1, seed=1, stores=["prefixstore"], folder=str(tmp_path), kinds=kinds
        )
    )
    assert [row["case"] for row in rows] == kinds
    for row in rows:
        assert row["wrong"] == row["failed"] == row["still_missing"] == 0, row
        assert not row["lost"]
        assert row["missing"] or row["case"] == corruption_peers.KILL, row
    assert not list(tmp_path.iterdir())
