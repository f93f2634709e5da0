"""Fixtures: workers and a scheduler on a store of their own.

Tests of modules that know nothing of vLLM run without it, so it is imported where it is needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from connector.options import EngineOptions

if TYPE_CHECKING:
    from tests.connector.played_loads import LoadsByDma
    from tests.connector.played_scheduler import Played
    from tests.connector.played_worker import Stuck, Worker


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    """A small store."""
    memory = tmp_path / "memory"
    memory.mkdir()
    return EngineOptions(
        dir=str(tmp_path / "store"), memory="4MiB", disk="4MiB", memory_dir=str(memory),
        load="always", stall_ms=200,
    )  # fmt: skip


@pytest.fixture
def start(options: EngineOptions) -> Iterator[Callable[..., Worker]]:
    """Starts workers on the same store; arguments are those of `Worker` and changed options."""
    pytest.importorskip("vllm")
    from dataclasses import replace

    from tests.connector.played_worker import IDENTITY, LAYOUT, STAGED_CHUNKS, Worker

    workers: list[Worker] = []

    def make(
        *heads: int, load_threads: int = 1, device: int = 0, codec: str = "none", **kwargs: Any
    ) -> Worker:
        staging = STAGED_CHUNKS * LAYOUT.payload_bytes
        changed = replace(
            options, staging=staging, load_threads=load_threads, device=device, codec=codec
        )
        workers.append(Worker(changed, *heads, **kwargs))
        # The scheduler's half registers it.
        workers[-1].store.namespace(IDENTITY, workers[-1].layout)
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    """What does not answer until told to."""
    pytest.importorskip("vllm")
    from tests.connector.played_worker import Stuck

    stuck = Stuck()
    yield stuck
    stuck.release.set()


@pytest.fixture
def played(options: EngineOptions) -> Iterator[Played]:
    """A scheduler."""
    pytest.importorskip("vllm")
    from tests.connector.played_scheduler import Played

    played = Played(options)
    yield played
    played.side.close()
    played.handle.close()


def interpreted(name: str) -> ModuleType:
    """A module of `connector`, another time: its kernels are interpreted, on the CPU."""
    pytest.importorskip("triton")
    spec = importlib.util.find_spec(f"connector.{name}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    """`connector.page_kernel`, interpreted."""
    return interpreted("page_kernel")


@pytest.fixture(scope="module")
def sum_kernel() -> ModuleType:
    """`connector.sum_kernel`, interpreted."""
    return interpreted("sum_kernel")


@pytest.fixture
def loads_by_dma(monkeypatch: pytest.MonkeyPatch, sum_kernel: ModuleType) -> LoadsByDma:
    """Workers that start now load by what stands for DMA."""
    pytest.importorskip("vllm")
    from tests.connector.played_loads import LoadsByDma

    return LoadsByDma(monkeypatch, sum_kernel)
