"""Engines that are none, and a router in front of them, all in one event loop.

A fake engine speaks as vLLM's API server does where the router listens: metrics, models, tokens,
completions. A token is a byte of the text. What it was asked is kept, as it came.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, web
from multidict import CIMultiDict

from prefixstore.route.run import RouteOptions, Router
from prefixstore.route.state import Routing
from prefixstore.route.workers import WorkerSpec

BLOCK, WAIT_S = 4, 20.0
IDENTITY = "1d" * 16
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class Fake:
    """An engine. ``handler`` answers instead of `speak`, where a test wants something else."""

    name: str = ""
    models: tuple[str, ...] = ("m",)
    identity: str = IDENTITY
    blocks: int = 1000
    running: float = 0.0
    waiting: float = 0.0
    cache_share: float = 0.0
    started_s: float = 1.0
    handler: Handler | None = None
    sick: bool = False
    asked: list[tuple[str, bytes, CIMultiDict[str]]] = field(default_factory=list)
    gone: int = 0  # requests whose client went away
    tokenized: int = 0
    url: str = ""
    _runner: web.AppRunner | None = None
    _port: int = 0

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(data) for _, data, _ in self.asked]

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([
            web.get("/metrics", self._metrics), web.get("/v1/models", self._models),
            web.post("/tokenize", self._tokenize), web.post("/v1/{rest:.+}", self._answer),
        ])  # fmt: skip
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """As a process that is killed: nobody listens, connections end at once."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            assert runner.server is not None
            for protocol in list(runner.server.connections):
                if protocol.transport is not None:
                    protocol.transport.abort()
            await runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.sick:
            return web.Response(status=500)
        labels = 'engine="0",model_name="m"'
        return web.Response(text=(
            "# HELP vllm:num_requests_running x\n"
            f"vllm:num_requests_running{{{labels}}} {self.running}\n"
            f"vllm:num_requests_waiting{{{labels}}} {self.waiting}\n"
            f"vllm:kv_cache_usage_perc{{{labels}}} {self.cache_share}\n"
            f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="{self.blocks}"}} 1.0\n'
            f'prefixstore:identity_info{{{labels},identity="{self.identity}"}} 1.0\n'
            f"process_start_time_seconds {self.started_s}\n"
        ))  # fmt: skip

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": m} for m in self.models]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.tokenized += 1
        text = asked.get("prompt") or "".join(one["content"] for one in asked["messages"])
        return web.json_response({"tokens": list(text.encode()), "count": len(text)})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        self.asked.append((request.path_qs, data, CIMultiDict(request.headers)))
        body = json.loads(data)
        try:
            return await (self.handler or self.speak)(request, body)
        except asyncio.CancelledError:
            self.gone += 1
            raise

    async def speak(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """An answer in three events, or in one object."""
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "abc"}], "by": self.name})
        response = await sse(request)
        for part in (b"data: a\n\n", b"data: \xff\x00 odd bytes\n\n", b"data: [DONE]\n\n"):
            await response.write(part)
            await asyncio.sleep(0.01)
        return response


async def sse(request: web.Request) -> web.StreamResponse:
    """The head of a stream of events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


@dataclass
class Site:
    """A router that runs, its engines, and a client."""

    router: Router
    client: ClientSession

    @property
    def url(self) -> str:
        return self.router.address

    async def complete(
        self, prompt: Any = "hello", headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, bytes, str]:
        """Status, body and the worker of a completion."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 3, **more}
        url = f"{self.url}/v1/completions"
        async with self.client.post(url, json=body, headers=headers or {}) as answer:
            return (
                answer.status,
                await answer.read(),
                answer.headers.get("X-Prefixstore-Worker", ""),
            )

    async def admin(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        async with self.client.request(method, self.url + path, json=body, **more) as answer:
            return answer.status, await answer.json()

    async def wait(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def ready(self, count: int) -> None:
        """Wait until so many workers may have requests."""
        pool = self.router.state.pool
        await self.wait(lambda: sum(one.state == "ready" for one in pool) == count)

    def counted(self, name: str) -> int:
        return self.router.state.metrics.total(name)


@asynccontextmanager
async def site(
    *fakes: Fake, roles: str = "", more: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Site]:
    """A router in front of fakes. ``roles``: a letter each, b, p or d."""
    names = {"b": "both", "p": "prefill", "d": "decode"}
    for number, fake in enumerate(fakes):
        fake.name = fake.name or str(number)
        if not fake.url:
            await fake.start()
    specs = tuple(
        WorkerSpec.parse({"url": fake.url, "role": names[role]})
        for fake, role in zip(fakes, roles or "b" * len(fakes), strict=True)
    )
    routing = Routing(workers=specs, **{"seed": 1, **(more or {})})
    router = Router(RouteOptions(routing=routing, drain_s=1.0, **options))
    await router.start()
    try:
        async with ClientSession(auto_decompress=False) as client:
            it = Site(router, client)
            await it.ready(len(fakes))
            yield it
    finally:
        await router.stop()
        for fake in fakes:
            await fake.stop()
