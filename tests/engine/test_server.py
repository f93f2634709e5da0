"""Engines behind a server: what one stores another loads, whatever becomes of the server."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Answer, Engine
from benchmarks.engine_process import connector_config
from benchmarks.server_process import ServerProcess
from benchmarks.vllm_server import free_port
from prefixstore import open as open_store
from prefixstore.errors import StoreError
from tests.engine.support import (
    NEVER,
    PROMPTS,
    Truth,
    ask,
    counting,
    distance,
    hit_tokens,
    misses,
    remove_memory_of,
    same,
    start,
    tokens,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
TOKEN = "tenant-" + "t" * 32
STAGES = {"pipeline_parallel_size": 2, "worker_cls": "tests.engine.stages.StageWorker"}
RANKS = {"prefixstore": {"salt": "ranks"}}  # apart: ranks round differently
BACK_S = 5.0  # hits come back by themselves within that time after a restart of the server
HIT_WITHIN_S = 30.0
ROUNDING = 1e-4  # of a sum over ranks, and of steps of other sizes, float32


def behind(url: str, **extra: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` of an engine without a folder."""
    return connector_config(None, url=url, load="always", stall_ms=5000, **extra)


@contextmanager
def engine_behind(model: Path, url: str, extra: dict[str, Any], **changes: Any) -> Iterator[Engine]:
    with start(model, None, kv_transfer_config=behind(url, **extra), **changes) as engine:
        yield engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("served")
    yield place
    remove_memory_of(place)


@pytest.fixture(scope="module")
def secret(place: Path) -> dict[str, str]:
    """A tenant's token, as engines are given it, and the server's file of tokens."""
    (place / "tokens").write_text(f"team:{TOKEN}\n")
    (place / "tokens").chmod(0o600)
    (place / "token").write_text(TOKEN + "\n")
    return {"token_file": str(place / "token")}


@pytest.fixture(scope="module")
def port() -> int:
    """Of the server, which the first engine is told before there is one."""
    return free_port()


@pytest.fixture(scope="module")
def two_ranks(model: Path, port: int, secret: dict[str, str]) -> Iterator[Engine]:
    """An engine that is started while nobody listens there."""
    url = f"http://127.0.0.1:{port}"
    with engine_behind(model, url, secret, tensor_parallel_size=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(
    place: Path, port: int, secret: dict[str, str], two_ranks: Engine
) -> Iterator[ServerProcess]:
    options = ["--memory=256MiB", "--disk=1GiB", f"--tokens={place / 'tokens'}"]
    with ServerProcess(place / "store", *options, log=place / "log", port=port) as server:
        yield server


@pytest.fixture(scope="module")
def engines(
    model: Path, server: ServerProcess, secret: dict[str, str], place: Path
) -> Iterator[tuple[Engine, Engine]]:
    """One with nothing but the server, and one with a folder in front of it."""
    front = {"dir": str(place / "front"), "memory": "64MiB", "disk": 0}
    with ExitStack() as stack:
        bare = stack.enter_context(engine_behind(model, server.url, secret))
        fronted = stack.enter_context(engine_behind(model, server.url, {**secret, **front}))
        yield bare, fronted


def wait_until_hit(
    engine: Engine, prompt: str, count: int, params: dict[str, Any] | None = None
) -> Answer:
    """Ask until so many tokens come from the store; that answer.

    One look is not enough even when the chunks are there: ranks that spin on few cores have kept
    the server from its core for longer than a look-up waits (vLLM's message queue yields in a
    circle for up to a second).
    """
    end = time.monotonic() + HIT_WITHIN_S
    while (answer := ask(engine, prompt, params=params)).cached_tokens != count:
        assert time.monotonic() < end, f"no hit: {engine.log_tail()}"
        time.sleep(0.05)
    return answer


def test_an_engine_without_its_server_serves(two_ranks: Engine, truth: Truth) -> None:
    for name in ("five", "ten"):
        answer = ask(two_ranks, name, params=RANKS)
        assert distance(answer, truth[name]) < ROUNDING
        assert answer.cached_tokens == 0


def test_it_finds_the_server_when_there_is_one(
    two_ranks: Engine, server: ServerProcess, truth: Truth
) -> None:
    cold = ask(two_ranks, "ten", params=NEVER)
    assert same(wait_until_hit(two_ranks, "ten", 640, RANKS), cold)


def test_one_rank_loads_what_two_stored(
    engines: tuple[Engine, Engine], two_ranks: Engine, truth: Truth
) -> None:
    answer = wait_until_hit(engines[0], "ten", 640, RANKS)
    assert distance(answer, truth["ten"]) < ROUNDING


def test_two_ranks_load_what_two_stages_stored(
    model: Path, server: ServerProcess, secret: dict[str, str], two_ranks: Engine, truth: Truth
) -> None:
    """Each stage writes its layers; a chunk is there when both have."""
    with engine_behind(model, server.url, secret, **STAGES) as stages:
        loaded = wait_until_hit(stages, "ten", 640, RANKS)
        assert distance(loaded, truth["ten"]) < ROUNDING
        for name in ("whole", "fork"):
            assert distance(ask(stages, name, params=RANKS), truth[name]) < ROUNDING
        wait_until_hit(stages, "fork", 448, RANKS)
    for name, count in (("whole", 384), ("fork", 448)):
        answer = wait_until_hit(two_ranks, name, count, RANKS)
        assert distance(answer, truth[name]) < ROUNDING


def test_one_engine_loads_what_another_stored(engines: tuple[Engine, Engine], truth: Truth) -> None:
    bare, fronted = engines
    for name in PROMPTS:
        assert same(ask(bare, name), truth[name]), name
    wait_until_hit(bare, "batch5", len(PROMPTS["batch5"]) // 64 * 64)
    with counting(fronted) as found:
        for name in ("five", "ten", "whole"):
            answer = ask(fronted, name)
            assert answer.cached_tokens == len(PROMPTS[name]) // 64 * 64
            # Of "whole" one token is left to compute: a step of another size, and other rounding.
            assert distance(answer, truth[name]) <= (ROUNDING if name == "whole" else 0)
    assert hit_tokens(found, "remote") == hit_tokens(found) == 320 + 640 + 384
    with counting(fronted) as found:
        assert same(ask(fronted, "ten"), truth["ten"])
    assert hit_tokens(found, "memory") == hit_tokens(found) == 640, "it was not copied to the front"


def test_with_the_server_gone_engines_serve(
    engines: tuple[Engine, Engine], server: ServerProcess, truth: Truth
) -> None:
    bare, fronted = engines
    server.kill()
    try:
        with counting(fronted) as found:
            assert same(ask(fronted, "ten"), truth["ten"])
        assert hit_tokens(found, "memory") == 640, "the front did not go on alone"
        for name in ("five", "ten"):
            assert same(ask(bare, name), truth[name])
        assert ask(bare, "ten").cached_tokens == 0
    finally:
        server.start()
    began = time.monotonic()
    assert same(wait_until_hit(bare, "ten", 640), truth["ten"])
    assert time.monotonic() - began < BACK_S


def test_with_the_server_frozen_engines_serve(
    engines: tuple[Engine, Engine], server: ServerProcess, truth: Truth
) -> None:
    bare, _ = engines
    server.signal(signal.SIGSTOP)
    try:
        with counting(bare) as found:
            for _ in range(3):
                assert same(ask(bare, "five"), truth["five"])
        assert set(misses(found)) <= {"stalled", "bypassed", "error"}
    finally:
        server.signal(signal.SIGCONT)
    wait_until_hit(bare, "five", 320)


def test_a_request_waits_for_what_is_being_stored(
    engines: tuple[Engine, Engine], truth: Truth
) -> None:
    """It is asked for at the very moment another engine has computed it."""
    bare, fronted = engines
    prompt = tokens(77, 400)
    waiting = {"prefixstore": {"wait_ms": 5000, "write": False}}
    [computed] = bare.generate([prompt], max_tokens=1, logprobs=5)
    answer = ask(fronted, prompt, 1, params=waiting)
    assert answer.cached_tokens == 384
    assert same(answer, computed)
    never = ask(fronted, tokens(78, 200), 1, params={"prefixstore": {"wait_ms": 200}})
    assert never.cached_tokens == 0


def test_a_wrong_token_is_said_so(server: ServerProcess) -> None:
    with open_store(server.url, token=TOKEN) as mine:
        mine.check_open()
    with open_store(server.url, token="x" * 40) as theirs, pytest.raises(StoreError, match="token"):
        theirs.check_open()
