"""The router in front of two vLLM servers that tell of their caches: what it says of them is what
vLLM counts, answers are those of the engine itself, and one that is killed fails nobody who has
not begun to get an answer. (Prefill and decode workers: `test_disaggregated`.)"""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout

from benchmarks.model import demo_text
from benchmarks.route import QUICK, Talks, Workers, talk
from benchmarks.server_process import RouterProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
TIMEOUT = ClientTimeout(total=60.0)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(QUICK, tmp_path_factory.mktemp("workers"), stack)


@pytest.fixture
def router(workers: Workers, tmp_path: Path) -> Iterator[RouterProcess]:
    file = tmp_path / "workers.json"
    file.write_text(json.dumps(workers.specs))
    with RouterProcess([], f"--workers={file}", "--seed=1", log=tmp_path / "log") as router:
        router.wait(QUICK.workers)
        yield router


def known_tokens(router: RouterProcess) -> float:
    with urllib.request.urlopen(f"{router.url}/metrics", timeout=10) as page:
        text = page.read().decode()
    [value] = re.findall(r"^prefixstore_route_known_tokens_total (\S+)$", text, re.M)
    return float(value)


async def stream(session: ClientSession, url: str, body: dict[str, Any]) -> list[Any]:
    """What a stream says: the text, why it ended, what it counted, and its last event. (How many
    tokens an event has depends on how fast vLLM is.)"""
    text, reasons, usage = "", [], None
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.read()
        assert answer.content_type == "text/event-stream"
        data = await answer.read()
    *told, last, nothing = data.split(b"\n\n")
    for event in told:
        one = json.loads(event.removeprefix(b"data: "))
        text += "".join(choice["text"] for choice in one["choices"])
        reasons += [choice["finish_reason"] for choice in one["choices"] if choice["finish_reason"]]
        usage = one.get("usage") or usage
    return [text, reasons, usage, last, nothing]


def test_what_is_known_of_workers_is_what_they_find(
    workers: Workers, router: RouterProcess
) -> None:
    """Conversations in random order, from caches that are too small for all of them."""
    before = workers.counted()
    took = asyncio.run(talk(router.url, Talks(QUICK, "exact"), lambda: None))
    queries, hits = (b - a for a, b in zip(before, workers.counted(), strict=True))
    assert len(took) == QUICK.talks * QUICK.turns
    assert hits > queries / 4
    # What is evicted between the choice and the step, or about to be stored, may be off.
    assert known_tokens(router) == pytest.approx(hits, rel=0.05)


def test_chats_are_known_as_the_engine_tokenizes_them(
    workers: Workers, router: RouterProcess
) -> None:
    """With the template of the engine, and a salt, which parts them from others."""

    async def run() -> None:
        async with ClientSession(timeout=TIMEOUT) as session:
            for salt in ("", "one", "other"):
                told = [{"role": "system", "content": demo_text()[:800]}]
                for turn in range(3):
                    told.append({"role": "user", "content": f"{turn} {demo_text()[1000:1300]}"})
                    body = {"model": "m", "messages": told, "max_tokens": 4}
                    body |= {"cache_salt": salt} if salt else {}
                    url = f"{router.url}/v1/chat/completions"
                    async with session.post(url, json=body) as answer:
                        assert answer.status == 200, await answer.read()
                        choice = (await answer.json())["choices"][0]
                    told.append({"role": "assistant", "content": choice["message"]["content"]})

    before = workers.counted()
    asyncio.run(run())
    queries, hits = (b - a for a, b in zip(before, workers.counted(), strict=True))
    assert known_tokens(router) == hits
    assert 0.3 * queries < hits < 0.7 * queries


def test_streams_are_those_of_the_engine(workers: Workers, router: RouterProcess) -> None:
    """Through the router and directly, of text and of token ids; refusals as well."""

    async def run() -> None:
        prompts: list[Any] = ["Licensed under the terms", list(range(5, 300))]
        async with ClientSession(timeout=TIMEOUT) as session:
            for prompt in prompts:
                body = {"model": "m", "stream": True, "temperature": 0, "max_tokens": 12,
                        "stream_options": {"include_usage": True}, "prompt": prompt}  # fmt: skip
                mine = await stream(session, router.url, body)
                assert mine == await stream(session, workers.specs[0]["url"], body)
                assert (len(mine[0]) > 10, mine[1:2], mine[3:]) == (
                    True, [["length"]], [b"data: [DONE]", b""],
                )  # fmt: skip
                assert mine[2]["completion_tokens"] == 12
            bad = {"model": "m", "prompt": "x", "max_tokens": -1}
            for url in (router.url, workers.specs[1]["url"]):
                async with session.post(f"{url}/v1/completions", json=bad) as answer:
                    assert answer.status == 400
                    assert b"max_tokens" in await answer.read()

    asyncio.run(run())


def test_a_killed_worker_fails_nobody_who_has_no_answer_yet(
    workers: Workers, router: RouterProcess
) -> None:
    """The last test of this module: it kills."""
    outcomes: list[str] = []

    async def client(session: ClientSession, number: int) -> None:
        for turn in range(12):
            body = {"model": "m", "stream": True, "max_tokens": 20, "temperature": 0,
                    "prompt": [number + 1, turn + 1, *range(200)], "ignore_eos": True}  # fmt: skip
            began = ended = False
            try:
                async with session.post(f"{router.url}/v1/completions", json=body) as answer:
                    async for line in answer.content:
                        began = began or line.startswith(b"data: {")
                        ended = ended or line == b"data: [DONE]\n"
                    outcomes.append("whole" if answer.status == 200 and ended else "failed")
            except ClientError:
                outcomes.append("cut" if began else "failed")
            if len(outcomes) == 12:
                workers.servers[1].kill()

    async def run() -> None:
        async with ClientSession(timeout=TIMEOUT) as session:
            await asyncio.gather(*(client(session, number) for number in range(6)))

    asyncio.run(run())
    assert len(outcomes) == 72
    assert outcomes.count("failed") == 0
    assert outcomes.count("cut") <= 6
    assert outcomes[-12:] == ["whole"] * 12
