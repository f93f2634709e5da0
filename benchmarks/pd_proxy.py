"""Prefill and decode engines behind one address, when they share a store.

``python -m benchmarks.pd_proxy --prefill URL... --decode URL... [--port P]``

A request goes to a prefill engine first, for one token, which puts the KV of its prompt into the
store; then as it is to a decode engine, which loads what is there and computes the rest. Nothing is
paired: an engine that is gone is skipped, without prefill engines the decode engine computes. PUT
/pools with ``{"prefill": [...], "decode": [...]}`` changes who does what while requests run.
"""

import argparse
from itertools import count
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

PREFILL = ClientTimeout(total=60.0, sock_connect=2.0)
DECODE = ClientTimeout(total=None, sock_connect=2.0, sock_read=300.0)
WAIT_MS = 500  # the prefill engine answers a little before its last chunks are in the store
BODY_BYTES_MAX = 64 << 20
GONE = (ClientError, OSError, TimeoutError)
PASSED_ON, TRACED = ("Content-Type", "X-Request-Id"), ("X-Request-Id", "traceparent")


class Proxy:
    """The engines by role, and whose turn it is."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self.pools = {"prefill": prefill, "decode": decode}
        self.turns = {"prefill": count(), "decode": count()}

    def engines(self, role: str) -> list[str]:
        """All of a role, beginning with the one whose turn it is."""
        pool = self.pools[role]
        first = next(self.turns[role]) % max(1, len(pool))
        return pool[first:] + pool[:first]

    async def set_pools(self, request: web.Request) -> web.Response:
        """Change who does what, from the next request on."""
        given = await request.json()
        self.pools = {role: list(map(str, given[role])) for role in ("prefill", "decode")}
        return web.json_response(self.pools)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Prefill, then decode; the answer is passed on as it comes."""
        body: dict[str, Any] = await request.json()
        known = {k: request.headers[k] for k in TRACED if k in request.headers}
        pool = TCPConnector(limit=0)
        async with ClientSession(connector=pool, headers=known, timeout=DECODE) as session:
            if await self.prefill(session, request.path, body):
                params = body["kv_transfer_params"] = body.get("kv_transfer_params") or {}
                params.setdefault("prefixstore", {}).setdefault("wait_ms", WAIT_MS)
            return await self.decode(session, request, body)

    async def prefill(self, session: ClientSession, path: str, body: dict[str, Any]) -> bool:
        """Whether an engine has computed the prompt."""
        one = {**body, "max_tokens": 1, "stream": False, "stream_options": None}
        one.pop("max_completion_tokens", None)
        for engine in self.engines("prefill"):
            try:
                async with session.post(engine + path, json=one, timeout=PREFILL) as answer:
                    await answer.read()
                    return answer.ok
            except GONE:
                continue
        return False

    async def decode(
        self, session: ClientSession, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        """The answer of the first engine that begins to give one."""
        response = None
        for engine in self.engines("decode"):
            try:
                async with session.post(engine + request.path, json=body) as answer:
                    data = await answer.content.readany()
                    kept = {k: answer.headers[k] for k in PASSED_ON if k in answer.headers}
                    response = web.StreamResponse(status=answer.status, headers=kept)
                    await response.prepare(request)
                    while data:
                        await response.write(data)
                        data = await answer.content.readany()
                    return response
            except GONE:
                if response is not None:
                    raise  # a part of it has been sent: nobody can go on with that
        raise web.HTTPServiceUnavailable(text="no decode engine answers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pd_proxy")
    parser.add_argument("--prefill", nargs="*", default=[], metavar="URL")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    proxy, app = Proxy(args.prefill, args.decode), web.Application(client_max_size=BODY_BYTES_MAX)
    both = [web.post(f"/v1/{one}", proxy.complete) for one in ("completions", "chat/completions")]
    app.add_routes([web.put("/pools", proxy.set_pools), *both])
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)
