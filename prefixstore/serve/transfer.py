"""Gets: KV to the network.

A get is answered with one record and payload after the other, in the order asked. For the tenant
`local`, whole slots and long runs go from the tier's file to the socket, unread by us (by
``sendfile``; from memory, by ``send`` of the mapped file): the record carries the checksums and the
receiver compares. Short runs, TLS, other tenants (a slot may be another's by the time it is sent),
and whoever asks for ``checked=1`` (a client whose comparison failed) get bytes that were read and
checked here, which is also what heals a damaged chunk.

What must hold: nothing that failed its check leaves this process for a tenant, nor what a buffer
held before.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import partial

import numpy as np
from aiohttp import web

from prefixstore import owned, wire
from prefixstore.errors import StoreError
from prefixstore.keys import ChunkRef
from prefixstore.layout import checksum
from prefixstore.ledger import DISK, TIER_NAMES
from prefixstore.namespace import MISS, Namespace
from prefixstore.owned import Place, Region
from prefixstore.serve import limits
from prefixstore.serve.answering import transfer_s
from prefixstore.serve.bodies import chunks, region_of
from prefixstore.serve.context import state_of, tenant_of
from prefixstore.serve.eyes import note_get
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.sending import SlotPart, SlowReceiverError, Step, send_steps
from prefixstore.serve.state import State, to_end
from prefixstore.timing import timeout
from prefixstore.wire import SUM_NONE, SUM_WHOLE, Record

_MISSED = Record(MISS, SUM_NONE, b"", 0)
_PUT_SUM_BYTES = 16


class _Answer(web.StreamResponse):
    """Whose headers go out with the first bytes of its body: one system call, one packet."""

    _send_headers_immediately = False


async def get(request: web.Request) -> web.StreamResponse:
    """Regions of chunks."""
    state, tenant = state_of(request), tenant_of(request)
    ns, _, refs = await chunks(request)
    region = region_of(ns, request.query)
    total = len(refs) * region.num_bytes  # before anything is looked up, whether it is there or not
    if total > limits.GET_BYTES_MAX:
        raise RefusedError(413, "too_large", f"{total} bytes", f"at most {limits.GET_BYTES_MAX}")
    locate = partial(owned.locate, ns, refs, region)
    if region.is_whole:
        places = await state.look_up(tenant, ns, refs, locate)
    else:  # trailers are read as well
        places = await state.ask(tenant, locate)
    note_get(request, ns, refs, places)
    checked = (
        "checked" in request.query
        or not tenant.is_local
        or request.transport is None
        or request.transport.get_extra_info("ssl_object") is not None
        or min(run.num_bytes for run in region.runs()) < limits.SENDFILE_BYTES_MIN
    )
    records = [_record(place, checked) for place in places]
    total = sum(len(record.pack()) + record.num_bytes for record in records)
    with state.transferring(tenant, total):
        response = _Answer(
            headers={"Content-Type": wire.CONTENT_TYPE, "Content-Length": str(total)}
        )
        if checked:
            size = ns.layout.roi_bytes(region.roi)
            step = min(len(refs) * size, max(size, limits.BATCH_BYTES))
            with state.memory(tenant, "checked", step, limits.CHECKED_BYTES_MAX):
                sending = _send_checked(request, response, ns, refs, region, records)
                done = await _whole(request, state, sending, transfer_s(total))
        else:
            steps = _steps(region, places, records)
            in_memory = all(record.tier != DISK for record in records)
            unread = _send_unread(request, response, steps, transfer_s(total), in_memory)
            done = await _whole(request, state, unread, None)
        if done:
            _note_hits(ns, [] if checked else places)
            for record in records:
                state.metrics.add("chunks_total", tier=TIER_NAMES.get(record.tier, "miss"))
            state.metrics.add("sent_bytes_total", total)
    return response


def _record(place: Place | None, checked: bool) -> Record:
    if place is None:
        return _MISSED
    if not checked:
        return place.record
    return Record(place.record.tier, SUM_WHOLE, bytes(16), place.record.num_bytes)


def _steps(
    region: Region, places: Sequence[Place | None], records: Sequence[Record]
) -> deque[Step]:
    steps: deque[Step] = deque()
    runs = region.runs()
    for place, record in zip(places, records, strict=True):
        steps.append(record.pack())
        if place is not None:
            steps += [
                SlotPart(place.file, place.slot, run.slot_offset, run.num_bytes) for run in runs
            ]
    return steps


async def _whole(
    request: web.Request, state: State, sending: Awaitable[None], deadline_s: float | None
) -> bool:
    """Send an answer whose length has been announced, headers and all; whatever fails must end the
    connection: the receiver would take another answer for the rest of this one."""
    done = False
    try:
        async with timeout(deadline_s):
            await sending
        done = True
    except (OSError, asyncio.TimeoutError, StoreError):
        pass  # counted, and seen by the receiver
    finally:
        if not done:
            state.metrics.add("broken_transfers_total", way="get")
            if request.transport is not None:
                request.transport.abort()
    return done


async def _send_unread(
    request: web.Request,
    response: web.StreamResponse,
    steps: deque[Step],
    deadline_s: float,
    in_memory: bool,
) -> None:
    await response.prepare(request)
    if steps:  # aiohttp sends the headers with the first record, and is done
        first = steps.popleft()
        assert isinstance(first, bytes)
        await response.write(first)
    await send_steps(request, state_of(request), steps, deadline_s, in_memory)


def _note_hits(ns: Namespace, places: Sequence[Place | None]) -> None:
    keeper = ns.store.keeper
    for place in places:
        if place is not None:
            keeper.touched(place.record.tier, place.key)
            if place.record.tier == DISK:
                keeper.promote(place.key)


async def _send_checked(
    request: web.Request,
    response: web.StreamResponse,
    ns: Namespace,
    refs: Sequence[ChunkRef],
    region: Region,
    records: list[Record],
) -> None:
    """Read, check and send chunks, a few at a time."""
    await response.prepare(request)
    state = state_of(request)
    size = ns.layout.roi_bytes(region.roi)
    count = max(1, limits.BATCH_BYTES // size)
    for at in range(0, len(refs), count):
        batch = [i for i in range(at, min(at + count, len(refs))) if records[i].num_bytes]
        outs = [state.buffer(size) for _ in batch]
        read = partial(_read_checked, ns, [refs[i] for i in batch], outs, region)
        job = state.transfer.submit(tenant_of(request).name, read)
        tiers, payloads, sums = await to_end(job)
        found = iter(zip(tiers, payloads, sums, strict=True))
        for i in range(at, min(at + count, len(refs))):
            if records[i].num_bytes:
                tier, payload, total = next(found)
                records[i] = Record(tier, SUM_WHOLE, total, records[i].num_bytes)
                await _write(response, memoryview(records[i].pack()))
                await _write(response, payload)
            else:
                await _write(response, memoryview(records[i].pack()))
        await _taken(request)
        state.give_back(outs)


async def _write(response: web.StreamResponse, data: memoryview) -> None:
    """Write what the receiver takes without a pause of STALL_S. Raises asyncio.TimeoutError."""
    for at in range(0, len(data), limits.INLINE_BYTES):
        part = data[at : at + limits.INLINE_BYTES]
        async with timeout(limits.STALL_S):
            await response.write(part)


async def _taken(request: web.Request) -> None:
    """Wait until the transport has no more to send: the buffers are used again."""
    transport, before, since = request.transport, -1, 0.0
    while transport is not None and (left := transport.get_write_buffer_size()):
        if transport.is_closing():
            raise ConnectionResetError("the connection is gone")
        if left != before:
            before, since = left, time.monotonic()
        elif time.monotonic() - since > limits.STALL_S:
            raise SlowReceiverError("the receiver took nothing for too long")
        await asyncio.sleep(0.001)


def _read_checked(
    ns: Namespace, refs: Sequence[ChunkRef], outs: Sequence[bytearray], region: Region
) -> tuple[list[int], list[memoryview], list[bytes]]:
    views = [memoryview(out) for out in outs]
    tiers = ns.get(refs, views, region.roi)
    for tier, view in zip(tiers, views, strict=True):
        if tier == MISS:  # what a failed check leaves may be another's, or of the last use
            np.frombuffer(view, np.uint8)[:] = 0
        elif region.plane is not None:
            _keep_plane(view, region)
    payloads = [view[: region.num_bytes] for view in views]
    return tiers, payloads, [checksum(payload) for payload in payloads]


def _keep_plane(payload: memoryview, region: Region) -> None:
    """Move the plane that is asked for to the front, layer by layer: no second buffer."""
    layers = region.roi.layer_stop - region.roi.layer_start
    whole = np.frombuffer(payload, np.uint8).reshape(layers, region.layout.num_planes, -1)
    front = np.frombuffer(payload, np.uint8)[: region.num_bytes].reshape(layers, -1)
    for layer in range(layers):
        front[layer] = whole[layer, region.plane]
