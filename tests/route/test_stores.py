"""What the router asks stores, of a real server: the tenant's own chunks of the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from prefixstore import Store
from prefixstore.route.choose import Stored
from prefixstore.route.prompt import Prompt
from prefixstore.route.stores import Stores
from prefixstore.route.workers import Worker, WorkerSpec
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
from tests.serve.support import ALICE, BOB, running, tokens_file
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
SIZE, CHUNK = CONTRACT_LAYOUT.payload_bytes, CONTRACT_LAYOUT.chunk_tokens


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("4MiB", "4MiB") as store:
        yield store


def worker(store: str | None, label: str = "a", name: str = "w") -> Worker:
    spec = WorkerSpec(f"http://{name}:1", store=store)
    return Worker(spec, identity=identity_for(label).namespace_hex)


def find(stores: Stores, prompt: Prompt, *workers: Worker) -> list[Stored | None]:
    async def run() -> list[Stored | None]:
        found = await stores.find(workers, prompt)
        stores.close()
        return [found.get(one) for one in workers]

    return asyncio.run(run())


def test_a_store_tells_what_it_has_of_a_prompt(store: Store, tmp_path: Path) -> None:
    """To each tenant what is its own; of other models, salts and adapters nothing."""
    with running(store, tokens=tokens_file(tmp_path)) as server, server.open(ALICE) as alice:
        ns = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        tokens = tokens_of(1, 5)
        refs = ns.chain(tokens).refs()
        ns.put(refs[:3], [content_of(ref.key, SIZE) for ref in refs[:3]])
        at = server.address
        prompt = Prompt.of([*tokens, 1], {}, "")
        workers = worker(at), worker(at, name="x"), worker(at, "b"), worker(None), worker(at)
        workers[-1].identity = ""
        found = find(Stores(ALICE, None, False), prompt, *workers)
        assert found == [Stored(3 * CHUNK), Stored(3 * CHUNK), Stored(), Stored(), Stored()]
        assert find(Stores(BOB, None, False), prompt, workers[0]) == [Stored()]
        assert find(Stores("wrong-" + "w" * 20, None, False), prompt, workers[0]) == [Stored()]
        for salted in (Prompt.of(tokens, {"cache_salt": "s"}, ""), Prompt.of(tokens, {}, "l")):
            assert find(Stores(ALICE, None, False), salted, workers[0]) == [None]


def test_texts_anywhere_count_where_engines_blend(store: Store) -> None:
    with running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        tokens = tokens_of(1, 40)
        refs = ns.chain(tokens).refs()
        ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
        moved = [999, 998, 997, *tokens]
        wait_for(lambda: ns.find_segments(moved), "texts are found a moment after they are stored")
        [without] = find(Stores("", None, False), Prompt.of(moved, {}, ""), worker(server.address))
        [found] = find(Stores("", None, True), Prompt.of(moved, {}, ""), worker(server.address))
        assert without == Stored()
        assert found is not None
        assert found.prefix == 0
        assert found.segments > len(tokens) // 2


@pytest.mark.parametrize("size", [0, -1, "x", None, float("inf"), [], {}])
def test_a_store_that_says_nonsense_of_its_chunks_is_a_miss(size: object) -> None:
    async def run() -> None:
        async def namespaces(request: web.Request) -> web.Response:
            identity = json.loads(identity_for("a").to_json())
            layout = {"chunk_tokens": size}
            told = {"namespaces": [{"identity": identity, "namespace": "n", "layout": layout}]}
            return web.Response(text=json.dumps(told), content_type="application/json")

        app = web.Application()
        app.add_routes([web.get("/v1/namespaces", namespaces)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stores = Stores("", None, False)
        one = worker(f"http://127.0.0.1:{runner.addresses[0][1]}")
        assert await stores.find([one], Prompt.of(range(100), {}, "")) == {one: Stored()}
        stores.close()
        await runner.cleanup()

    asyncio.run(run())


def test_a_store_that_is_gone_is_a_miss() -> None:
    assert find(
        Stores("", None, False), Prompt.of(range(100), {}, ""), worker("http://127.0.0.1:9")
    ) == [Stored()]
