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
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of the test's own, removed afterwards."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    memory_dir = Path(tempfile.mkdtemp(prefix="prefixstore-test-", dir=shared))
    yield Place(tmp_path, memory_dir)
    shutil.rmtree(memory_dir)
