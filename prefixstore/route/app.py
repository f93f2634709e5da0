"""The application: what is passed on, and what operators may ask and change.

``/v1/workers`` and ``/metrics`` want the operators' token if there is one. PASSED_PATHS are the
workers': who may ask there, they decide by the ``Authorization`` that is passed on.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

from prefixstore.errors import ConfigError
from prefixstore.route import limits
from prefixstore.route.state import STATE, State
from prefixstore.route.workers import Role, WorkerSpec
from prefixstore.serve.answering import (
    REQUEST_ID,
    answer,
    name_request,
    no_token,
    parsed_bytes,
    read_in_time,
    read_told,
    too_large,
)
from prefixstore.serve.auth import check_origin
from prefixstore.serve.guard import Guards
from prefixstore.serve.metrics import CONTENT_TYPE
from prefixstore.serve.refusal import RefusedError, busy

GUARDS = web.AppKey("guards", Guards)
# No others: an engine's own operators' paths are not for everybody who may ask here.
PASSED_PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/v1/score", "/v1/rerank", "/tokenize",
    "/detokenize",
)  # fmt: skip
_CHANGES = {"role", "state"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(state: State) -> web.Application:
    """The application of a router."""
    app = web.Application(middlewares=[_around], client_max_size=limits.BODY_BYTES_MAX)
    app[STATE], app[GUARDS] = state, Guards()
    app.cleanup_ctx.append(state.run)
    app.add_routes(routes())
    app.on_response_prepare.append(_before_headers)
    return app


def routes() -> list[web.RouteDef]:
    """Every route."""
    return [
        web.get("/v1/workers", get_workers, allow_head=False),
        web.post("/v1/workers", post_worker),
        web.patch("/v1/workers/{name}", patch_worker),
        web.delete("/v1/workers/{name}", delete_worker),
        web.get("/metrics", show_metrics, allow_head=False),
        web.get("/healthz", healthz, allow_head=False),
        web.get("/readyz", readyz, allow_head=False),
        web.get("/v1/models", get_models, allow_head=False),
        *(web.post(path, pass_on) for path in PASSED_PATHS),
    ]


async def _before_headers(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
    if request.app[STATE].draining:
        response.force_close()
        response.headers["Connection"] = "close"


@web.middleware
async def _around(request: web.Request, handler: Handler) -> web.StreamResponse:
    began, state, guards = time.monotonic(), request.app[STATE], request.app[GUARDS]
    guards.begin(request.transport)
    name_request(request)
    route = getattr(request.match_info.route.resource, "canonical", "unknown")
    status = 499  # the client went away
    try:
        response = await answer(request, lambda: handler(request), state.metrics)
        status = response.status
        return response
    finally:
        guards.end(request.transport)
        state.metrics.observe(route, time.monotonic() - began)
        state.metrics.add("requests_total", route=route, status=status)


async def pass_on(request: web.Request) -> web.StreamResponse:
    """A request for the workers."""
    state = request.app[STATE]
    if state.draining:
        raise RefusedError(503, "draining", "this router is being stopped")
    if "Content-Encoding" in request.headers:
        raise RefusedError(415, "config", "Content-Encoding is not taken", "send it as it is")
    length = request.content_length or 0
    if length > limits.BODY_BYTES_MAX:
        raise too_large(f"a body of {length} bytes", limits.BODY_BYTES_MAX)
    with state.room() as is_of:
        # What has come counts, not what may: who sends slowly must not hold more than others.
        data = await read_in_time(request, limits.BODY_BYTES_MAX, is_of)
        is_of(len(data) + parsed_bytes(data))
        assert state.proxy is not None
        return await state.proxy.pass_on(request, data, is_of)


# ---------------------------------------------------------------------- operators
def _check(request: web.Request) -> State:
    state = request.app[STATE]
    check_origin(request.headers, not state.token)
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = token.strip().encode("utf-8", "surrogateescape")
    if state.token and not (
        scheme.lower() == "bearer" and hmac.compare_digest(given, state.token.encode())
    ):
        raise no_token()
    return state


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        given = json.loads(await read_told(request, limits.ADMIN_BODY_BYTES_MAX))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError("the body is not a JSON object")
    return given


async def get_workers(request: web.Request) -> web.Response:
    """All workers, with what is known of each."""
    return web.json_response({"workers": [one.to_json() for one in _check(request).pool]})


async def post_worker(request: web.Request) -> web.Response:
    """Add a worker; it gets requests as soon as it answers."""
    state = _check(request)
    worker = state.add(WorkerSpec.parse(await _object(request), by_api=True))
    return web.json_response(worker.to_json(), status=201)


async def patch_worker(request: web.Request) -> web.Response:
    """Give a worker another role, or drain it, or have it get requests again."""
    worker = _check(request).pool.get(request.match_info["name"])
    given = await _object(request)
    if not given or set(given) - _CHANGES:
        raise ConfigError(f"entries {sorted(given)}", f"give some of {sorted(_CHANGES)}")
    if given.get("state", "ready") not in ("ready", "draining"):
        raise ConfigError(f"state is {given['state']!r:.80}", "give ready or draining")
    if "role" in given:
        if given["role"] not in list(Role):
            raise ConfigError(f"role is {given['role']!r:.80}", f"give {', '.join(Role)}")
        worker.spec = replace(worker.spec, role=Role(given["role"]))
    if "state" in given:
        worker.draining = given["state"] == "draining"
    return web.json_response(worker.to_json())


async def delete_worker(request: web.Request) -> web.Response:
    """Forget a worker; what it has under way ends as it would have."""
    return web.json_response(_check(request).pool.remove(request.match_info["name"]).to_json())


async def get_models(request: web.Request) -> web.Response:
    """The models of all workers that are there."""
    found: dict[str, Any] = {}
    for worker in request.app[STATE].pool:
        if worker.state == "ready":
            found = {**worker.models, **found}
    if not found:
        raise busy("no worker is ready")
    return web.json_response({"object": "list", "data": list(found.values())})


async def show_metrics(request: web.Request) -> web.Response:
    """Numbers for Prometheus."""
    state = _check(request)
    return web.Response(text=state.metrics_page(), headers={"Content-Type": CONTENT_TYPE})


async def healthz(request: web.Request) -> web.Response:
    """The process answers."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Whether requests should be sent here."""
    state = request.app[STATE]
    if state.draining:
        raise RefusedError(503, "draining", "this router is being stopped")
    ready = sum(worker.state == "ready" for worker in state.pool)
    if not ready:
        raise busy("no worker is ready")
    return web.json_response({"status": "ready", "workers": ready})
