"""The engine answers, and answers right, whatever happens to the store under it.

The tests of the first part share an engine and come in this order for a reason: each leaves the
store usable but the last, which removes it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.engine import Engine, EngineDied
from prefixstore import Store, admin
from tests.engine.support import (
    DEADLINE_S,
    NEVER,
    ONLY_READ,
    PROMPTS,
    Truth,
    ask,
    counted,
    counting,
    damage,
    hit_tokens,
    misses,
    same,
    start,
    store_counters,
    to_disk_only,
    tokens,
    totals,
    wait_for_chunks,
)
from tests.store_helpers import small_file_system

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

STALL_MS = 100  # the connector's default
BYPASS_S = 1.0


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, truth: Truth) -> Iterator[Engine]:
    """An engine whose store holds "five" and "ten"."""
    with start(model, folder, extra={"bypass_s": BYPASS_S, "stall_ms": 100}) as engine:
        for name in ("five", "ten"):
            assert same(ask(engine, name), truth[name])
        wait_for_chunks(folder, 15, on_disk=True)
        yield engine


def ask_until_hit(engine: Engine, name: str, truth: Truth, most: int = 100) -> int:
    """Ask until everything is loaded and no load fails; returns how many requests it took."""
    end = time.monotonic() + DEADLINE_S
    for count in range(1, most + 1):
        with counting(engine) as found:
            answer = ask(engine, name)
        assert same(answer, truth[name])
        if hit_tokens(found) == len(PROMPTS[name]) // 64 * 64 and "loads_failed" not in found:
            return count
        assert time.monotonic() < end, found
    raise AssertionError(f"no whole hit in {most} requests")


def test_damaged_chunks_are_recomputed_and_stored_again(
    engine: Engine, folder: Path, truth: Truth
) -> None:
    before = store_counters(folder)
    assert damage(folder) == 30
    with counting(engine) as found:
        assert same(ask(engine, "five"), truth["five"])
    for name in ("corrupt_memory", "corrupt_disk"):
        end = time.monotonic() + DEADLINE_S  # processes add to the shared counters now and then
        while store_counters(folder).get(name, 0) <= before.get(name, 0):
            assert time.monotonic() < end, name
            time.sleep(0.1)
    for name in ("five", "ten"):
        # Each request finds at least the first damaged chunk and stores it again.
        assert ask_until_hit(engine, name, truth, len(PROMPTS[name]) // 64 + 1)
    with Store.open(folder, create=False) as store:
        store.flush()
        assert admin.verify(store).sound
    assert found["loads_failed"] == 1  # one load, however many of its chunks


def test_a_truncated_disk_file(engine: Engine, folder: Path, truth: Truth) -> None:
    to_disk_only(folder)
    [path] = folder.glob("disk-*.slots")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    for name in ("five", "ten"):
        assert same(ask(engine, name), truth[name])
        assert ask_until_hit(engine, name, truth, len(PROMPTS[name]) // 64 + 1)


HOLD_LOCK = """
import sys, time
from prefixstore import Store
with Store.open(sys.argv[1], create=False) as store:
    def hold(txn):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
    store.live.write(hold, 60)
    print("free", flush=True)
"""


@contextmanager
def writer_lock_held(folder: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process keeps the live index's writer lock for that long."""
    command = [sys.executable, "-c", HOLD_LOCK, str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        assert holder.stdout.readline() == "free\n"
    assert holder.returncode == 0


def test_hits_under_a_held_lock_are_served(engine: Engine, folder: Path, truth: Truth) -> None:
    """Their leases are taken when it is free again: a load checks what it reads."""
    assert ask_until_hit(engine, "ten", truth)
    with writer_lock_held(folder, 3.0) as holder, counting(engine) as found:
        answers = [ask(engine, "ten") for _ in range(3)]
        still_held = holder.poll() is None
    assert still_held
    assert all(same(answer, truth["ten"]) for answer in answers)
    assert hit_tokens(found) == 3 * (len(PROMPTS["ten"]) // 64 * 64)
    assert not {"loads_failed", "loads_stalled"} & found.keys()
    assert misses(found) == {}
    end = time.monotonic() + DEADLINE_S
    with Store.open(folder, create=False) as store:
        while admin.stats(store)["leases"]:
            assert time.monotonic() < end, "leases that nobody ends"
            time.sleep(0.01)


def test_saves_under_a_held_lock_hold_nobody_up(engine: Engine, folder: Path, truth: Truth) -> None:
    prompt = tokens(40, 500)
    usual = [ask(engine, prompt, params=NEVER).total_ms for _ in range(3)]
    time.sleep(2 * BYPASS_S)
    hold_s = 3.0
    with writer_lock_held(folder, hold_s):
        answer = ask(engine, prompt)
    assert answer.total_ms - max(usual) < 3 * STALL_MS
    assert "save_errors" not in totals(engine)
    end = time.monotonic() + DEADLINE_S
    while (again := ask(engine, prompt)).cached_tokens == 0:  # bypassed for a while yet
        assert time.monotonic() < end
    assert same(again, answer)


def test_the_folder_removed_while_in_use(engine: Engine, folder: Path, truth: Truth) -> None:
    assert ask_until_hit(engine, "five", truth)
    shutil.rmtree(folder)
    for name in ("five", "ten", "fork"):
        assert same(ask(engine, name), truth[name])
    # Until it notices, the engine goes on with the files it has open; then a new store is made.
    end = time.monotonic() + DEADLINE_S
    while not (folder / "store.json").exists():
        assert same(ask(engine, "five"), truth["five"])
        assert time.monotonic() < end
        time.sleep(0.1)
    assert ask_until_hit(engine, "five", truth, 1000)
    wait_for_chunks(folder, 5)


# ---------------------------------------------------------------------- engines of their own
def test_a_folder_that_cannot_be_used_at_first(model: Path, own_folder: Path, truth: Truth) -> None:
    folder = own_folder
    folder.write_text("a file in its place")
    with start(model, folder) as engine:
        assert "serving without the store" in engine.log.read_text()
        assert "prefixstore: no store yet, namespace" in engine.log.read_text()
        for _ in range(2):
            assert same(ask(engine, "five"), truth["five"])
        assert hit_tokens(totals(engine)) == 0
        folder.unlink()
        assert ask_until_hit(engine, "five", truth, 1000)


@pytest.mark.parametrize("full", ["disk", "memory"])
def test_a_full_file_system(
    model: Path, tmp_path: Path, own_folder: Path, truth: Truth, full: str
) -> None:
    """The tiers may grow to 256 MiB and 1 GiB, but one of their file systems ends at 6 MiB."""
    with small_file_system(tmp_path / "small", "6m") as small:
        folder = own_folder if full == "memory" else small / "store"
        memory = {"memory_dir": str(small)} if full == "memory" else {}
        prompts = [tokens(50 + i, 1900) for i in range(4)]  # 3.7 MiB of KV each
        with start(model, folder, extra=memory) as engine:
            plain = [ask(engine, prompt, params=NEVER) for prompt in prompts]
            for _ in range(2):
                for prompt, expected in zip(prompts, plain, strict=True):
                    assert same(ask(engine, prompt), expected)
                assert same(ask(engine, "five"), truth["five"])
            assert engine.alive
            counted(engine)


def test_a_tier_far_too_small(model: Path, own_folder: Path, truth: Truth) -> None:
    """More KV than both tiers take: chunks are evicted, answers stay right."""
    folder = own_folder
    with start(model, folder, extra={"memory": "2MiB", "disk": "3MiB"}) as engine:
        for _ in range(2):
            for name in ("five", "ten", "fork", "whole", "batch4", "batch5"):
                answer = ask(engine, name, params=ONLY_READ if name == "five" else None)
                if name == "whole" and answer.cached_tokens:
                    assert answer.token_ids == truth[name].token_ids
                else:
                    assert same(answer, truth[name])
        assert totals(engine)["chunks_saved"] > 0
        with Store.open(folder, create=False) as store:
            numbers = admin.stats(store)["tiers"]
    assert numbers["memory"]["allocated_bytes"] <= 2 << 20
    assert numbers["disk"]["allocated_bytes"] <= 3 << 20


def test_a_mistake_in_the_settings_stops_the_start(model: Path, own_folder: Path) -> None:
    with pytest.raises(EngineDied, match=r"unknown entries .*'memmory'"):
        start(model, own_folder, extra={"memmory": "1GiB"})
