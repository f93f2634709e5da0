"""The client for event loops: the same calls as `client.remote`, to be awaited.

    async with AsyncStore("http://127.0.0.1:7575", token=token) as store:
        ns = await store.namespace(identity, layout)
        tiers = await ns.get(refs, buffers)

Requests, answers, retries, deadlines and the breaker are those of the blocking client
(`operations`, `caller`); here is how bytes come and go. A call that is cancelled closes its
connection. Payloads go from the socket into the caller's buffers, except with TLS, where the loop's
streams copy them.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from prefixstore.client.caller import Calls
from prefixstore.client.connection import Address, Connection
from prefixstore.client.operations import NamespaceCalls
from prefixstore.client.stores import StoreCalls
from prefixstore.layout import Buffer
from prefixstore.timing import timeout_at
from prefixstore.wire import SOCKET_BYTES

T = TypeVar("T")
AsyncNamespace = NamespaceCalls
AT_ONCE_BYTES = 4 << 20  # taken without a turn of the loop


class AsyncStore(StoreCalls):
    """A store behind ``http://``, ``https://`` or ``unix:``, for one event loop. An asynchronous
    context manager.

    ``deadline_s`` bounds each call; a transfer has a second more for each 64 MiB. ``ca_file``: the
    certificates that a TLS server's must be signed by, if not the system's. Raises ConfigError.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        deadline_s: float = 10.0,
        ca_file: str | None = None,
    ) -> None:
        super().__init__(LoopCalls(url, token, ca_file), deadline_s)

    @property
    def usable(self) -> bool:
        """Whether the server has answered lately, or it is time to ask again."""
        return not self.calls.breaker.is_open

    def close(self) -> None:
        """Let go of the connections that are not in use; calls fail from now on."""
        self.calls.close()

    async def __aenter__(self) -> AsyncStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class LoopCalls(Calls):
    """Calls of one event loop."""

    async def call(
        self,
        method: str,
        path: str,
        parts: Sequence[Buffer],
        deadline_s: float,
        take: Callable[[Connection], Awaitable[T]],
    ) -> T:
        """See `Calls.call`."""
        try:
            return await super().call(method, path, parts, deadline_s, take)
        except asyncio.CancelledError:
            self.breaker.undecided()  # if it was the probe, the next call is
            raise

    async def _connect(self, deadline: float) -> Connection:
        if self.address.scheme == "https":
            secure = StreamConnection(self.address)
            secure.deadline = deadline
            await secure.open(self.tls or ssl.create_default_context())
            return secure
        plain = SocketConnection(self.address)
        plain.deadline = deadline
        await plain.open()
        return plain

    async def _pause(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)


class _LoopConnection(Connection):
    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with timeout_at(asyncio.get_running_loop().time() + self._remaining()):
                yield
        except asyncio.TimeoutError:  # no OSError before Python 3.11
            raise TimeoutError("the deadline has passed") from None


class SocketConnection(_LoopConnection):
    """Over a socket that the loop waits for."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.name)
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._at_once = 0

    async def open(self) -> None:
        """Connect. Raises OSError."""
        host, port = self._address.host, self._address.port
        if self._address.scheme == "unix":
            await self._try(socket.AF_UNIX, host)
            return
        async with self._in_time():
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        problem: OSError = OSError(f"{host} has no address")
        for family, _, _, _, name in found:
            try:
                return await self._try(family, name)
            except OSError as error:
                problem = error
        raise problem

    async def _try(self, family: int, name: object) -> None:
        sock = socket.socket(family)
        try:
            sock.setblocking(False)
            if family == socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with self._in_time():
                await self._loop.sock_connect(sock, name)  # type: ignore[arg-type]
        except (OSError, asyncio.CancelledError):
            sock.close()
            raise
        self._sock = sock

    async def _send_all(self, data: Buffer) -> None:
        assert self._sock is not None
        async with self._in_time():
            await self._loop.sock_sendall(self._sock, data)

    async def _receive(self, out: memoryview) -> int:
        assert self._sock is not None
        self._remaining()
        try:  # what is there is taken without a task for the wait
            got = self._sock.recv_into(out)
        except (BlockingIOError, InterruptedError):
            self._at_once = 0
            async with self._in_time():
                return await self._loop.sock_recv_into(self._sock, out)
        self._at_once += got
        if self._at_once > AT_ONCE_BYTES:  # others' turn
            self._at_once = 0
            await asyncio.sleep(0)
        return got

    def close(self) -> None:
        """Close it."""
        if self._sock is not None:
            self._sock.close()


class StreamConnection(_LoopConnection):
    """Over the loop's streams, which know TLS."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.name)
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, context: ssl.SSLContext) -> None:
        """Connect. Raises OSError."""
        async with self._in_time():
            self._reader, self._writer = await asyncio.open_connection(
                self._address.host, self._address.port, ssl=context
            )

    async def _send_all(self, data: Buffer) -> None:
        assert self._writer is not None
        self._writer.write(data)
        async with self._in_time():
            await self._writer.drain()

    async def _receive(self, out: memoryview) -> int:
        assert self._reader is not None
        async with self._in_time():
            data = await self._reader.read(out.nbytes)
        out[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close it; what was not sent is dropped."""
        if self._writer is not None:
            self._writer.transport.abort()
