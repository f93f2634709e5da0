"""What an engine makes of the verdict on its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.model import demo_text, make_model
from connector import blend_compat, compat
from connector.blend_options import BlendOptions
from connector.options import EngineOptions
from prefixstore import Layout, ModelIdentity
from prefixstore.errors import ConfigError
from prefixstore.verdict import Verdict, digest_of, path_of, write
from tests.store_helpers import empty_store

LAYERS = 8
LAYOUT = Layout(LAYERS, 2, 2, 16, 32)
IDENTITY = ModelIdentity(
    architecture="LlamaForCausalLM", num_layers=LAYERS, num_kv_heads=2, head_size=8, rope="{}",
    attention="{}", weights="w", model_dtype="float32", kv_dtype="float32", chunk_tokens=16,
)  # fmt: skip
PASSED = Verdict(
    passed=True, selector="first", budget=0.25, reason="it stays close", model="m",
    date="2026-11-22T00:00:00+00:00", texts={}, figures=[], versions={},
)  # fmt: skip
FAILED = replace(PASSED, passed=False, selector="", budget=0.0, reason="KL 2.3 nats is far")


@pytest.fixture(autouse=True)
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """vLLM may keep its loggers from pytest's handler, so it gets its own; and each line once."""
    logger = logging.getLogger("vllm.prefixstore")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "vllm.prefixstore")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(empty_store(tmp_path))


def blends(
    folder: str, given: Any, monkeypatch: pytest.MonkeyPatch, step_tokens: int = 8192
) -> tuple[Any, bool]:
    """What the connector decides at its start: the options it blends with, and if it refuses."""
    monkeypatch.setattr(blend_compat, "refusal", lambda *_: "")
    monkeypatch.setattr(blend_compat, "isolation_fault", lambda *_: "")
    options = EngineOptions(dir=folder, blend=given)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=step_tokens),
    )
    claims = blend_compat.claims_of(config, None, options, LAYOUT, IDENTITY)
    return claims.options, claims.refused


def test_without_a_verdict_it_blends_and_recommends_the_check(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    assert blends(folder, True, monkeypatch) == (BlendOptions(), False)
    [line] = log.messages
    assert f"prefixstore blend-check {folder}" in line
    assert log.records[0].levelno == logging.INFO


def test_slices_have_no_more_rows_than_a_step(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    found = blends(folder, True, monkeypatch, step_tokens=256)
    assert found == (BlendOptions(step_rows=256), False)


def test_a_model_that_failed_is_not_blended(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    path = write(folder, IDENTITY, FAILED)
    for given in (True, {"budget": 0.5}):
        log.clear()
        assert blends(folder, given, monkeypatch) == (None, True)
        [line] = log.messages
        assert "no blending, only exact prefixes" in line
        for told in (str(path), FAILED.reason, '"ignore_verdict": true'):
            assert told in line


def test_it_is_blended_all_the_same_when_told_to(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    write(folder, IDENTITY, FAILED)
    given = {"ignore_verdict": True}
    assert blends(folder, given, monkeypatch) == (BlendOptions(ignore_verdict=True), False)
    assert log.messages == []


def test_another_models_verdict_does_not_count(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, replace(IDENTITY, weights="other"), FAILED)
    assert blends(folder, True, monkeypatch) == (BlendOptions(), False)


def test_what_is_recommended_is_used_unless_something_else_is_set(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    path = write(folder, IDENTITY, PASSED)
    expected = BlendOptions("first", 0.25, span=4)
    assert blends(folder, {"span": 4}, monkeypatch) == (expected, False)
    [line] = log.messages
    assert "selector first and budget 0.25" in line
    assert str(path) in line
    assert blends(folder, True, monkeypatch)[0] == BlendOptions("first", 0.25)
    assert blends(folder, {"budget": 0.4}, monkeypatch)[0] == BlendOptions(budget=0.4)
    assert blends(folder, {"selector": "query"}, monkeypatch)[0] == BlendOptions("query")


def test_an_engine_that_does_not_blend_reads_no_verdict(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    write(folder, IDENTITY, FAILED)
    for given in (None, False):
        assert blends(folder, given, monkeypatch) == (None, False)
    assert log.messages == []


@pytest.mark.parametrize(
    ("selector", "budget", "told"),
    [("best", 0.2, "no selector 'best'"), ("deviation", 0.1, "computes 2 of 8"),
     ("oracle", 0.2, "for benchmarks only")],
)  # fmt: skip
def test_a_recommendation_this_version_cannot_follow_is_left(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture,
    selector: str, budget: float, told: str,
) -> None:  # fmt: skip
    write(folder, IDENTITY, replace(PASSED, selector=selector, budget=budget))
    assert blends(folder, True, monkeypatch) == (BlendOptions(), False)
    [line] = log.messages
    assert told in line


def test_a_damaged_verdict_is_as_none(
    folder: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    write(folder, IDENTITY, FAILED)
    path_of(folder, IDENTITY).write_bytes(b"\0" * 100)
    assert blends(folder, True, monkeypatch) == (BlendOptions(), False)
    assert any("is ignored" in line for line in log.messages)


def test_the_option_is_the_engines_and_a_switch() -> None:
    with pytest.raises(ConfigError, match=r"blend\.ignore_verdict is 'yes'"):
        BlendOptions.parse({"ignore_verdict": "yes"}, LAYERS)
    with pytest.raises(ConfigError, match="unknown entries"):
        BlendOptions().of_request({"ignore_verdict": True}, LAYERS)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "engine", [{}, {"dtype": "bfloat16", "block_size": 32, "max_model_len": 512}]
)
def test_vllm_and_the_folder_name_the_same_verdict(
    tmp_path: Path, arch: str, engine: dict[str, Any]
) -> None:
    """vLLM's own configuration of a model, and what `blend-check` reads from its folder."""
    from vllm.engine.arg_utils import EngineArgs

    model = make_model(tmp_path / "m", text=demo_text(), arch=arch, layers=2, hidden=64)
    config = EngineArgs(model=str(model), **engine).create_engine_config()
    ours = compat.identities(config, 128)(None)
    theirs = ModelIdentity.from_folder(model, model_dtype="float32")
    assert digest_of(ours) == digest_of(theirs)
    assert ours.namespace != theirs.namespace
