"""The benchmark of the server runs, and names what it measured; its Redis client reads right."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.serve_redis import RedisClient
from benchmarks.serve_tasks import repeat


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--dir", str(tmp_path), "--memory-dir", str(tmp_path), "--memory", "512MiB"]
    serve.main(["--quick", "--json", *place])
    found = json.loads(capsys.readouterr().out)["rows"]
    moved = {"get", "get of 8", "put", "match"}
    slow = {f"64 slow {kind}" for kind in ("gets", "checked gets", "puts")}
    assert {row["case"] for row in found} == moved | slow
    for row in found:
        if row["case"] in moved:
            assert row["calls"] > 0
            assert row["p99_ms"] >= row["p50_ms"] > 0
        else:
            assert 0 < row["mib"] <= row["mib_max"]
    assert {row["variant"] for row in found if row["case"] == "put"} == {
        "bare socket", "tcp", "unix socket", "memcpy", "shared memory",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 7, 100_000])
def test_values_arrive_whole_however_they_are_cut(cut: int) -> None:
    """An answer of three values, and then one of one, sent in parts of ``cut`` bytes at first."""
    values = [os.urandom(50_000), b"\r\n" * 25_000, os.urandom(50_000)]
    data = b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values)
    here, there = socket.socketpair()
    with here, there:

        def answer() -> None:
            for _ in range(2):
                there.recv(4096)
                for at in range(0, min(len(data), 300 * cut), cut):
                    there.sendall(data[at : at + cut])
                there.sendall(data[300 * cut :])

        thread = threading.Thread(target=answer)
        thread.start()
        client = RedisClient(here)
        for _ in range(2):
            outs = [bytearray(len(value)) for value in values]
            client.get([b"a", b"b", b"c"], [memoryview(out) for out in outs])
            assert outs == values
        thread.join(20)


def test_a_wrong_value_is_refused() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"$-1\r\n")
        with pytest.raises(RuntimeError, match=r"redis: .*-1"):
            RedisClient(here).get([b"a"], [memoryview(bytearray(100))])


def test_time_that_a_call_leaves_out_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of 1 s, of which a quarter counts, for 10 s by a clock that stands still meanwhile."""
    now = 0.0

    def call() -> float:
        nonlocal now
        now += 1.0
        return 0.25

    monkeypatch.setattr("benchmarks.serve_tasks.time.perf_counter", lambda: now)
    rate, took = repeat(call, 10.0)
    assert took == [0.25] * 10
    assert rate == pytest.approx(4.0)
