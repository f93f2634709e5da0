"""Puts: KV from the network.

A put is checked, and given to the library, in batches of BATCH_BYTES while the rest arrives. What
must hold: a chunk is stored under the hash of what it stands for, with the bytes its sender summed;
what a put takes (memory, a buffer, a lock) stays taken until the thread that uses it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from aiohttp import web

from prefixstore import config, owned, wire
from prefixstore.errors import ConfigError
from prefixstore.keys import KEY_BYTES, ChunkRef, key_of
from prefixstore.layout import checksum
from prefixstore.namespace import Namespace
from prefixstore.owned import Region
from prefixstore.putting import PutState
from prefixstore.serve import limits
from prefixstore.serve.auth import Tenant
from prefixstore.serve.bodies import BodyReader, have_room, number, off_loop, region_of
from prefixstore.serve.context import state_of, tenant_of
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.state import State, to_end

_PUT_SUM_BYTES = 16


async def put(request: web.Request) -> web.Response:
    """Store chunks, or regions of them, while they arrive."""
    state, tenant = state_of(request), tenant_of(request)
    length = request.content_length
    if length is None:
        raise RefusedError(411, "config", "a put without Content-Length")
    if length > limits.PUT_BODY_BYTES_MAX:
        raise RefusedError(
            413, "too_large", f"a body of {length} bytes", "put fewer chunks at once"
        )
    if state.read_only:
        raise RefusedError(403, "read_only", "this server only reads")
    if state.draining:
        raise RefusedError(503, "draining", "this server is being stopped")
    with state.transferring(tenant, length):
        body = BodyReader(request.content, length)
        text = await body.fields()
        await have_room(request, text)
        fields = await off_loop(request, len(text), partial(wire.parse_fields, text))
        ns = state.namespace(tenant, fields.get("namespace"))
        region = region_of(ns, request.query)
        if region.plane is not None:
            raise ConfigError("part in a put", "put both, or leave it out")
        options = _put_options(fields)
        refs = await _put_refs(request, ns, body)
        size = region.num_bytes
        if body.left != len(refs) * (_PUT_SUM_BYTES + size):
            raise ConfigError(
                f"{body.left} bytes of payloads",
                f"{len(refs)} chunks of {_PUT_SUM_BYTES} + {size} are expected",
            )
        step = min(len(refs) * size, max(size, limits.BATCH_BYTES)) + size
        with state.memory(tenant, "put", step, limits.PUT_BYTES_MAX):
            states = await _receive(state, tenant, ns, body, refs, region, options)
    for one in states:
        state.metrics.add("puts_total", state=one.value)
    state.metrics.add("received_bytes_total", len(refs) * size)
    return web.json_response({"states": [one.value for one in states]})


async def _put_refs(request: web.Request, ns: Namespace, body: BodyReader) -> list[ChunkRef]:
    """The chunks of a put, each with the hash of its preimage. Raises ConfigError, RefusedError."""
    state, tenant = state_of(request), tenant_of(request)
    with ExitStack() as held:

        def check(num_bytes: int) -> None:
            most = limits.BODY_BYTES_MAX
            held.enter_context(state.memory(tenant, "body", num_bytes, most))

        block = await body.refs(check)

        def work() -> list[ChunkRef]:
            refs, _ = wire.unpack_refs(block)
            for ref in refs:
                _check_ref(ns, ref)
            return refs

        return await off_loop(request, len(block), work)


def _put_options(fields: dict[str, Any]) -> dict[str, Any]:
    """What a put may say about its chunks. Raises ConfigError."""
    options: dict[str, Any] = {"group": fields.get("group", 0), "tag": fields.get("tag", "")}
    if type(options["group"]) is not int or not 0 <= options["group"] < 2**64 - 1:
        raise ConfigError("group: a whole number, 0 to 2**64 - 2")
    if not isinstance(options["tag"], str):
        raise ConfigError("tag: a text")
    for name in ("pin", "alone", "wait"):
        options[name] = fields.get(name, name == "wait")
        if not isinstance(options[name], bool):
            raise ConfigError(f"{name}: true or false")
    if fields.get("ttl_s") is not None:
        options["ttl_s"] = number(fields, "ttl_s", 1, 0, config.TTL_S_MAX)
    options["deadline_s"] = number(fields, "deadline_s", config.OP_DEADLINE_S, 0.001, limits.OP_S)
    return options


def _check_ref(ns: Namespace, ref: ChunkRef) -> None:
    """A key must be the hash of what it stands for, else it could be in somebody's way; and what
    it stands for is kept in the index, so it has a bound."""
    if ns.layout.chunk_tokens > limits.CHUNK_TOKENS_MAX:  # its store has it from others
        raise ConfigError(
            f"chunks of {ns.layout.chunk_tokens} tokens",
            f"at most {limits.CHUNK_TOKENS_MAX} are taken over the network",
        )
    least = KEY_BYTES + 4 * ns.layout.chunk_tokens
    if len(ref.preimage) > least + limits.ITEMS_BYTES_MAX:
        raise ConfigError(
            f"a preimage of {len(ref.preimage)} bytes",
            f"{least}, and at most {limits.ITEMS_BYTES_MAX} of multimodal items",
        )
    if len(ref.preimage) < least or key_of(ref.preimage) != ref.key:
        raise ConfigError("a key that is not the hash of its preimage", "see docs/format.md")


async def _receive(
    state: State,
    tenant: Tenant,
    ns: Namespace,
    body: BodyReader,
    refs: Sequence[ChunkRef],
    region: Region,
    options: dict[str, Any],
) -> list[PutState]:
    states: list[PutState] = []
    size = region.num_bytes
    most = max(1, min(limits.BATCH_CHUNKS, limits.BATCH_BYTES // size))
    for at in range(0, len(refs), most):
        batch = refs[at : at + most]
        buffers = [state.buffer(size) for _ in batch]
        sums = []
        for buffer in buffers:
            sums.append(await body.take(_PUT_SUM_BYTES))
            await body.into(memoryview(buffer))
        work = partial(_store, ns, batch, buffers, sums, region, options)
        if region.is_whole:
            states += await to_end(state.storing.submit(tenant.name, work))
        else:
            async with state.lock(ns.name):
                states += await to_end(state.storing.submit(tenant.name, work))
        state.give_back(buffers)
    return states


def _store(
    ns: Namespace,
    refs: Sequence[ChunkRef],
    buffers: Sequence[bytearray],
    sums: Sequence[bytes],
    region: Region,
    options: dict[str, Any],
) -> list[PutState]:
    for buffer, expected in zip(buffers, sums, strict=True):
        if checksum(buffer) != expected:
            raise RefusedError(
                400, "checksum", "a payload is not what its checksum says", "send again"
            )
    pin = options["pin"]
    states = ns.put(refs, buffers, roi=region.roi, **{**options, "pin": False})
    stored = [ref for ref, one in zip(refs, states, strict=True) if one is PutState.STORED]
    if pin and stored:
        owned.pin(ns, stored, True)  # which knows of quotas
    return states
