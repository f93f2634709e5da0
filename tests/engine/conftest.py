"""Fixtures all engine tests share: the model, and the answers of a plain engine to its prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.support import Truth, plain_answers, remove_memory_of, tiny_model


@pytest.fixture(scope="session")
def model() -> Path:
    """The folder of the tiny model."""
    return tiny_model()


@pytest.fixture(scope="session")
def truth(model: Path) -> Truth:
    """What vLLM without a connector answers to `PROMPTS`, each alone in the engine."""
    return plain_answers(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store folder of one module; its memory tier goes when the module ends."""
    folder = tmp_path_factory.mktemp("store") / "store"
    yield folder
    remove_memory_of(folder)


@pytest.fixture
def own_folder(tmp_path: Path) -> Iterator[Path]:
    """The store folder of one test, in ``tmp_path``; its memory tier goes when the test ends."""
    yield tmp_path / "store"
    remove_memory_of(tmp_path)
