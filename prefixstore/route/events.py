"""Following the KV events of a worker: what its own cache holds, block by block, over ZeroMQ.

What must hold: messages that are malformed or lost cost hits, nothing else. Those whose numbers are
missing are asked for where the worker has a replay endpoint, every _ASK_AGAIN_S until that answers.
As long as they are missing, what was sent to the worker counts beside what it tells; where it has
them no more, until it is started anew or says that it has nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from prefixstore.errors import ConfigError
from prefixstore.route import limits
from prefixstore.route.workers import Worker
from prefixstore.timing import timeout

if TYPE_CHECKING:
    from zmq.asyncio import Context, Socket

    from prefixstore.serve.kv_wire import KVEventBatch

logger = logging.getLogger("prefixstore")
_REPLAY_S = 2.0  # between two messages that are repeated
_ASK_AGAIN_S = 10.0  # after nobody has repeated them, or not to the end
_REPLAYS_MAX = 16  # 10,000 messages are kept by vLLM, and some 1,000 come at a time
_END = (-1).to_bytes(8, "big", signed=True)


def make_context() -> Context:
    """A context for sockets of this event loop. Raises ConfigError where ZeroMQ is not there."""
    try:
        import msgspec  # noqa: F401  (asked for here, so that it is told of at the start)
        from zmq.asyncio import Context
    except ImportError as error:
        raise ConfigError(f"kv_events: {error}", "pip install 'prefixstore[events]'") from error
    return Context()


class Follower:
    """See the module docstring."""

    def __init__(self, context: Context, worker: Worker) -> None:
        from msgspec import MsgspecError
        from msgspec.msgpack import Decoder

        from prefixstore.serve import kv_wire

        self._context, self._worker, self._wire = context, worker, kv_wire
        self._decode, self._malformed = Decoder(kv_wire.KVEventBatch).decode, MsgspecError
        self._next = 0  # the number of the message that is to come
        self._restarts = worker.known.restarts
        self._told_s = 0.0  # when the last one was made, on the worker's clock
        self._missing: int | None = None  # the first message that is, and may still be had
        self._ask_at = 0.0  # for it, by the monotonic clock
        self._told = False  # of what is asked for just now: whether all before it was told

    async def run(self) -> None:
        """Follow until cancelled."""
        import zmq

        spec = self._worker.spec
        while not self._worker.answers:  # then the size of its blocks is known
            await asyncio.sleep(limits.POLL_S / 4)
        sub = self._context.socket(zmq.SUB)
        try:
            self._open(sub, spec.kv_events)
            sub.setsockopt(zmq.SUBSCRIBE, b"")
            await self._ask_for(0, told_before=True)
            while True:
                await self._take(await sub.recv_multipart())
        except zmq.ZMQError as error:
            logger.warning("the KV events of %s are not followed: %s", spec.name, error)
        finally:
            self._worker.known.tells = False
            sub.close(linger=0)

    def _open(self, sock: Socket, endpoint: str | None) -> None:
        import zmq

        assert endpoint is not None
        sock.setsockopt(zmq.LINGER, 0)
        sock.set_hwm(limits.EVENTS_HIGH_WATER)
        sock.setsockopt(zmq.MAXMSGSIZE, limits.EVENT_BYTES_MAX)
        if "[" in endpoint:
            sock.setsockopt(zmq.IPV6, 1)
        sock.connect(endpoint)

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            return
        number, known = int.from_bytes(frames[1], "big"), self._worker.known
        try:
            batch = self._decode(frames[2])
        except self._malformed:
            return  # its number is missing then
        if number < self._next and batch.ts <= self._told_s:
            return  # it was repeated
        if number < self._next or known.restarts != self._restarts:
            if known.restarts == self._restarts:  # the polls have not seen it yet
                known.forget()
            self._next, self._restarts, self._missing = 0, known.restarts, None
        if number == 0 or number == self._missing == self._next:  # nothing is missing before it
            known.tells, self._missing = True, None
        elif self._missing is not None:
            if time.monotonic() >= self._ask_at:
                await self._ask_for(self._missing, told_before=True)
        elif number != self._next:
            await self._ask_for(self._next, told_before=self._next == 0 or known.tells)
        if number >= self._next:
            self._apply(number, batch)

    async def _ask_for(self, first: int, *, told_before: bool) -> None:
        """Ask for a message that is missing and those behind it; what came of these is applied once
        more, in order. ``told_before``: whether all before it was told."""
        known, self._next, self._missing = self._worker.known, first, None
        known.tells, self._told = False, told_before
        ended = await self._replay()
        known.tells = ended and self._told
        if not ended and self._told and self._worker.spec.replay is not None:
            self._missing = self._next  # else some are lost for good
        self._ask_at = time.monotonic() + _ASK_AGAIN_S

    def _apply(self, number: int, batch: KVEventBatch) -> None:
        known = self._worker.known
        self._next, self._told_s = number + 1, batch.ts
        for event in batch.events:
            try:
                if isinstance(event, self._wire.BlockStored):
                    known.stored(event)
                elif isinstance(event, self._wire.BlockRemoved):
                    known.removed(event)
                else:
                    known.forget()
                    known.tells = self._told = True  # whatever was missed before
                    self._missing = None
            except ConfigError:  # token ids that are none
                continue

    async def _replay(self) -> bool:
        """Take what the worker still has from the next message on; whether that was all. What it
        has no more it has not told."""
        for _ in range(_REPLAYS_MAX):
            before, ended, first = self._next, False, None
            async with aclosing(self._repeated()) as repeated:
                async for number, batch in repeated:
                    if number is None:
                        ended = True
                        break
                    first = number if first is None else first
                    if number > self._next and number != first:
                        break  # its socket holds 1,000 messages and drops others: ask again
                    if number > self._next:
                        self._told = False
                    if number >= self._next:
                        self._apply(number, batch)
            if ended or self._next == before:
                return ended
        return False

    async def _repeated(self) -> AsyncGenerator[tuple[int | None, Any]]:
        """Numbers and batches the worker repeats; None behind the last, if that comes in time."""
        import zmq

        if self._worker.spec.replay is None:
            return
        ask = self._context.socket(zmq.DEALER)
        try:
            self._open(ask, self._worker.spec.replay)
            await ask.send_multipart((b"", self._next.to_bytes(8, "big")))
            while True:
                async with timeout(_REPLAY_S):
                    _, _, number, payload = await ask.recv_multipart()
                if number == _END:
                    yield None, None
                    return
                yield int.from_bytes(number, "big"), self._decode(payload)
        except (asyncio.TimeoutError, ValueError, self._malformed):  # nobody there, or not vLLM
            return
        finally:
            ask.close(linger=0)
