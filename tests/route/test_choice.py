"""Where requests go: to their prefix, unless waiting for it costs more; to whom they ask for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from aiohttp import web

from prefixstore.route import choose, limits
from prefixstore.route.choose import Stored
from prefixstore.route.prompt import Prompt
from prefixstore.route.watch import take_metrics
from prefixstore.route.workers import Load, Role, Worker, WorkerSpec
from tests.route.fakes import BLOCK, Fake, Site, site


def worker(name: str = "a", role: str = "both", identity: str = "") -> Worker:
    one = Worker(WorkerSpec.parse({"url": f"http://{name}:1", "role": role}), identity=identity)
    one.known.shape(BLOCK, 1000)
    return one


def prompt(count: int, start: int = 0) -> Prompt:
    return Prompt.of(range(start, start + count), {}, "")


def chosen(workers: list[Worker], asked: Prompt, found: choose.Found | None = None) -> Worker:
    one = choose.cheapest(workers, asked, found or {}, random.Random(1))
    assert one is not None
    return one


def test_the_cost_is_what_is_computed_loaded_and_waited_for() -> None:
    one, asked = worker(), prompt(403)
    assert choose.work(one, asked, {}) == (403, 403)
    one.known.send(prompt(100).keys(BLOCK))
    assert choose.work(one, asked, {}) == (303, 303)
    found = {one: Stored(prefix=200, segments=50)}
    left = 403 - 200
    blended = limits.SEGMENT_SHARE * 50 + limits.LOAD_SHARE * 100
    assert choose.work(one, asked, found) == pytest.approx((left - 50 + blended, left))
    assert choose.work(one, asked, {}, loads=True) == pytest.approx((limits.LOAD_SHARE * 303, 0))
    assert one.cost == 0
    one.load = Load(running=3, waiting=2, cache_share=0.95, ours=1)
    others = 2 * limits.RUNNING_TOKENS + 2 * limits.WAITING_TOKENS
    assert one.cost == pytest.approx(others + 0.5 * limits.FULL_TOKENS)
    with one.serving(prompt(8), 300) as serving:
        assert one.cost == pytest.approx(
            others + 0.5 * limits.FULL_TOKENS + 300 + limits.RUNNING_TOKENS
        )
        serving.began()
        assert one.prefill_tokens == 0
    assert (one.requests, one.prefill_tokens) == (0, 0)


PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:cache_config_info{block_size="8",enable_prefix_caching="True",num_gpu_blocks="50"} 1.0
vllm:cache_config_info{block_size="8",enable_prefix_caching="True",num_gpu_blocks="50"} 1.0
prefixstore:identity_info{engine="0",identity="ab"} 1.0
"""


def test_a_page_of_metrics_is_load_cache_and_identity() -> None:
    """Of two engines of one server, together."""
    one = worker()
    take_metrics(one, PAGE)
    assert one.load == Load(running=5.0, waiting=1.0, cache_share=0.5, ours=0)
    assert (one.known.block_tokens, one.known.blocks_max, one.identity) == (8, 100, "ab")
    take_metrics(one, PAGE.replace('caching="True"', 'caching="False"'))
    one.known.send(prompt(80).keys(8))
    assert len(one.known) == 0
    for page in ("", "# nothing", "<html>", "vllm:num_requests_running x"):
        with pytest.raises(ValueError, match=r"metrics|convert"):
            take_metrics(one, page)


def test_requests_of_ours_that_a_page_shows_are_not_anothers() -> None:
    """Also those that have ended since the engine wrote it."""
    one = worker()
    with one.serving(prompt(8), 0), one.serving(prompt(8), 0):
        pass
    take_metrics(one, PAGE)
    assert one.cost == 3 * limits.RUNNING_TOKENS + limits.WAITING_TOKENS
    take_metrics(one, PAGE)
    assert one.cost == 5 * limits.RUNNING_TOKENS + limits.WAITING_TOKENS


def test_a_prefix_decides_until_its_worker_is_too_busy() -> None:
    near, far = worker("near"), worker("far")
    asked = prompt(4000)
    near.known.send(prompt(3000).keys(BLOCK))
    assert chosen([far, near], asked) is near
    near.load = Load(running=3000 / limits.RUNNING_TOKENS - 1)
    assert chosen([far, near], asked) is near
    near.load = Load(running=3000 / limits.RUNNING_TOKENS + 1)
    assert chosen([far, near], asked) is far


def test_a_store_beside_a_worker_counts_less_than_its_own_cache() -> None:
    own, stored, nothing = worker("own"), worker("stored"), worker("nothing")
    asked = prompt(1000)
    own.known.send(asked.keys(BLOCK))
    found = {stored: Stored(prefix=1000)}
    assert chosen([nothing, stored, own], asked, found) is own
    assert chosen([nothing, stored], asked, found) is stored


def test_ties_go_to_all_and_the_same_way_each_time() -> None:
    workers = [worker(name) for name in "abcd"]

    def draws(seed: int) -> list[str]:
        rng = random.Random(seed)
        found = [choose.cheapest(workers, prompt(8), {}, rng) for _ in range(200)]
        return [one.name for one in found if one is not None]

    assert draws(1) == draws(1) != draws(2)
    assert all(30 < count < 70 for count in Counter(draws(1)).values())
    assert choose.cheapest([], prompt(8), {}, random.Random(1)) is None


def test_only_workers_of_one_known_identity_are_paired() -> None:
    decode = worker("d", "decode", "x")
    same, other, unknown = (
        worker(n, "prefill", i) for n, i in zip("abc", ("x", "y", ""), strict=True)
    )
    assert choose.partners(decode, [same, other, unknown]) == [same]
    assert choose.partners(worker("e", "decode", ""), [same, other, unknown]) == []
    assert choose.partners(worker("f", "both", "x"), [same]) == []
    assert choose.for_whole([same, decode]) == [decode]
    assert choose.for_whole([same]) == [same]


# ---------------------------------------------------------------------- through the router
async def talk(it: Site, turns: int, start: str) -> list[str]:
    """A conversation; the worker of each turn."""
    text, found = start, []
    for turn in range(turns):
        text += f" turn {turn} of a conversation that goes on and on" * 3
        found.append((await it.complete(text))[2])
    return found


def test_a_conversation_stays_where_it_began() -> None:
    async def run() -> None:
        fakes = [Fake() for _ in range(4)]
        async with site(*fakes) as it:
            talks = [await talk(it, 5, f"{n} is another number") for n in range(12)]
            assert all(len(set(one)) == 1 for one in talks)
            assert len({one[0] for one in talks}) > 1
            known = it.counted("known_tokens_total") / it.counted("prompt_tokens_total")
            assert known > 0.6
            assert sum(fake.tokenized for fake in fakes) == 60

    asyncio.run(run())


def test_chats_are_tokenized_and_images_are_not() -> None:
    async def run() -> None:
        fakes = [Fake(), Fake()]
        async with site(*fakes) as it:
            url = f"{it.url}/v1/chat/completions"
            text: list[dict[str, Any]] = [{"role": "user", "content": "a word and another " * 9}]
            image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
            for messages in (text, text, image):
                body = {"model": "m", "messages": messages}
                async with it.client.post(url, json=body) as answer:
                    assert answer.status == 200
            assert sum(fake.tokenized for fake in fakes) == 2
            assert it.counted("untokenized_total") == 1
            assert sorted(len(fake.asked) for fake in fakes) in ([0, 3], [1, 2])

    asyncio.run(run())


def test_token_ids_need_no_tokenizing_and_salts_part() -> None:
    async def run() -> None:
        fakes = [Fake(running=0.0), Fake(running=1.0)]
        async with site(*fakes) as it:
            ids = list(range(400))
            assert [(await it.complete(ids))[0] for _ in range(2)] == [200, 200]
            assert (await it.complete([ids, ids]))[0] == 200
            known = it.counted("known_tokens_total")
            assert known == 2 * 400
            assert (await it.complete(ids, cache_salt="x"))[0] == 200
            assert it.counted("known_tokens_total") == known
            assert sum(fake.tokenized for fake in fakes) == 0

    asyncio.run(run())


def test_a_request_may_name_its_worker() -> None:
    async def run() -> None:
        fakes = [Fake(running=100.0), Fake()]
        async with site(*fakes) as it:
            name = fakes[0].url.removeprefix("http://")
            given = {"X-Prefixstore-Worker": name}
            for _ in range(3):
                assert (await it.complete(headers=given))[2] == name
            assert len(fakes[0].asked) == 3
            assert "X-Prefixstore-Worker" not in fakes[0].asked[0][2]
            status, data, _ = await it.complete(headers={"X-Prefixstore-Worker": "nobody:1"})
            assert status == 404
            assert b"nobody:1" in data
            await fakes[0].stop()  # who asks for one gets no other
            assert (await it.complete(headers=given))[0] in (502, 503)
            assert fakes[1].asked == []

    asyncio.run(run())


def test_workers_of_several_models() -> None:
    async def run() -> None:
        fakes = [Fake(models=("m", "x")), Fake(models=("n",))]
        async with site(*fakes) as it:
            for _ in range(4):
                assert (await it.complete(model="n"))[0] == 200
            assert len(fakes[1].asked) == 4
            status, told = await it.admin("GET", "/v1/models")
            assert status == 200
            assert {card["id"] for card in told["data"]} == {"m", "n", "x"}

    asyncio.run(run())


def test_load_others_make_is_seen() -> None:
    """From the engines' own metrics, which the router reads."""

    async def run() -> None:
        fakes = [Fake(), Fake()]
        async with site(*fakes) as it:
            fakes[0].waiting = 5.0
            [first, _] = it.router.state.pool
            await it.wait(lambda: first.load.waiting == 5.0)
            for number in range(5):
                assert (await it.complete(f"{number} is new" * 9))[0] == 200
            assert len(fakes[1].asked) == 5

    asyncio.run(run())


def test_other_paths_go_to_whom_has_least_to_do() -> None:
    async def run() -> None:
        async def embed(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"data": [1.0]})

        fakes = [Fake(handler=embed, running=9.0), Fake(handler=embed)]
        async with site(*fakes) as it:
            async with it.client.post(f"{it.url}/v1/embeddings", json={"model": "m"}) as answer:
                assert await answer.json() == {"data": [1.0]}
            assert [path for path, _, _ in fakes[1].asked] == ["/v1/embeddings"]
            assert it.counted("untokenized_total") == 0

    asyncio.run(run())


def test_roles_are_text() -> None:
    assert [str(role.value) for role in Role] == ["both", "prefill", "decode"]
