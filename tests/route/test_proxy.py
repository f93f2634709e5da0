"""What clients get through the router is what engines gave, whatever dies in between."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import tracemalloc
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from prefixstore.route import limits
from prefixstore.serve.answering import parsed_bytes
from tests.route.fakes import WAIT_S, Fake, site, sse

EVENTS = b"data: a\n\ndata: \xff\x00 odd bytes\n\ndata: [DONE]\n\n"


def test_a_stream_passes_byte_for_byte_and_as_it_comes() -> None:
    async def run() -> None:
        go_on = asyncio.Event()

        async def slowly(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = await sse(request)
            await response.write(b"data: first\n\n")
            await go_on.wait()
            await response.write(b"data: last\n\n")
            return response

        fake = Fake()
        async with site(fake) as it:
            assert (await it.complete(stream=True))[:2] == (200, EVENTS)
            fake.handler = slowly
            body = {"model": "m", "prompt": "x", "stream": True}
            async with it.client.post(f"{it.url}/v1/completions?a=b", json=body) as answer:
                assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
                assert await answer.content.readany() == b"data: first\n\n"
                go_on.set()
                assert await answer.read() == b"data: last\n\n"
            assert fake.asked[-1][0] == "/v1/completions?a=b"

    asyncio.run(run())


def test_a_request_passes_as_it_is() -> None:
    """Body byte for byte, headers but those of one connection; status and headers back."""

    async def run() -> None:
        async def odd(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.Response(status=418, body=b"\x1f\x8b no gzip", headers={"X-Odd": "1"})

        fake = Fake(handler=odd)
        async with site(fake) as it:
            data = b'{"model" : "m",\n "prompt":[1,2,3], "x": 1e2}'
            given = {"Authorization": "Bearer k", "X-Mine": "2", "X-Request-Id": "r-1",
                     "Connection": "keep-alive, X-Hop", "X-Hop": "3"}  # fmt: skip
            async with it.client.post(f"{it.url}/v1/completions", data=data, headers=given) as got:
                assert (got.status, await got.read()) == (418, b"\x1f\x8b no gzip")
                assert got.headers["X-Odd"] == "1"
                assert got.headers["X-Request-Id"] == "r-1"
        [(_, came, headers)] = fake.asked
        assert came == data
        del given["Connection"], given["X-Hop"]
        assert {name: headers.get(name) for name in given} == given
        assert "X-Hop" not in headers

    asyncio.run(run())


def test_a_redirection_is_an_answer_like_others() -> None:
    """The router goes nowhere but to its workers."""

    async def run() -> None:
        async def away(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"})

        async with site(Fake(handler=away)) as it:
            url, body = f"{it.url}/v1/completions", {"model": "m", "prompt": "x"}
            async with it.client.post(url, json=body, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (307, "http://127.0.0.1:9/")

    asyncio.run(run())


@pytest.mark.parametrize("how", ["refused", "reset", "headers only", "status"])
def test_another_worker_is_tried_before_the_first_byte(how: str) -> None:
    """The client gets one whole answer, of the other worker."""

    async def run() -> None:
        async def die(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if how == "status":
                return web.json_response({"error": "no"}, status=503)
            if how == "headers only":
                await sse(request)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        bad, good = Fake(handler=die), Fake(running=50.0)  # the bad one looks better
        async with site(bad, good) as it:
            if how == "refused":
                await bad.stop()
            status, data, by = await it.complete(stream=True)
            assert (status, data, by) == (200, EVENTS, good.url.removeprefix("http://"))
            assert it.counted("retried_total") == 1
            if how != "refused":
                assert len(bad.asked) == 1
        assert len(good.asked) == 1

    asyncio.run(run())


def test_a_worker_that_dies_in_its_answer_leaves_a_cut_one() -> None:
    """What came is passed on, the end is missing, and nobody else answers."""

    async def run() -> None:
        async def die(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = await sse(request)
            await response.write(b"data: half")
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
            return response

        bad, other = Fake(handler=die), Fake(running=50.0)
        async with site(bad, other) as it:
            body = {"model": "m", "prompt": "x", "stream": True}
            async with it.client.post(f"{it.url}/v1/completions", json=body) as answer:
                assert await answer.content.readany() == b"data: half"
                with pytest.raises(aiohttp.ClientPayloadError):
                    await answer.read()
            assert (it.counted("cut_total"), it.counted("retried_total")) == (1, 0)
        assert other.asked == []

    asyncio.run(run())


def test_a_cut_answer_of_known_length_stays_short() -> None:
    async def run() -> None:
        async def die(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "100"})
            await response.prepare(request)
            await response.write(b"half")
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
            return response

        async with site(Fake(handler=die)) as it:
            with pytest.raises(aiohttp.ClientPayloadError):
                await it.complete()

    asyncio.run(run())


def test_a_request_is_tried_on_few_workers_and_the_last_ones_error_is_passed_on() -> None:
    """One that breaks engines must not break all of them."""

    async def run() -> None:
        async def broken(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response({"why": "because"}, status=500)

        fakes = [Fake(handler=broken) for _ in range(5)]
        async with site(*fakes) as it:
            assert (await it.complete())[:2] == (500, b'{"why": "because"}')
            assert sum(len(fake.asked) for fake in fakes) == limits.ATTEMPTS_MAX
            assert it.counted("retried_total") == limits.ATTEMPTS_MAX - 1

    asyncio.run(run())


def test_a_worker_that_is_late_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is asked to do the same work again."""

    async def run() -> None:
        async def silent(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await asyncio.sleep(60)
            return web.Response()

        late = aiohttp.ClientTimeout(sock_read=0.1)
        monkeypatch.setattr("prefixstore.route.proxy._ANSWER", late)
        slow, other = Fake(handler=silent), Fake(running=50.0)
        async with site(slow, other) as it:
            status, data, _ = await it.complete()
            assert (status, json.loads(data)["error"]["code"]) == (504, "late")
            await it.wait(lambda: slow.gone == 1)
        assert other.asked == []

    asyncio.run(run())


def test_a_client_that_goes_away_ends_its_request_at_the_worker() -> None:
    async def run() -> None:
        async def forever(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = await sse(request)
            while True:
                await response.write(b"data: more\n\n")
                await asyncio.sleep(0.01)

        fake = Fake(handler=forever)
        async with site(fake) as it:
            body = {"model": "m", "prompt": "x", "stream": True}
            async with it.client.post(f"{it.url}/v1/completions", json=body) as answer:
                await answer.content.readany()
            await it.wait(lambda: fake.gone == 1)
            [worker] = it.router.state.pool
            await it.wait(lambda: (worker.requests, worker.prefill_tokens) == (0, 0))

            async def silent(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await asyncio.sleep(60)
                return web.Response()

            fake.handler = silent
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(it.complete(), 0.2)
            await it.wait(lambda: fake.gone == 2)

    asyncio.run(run())


def test_over_a_bound_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with Retry-After; nothing waits in the router."""

    async def run() -> None:
        go_on = asyncio.Event()

        async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await go_on.wait()
            return web.Response(body=b"late")

        monkeypatch.setattr(limits, "WORKER_REQUESTS_MAX", 2)
        fake = Fake(handler=wait)
        async with site(fake) as it:
            first = [asyncio.create_task(it.complete()) for _ in range(2)]
            await it.wait(lambda: len(fake.asked) == 2)
            url, body = f"{it.url}/v1/completions", {"model": "m", "prompt": "x"}
            async with it.client.post(url, json=body) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"] == "1"
                assert (await answer.json())["error"]["code"] == "busy"
            monkeypatch.setattr(limits, "WORKER_REQUESTS_MAX", 9)
            monkeypatch.setattr(limits, "REQUESTS_MAX", 2)
            assert (await it.complete())[0] == 503
            go_on.set()
            assert [(await one)[0] for one in first] == [200, 200]
            assert (await it.complete())[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"{", 400, "config"),
        (b"[1]", 400, "config"),
        (b"[" * 100_000, 400, "config"),
        (b"\xff", 400, "config"),
        (json.dumps({"model": "other", "prompt": "x"}).encode(), 404, "model"),
    ],
)
def test_bad_requests_get_one_clear_error(data: bytes, status: int, code: str) -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            async with it.client.post(f"{it.url}/v1/completions", data=data) as answer:
                assert answer.status == status
                told = (await answer.json())["error"]
                assert told["code"] == code
                assert told["message"]
            assert (await it.complete())[0] == 200
        assert len(fake.asked) == 1

    asyncio.run(run())


def test_compressed_bodies_are_refused() -> None:
    async def run() -> None:
        async with site(Fake()) as it:
            given = {"Content-Encoding": "gzip"}
            url = f"{it.url}/v1/completions"
            async with it.client.post(url, data=gzip.compress(b"{}"), headers=given) as answer:
                assert answer.status == 415

    asyncio.run(run())


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "BODY_BYTES_MAX", 1000)
        fake = Fake()
        async with site(fake) as it:
            assert (await it.complete("x" * 2000))[0] == 413
            parts = iter([b"{", b" " * 2000])

            async def chunked() -> Any:
                for part in parts:
                    yield part

            async with it.client.post(f"{it.url}/v1/completions", data=chunked()) as answer:
                assert answer.status == 413
        assert fake.asked == []

    asyncio.run(run())


@pytest.mark.parametrize("told", [True, False])
def test_a_slow_sender_holds_no_more_than_it_has_sent(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Whatever it might send, with a length or without: others have the room."""

    async def run() -> None:
        monkeypatch.setattr(limits, "BODY_BYTES_MAX", 500_000)
        monkeypatch.setattr(limits, "BODIES_BYTES_MAX", 500_000)
        async with site(Fake()) as it:
            go_on, state = asyncio.Event(), it.router.state

            async def slowly() -> Any:
                yield b'{"model": "m", "prompt": "x", "y": "'
                await go_on.wait()
                yield b"y" * 60_000 + b'"}'

            async def send() -> int:
                length = {"Content-Length": "60038"} if told else {}
                url = f"{it.url}/v1/completions"
                async with it.client.post(url, data=slowly(), headers=length) as answer:
                    return answer.status

            slow = [asyncio.create_task(send()) for _ in range(8)]
            await it.wait(lambda: state._bytes == 8 * 36)
            others = await asyncio.gather(*(it.complete("x" * 10_000) for _ in range(4)))
            assert [status for status, _, _ in others] == [200] * 4
            go_on.set()
            assert set(await asyncio.gather(*slow)) <= {200, 503}  # what has come counts
            assert state._bytes == 0

    asyncio.run(run())


JUNK = {
    "lists": b"[" + b"[]," * 20_000 + b"0]",
    "objects": b"[" + b"{}," * 20_000 + b"0]",
    "entries": b"[" + b'{"a":{}},' * 20_000 + b"0]",
    "numbers": b"[" + b"1e9," * 20_000 + b"0]",
    "large numbers": b"[" + b"1234567890," * 20_000 + b"0]",
    "texts": b"[" + b'"ab",' * 20_000 + b"0]",
    "names": b"{" + b",".join(b'"%d":0' % i for i in range(20_000)) + b"}",
    "one text": b'"' + b"x" * 100_000 + b'"',
    "a wide one": b'"' + b"x" * 100_000 + "\U0001f600".encode() + b'"',
    "an escaped one": b'"' + b"x" * 100_000 + b'\\ud83d\\ude00"',
}


@pytest.mark.parametrize("what", JUNK)
def test_what_a_body_takes_when_it_is_parsed(what: str) -> None:
    """Never more than is counted, and seldom much less."""
    data = b'{"model": "m", "x": ' + JUNK[what] + b"}"
    json.loads(data)  # what the parser keeps
    tracemalloc.start()
    try:
        parsed = json.loads(data)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert parsed["model"] == "m"
    assert taken <= parsed_bytes(data) <= 12 * taken + 1000


def test_what_bodies_were_parsed_into_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it was read; then the bytes alone."""

    async def run() -> None:
        go_on = asyncio.Event()

        async def wait(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await go_on.wait()
            return web.Response(body=b"late")

        monkeypatch.setattr(limits, "BODIES_BYTES_MAX", 1_000_000)
        fake = Fake(handler=wait)
        async with site(fake) as it:
            url, head = f"{it.url}/v1/completions", b'{"model": "m", "prompt": [1], "x": '
            async with it.client.post(url, data=head + JUNK["lists"] + b"}") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (413, "too_large")
            assert fake.asked == []
            body = head + b"[" + b"[]," * 3000 + b"0]}"
            assert (
                2 * parsed_bytes(body)
                > limits.BODIES_BYTES_MAX
                > parsed_bytes(body) + 9 * len(body)
            )
            first = []
            for number in range(1, 9):  # one parsed at a time, all under way
                first.append(asyncio.create_task(it.complete(x=[[]] * 3000)))
                await it.wait(lambda number=number: len(fake.asked) == number)  # type: ignore[misc]
            state = it.router.state
            assert state._bytes == sum(len(data) for _, data, _ in fake.asked)
            stalled = asyncio.Event()

            async def stall(*_: Any) -> None:
                await stalled.wait()

            monkeypatch.setattr("prefixstore.route.proxy.Proxy._read_prompt", stall)
            second = asyncio.create_task(it.complete(x=[[]] * 3000))
            await it.wait(lambda: state._bytes > 500_000)
            assert (await it.complete(x=[[]] * 3000))[0] == 503
            go_on.set()
            stalled.set()
            assert [(await one)[0] for one in (*first, second)] == [200] * 9
            assert state._bytes == 0

    asyncio.run(run())


def test_a_workers_name_that_nobody_looks_up_takes_little_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was found before, and the worker is ready."""

    async def run() -> None:
        real, answers, asked = socket.getaddrinfo, threading.Event(), threading.Event()
        answers.set()

        def look_up(host: Any, *words: Any, **told: Any) -> Any:
            if host == "worker.example":
                if not answers.is_set():
                    asked.set()
                assert answers.wait(WAIT_S)
                host = "127.0.0.1"
            return real(host, *words, **told)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        fake = Fake()
        await fake.start()
        fake.url = fake.url.replace("127.0.0.1", "worker.example")
        async with site(fake) as it:
            answers.clear()
            assert it.router.state.proxy is not None
            connector = it.router.state.proxy._session.connector
            assert isinstance(connector, aiohttp.TCPConnector)
            connector.clear_dns_cache()
            async with asyncio.timeout(WAIT_S):
                assert (await it.complete([1, 2, 3]))[0] == 502
            assert asked.is_set()
            assert not answers.is_set()
            answers.set()

    asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/reset_prefix_cache", "/v1/../sleep", "/v1/%2e%2e/sleep", "/"],
)
def test_paths_for_operators_of_engines_are_not_passed(path: str) -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            url = URL(it.url + path, encoded=True)
            async with it.client.post(url, json={"model": "m"}) as answer:
                assert answer.status == 404
        assert fake.asked == []

    asyncio.run(run())


def test_without_a_worker_there_is_503_and_then_there_is_one() -> None:
    async def run() -> None:
        fake = Fake()
        async with site(fake) as it:
            await fake.stop()
            assert (await it.complete())[0] in (502, 503)
            assert (await it.complete())[0] == 503
            assert (await it.admin("GET", "/readyz"))[0] == 503
            await fake.start()
            await it.ready(1)
            assert (await it.complete())[0] == 200
            assert (await it.admin("GET", "/readyz"))[1] == {"status": "ready", "workers": 1}

    asyncio.run(run())
