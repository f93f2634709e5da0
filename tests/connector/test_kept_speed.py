"""The speed of computing that engines keep in their store's folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connector import kept_speed
from connector.kept_speed import (
    FILE,
    FILE_BYTES_MAX,
    MOVED,
    NAME_CHARS_MAX,
    SPEEDS_MAX,
    KeptSpeed,
    name_of,
    read,
    write,
)
from prefixstore import Store
from prefixstore.config import SETTINGS_FILE
from prefixstore.errors import StoreError
from prefixstore.testing_data import identity_for
from tests.store_helpers import LAYOUT, empty_store

pytestmark = pytest.mark.timeout(60)
DEADLINE_S = 10.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return empty_store(tmp_path)


def on_disk(folder: Path) -> dict[str, float]:
    """The speeds as any reader of JSON finds them."""
    speeds: dict[str, float] = json.loads((folder / FILE).read_text())["speeds"]
    return speeds


def written(kept: KeptSpeed) -> None:
    """Wait for the thread."""
    kept._thread.join(DEADLINE_S)
    assert not kept._thread.is_alive()


def test_an_engine_begins_with_what_one_like_it_measured(folder: Path) -> None:
    first = KeptSpeed(str(folder), "a")
    assert first.tokens_per_s is None
    first.heard(1000.0)
    written(first)  # though nobody closes it: engines are killed
    assert on_disk(folder) == {"a": 1000.0}
    assert KeptSpeed(str(folder), "a").tokens_per_s == 1000.0
    assert KeptSpeed(str(folder), "b").tokens_per_s is None
    assert first.tokens_per_s is None  # it has its own


def test_it_is_written_seldom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, writes = 1000.0, []
    monkeypatch.setattr(kept_speed, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(kept_speed, "write", lambda *arguments: writes.append(arguments[2]))
    kept = KeptSpeed(str(folder), "a")
    for speed in (100.0, 500.0, 300.0):  # at once
        kept.heard(speed)
        written(kept)
    assert writes == [100.0]
    now += kept_speed.WRITE_EVERY_S
    for speed in (100.0 * MOVED, 100.0 / MOVED):  # hardly another
        kept.heard(speed)
        written(kept)
    assert writes == [100.0]
    kept.heard(99.0 / MOVED)
    written(kept)
    assert writes == [100.0, 99.0 / MOVED]
    kept.heard(200.0)
    kept.close()  # what was heard last
    assert writes == [100.0, 99.0 / MOVED, 200.0]
    kept.close()
    assert len(writes) == 3


def test_nothing_heard_nothing_kept(folder: Path) -> None:
    KeptSpeed(str(folder), "a").close()
    assert not (folder / FILE).exists()


def test_the_step_waits_neither_for_the_disk_nor_for_another_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread hangs where the file is written; the scheduler's does not."""
    stuck, threads = threading.Event(), set()

    def hangs(*_: Any) -> None:
        threads.add(threading.current_thread())
        stuck.wait(DEADLINE_S)

    kept = KeptSpeed(str(folder), "a")
    monkeypatch.setattr(kept_speed, "write_whole", hangs)
    kept.heard(1.0)
    kept._next_write = 0.0
    for speed in (10.0, 100.0):
        kept.heard(speed)
    assert kept._thread.is_alive()
    stuck.set()
    written(kept)
    assert len(threads) == 1  # one at a time
    assert threading.current_thread() not in threads


def test_a_folder_that_does_not_answer_costs_the_start_a_bounded_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()

    def hangs(_: Path) -> dict[str, float]:
        stuck.wait(DEADLINE_S)
        return {"a": 5.0}

    monkeypatch.setattr(kept_speed, "READ_WAIT_S", 0.05)
    monkeypatch.setattr(kept_speed, "CLOSE_WAIT_S", 0.05)
    monkeypatch.setattr(kept_speed, "read", hangs)
    kept = KeptSpeed(str(folder), "a")
    assert kept.tokens_per_s is None
    kept.heard(7.0)
    kept.close()
    assert kept._thread.is_alive()  # nobody waited for it
    stuck.set()
    written(kept)


def test_the_oldest_go(folder: Path) -> None:
    names = [f"{number:032x} " + "x" * NAME_CHARS_MAX for number in range(SPEEDS_MAX + 3)]
    names = [name[:NAME_CHARS_MAX] for name in names]
    for number, name in enumerate(names):
        write(folder, name, 1e5 / 3 + number)
        write(folder, names[0], 1.0)  # never the oldest
    kept = on_disk(folder)
    assert len(kept) == SPEEDS_MAX
    assert set(kept) == {names[0], *names[-SPEEDS_MAX + 1 :]}
    assert (folder / FILE).stat().st_size <= 8192
    assert read(folder) == kept


def test_engines_that_write_at_once_lose_nothing(folder: Path) -> None:
    engines = [KeptSpeed(str(folder), f"{number}") for number in range(8)]
    for number, engine in enumerate(engines):
        engine.heard(float(number + 1))
    for engine in engines:
        written(engine)
    assert on_disk(folder) == {f"{number}": number + 1 for number in range(8)}


def having(**changes: Any) -> Callable[[str], bytes]:
    return lambda text: json.dumps({**json.loads(text), **changes}).encode()


DAMAGE: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2].encode(),
    "no text": lambda text: b"\xff\xfe\xff",
    "deep": lambda text: b"[" * (FILE_BYTES_MAX - 1),
    "large": lambda text: text.encode() + b" " * FILE_BYTES_MAX,
    "no object": having(speeds=[1]),
    "version": having(format_version=2),
    "text": having(speeds={"a": "fast"}),
    "true": having(speeds={"a": True}),
    "zero": having(speeds={"a": 0}),
    "huge": having(speeds={"a": 10**400}),
    "nan": having(speeds={"a": float("nan")}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_none_and_is_replaced(folder: Path, name: str) -> None:
    write(folder, "a", 1000.0)
    path = folder / FILE
    path.write_bytes(DAMAGE[name](path.read_text()))
    kept = KeptSpeed(str(folder), "a")
    assert kept.tokens_per_s is None
    kept.heard(500.0)
    written(kept)
    assert on_disk(folder) == {"a": 500.0}


def test_what_cannot_be_read_or_written_hurts_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / FILE).mkdir()  # neither
    kept = KeptSpeed(str(folder), "a")
    assert kept.tokens_per_s is None
    kept.heard(500.0)
    kept.close()
    assert not kept._thread.is_alive()
    (folder / FILE).rmdir()
    assert not list(folder.glob(f".{FILE}*"))
    kept.heard(500.0)
    kept.close()  # it is tried again
    assert on_disk(folder) == {"a": 500.0}


def test_only_a_store_takes_one(tmp_path: Path) -> None:
    """A folder with a file and without a store could not become one."""
    (tmp_path / "new").mkdir()
    for path in (tmp_path / "new", tmp_path / "none"):
        with pytest.raises(StoreError, match="holds no store"):
            write(path, "a", 1.0)
        kept = KeptSpeed(str(path), "a")
        kept.heard(1.0)
        kept.close()
        assert not kept._thread.is_alive()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert not list((tmp_path / "new").iterdir())


def test_a_store_of_another_format_is_left_alone(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    (folder / SETTINGS_FILE).write_text(json.dumps({**settings, "format_version": 99}))
    kept = KeptSpeed(str(folder), "a")
    kept.heard(1.0)
    kept.close()
    assert not (folder / FILE).exists()


def test_the_store_does_not_mind_it(folder: Path) -> None:
    (folder / f".{FILE}.1").write_text("a process was killed")
    write(folder, "a", 1000.0)
    assert not (folder / f".{FILE}.1").exists()
    with Store.open(folder) as store:
        assert store.namespaces() == []
    assert read(folder) == {"a": 1000.0}


def test_a_name_is_of_a_model_and_of_what_computes_it() -> None:
    identity = identity_for("model", LAYOUT)
    name = name_of(identity, "NVIDIA H200, TP 2, PP 1")
    assert name == f"{identity.namespace.hex()} NVIDIA H200, TP 2, PP 1"
    others = [replace(identity, weights="x"), replace(identity, kv_dtype="fp8_e4m3")]
    assert len({name, *(name_of(other, "NVIDIA H200, TP 2, PP 1") for other in others)}) == 3
    assert len(name_of(identity, "\N{GREEK SMALL LETTER MU}" * 1000)) == NAME_CHARS_MAX
    assert name_of(identity, "\N{GREEK SMALL LETTER MU}").isascii()
