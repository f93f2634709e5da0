"""Requests that change what is kept of chunks, or have it moved: pin, delete, prefetch, staleness.

Each is: who asks, which namespace of theirs, which chunks; then one call of the library on a
thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from aiohttp import web

from prefixstore import config, owned, wire
from prefixstore.errors import ConfigError, FormatError
from prefixstore.keys import ChunkRef
from prefixstore.namespace import Namespace
from prefixstore.serve import limits
from prefixstore.serve.auth import Tenant
from prefixstore.serve.bodies import asked, chunks, number, off_loop
from prefixstore.serve.context import state_of, tenant_of
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.state import State

T = TypeVar("T")


def _writable(request: web.Request) -> tuple[State, Tenant]:
    state = state_of(request)
    if state.read_only:
        raise RefusedError(403, "read_only", "this server only reads")
    if state.draining:
        raise RefusedError(503, "draining", "this server is being stopped")
    return state, tenant_of(request)


async def pin(request: web.Request) -> web.Response:
    """Exempt chunks from eviction, or not."""
    state, tenant = _writable(request)
    ns, fields, refs = await chunks(request)
    pinned = fields.get("pinned", True)
    if not isinstance(pinned, bool):
        raise ConfigError("pinned: true or false")
    done = await state.ask(tenant, lambda: owned.pin(ns, refs, pinned))
    return web.json_response({"chunks": done})


async def set_ttl(request: web.Request) -> web.Response:
    """Have chunks expire so many seconds from now; null: never."""
    state, tenant = _writable(request)
    ns, fields, refs = await chunks(request)
    if "ttl_s" not in fields:
        raise ConfigError("ttl_s is missing", "give seconds, or null for ever")
    ttl_s = None if fields["ttl_s"] is None else number(fields, "ttl_s", 1, 0, config.TTL_S_MAX)
    done = await state.ask(tenant, lambda: ns.set_ttl(refs, ttl_s))
    return web.json_response({"chunks": done})


async def retire(request: web.Request) -> web.Response:
    """Drop a model: its chunks and its name."""
    state, tenant = _writable(request)
    ns = state.namespace(tenant, request.match_info["id"])
    done = await state.ask(tenant, lambda: _gone(ns.retire))
    return web.json_response({"chunks": done})


async def bump(request: web.Request) -> web.Response:
    """A model has other weights now: its chunks go, and it is entered under another name."""
    state, tenant = _writable(request)
    ns = state.namespace(tenant, request.match_info["id"])

    def work() -> Namespace:
        new = _gone(ns.bump)
        state.tenants.limit(state.store, tenant, new.name)
        return new

    new = await state.ask(tenant, work)
    identity = json.loads(new.identity.to_json())
    return web.json_response({"namespace": new.name.hex(), "identity": identity})


def _gone(work: Callable[[], T]) -> T:
    """Two at once: the second finds it retired."""
    try:
        return work()
    except FormatError as error:
        raise RefusedError(404, "namespace", str(error), "it was retired meanwhile") from error


async def delete(request: web.Request) -> web.Response:
    """Remove chunks from every tier."""
    state, tenant = _writable(request)
    ns, _, refs = await chunks(request)
    return web.json_response({"chunks": await state.ask(tenant, lambda: owned.delete(ns, refs))})


async def prefetch(request: web.Request) -> web.Response:
    """Have chunks copied from disk to memory soon."""
    ns, _, refs = await chunks(request)
    done = await state_of(request).ask(tenant_of(request), lambda: owned.prefetch(ns, refs))
    return web.json_response({"chunks": done}, status=202)


async def post_staleness(request: web.Request) -> web.Response:
    """What was noted of chunks: a presence byte each, then float16 values of those present."""
    ns, _, refs = await chunks(request)

    def work() -> bytes:
        own = set(owned.own_keys(ns, refs))
        found = [
            value if ref.key in own else None
            for ref, value in zip(refs, ns.staleness_of(refs), strict=True)
        ]
        there = bytes(value is not None for value in found)
        return there + b"".join(value.tobytes() for value in found if value is not None)

    body = await state_of(request).ask(tenant_of(request), work)
    return web.Response(body=body, content_type="application/octet-stream")


async def put_staleness(request: web.Request) -> web.Response:
    """Note how far the KV of each token moves: float32 [chunks, tokens] behind the references."""
    state, tenant = _writable(request)
    fields, rest = await asked(request)
    ns = state.namespace(tenant, fields.get("namespace"))
    refs, rest = await off_loop(request, len(rest), partial(wire.unpack_refs, rest))
    size = ns.layout.chunk_tokens
    if len(rest) != 4 * size * len(refs):
        raise ConfigError(f"{len(rest)} bytes of values", f"{4 * size * len(refs)} are expected")
    values = np.frombuffer(rest, "<f4").reshape(len(refs), size)

    def work() -> int:
        own = set(owned.own_keys(ns, refs))
        which = [i for i, ref in enumerate(refs) if ref.key in own]
        return ns.note_staleness(_pick(refs, which), values[which])

    return web.json_response({"chunks": await state.ask(tenant, work)})


def _pick(refs: Sequence[ChunkRef], which: Sequence[int]) -> list[ChunkRef]:
    return [refs[i] for i in which]


async def flush(request: web.Request) -> web.Response:
    """Wait until what was put is on disk; whether the tenant's chunks are."""
    fields, _ = await asked(request)
    deadline_s = number(fields, "deadline_s", config.OP_DEADLINE_S, 0, limits.OP_S)
    state = state_of(request)
    tenant, store = tenant_of(request), state.store

    def owns(name: bytes) -> bool:
        try:
            return tenant.owns(store.namespace_of(name).identity)
        except FormatError:  # it was retired
            return False

    work, wait_s = partial(store.flush, deadline_s, owns), deadline_s + limits.OP_S
    done = await state.ask(tenant, work, wait_s, state.flushing)
    return web.json_response({"flushed": done})
