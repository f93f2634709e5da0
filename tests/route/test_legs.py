"""Prefill workers and decode workers: who gets which leg, and what a failed first one costs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from prefixstore.route import limits
from prefixstore.route.legs import one_token, waiting
from tests.route.fakes import Fake, site

LONG = list(range(1000))


async def fail(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({}, status=500)


def test_the_prompt_is_computed_first_and_then_waited_for() -> None:
    async def run() -> None:
        p, d = Fake(), Fake()
        async with site(p, d, roles="pd") as it:
            more: dict[str, Any] = {
                "stream": True,
                "logprobs": 5,
                "kv_transfer_params": {"prefixstore": {"tag": "t"}},
            }
            status, data, by = await it.complete(LONG, **more)
            assert (status, data[:9], by) == (200, b"data: a\n\n", d.url.removeprefix("http://"))
        [first], [second] = p.bodies, d.bodies
        assert (first["max_tokens"], first["stream"], first["prompt"]) == (1, False, LONG)
        assert "logprobs" not in first
        ours = {"tag": "t", "wait_ms": 500}
        assert second == {"model": "m", "prompt": LONG, "max_tokens": 3, **more,
                          "kv_transfer_params": {"prefixstore": ours}}  # fmt: skip
        assert p.asked[0][2]["X-Request-Id"] == d.asked[0][2]["X-Request-Id"]

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["short", "known", "other path", "none"])
def test_no_first_leg_where_it_gains_nothing(kind: str) -> None:
    async def run() -> None:
        p, d = Fake(), Fake()
        async with site(p, d, roles="pd") as it:
            if kind == "known":
                await it.complete(LONG)
                p.asked.clear()
                assert (await it.complete([*LONG, 1, 2]))[0] == 200
            elif kind == "short":
                assert (await it.complete(LONG[:256]))[0] == 200
            elif kind == "none":
                headers = {"X-Prefixstore-Prefill": "none"}
                assert (await it.complete(LONG, headers))[0] == 200
            else:
                async with it.client.post(f"{it.url}/v1/embeddings", json={"model": "m"}) as got:
                    assert got.status == 200
            assert p.asked == []
            assert "kv_transfer_params" not in d.bodies[-1]

    asyncio.run(run())


def test_workers_of_other_identities_are_not_paired() -> None:
    async def run() -> None:
        fakes = p, other, nameless, d = Fake(), Fake(identity="2e" * 16), Fake(identity=""), Fake()
        async with site(*fakes, roles="pppd") as it:
            for number in range(6):
                assert (await it.complete([number, *LONG]))[0] == 200
            assert (len(p.asked), len(d.asked)) == (6, 6)
            assert (other.asked, nameless.asked) == ([], [])
            await p.stop()
            assert (await it.complete([9, *LONG]))[0] == 200  # by itself
            assert (other.asked, nameless.asked) == ([], [])
            [one] = [w for w in it.router.state.pool if w.spec.url == d.url]
            one.identity = ""
            assert (await it.complete([10, *LONG]))[0] == 200
            assert (other.asked, nameless.asked) == ([], [])

    asyncio.run(run())


def test_a_first_leg_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async def silent(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await asyncio.sleep(60)
            return web.Response()

        monkeypatch.setattr(limits, "PREFILL_S", 0.1)
        p, q, d = Fake(handler=silent), Fake(handler=silent), Fake()
        async with site(p, q, d, roles="ppd") as it:
            assert (await it.complete(LONG))[0] == 200
            assert len(p.asked) + len(q.asked) == 1
            await it.wait(lambda: p.gone + q.gone == 1)
            assert "kv_transfer_params" not in d.bodies[0]

    asyncio.run(run())


@pytest.mark.parametrize("how", ["status", "gone"])
def test_a_first_leg_that_fails_costs_time_only(how: str) -> None:
    async def run() -> None:
        p, q, d = Fake(handler=fail), Fake(handler=fail), Fake()
        async with site(p, q, d, roles="ppd") as it:
            if how == "gone":
                await p.stop()
                await q.stop()
            assert (await it.complete(LONG))[0] == 200
            assert len(d.asked) == 1
            assert "kv_transfer_params" not in d.bodies[0]
            q.handler = None
            if how == "status":  # the other one is tried
                assert (await it.complete([1, *LONG]))[0] == 200
                assert "kv_transfer_params" in d.bodies[1]

    asyncio.run(run())


def test_decode_is_tried_elsewhere_without_a_second_first_leg() -> None:
    async def run() -> None:
        p, bad, good = Fake(), Fake(handler=fail), Fake(running=50.0)
        async with site(p, bad, good, roles="pdd") as it:
            assert (await it.complete(LONG))[0] == 200
            assert [len(one.asked) for one in (p, bad, good)] == [1, 1, 1]
            assert "kv_transfer_params" in good.bodies[0]

    asyncio.run(run())


def test_prefill_workers_answer_where_nobody_else_is_left() -> None:
    async def run() -> None:
        p, d = Fake(), Fake()
        async with site(p, d, roles="pd") as it:
            await d.stop()
            for _ in range(3):
                status, _, by = await it.complete(LONG)
            assert (status, by) == (200, p.url.removeprefix("http://"))

    asyncio.run(run())


def test_a_request_may_name_who_prefills() -> None:
    async def run() -> None:
        p, q, d = Fake(), Fake(running=50.0), Fake()
        async with site(p, q, d, roles="ppd") as it:
            headers = {"X-Prefixstore-Prefill": q.url.removeprefix("http://")}
            assert (await it.complete(LONG, headers))[0] == 200
            assert (len(p.asked), len(q.asked)) == (0, 1)
            assert (await it.complete(LONG[1:], {"X-Prefixstore-Prefill": "x:1"}))[0] == 404

    asyncio.run(run())


def test_prompts_of_a_conversation_are_prefilled_where_they_were() -> None:
    """The decode worker has the last turn; its prefill worker has the beginning of a new one."""

    async def run() -> None:
        fakes = [Fake() for _ in range(4)]
        async with site(*fakes, roles="ppdd", more={"local_tokens": 16}) as it:
            for talk in range(8):
                told = [talk, *LONG[:200]]
                for turn in range(3):
                    told = [*told, *range(turn, 100)]
                    assert (await it.complete(told))[0] == 200
            for fake in fakes:
                talks = {body["prompt"][0] for body in fake.bodies}
                counts = [sum(b["prompt"][0] == t for b in fake.bodies) for t in talks]
                assert counts == [3] * len(talks)

    asyncio.run(run())


@pytest.mark.parametrize("params", [None, {}, {"prefixstore": {"wait_ms": 7}}, {"other": 1}])
def test_the_second_leg_keeps_what_it_was_given(params: Any) -> None:
    told = json.loads(waiting({"kv_transfer_params": params}))["kv_transfer_params"]
    given = (params or {}).get("prefixstore", {})
    assert told.pop("prefixstore") == {"wait_ms": 500, **given}
    assert told == {k: v for k, v in (params or {}).items() if k != "prefixstore"}


@pytest.mark.parametrize("params", [7, {"prefixstore": 7}])
def test_what_is_malformed_is_left_to_the_worker(params: Any) -> None:
    body = {"kv_transfer_params": params}
    assert json.loads(waiting(body)) == body


def test_the_first_leg_asks_for_one_token() -> None:
    body = {"max_tokens": 9, "max_completion_tokens": 9, "min_tokens": 5, "n": 3, "stream": True,
            "stream_options": {}, "temperature": 0.5, "cache_salt": "x"}  # fmt: skip
    assert one_token(body) == {
        "max_tokens": 1, "n": 1, "stream": False, "temperature": 0.5, "cache_salt": "x",
    }  # fmt: skip
