"""Sending slots to a socket: by the kernel, on threads, as fast as the other side takes it.

The socket is a duplicate of the connection's, used only after all that the server itself has
written to it is gone. A thread sends until the socket is full, waits a little, and then gives
itself back: a slow receiver holds a few steps in a queue and no thread. What must hold: after an
error nothing more may be sent on the connection, because the receiver waits for the rest.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from prefixstore.serve import limits
from prefixstore.serve.context import tenant_of
from prefixstore.serve.state import State
from prefixstore.slots import SlotFile
from prefixstore.timing import timeout
from prefixstore.wire import SOCKET_BYTES


@dataclass(frozen=True, slots=True)
class SlotPart:
    """Bytes of a slot."""

    file: SlotFile
    slot: int
    offset: int
    num_bytes: int


Step = bytes | SlotPart


class SlowReceiverError(OSError):
    """The receiver took too little for too long."""


async def send_steps(
    request: web.Request, state: State, steps: deque[Step], deadline_s: float, in_memory: bool
) -> None:
    """Send all, or raise OSError; then the connection must be closed.

    ``in_memory``: none of it has to come from a device.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the connection is gone")
    loop = asyncio.get_running_loop()
    end = time.monotonic() + deadline_s
    while transport.get_write_buffer_size():  # the headers: a few hundred bytes
        await asyncio.sleep(0.001)
        if transport.is_closing() or time.monotonic() > end:
            raise ConnectionResetError("the connection is gone")
    out = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
    out.setblocking(False)
    if out.family == socket.AF_UNIX:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    pushed: asyncio.Future[bool] | None = None
    work = partial(_push, out, steps)
    try:
        if in_memory:  # a small chunk is sent before a thread would have woken up
            alone = sum(state.transfers.values()) == 1  # nobody waits: no need of threads, either
            _push(out, steps, limits.ALONE_BYTES if alone else limits.INLINE_BYTES, 0)
        while steps:
            pushed = state.transfer.submit(tenant_of(request).name, work).future
            was_full = await asyncio.shield(pushed)
            if not steps:
                return
            wait_s = min(limits.STALL_S, end - time.monotonic())
            if transport.is_closing():
                raise ConnectionResetError("the connection is gone")
            if wait_s <= 0 or (was_full and not await _writable(loop, out, wait_s)):
                raise SlowReceiverError("the receiver took too little for too long")
    finally:
        if pushed is None or pushed.done():
            out.close()
        else:  # cancelled: the number must not become another file's while a thread uses it
            pushed.add_done_callback(lambda _: out.close())


def _push(
    out: socket.socket,
    steps: deque[Step],
    most_bytes: int = limits.PUSH_BYTES,
    spin_s: float = limits.SPIN_S,
) -> bool:
    """Send until the socket is full, or so many bytes of slots are sent; whether it is full."""
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    while steps and most_bytes > 0:
        step = steps[0]
        try:
            if isinstance(step, bytes):
                # Only if more follows: the kernel holds it back for 200 ms otherwise.
                sent = out.send(step, socket.MSG_MORE if len(steps) > 1 else 0)
                rest: Step | None = step[sent:] or None
            else:
                count = min(step.num_bytes, most_bytes)
                sent = _send_slot(out, step, count)
                left = step.num_bytes - sent
                rest = SlotPart(step.file, step.slot, step.offset + sent, left) if left else None
                most_bytes -= sent
        except BlockingIOError:
            if not (spin_s and poll.poll(spin_s * 1000)):
                return True
            continue
        if rest is None:
            steps.popleft()
        else:
            steps[0] = rest
    return False


def _send_slot(out: socket.socket, part: SlotPart, count: int) -> int:
    if not part.file.mapped:
        return part.file.send(out.fileno(), part.slot, part.offset, count)
    # To TCP, `sendfile` costs more than twice of a copy: it hands over pages, of 4 KiB each.
    view = part.file.view(part.slot)[part.offset : part.offset + count]
    return out.send(view)


async def _writable(loop: asyncio.AbstractEventLoop, out: socket.socket, wait_s: float) -> bool:
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(True)

    loop.add_writer(out.fileno(), wake)
    try:
        async with timeout(wait_s):
            await ready
    except asyncio.TimeoutError:
        return False
    finally:
        loop.remove_writer(out.fileno())
    return True
