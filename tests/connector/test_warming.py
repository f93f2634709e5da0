"""Warming's engine, with a made-up vLLM: what fails leaves nothing running."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from connector import compat, warming
from connector.warming import WarmingEngine
from prefixstore.errors import ConfigError, StoreError
from prefixstore.identity import IdentityError

FOLDER, ARGUMENTS, CHUNK = {"dir": "kv"}, {"dtype": "float32"}, 64


class Core:
    """vLLM's engine: refuses long prompts, ends one prompt a step."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.closed = 0
        self.vllm_config = None
        self.engine_core = SimpleNamespace(engine_core=self, shutdown=self.shutdown)
        self.scheduler = SimpleNamespace(kv_cache_config=None, has_requests=lambda: False)

    def shutdown(self) -> None:
        self.closed += 1

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 10:
            raise ValueError("too long")
        self.running.append(name)

    def abort_request(self, names: list[str]) -> None:
        self.running = [name for name in self.running if name not in names]

    def step(self) -> list[Any]:
        name = self.running.pop()
        return [SimpleNamespace(finished=True, request_id=name, kv_transfer_params=None)]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core()
    vllm = SimpleNamespace(
        LLM=lambda **_: SimpleNamespace(llm_engine=core), SamplingParams=dict, TokensPrompt=dict
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(KVTransferConfig=dict))
    return core


@pytest.fixture
def engine(core: Core, monkeypatch: pytest.MonkeyPatch) -> WarmingEngine:
    monkeypatch.setattr(WarmingEngine, "_facts", lambda *_: None)
    return WarmingEngine("m", FOLDER, ARGUMENTS, CHUNK)


def prompts(*lengths: int) -> list[tuple[list[int], dict[str, Any]]]:
    return [(list(range(length)), {}) for length in lengths]


def test_every_prompt_is_told_once(core: Core, engine: WarmingEngine) -> None:
    assert sorted(engine.compute(prompts(3, 4, 5))) == [0, 1, 2]
    assert (core.running, core.closed) == ([], 0)
    engine.close()
    assert core.closed == 1


def test_a_refused_prompt_leaves_none_running(core: Core, engine: WarmingEngine) -> None:
    with pytest.raises(StoreError, match="refuses a prompt of 11 tokens: too long"):
        list(engine.compute(prompts(3, 11, 4)))
    assert core.running == []
    assert list(engine.compute(prompts(3))) == [0]


def test_who_stops_asking_leaves_none_running(core: Core, engine: WarmingEngine) -> None:
    asked = engine.compute(prompts(3, 4, 5))
    assert next(asked) == 2
    asked.close()  # type: ignore[attr-defined]
    assert core.running == []


@pytest.mark.parametrize("error", [IdentityError("no weights"), KeyError("new vLLM")])
def test_an_engine_that_cannot_be_used_is_closed(
    core: Core, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(warming, "geometry_of", fails)
    with pytest.raises(type(error)):
        WarmingEngine("m", FOLDER, ARGUMENTS, CHUNK)
    assert core.closed == 1
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_a_model_that_cannot_be_identified_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error that the command line shows without a traceback."""
    cache = SimpleNamespace(block_size=16)
    args = SimpleNamespace(create_engine_config=lambda: SimpleNamespace(cache_config=cache))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=lambda **_: args))

    def fails(*_: object) -> None:
        raise IdentityError("no weights")

    monkeypatch.setattr(compat, "identities", fails)
    with pytest.raises(ConfigError, match="no weights"):
        warming.facts("m", {}, CHUNK)
