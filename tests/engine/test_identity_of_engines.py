"""Engines that share a folder but not a model: none may load what another has stored.

All differ in one thing from the one that filled the store. Each is asked for the same prompt
twice with the store switched off and on: nothing is loaded at first, its own chunks then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Answer, Engine
from tests.engine.lora import make_adapter
from tests.engine.support import (
    NEVER,
    Truth,
    ask,
    counted,
    counting,
    hit_tokens,
    same,
    start,
    tiny_model,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, folder: Path, truth: Truth) -> Path:
    """A model folder of this module's own; the store holds what it answers to "five"."""
    model = tiny_model(tmp_path_factory.mktemp("models") / "model")
    with start(model, folder) as engine:
        assert same(ask(engine, "five"), truth["five"])
        wait_for_chunks(folder, 5)
    return model


def check_stranger(engine: Engine, **more: Any) -> Answer:
    """It loads nothing, then its own, and answers as without the store. Returns the answer."""
    plain = ask(engine, "five", params=NEVER, **more)
    with counting(engine) as found:
        first = ask(engine, "five", **more)
    assert hit_tokens(found) == 0
    assert found["chunks_saved"] == 5
    second = ask(engine, "five", **more)
    assert second.cached_tokens == 320
    assert same(first, plain)
    assert same(second, plain)
    return plain


def other_weights(model: Path) -> dict[str, Any]:
    """Another seed under the same folder name and with the same sizes."""
    other = tiny_model(model.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    return {}


def other_rope_by_override(model: Path) -> dict[str, Any]:
    rope = {"rope_theta": 40000.0, "rope_type": "default"}
    return {"hf_overrides": {"rope_theta": 40000.0, "rope_parameters": rope}}


def other_dtype(model: Path) -> dict[str, Any]:
    return {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    "change", [other_dtype, other_weights, other_rope_by_override],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_stranger_loads_nothing(
    base: Path, folder: Path, truth: Truth, tmp_path: Path, change: Callable[[Path], dict[str, Any]]
) -> None:
    model = Path(shutil.copytree(base, tmp_path / base.name))
    with start(model, folder, **change(model)) as engine:
        answer = check_stranger(engine)
    assert not same(answer, truth["five"])  # or the change has changed nothing


def test_a_copy_of_the_model_loads(base: Path, folder: Path, truth: Truth, tmp_path: Path) -> None:
    """Adapters are kept apart from each other and from the model without one; and that one loads.

    The model is a copy in another place: what it is counts, not where it lies.
    """
    model = Path(shutil.copytree(base, tmp_path / "copy"))
    adapters = [make_adapter(tmp_path / f"adapter{i}", model, i) for i in range(2)]
    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with start(model, folder, **lora) as engine:
        with counting(engine) as found:
            answer = ask(engine, "five")
        assert hit_tokens(found) == answer.cached_tokens == 320
        assert answer.token_ids == truth["five"].token_ids
        answers = [answer]
        for number, adapter in enumerate(adapters, 1):
            answers.append(check_stranger(engine, lora=(f"a{number}", number, str(adapter))))
        # The same bytes under another name and path are the same adapter.
        twin = Path(shutil.copytree(adapters[0], tmp_path / "twin"))
        again = ask(engine, "five", lora=("twin", 3, str(twin)))
        assert again.cached_tokens == 320
        assert same(again, answers[1])
        counted(engine)
    different = {tuple(answer.token_ids) for answer in answers}
    assert len(different) == 3


@pytest.fixture(autouse=True)
def _no_leftovers(folder: Path) -> Iterator[None]:
    yield
    assert (folder / "store.json").exists()
