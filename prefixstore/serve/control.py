"""Requests about chunks that carry no KV: find, lease, pin, delete, explain, prefetch, staleness.

Each is: who asks, which namespace of theirs, which chunks; then one call of the library on a
thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from prefixstore import config, owned, wire
from prefixstore.errors import ConfigError, LayoutError
from prefixstore.identity import ModelIdentity, canonical_json
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.ledger import TIER_NAMES
from prefixstore.namespace import Lease, Namespace
from prefixstore.registry import NamespaceRecord
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.serve import limits
from prefixstore.serve.auth import MARK_FIELD
from prefixstore.serve.bodies import (
    asked,
    chunks,
    items_of,
    number,
    salt_of,
    tokens_of,
)
from prefixstore.serve.context import state_of, tenant_of
from prefixstore.serve.eyes import note_match
from prefixstore.serve.held import HeldLease, no_lease

PROMPTS_MAX = 1024  # in one match


# ---------------------------------------------------------------------- namespaces
async def post_namespaces(request: web.Request) -> web.Response:
    """Enter a model, or find it; its id, and its identity as it stands in this store."""
    state, tenant = state_of(request), tenant_of(request)
    fields, _ = await asked(request)

    def work() -> Namespace:
        try:
            text = json.dumps(fields["identity"])
            if len(text) > limits.IDENTITY_BYTES_MAX:
                raise ConfigError(
                    f"an identity of {len(text)} bytes", f"at most {limits.IDENTITY_BYTES_MAX}"
                )
            identity = ModelIdentity.from_json(text)
            layout = Layout(**fields["layout"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"identity and layout are expected: {error}") from error
        except (ValueError, RecursionError) as error:  # IdentityError is one
            raise ConfigError(f"identity: {error}") from error
        _check_layout(layout)
        return state.register(tenant, identity, layout)

    ns = await state.ask(tenant, work)
    identity = json.loads(ns.identity.to_json())
    return web.json_response({"namespace": ns.name.hex(), "identity": identity})


def _check_layout(layout: Layout) -> None:
    """Work is done for each piece, and for each token. Raises LayoutError."""
    if layout.chunk_tokens > limits.CHUNK_TOKENS_MAX:
        raise LayoutError(
            f"chunks of {layout.chunk_tokens} tokens", f"at most {limits.CHUNK_TOKENS_MAX}"
        )
    pieces, size = layout.num_pieces, layout.piece_bytes
    if pieces > limits.PIECES_MAX or size < limits.PIECE_BYTES_MIN:
        raise LayoutError(
            f"{pieces} pieces (layer, plane, head) of {size} bytes",
            f"at most {limits.PIECES_MAX}, of at least {limits.PIECE_BYTES_MIN} bytes",
        )


async def get_namespaces(request: web.Request) -> web.Response:
    """The tenant's namespaces."""
    state, tenant = state_of(request), tenant_of(request)

    def work() -> list[dict[str, Any]]:
        return [_shown(one) for one in state.store.namespaces() if tenant.owns(one.identity)]

    return web.json_response({"namespaces": await state.ask(tenant, work)})


def _shown(record: NamespaceRecord) -> dict[str, Any]:
    """A namespace as its tenant gives it: without the mark, and without numbers of the store."""
    identity = json.loads(record.given.to_json())
    forward = json.loads(identity["forward"])
    forward.pop(MARK_FIELD, None)
    identity["forward"] = canonical_json(forward)
    layout = record.layout.to_json()
    return {"namespace": record.identity.namespace_hex, "identity": identity, "layout": layout}


# ---------------------------------------------------------------------- finding
async def match(request: web.Request) -> web.Response:
    """The leading chunks that are there, of each prompt; leased if asked for. Or each by itself."""
    state, tenant = state_of(request), tenant_of(request)
    ns, fields, refs = await chunks(request)
    if fields.get("each") is True:
        each = await state.look_up(tenant, ns, refs, lambda: ns.match_each(refs))
        return web.json_response({"tiers": [each]})
    prompts = _prompts(fields, len(refs))
    lease_s = number(fields, "lease_s", 0, 0, config.LEASE_S)

    def let_go(late: tuple[list[list[int]], Lease | None, list[tuple[int, bytes]]]) -> None:
        if late[1] is not None:
            ns.release(late[1])

    def work() -> tuple[list[list[int]], Lease | None, list[tuple[int, bytes]]]:
        tiers, found, found_tiers, at = [], [], [], 0
        for count in prompts:
            matched = list(ns.match(refs[at : at + count]).tiers)
            found += refs[at : at + len(matched)]
            found_tiers += matched
            tiers.append(matched)
            at += count
        if not (lease_s and found):
            return tiers, None, []
        lease, held = ns.lease(found, found_tiers, lease_s)
        return _cut(tiers, held), lease, _granted(found, found_tiers, held)

    if lease_s:
        tiers, lease, granted = await state.ask(tenant, work, undo=let_go)
    else:
        most = limits.INLINE_MATCH_REFS_MAX
        tiers, lease, granted = await state.look_up(tenant, ns, refs, work, most)
    note_match(request, ns, refs, prompts, tiers)
    answer: dict[str, Any] = {"tiers": tiers}
    if lease is not None:
        held = HeldLease(tenant.name, ns, granted, lease)
        answer["lease"] = {"id": state.leases.add(held), "end_s": lease.end_s}
    return web.json_response(answer)


def _prompts(fields: dict[str, Any], count: int) -> list[int]:
    prompts = fields.get("prompts", [count])
    if (
        not isinstance(prompts, list)
        or len(prompts) > PROMPTS_MAX
        or not all(type(one) is int and one >= 0 for one in prompts)
        or sum(prompts) != count
    ):
        raise ConfigError(f"prompts: how many of the {count} chunks each has, in order")
    return prompts


def _granted(refs: Sequence[ChunkRef], tiers: Sequence[int], held: int) -> list[tuple[int, bytes]]:
    """What is kept of a lease: tier and key of the leading chunks that it holds."""
    return [(tier, ref.key) for tier, ref in zip(tiers[:held], refs[:held], strict=True)]


def _cut(tiers: list[list[int]], held: int) -> list[list[int]]:
    """What a lease holds of several prompts: it ends at the first chunk that has gone."""
    cut = []
    for one in tiers:
        cut.append(one[: max(0, held)])
        held -= len(one)
    return cut


async def segments(request: web.Request) -> web.Response:
    """Runs of a prompt's tokens that stand in stored texts, and the chunks they stand in."""
    state, tenant = state_of(request), tenant_of(request)
    fields, rest = await asked(request)
    ns = state.namespace(tenant, fields.get("namespace"))
    start = int(number(fields, "start", 0, 0, 2**31))
    least = int(number(fields, "min_tokens", MIN_SEGMENT_TOKENS, 0, 2**31))

    def work() -> list[Segment]:
        tokens, salt, items = tokens_of(fields, rest), salt_of(fields), items_of(fields)
        if len(tokens) > limits.SEGMENT_TOKENS_MAX:
            raise ConfigError(f"{len(tokens)} tokens", f"at most {limits.SEGMENT_TOKENS_MAX}")
        return ns.find_segments(tokens, salt, start, least, items)

    found = await state.ask(tenant, work)
    refs = [ref for one in found for ref in one.refs]
    body = wire.pack_request({"segments": [_segment(one) for one in found]}, wire.pack_refs(refs))
    return web.Response(body=body, content_type=wire.CONTENT_TYPE)


def _segment(one: Segment) -> dict[str, Any]:
    return {
        "start": one.start,
        "num_tokens": one.num_tokens,
        "source_start": one.source_start,
        "alone": one.alone,
        "tiers": list(one.tiers),
    }


async def explain(request: web.Request) -> web.Response:
    """The first chunk of a prompt that is missing, and why."""
    state = state_of(request)
    ns, _, refs = await chunks(request)

    def work() -> dict[str, Any]:
        count = ns.match(refs).num_chunks
        size = ns.layout.chunk_tokens
        answer: dict[str, Any] = {"chunks": len(refs), "found_chunks": count,
                                  "found_tokens": count * size}  # fmt: skip
        if count < len(refs):
            answer["missing"] = {
                "chunk": count,
                "token": count * size,
                "why": owned.why_missing(ns, refs[count]),
                "stored_behind": len(owned.own_keys(ns, refs[count + 1 :])),
            }
        return answer

    return web.json_response(await state.ask(tenant_of(request), work))


# ---------------------------------------------------------------------- leases
async def post_leases(request: web.Request) -> web.Response:
    """Hold chunks that a match found in those tiers."""
    state, tenant = state_of(request), tenant_of(request)
    ns, fields, refs = await chunks(request)
    tiers = fields.get("tiers")
    if (
        not isinstance(tiers, list)
        or len(tiers) != len(refs)
        or not all(type(tier) is int and tier in TIER_NAMES for tier in tiers)
    ):
        raise ConfigError("tiers: 1 or 2 for each chunk")
    duration_s = number(fields, "duration_s", config.LEASE_S, 0.001, config.LEASE_S)
    lease, held = await state.ask(
        tenant,
        lambda: ns.lease(refs, tiers, duration_s),
        undo=lambda late: ns.release(late[0]),
    )
    name = state.leases.add(HeldLease(tenant.name, ns, _granted(refs, tiers, held), lease))
    return web.json_response({"id": name, "end_s": lease.end_s, "held": held})


async def renew_lease(request: web.Request) -> web.Response:
    """Hold the chunks of a lease for longer."""
    state, tenant = state_of(request), tenant_of(request)
    name = request.match_info["id"]
    held = state.leases.of(tenant, name)
    fields, _ = await asked(request)
    duration_s = number(fields, "duration_s", config.LEASE_S, 0.001, config.LEASE_S)
    lease, count = await state.ask(
        tenant,
        lambda: held.again(duration_s),
        undo=lambda late: held.namespace.release(late[0]),
    )
    if not state.leases.renewed(name, held, lease):
        held.namespace.release(lease)  # it was released meanwhile
        raise no_lease()
    return web.json_response({"end_s": lease.end_s, "held": count})


async def delete_lease(request: web.Request) -> web.Response:
    """End a lease."""
    state_of(request).leases.release(tenant_of(request), request.match_info["id"])
    return web.json_response({})
