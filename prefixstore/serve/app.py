"""The application: its routes, and what happens around every request.

Around every request: who asks (bearer token), what went wrong as one JSON object, a request id in
and out, counts, one line of log if asked for. What must hold: an error of a request never ends the
server, and nothing a client sends makes a 500.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial

from aiohttp import web

from prefixstore import admin, config
from prefixstore.serve import changing, control, limits, receiving, transfer
from prefixstore.serve.answering import REQUEST_ID, answer, name_request, no_token
from prefixstore.serve.auth import Tenant, check_origin
from prefixstore.serve.context import HELD, STATE, TENANT, state_of, tenant_of
from prefixstore.serve.eyes import EYES, Eyes, EyesOptions, events, show_overview
from prefixstore.serve.guard import Guards
from prefixstore.serve.lines import Lines
from prefixstore.serve.metrics import CONTENT_TYPE
from prefixstore.serve.openapi import document
from prefixstore.serve.page import PAGE_PATHS, page_routes
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.state import State
from prefixstore.serve.tracing import SPAN
from prefixstore.serve.tracing import end as end_span

logger = logging.getLogger("prefixstore")
GUARDS = web.AppKey("guards", Guards)
LINES = web.AppKey("lines", Lines)
NOBODY = Tenant("", "")  # who asks for what needs no token
_STREAMS = frozenset({"/v1/events"})
_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", *PAGE_PATHS})
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    state: State, *, json_log: bool = False, options: EyesOptions | None = None
) -> web.Application:
    """The application of a store."""
    app = web.Application(middlewares=[_around], client_max_size=limits.CONTROL_BODY_BYTES_MAX)
    app[STATE], app[GUARDS] = state, Guards()
    app[EYES] = Eyes(state, options or EyesOptions())
    app.cleanup_ctx.append(app[EYES].run)
    if json_log:
        app[LINES] = lines = Lines()
        app.on_cleanup.append(lambda _: asyncio.to_thread(lines.close))
    app.add_routes(routes())
    app.on_response_prepare.append(_before_headers)
    return app


async def _before_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Each answer says which request it is of; while we stop, the next request of a connection must
    find another server."""
    if REQUEST_ID in request:  # not where aiohttp itself refuses, before any middleware
        response.headers["X-Request-Id"] = request[REQUEST_ID]
    if request.app[STATE].draining:
        response.force_close()
        response.headers["Connection"] = "close"


def routes() -> list[web.RouteDef]:
    """Every route; tests/serve compares them with the OpenAPI document."""
    return [
        web.post("/v1/namespaces", control.post_namespaces),
        web.get("/v1/namespaces", control.get_namespaces, allow_head=False),
        web.post("/v1/match", control.match),
        web.post("/v1/segments", control.segments),
        web.post("/v1/get", transfer.get),
        web.post("/v1/put", receiving.put),
        web.post("/v1/leases", control.post_leases),
        web.post("/v1/leases/{id}", control.renew_lease),
        web.delete("/v1/leases/{id}", control.delete_lease),
        web.post("/v1/prefetch", changing.prefetch),
        web.post("/v1/pin", changing.pin),
        web.post("/v1/delete", changing.delete),
        web.post("/v1/ttl", changing.set_ttl),
        web.post("/v1/namespaces/{id}/retire", changing.retire),
        web.post("/v1/namespaces/{id}/bump", changing.bump),
        web.post("/v1/explain", control.explain),
        web.post("/v1/staleness", changing.post_staleness),
        web.put("/v1/staleness", changing.put_staleness),
        web.post("/v1/flush", changing.flush),
        web.post("/v1/drain", drain),
        web.get("/v1/events", events, allow_head=False),
        web.get("/v1/overview", show_overview, allow_head=False),
        web.get("/metrics", show_metrics, allow_head=False),
        web.get("/healthz", healthz, allow_head=False),
        web.get("/readyz", readyz, allow_head=False),
        web.get("/openapi.json", openapi, allow_head=False),
        *page_routes(),
    ]


@web.middleware
async def _around(request: web.Request, handler: Handler) -> web.StreamResponse:
    began = time.monotonic()
    guards, eyes = request.app[GUARDS], request.app[EYES]
    guards.begin(request.transport)
    state = request.app[STATE]
    metrics = state.metrics
    name_request(request)
    route = getattr(request.match_info.route.resource, "canonical", "unknown")
    span = eyes.tracing.begin(request.method, route, request.headers)
    if span is not None:
        request[SPAN] = span
    status, sent = 499, 0  # the client went away
    try:
        work = partial(_asked, request, handler)
        response = await answer(request, work, metrics, state.refusal_of)
        status, sent = response.status, response.content_length or 0
        return response
    finally:
        guards.end(request.transport)
        seconds = time.monotonic() - began
        if route not in _STREAMS:  # how long somebody listens is no latency
            metrics.observe(route, seconds)
        metrics.add("requests_total", route=route, status=status)
        eyes.answered(request, route, status, seconds, sent)
        if span is not None:
            end_span(span, status, _attributes(request, sent))
        if LINES in request.app:
            request.app[LINES].put(_line(request, route, status, seconds))


async def _asked(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who asks, and what of a body there is room for; then the handler. Raises RefusedError."""
    state, tenant = state_of(request), NOBODY
    if request.path not in _OPEN_PATHS:
        check_origin(request.headers, state.tenants.open)
        known = state.tenants.authenticate(request.headers.get("Authorization", ""))
        if known is None:
            raise no_token()
        request[TENANT] = tenant = known
        state.check_there()
    if "Content-Encoding" in request.headers:
        raise RefusedError(415, "config", "Content-Encoding is not taken", "send it as it is")
    # A put says itself what it takes when it knows how much of it is payloads.
    length = 0 if handler is receiving.put else request.content_length or 0
    with ExitStack() as held:
        held.enter_context(state.memory(tenant, "body", length, limits.BODY_BYTES_MAX))
        request[HELD] = held
        return await handler(request)


def _attributes(request: web.Request, sent: int) -> dict[str, str | int]:
    tenant = request.get(TENANT)
    return {
        "http.request.body.size": request.content_length or 0,
        "http.response.body.size": sent,
        "prefixstore.request_id": request[REQUEST_ID],
        "prefixstore.tenant": "" if tenant is None else tenant.name,
    }


def _line(request: web.Request, route: str, status: int, seconds: float) -> str:
    trace = request.headers.get("traceparent", "")
    tenant = request.get(TENANT)
    line = {
        "time_s": round(time.time(), 3),
        "method": request.method,
        "route": route,
        "status": status,
        "ms": round(1000 * seconds, 3),
        "tenant": None if tenant is None else tenant.name,
        "request_id": request[REQUEST_ID],
        "traceparent": trace if _TRACEPARENT.fullmatch(trace) else None,
    }
    return json.dumps(line)


# ---------------------------------------------------------------------- operators
def _check_local(request: web.Request) -> State:
    if not tenant_of(request).is_local:
        raise RefusedError(403, "forbidden", "this is for the tenant 'local'", "use its token")
    return state_of(request)


async def healthz(request: web.Request) -> web.Response:
    """The process answers."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Whether requests should be sent here: not while draining, not without a store."""
    state = state_of(request)
    state.store.check_open()
    if state.draining:
        raise RefusedError(503, "draining", "this server is being stopped")
    return web.json_response({"status": "ready", "read_only": state.read_only})


async def drain(request: web.Request) -> web.Response:
    """Take no more puts, say so at /readyz, and write what is in memory to disk."""
    state = _check_local(request)
    state.draining, store, deadline_s = True, state.store, config.OP_DEADLINE_S

    def written() -> bool:
        return store.drain(deadline_s) and store.keeper.given_up.tell_of_all()

    wait_s = deadline_s + limits.OP_S
    done = await state.ask(tenant_of(request), written, wait_s, state.flushing)
    under_way = sum(state.transfers.values())
    return web.json_response({"flushed": done, "transfers": under_way})


async def show_metrics(request: web.Request) -> web.Response:
    """Numbers for Prometheus."""
    state = _check_local(request)
    stats = await state.ask(tenant_of(request), lambda: admin.stats(state.store))
    gauges = {
        "connections": float(len(request.app[GUARDS].connections)),
        "transfers": float(sum(state.transfers.values())),
        "transfer_bytes": float(sum(state.bytes_under_way.values())),
        "leases": float(state.num_leases),
        "draining": float(state.draining),
        "namespaces": float(len(stats["namespaces"])),
    }
    return web.Response(
        text=state.metrics.text(gauges, stats), headers={"Content-Type": CONTENT_TYPE}
    )


async def openapi(request: web.Request) -> web.Response:
    """The description of all this."""
    return web.json_response(document())
