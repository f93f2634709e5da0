"""Workers that come, go, are drained and change roles, by the operators' API and by a file."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from prefixstore.errors import ConfigError
from prefixstore.route import limits
from prefixstore.route.run import RouteOptions
from prefixstore.route.state import Routing, State
from prefixstore.route.workers import WorkerSpec
from prefixstore.serve.refusal import RefusedError
from tests.route.fakes import WAIT_S, Fake, Site, site, sse

TOKEN = "operators-" + "t" * 24


def name_of(fake: Fake) -> str:
    return fake.url.removeprefix("http://")


async def slowly(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await sse(request)
    for number in range(20):
        await response.write(b"data: %d\n\n" % number)
        await asyncio.sleep(0.01)
    return response


WHOLE = b"".join(b"data: %d\n\n" % number for number in range(20))


def test_workers_come_and_go_under_load() -> None:
    """Added, drained, changed, removed, killed: every request is answered whole but those that a
    killed worker had begun to answer."""

    async def run() -> None:
        fakes = [Fake(handler=slowly) for _ in range(4)]
        late = Fake(handler=slowly)
        await late.start()
        done = cut = 0
        stop = False

        async def load(it: Site, number: int) -> None:
            nonlocal done, cut
            asked = 0
            while not stop:
                asked += 1
                prompt = f"user {number} says {asked} and more of it" * 4
                body = {"model": "m", "prompt": prompt, "stream": True}
                async with it.client.post(f"{it.url}/v1/completions", json=body) as answer:
                    assert answer.status == 200, await answer.read()
                    try:
                        assert await answer.read() == WHOLE
                        done += 1
                    except aiohttp.ClientPayloadError:
                        cut += 1

        async with site(*fakes) as it:
            tasks = [asyncio.create_task(load(it, number)) for number in range(8)]

            async def some() -> None:
                wanted = done + 10
                await it.wait(lambda: done >= wanted or any(task.done() for task in tasks))

            await some()
            assert (await it.admin("POST", "/v1/workers", {"url": late.url}))[0] == 201
            await it.ready(5)
            first = f"/v1/workers/{name_of(fakes[0])}"
            status, told = await it.admin("PATCH", first, {"state": "draining"})
            assert (status, told["state"]) == (200, "draining")
            asked = len(fakes[0].asked)
            await some()
            assert len(fakes[0].asked) == asked
            assert (await it.admin("DELETE", first))[0] == 200
            second = f"/v1/workers/{name_of(fakes[1])}"
            for role in ("decode", "prefill", "both"):
                assert (await it.admin("PATCH", second, {"role": role}))[1]["role"] == role
                await some()
            assert (await it.admin("DELETE", second))[0] == 200  # in the middle of its answers
            await some()
            assert cut == 0
            begun = sum(worker.requests for worker in it.router.state.pool)
            await fakes[2].stop()
            await some()
            await some()
            stop = True
            await asyncio.gather(*tasks)
            assert cut <= begun
            assert len(late.asked) > 0
        assert done > 50
        await fakes[0].stop()
        await fakes[1].stop()
        await late.stop()

    asyncio.run(run())


def test_a_drained_worker_may_be_taken_back() -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            path = f"/v1/workers/{name_of(fake)}"
            await it.admin("PATCH", path, {"state": "draining"})
            assert (await it.complete())[0] == 503
            await it.admin("PATCH", path, {"state": "ready"})
            assert (await it.complete())[0] == 200

    asyncio.run(run())


def test_the_list_shows_what_is_known() -> None:
    async def run() -> None:
        fake = Fake(running=2.0, cache_share=0.25)
        async with site(fake) as it:
            assert (await it.complete(list(range(40))))[0] == 200
            status, told = await it.admin("GET", "/v1/workers")
            assert status == 200
            [one] = told["workers"]
            assert one["known_blocks"] == 10
            assert (one["running"], one["cache_share"], one["state"]) == (2.0, 0.25, "ready")
            assert (one["role"], one["models"], one["identity"]) == ("both", ["m"], fake.identity)
            async with it.client.get(f"{it.url}/metrics") as answer:
                page = await answer.text()
            assert "prefixstore_route_workers_ready 1\n" in page
            assert (
                'prefixstore_route_requests_total{route="/v1/completions",status="200"} 1\n' in page
            )

    asyncio.run(run())


def test_a_worker_that_was_restarted_has_nothing() -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            await it.complete(list(range(40)))
            [worker] = it.router.state.pool
            assert len(worker.known) == 10
            fake.started_s = 2.0
            await it.wait(lambda: len(worker.known) == 0)

    asyncio.run(run())


def test_a_worker_that_fails_its_polls_gets_nothing_until_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "POLL_S", 0.02)
        sick, well = Fake(), Fake(running=50.0)
        async with site(sick, well) as it:
            sick.sick = True
            await it.ready(1)
            assert (await it.complete())[2] == name_of(well)
            sick.sick = False
            await it.ready(2)
            assert (await it.complete())[2] == name_of(sick)

    asyncio.run(run())


def test_operators_need_their_token(tmp_path: Path) -> None:
    async def run() -> None:
        file = tmp_path / "token"
        file.write_text(TOKEN)
        fake = Fake()
        async with site(fake, more={"admin_token_file": str(file)}) as it:
            path = f"/v1/workers/{name_of(fake)}"
            for method, where in (("GET", "/v1/workers"), ("DELETE", path), ("GET", "/metrics")):
                for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
                    status, told = await it.admin(method, where, headers=given)
                    assert (status, told["error"]["code"]) == (401, "token")
            known = {"Authorization": f"Bearer {TOKEN}"}
            assert (await it.admin("GET", "/v1/workers", headers=known))[0] == 200
            assert (await it.complete())[0] == 200  # that is between clients and workers
            assert (await it.admin("GET", "/healthz"))[0] == 200

    asyncio.run(run())


def test_pages_of_other_sites_change_nothing() -> None:
    async def run() -> None:
        async with site(Fake()) as it:
            given = {"Origin": "http://evil.example"}
            status, told = await it.admin(
                "POST", "/v1/workers", {"url": "http://a:1"}, headers=given
            )
            assert (status, told["error"]["code"]) == (403, "origin")

    asyncio.run(run())


@pytest.mark.parametrize(
    "given",
    [
        {}, {"url": 1}, {"url": "ftp://a"}, {"url": "http://a/path"}, {"url": "http://u:p@a"},
        {"url": "http://"}, {"url": "http://a:1", "role": "boss"}, {"url": "http://a:1", "x": "y"},
        {"url": "http://a:1", "kv_events": "udp://a"}, [], "http://a:1", None, {"url": "http://[x"},
        {"url": "http://a#b"}, {"url": "http://a:99999"}, {"url": "http://a:0"},
        {"url": "http://:8000"}, {"url": "http://a..b:1"}, {"url": "http://a?"},
        *({"url": "http://a:1", "store": one} for one in (
            "", "s", "ftp://s", "http://[s", "http://s:99999", "http://s/path", "http://s?x=1",
            "http://u:p@s", "http://a..b", "redis://s",
        )),
    ],
)  # fmt: skip
def test_a_worker_that_makes_no_sense_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError):
        WorkerSpec.parse(given)


@pytest.mark.parametrize("name", ["kv_events", "replay", "store"])
def test_an_operator_far_away_names_no_socket_of_this_host(name: str) -> None:
    """Which a file of this host may do."""

    async def run() -> None:
        value = "unix:/run/store" if name == "store" else "ipc:///run/events"
        given = {"url": "http://a:1", name: value}
        assert getattr(WorkerSpec.parse(given), name) == value
        async with site(Fake()) as it:
            status, told = await it.admin("POST", "/v1/workers", given)
            assert (status, told["error"]["code"]) == (400, "config")
            assert name in told["error"]["message"]
            assert len(it.router.state.pool.workers) == 1

    asyncio.run(run())


def test_operators_bodies_are_small_and_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with site(Fake()) as it:
            address = it.url.removeprefix("http://")
            host, _, port = address.rpartition(":")
            head = f"POST /v1/workers HTTP/1.1\r\nHost: {address}\r\n"
            monkeypatch.setattr("prefixstore.serve.limits.BODY_S", 0.1)
            for rest, status in (
                ("Content-Length: 70000\r\n\r\n{", 413),
                ("Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 411),
                ("Content-Length: 100\r\n\r\n{", 408),
            ):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write((head + rest).encode())
                async with asyncio.timeout(WAIT_S):
                    assert f"HTTP/1.1 {status}".encode() in await reader.readline()
                writer.close()

    asyncio.run(run())


def test_changes_that_make_no_sense_are_refused() -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            path = f"/v1/workers/{name_of(fake)}"
            for body in ({}, {"role": "boss"}, {"state": "gone"}, {"url": "http://b:1"}, [1], "x"):
                status, told = await it.admin("PATCH", path, body)
                assert (status, told["error"]["code"]) == (400, "config"), body
            assert (await it.admin("PATCH", "/v1/workers/b:1", {"role": "both"}))[0] == 404
            assert (await it.admin("DELETE", "/v1/workers/b:1"))[0] == 404
            assert (await it.admin("POST", "/v1/workers", {"url": fake.url}))[0] == 409

    asyncio.run(run())


def test_there_are_not_endlessly_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WORKERS_MAX", 2)
    state = State(Routing())
    for name in "ab":
        state.add(WorkerSpec(f"http://{name}:1"))
    with pytest.raises(RefusedError, match="2 workers"):
        state.add(WorkerSpec("http://c:1"))


# ---------------------------------------------------------------------- the file
def write(path: Path, *workers: dict[str, str]) -> None:
    path.write_text(json.dumps(workers))


def test_the_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those no longer in it go, new ones come, others are not touched; mistakes change nothing."""
    file = tmp_path / "workers.json"
    write(file, {"url": "http://a:1"}, {"url": "http://b:1", "role": "decode"})
    state = State(Routing((WorkerSpec("http://own:1"),), str(file)))
    a = state.pool.get("a:1")
    write(file, {"url": "http://a:1", "role": "prefill"}, {"url": "http://c:1"})
    state.reload_or_say()
    assert set(state.pool.workers) == {"own:1", "a:1", "c:1"}
    assert state.pool.get("a:1") is a
    assert a.spec.role == "prefill"
    for text in ("[", "{}", '[{"url": "http://a:1", "role": "boss"}]', "x" * (2 << 20)):
        file.write_text(text)
        state.reload_or_say()
        assert set(state.pool.workers) == {"own:1", "a:1", "c:1"}
        assert "the workers stay as they are" in caplog.records[-1].getMessage()
    write(file, {"url": "http://a:1", "store": "http://s:1"})
    state.reload_or_say()
    assert state.pool.get("a:1") is not a  # another worker, for all that is known


@pytest.mark.parametrize("mistake", ["twice", "too many", "events"])
def test_a_file_that_cannot_be_done_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Though each entry makes sense: none is added, removed or changed."""
    file = tmp_path / "workers.json"
    write(file, {"url": "http://a:1"}, {"url": "http://b:1"})
    state = State(Routing((WorkerSpec("http://own:1"),), str(file)))
    before = dict(state.pool.workers)
    specs = {name: worker.spec for name, worker in before.items()}
    given = [{"url": "http://a:1", "role": "decode"}, {"url": "http://c:1"}]
    if mistake == "twice":
        given.append({"url": "http://c:1", "role": "prefill"})
    elif mistake == "too many":
        monkeypatch.setattr(limits, "WORKERS_MAX", 3)
        given.append({"url": "http://d:1"})
    else:
        given.append({"url": "http://d:1", "kv_events": "tcp://d:2"})
        monkeypatch.setitem(sys.modules, "zmq.asyncio", None)
    write(file, *given)
    with pytest.raises(ConfigError, match=r"twice|4 workers|events"):
        state.reload()
    assert state.pool.workers == before
    assert {name: worker.spec for name, worker in before.items()} == specs
    monkeypatch.undo()
    write(file, {"url": "http://c:1"})
    state.reload()
    assert set(state.pool.workers) == {"own:1", "c:1"}


def test_tokens_go_only_where_operators_say(tmp_path: Path) -> None:
    """Who may add a worker, or name a store, is sent the token: that must not be everybody."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    one, told = (WorkerSpec("http://a:1"),), str(file)
    for routing in (Routing(one, worker_token_file=told), Routing(one, store_token_file=told)):
        with pytest.raises(ConfigError, match="admin-token-file"):
            RouteOptions(routing=routing, insecure=True).check()
        RouteOptions(routing=replace(routing, admin_token_file=told)).check()


def test_a_token_follows_no_redirection(tmp_path: Path) -> None:
    async def run() -> None:
        async def away(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": f"{other.url}/metrics"})

        file = tmp_path / "token"
        file.write_text(TOKEN)
        good, bad, other = Fake(), Fake(), Fake()
        bad._metrics, seen = away, []  # type: ignore[method-assign]

        async def note(request: web.Request) -> web.Response:
            seen.append(request.headers)
            return web.Response()

        other._metrics = note  # type: ignore[method-assign]
        await bad.start()
        await other.start()
        files = {"admin_token_file": str(file), "worker_token_file": str(file)}
        async with site(good, more=files) as it:
            known = {"Authorization": f"Bearer {TOKEN}"}
            assert (await it.admin("POST", "/v1/workers", {"url": bad.url}, headers=known))[
                0
            ] == 201
            worker = it.router.state.pool.get(name_of(bad))
            await it.wait(lambda: worker.failed_polls > 0)
        assert seen == []
        await bad.stop()
        await other.stop()

    asyncio.run(run())


def test_mistakes_at_the_start_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        State(Routing(file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="already"):
        State(Routing((WorkerSpec("http://a:1"), WorkerSpec("http://a:1"))))
    one = Routing((WorkerSpec("http://a:1"),))
    with pytest.raises(ConfigError, match="admin-token-file"):
        RouteOptions(host="0.0.0.0", routing=one).check()
    with pytest.raises(ConfigError, match="no workers"):
        RouteOptions().check()
    RouteOptions(host="0.0.0.0", routing=one, insecure=True).check()
