"""Fixtures of the store's tests: ``pytest_plugins = ["tests.store_fixtures"]`` loads them.

Apart from `tests.store_helpers`, which test modules import: pytest wants a plugin to itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store_helpers import Place


@pytest.fixture
def no_late_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads while the memory tier is emptied: its slots are given back without a wait."""
    monkeypatch.setattr("prefixstore.admin.PUNCH_AFTER_S", 0.0)
    monkeypatch.setattr("prefixstore.ledger.PUNCH_AFTER_S", 0.0)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of the test's own, removed afterwards."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    memory_dir = Path(tempfile.mkdtemp(prefix="prefixstore-test-", dir=shared))
    yield Place(tmp_path, memory_dir)
    shutil.rmtree(memory_dir)
