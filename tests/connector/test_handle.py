"""The grip on the store: bypass and its growth, a store lost and found, one that never comes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from connector import handle as module
from connector.handle import BYPASS_GROWTH_MAX, StoreHandle
from connector.options import EngineOptions
from prefixstore import Store
from prefixstore.errors import StoreClosedError
from prefixstore.interface import StoreLike

BYPASS_S = 10.0
DEADLINE_S = 20.0


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    return clock


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    memory = tmp_path / "memory"
    memory.mkdir()
    return EngineOptions(
        dir=str(tmp_path / "store"), memory="1MiB", disk="1MiB",
        memory_dir=str(memory), bypass_s=BYPASS_S,
    )  # fmt: skip


@pytest.fixture
def handle(options: EngineOptions, clock: Clock) -> Iterator[StoreHandle]:
    handle = StoreHandle(options)
    yield handle
    handle.close()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_store_is_there_at_once(handle: StoreHandle, options: EngineOptions) -> None:
    store = handle.get()
    assert isinstance(store, Store)
    assert str(store.folder) == options.dir
    assert store.settings.memory_bytes == store.settings.disk_bytes == 1 << 20


def bypassed_s(handle: StoreHandle, clock: Clock) -> float:
    """How long from now the store stays out of reach, found by trying."""
    began = clock.now
    while handle.get() is None:
        clock.now += 0.5
        assert clock.now - began < 1000
    return clock.now - began


def test_each_stall_doubles_the_bypass_up_to_a_bound(handle: StoreHandle, clock: Clock) -> None:
    found = []
    for _ in range(6):
        handle.stalled("a load")
        assert handle.get() is None
        found.append(bypassed_s(handle, clock))
    most = BYPASS_GROWTH_MAX * BYPASS_S
    assert found == [min(BYPASS_S * 2**i, most) for i in range(6)]
    assert found[-1] == most


def test_a_stall_while_bypassed_adds_nothing(handle: StoreHandle, clock: Clock) -> None:
    handle.stalled("a load")
    clock.now += BYPASS_S / 2
    handle.stalled("a look-up")
    assert bypassed_s(handle, clock) == BYPASS_S / 2


def test_an_answer_in_time_forgives(handle: StoreHandle, clock: Clock) -> None:
    for _ in range(3):
        handle.stalled("a load")
        bypassed_s(handle, clock)
    handle.answered()
    handle.stalled("a load")
    assert bypassed_s(handle, clock) == BYPASS_S


def test_a_folder_that_becomes_usable(options: EngineOptions, clock: Clock) -> None:
    path = Path(options.dir)
    path.write_text("a file in its place")
    handle = StoreHandle(options)
    try:
        assert handle.get() is None
        path.unlink()
        eventually(lambda: handle.get() is not None)
    finally:
        handle.close()
    assert handle.get() is None


def test_a_lost_store_is_replaced(handle: StoreHandle, options: EngineOptions) -> None:
    first = handle.get()
    assert first is not None
    shutil.rmtree(options.dir)
    eventually(lambda: handle.get() not in (None, first))
    assert (Path(options.dir) / "store.json").exists()
    assert first.gone


def test_one_complaint_for_one_trouble(
    options: EngineOptions,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(options.dir)
    path.write_text("a file in its place")
    tries, original = [], StoreHandle._open

    def counted(handle: StoreHandle) -> StoreLike:
        tries.append(1)
        return original(handle)

    monkeypatch.setattr(StoreHandle, "_open", counted)
    handle = StoreHandle(options)
    try:
        assert handle.named == "no store yet"  # beside that it is served without
        eventually(lambda: len(tries) >= 4)
        path.unlink()
        eventually(lambda: handle.get() is not None)
        assert handle.named == f"store {path}"
    finally:
        handle.close()
    said = [record.message for record in caplog.records if record.name == "vllm.prefixstore"]
    assert [("serving without" in text, "usable again" in text) for text in said] == [
        (True, False),
        (False, True),
    ]


def test_one_that_is_closed_while_it_opens_leaves_nothing_open(
    options: EngineOptions, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on, opened, real = threading.Event(), threading.Event(), [], StoreHandle._open

    def slow(handle: StoreHandle) -> StoreLike:
        opening.set()
        assert go_on.wait(DEADLINE_S)
        opened.append(real(handle))
        return opened[0]

    monkeypatch.setattr(module, "FIRST_OPEN_WAIT_S", 0.0)
    monkeypatch.setattr(StoreHandle, "_open", slow)
    handle = StoreHandle(options)
    assert opening.wait(DEADLINE_S)
    handle.close()
    go_on.set()
    handle._thread.join(DEADLINE_S)
    with pytest.raises(StoreClosedError):
        opened[0].check_open()
    assert handle.get() is None


def test_two_handles_of_a_process_share_a_store(options: EngineOptions, clock: Clock) -> None:
    one, other = StoreHandle(options), StoreHandle(options)
    assert one.get() is other.get() is not None
    one.close()
    store = other.get()
    assert store is not None
    store.check_open()
    other.close()
