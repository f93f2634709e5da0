"""Connections: how many there may be, and how long each may take to say something.

`Guard` stands between a transport and aiohttp's protocol and passes everything on. aiohttp bounds
how long a connection may be idle, but not how slowly headers may arrive (slowloris); here a request
must have its headers HEADER_S after its first byte. What runs in a handler has its own deadlines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

from prefixstore.serve import limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


class Guards:
    """The connections there are. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self.connections: dict[asyncio.BaseTransport, Guard] = {}

    def factory(self, make: Callable[[], Any]) -> Callable[[], Guard]:
        """A protocol factory around another."""
        return lambda: Guard(make(), self)

    def begin(self, transport: asyncio.BaseTransport | None) -> None:
        """A request of a connection has its headers."""
        guard = self.connections.get(transport) if transport is not None else None
        if guard is not None:
            guard.busy, guard.since = True, 0.0

    def end(self, transport: asyncio.BaseTransport | None) -> None:
        """It was answered."""
        guard = self.connections.get(transport) if transport is not None else None
        if guard is not None:
            guard.busy = False

    def sweep(self) -> None:
        """Close connections that are late."""
        now = time.monotonic()
        for transport, guard in list(self.connections.items()):
            if not guard.busy and guard.since and now - guard.since > limits.HEADER_S:
                cast("asyncio.Transport", transport).abort()

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(limits.SWEEP_S)
            self.sweep()


class Guard(asyncio.Protocol):
    """One connection; see the module docstring."""

    def __init__(self, inner: Any, guards: Guards) -> None:
        self._inner, self._guards = inner, guards
        self._refused = False
        self.busy = False
        self.since = 0.0  # when the first byte of a request came that has no headers yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it, or turn it away."""
        if len(self._guards.connections) >= limits.CONNECTIONS_MAX:
            self._refused = True
            writer = cast("asyncio.Transport", transport)
            writer.write(_FULL)
            writer.close()
            return
        self._guards.connections[transport] = self
        self._transport = transport
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        if not self._refused:
            self._guards.connections.pop(self._transport, None)
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if self._refused:
            return
        if not self.busy and not self.since:
            self.since = time.monotonic()
        self._inner.data_received(data)

    def eof_received(self) -> Any:
        """The other side has said all."""
        return None if self._refused else self._inner.eof_received()

    def pause_writing(self) -> None:
        """The other side takes less than it is given."""
        if not self._refused:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """It has taken it."""
        if not self._refused:
            self._inner.resume_writing()
