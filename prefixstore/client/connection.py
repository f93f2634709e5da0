"""One HTTP/1.1 connection, as far as this server needs: bodies of known length, both ways.

`Connection` knows the protocol; how bytes come and go is a subclass's: `BlockingConnection` here,
one for an event loop in `client.loop`. Its methods are coroutines, of which those of the blocking
kind never wait for a loop: `finish` runs them. Why not `http.client`: its parsing of headers costs
more than a match does, and a payload must go from the socket into the caller's buffer with nothing
in between. What must hold: every call ends by its deadline; after an error the connection is not
used again.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefixstore import dialling
from prefixstore.errors import ConfigError
from prefixstore.layout import Buffer
from prefixstore.urls import is_http, shown
from prefixstore.wire import SOCKET_BYTES

T = TypeVar("T")
HEAD_BYTES_MAX = 65536
_SMALL_BYTES = 4096  # taken at once of a head, behind which a payload may follow
_JOIN_BYTES = 65536  # smaller parts of a body are joined before they are sent


class BrokenError(OSError):
    """The other side did not speak as it must, or stopped."""


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that blocks instead of waiting for a loop; what it returns."""
    try:
        work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    work.close()
    raise AssertionError("a blocking call has waited for an event loop")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    scheme: str  # http, https or unix
    host: str  # or the path of a socket
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL. Raises ConfigError."""
        scheme, _, rest = url.partition(":")
        if scheme == "unix" and rest:
            return cls(scheme, rest.removeprefix("//"), 0)
        parts = urlsplit(url if is_http(url) else "")
        if not parts.hostname or parts.path.strip("/") or parts.query or "@" in parts.netloc:
            raise ConfigError(
                f"{shown(url)!r:.200} is no address of a server", "http://host:port, unix:/path"
            )
        return cls(scheme, parts.hostname, parts.port or (443 if scheme == "https" else 80))

    @property
    def name(self) -> str:
        """What the server is called in a request."""
        return "localhost" if self.scheme == "unix" else f"{self.host}:{self.port}"


class Connection:
    """See the module docstring. Used by one caller at a time."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._buffer = bytearray(HEAD_BYTES_MAX)
        self._at = self._stop = 0  # what is in the buffer and not yet taken
        self.deadline = 0.0  # monotonic
        self.left = 0  # bytes of the answer's body not yet taken
        self.status = 0
        self.headers: dict[str, str] = {}
        self.used = False  # an answer came over it before

    # ------------------------------------------------------------------ of a subclass
    async def _send_all(self, data: Buffer) -> None:
        """Send all of it by the deadline. Raises OSError."""
        raise NotImplementedError

    async def _receive(self, out: memoryview) -> int:
        """Take what has come, at most so much, by the deadline; 0 at the end. Raises OSError."""
        raise NotImplementedError

    async def _receive_most(self, out: memoryview, ahead: memoryview) -> int:
        """Likewise, of what is wanted whole: may wait until all has come. ``ahead`` takes some of
        what follows it, if that is there."""
        return await self._receive(out)

    def close(self) -> None:
        """Close it."""
        raise NotImplementedError

    def _remaining(self) -> float:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        return left_s

    # ------------------------------------------------------------------ ask
    async def ask(
        self, method: str, path: str, headers: dict[str, str], parts: Sequence[Buffer]
    ) -> None:
        """Send a request and read the head of its answer. Raises OSError."""
        length = sum(memoryview(part).nbytes for part in parts)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        try:
            await self._send(head, parts)
        except (BrokenPipeError, ConnectionResetError):
            await self._read_head()  # it may have said why before it closed
        else:
            await self._read_head()
        self.used = True

    async def _send(self, head: bytes, parts: Sequence[Buffer]) -> None:
        small: list[Buffer] = [head]
        size = len(head)
        for part in parts:
            num_bytes = memoryview(part).nbytes
            if num_bytes < _JOIN_BYTES:
                small.append(part)
                size += num_bytes
            if num_bytes >= _JOIN_BYTES or size >= _JOIN_BYTES:
                await self._send_all(b"".join(small))
                small, size = [], 0
            if num_bytes >= _JOIN_BYTES:
                await self._send_all(part)
        if small:
            await self._send_all(b"".join(small))

    # ------------------------------------------------------------------ answer
    async def _read_head(self) -> None:
        start = 0
        self._at = self._stop = 0
        while (end := self._buffer.find(b"\r\n\r\n", start, self._stop)) < 0:
            start = max(0, self._stop - 3)
            if self._stop >= HEAD_BYTES_MAX:
                raise BrokenError("the head of an answer is too long")
            room = min(HEAD_BYTES_MAX, self._stop + _SMALL_BYTES)
            got = await self._receive(memoryview(self._buffer)[self._stop : room])
            if not got:
                raise BrokenError("the server closed the connection")
            self._stop += got
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._at = end + 4
        version, _, rest = lines[0].partition(" ")
        status = rest[:3]
        if version != "HTTP/1.1" or not (status.isascii() and status.isdigit()):
            raise BrokenError(f"not an answer of HTTP/1.1: {lines[0][:40]!r}")
        self.status = int(status)
        self.headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise BrokenError("an answer without Content-Length")
        self.left = int(length)

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self.left == 0 and self.headers.get("connection", "").lower() != "close"

    async def read_into(self, out: memoryview, ahead: int = 0) -> None:
        """Fill a buffer from the body; take so many bytes behind it as well, for the next read.

        That saves a system call, and no more should be taken than is read before the next payload:
        what is copied from here leaves the rest of a payload at an odd place, half as fast. Raises
        OSError.
        """
        size = out.nbytes
        if size > self.left:
            raise BrokenError("an answer that is shorter than it must be")
        at = min(size, self._stop - self._at)
        out[:at] = memoryview(self._buffer)[self._at : self._at + at]
        self._at += at
        spare = memoryview(self._buffer)[: min(ahead, self.left - size, HEAD_BYTES_MAX)]
        while at < size:
            got = await self._receive_most(out[at:], spare)
            if not got:
                raise BrokenError("the server closed the connection in the middle of an answer")
            taken = min(got, size - at)
            self._at, self._stop = 0, got - taken
            at += taken
        self.left -= size

    async def read(self, count: int, ahead: int = 0) -> bytes:
        """So many bytes of the body; ``ahead`` as in `read_into`."""
        if count > self.left:
            raise BrokenError("an answer that is shorter than it must be")
        data = bytearray(count)
        await self.read_into(memoryview(data), ahead)
        return bytes(data)


class BlockingConnection(Connection):
    """Over a socket whose calls block, each until the deadline."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        super().__init__(host)
        self._sock = sock

    @classmethod
    def connect(
        cls, address: Address, deadline: float, context: ssl.SSLContext | None
    ) -> BlockingConnection:
        """Connect by ``deadline`` (monotonic). Raises OSError."""
        if address.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
                sock.connect(address.host)
            except OSError:
                sock.close()
                raise
            return cls(sock, address.name)
        sock = dialling.connect(address.host, address.port, deadline)
        try:
            if address.scheme == "https":
                context = context or ssl.create_default_context()
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = context.wrap_socket(sock, server_hostname=address.host)
        except OSError:
            sock.close()
            raise
        return cls(sock, address.name)

    async def _send_all(self, data: Buffer) -> None:
        self._sock.settimeout(self._remaining())
        self._sock.sendall(data)  # the timeout is of all of it

    async def _receive(self, out: memoryview) -> int:
        self._sock.settimeout(self._remaining())
        return self._sock.recv_into(out)

    async def _receive_most(self, out: memoryview, ahead: memoryview) -> int:
        if isinstance(self._sock, ssl.SSLSocket):
            return await self._receive(out)
        # One call that waits in the kernel: with a timeout of Python's each part costs three, and
        # large payloads over TCP take a third longer.
        seconds, micros = divmod(int(1e6 * self._remaining()) + 1, 1_000_000)
        self._sock.settimeout(None)
        timeout = struct.pack("ll", seconds, micros)  # of the whole call
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        try:
            got = self._sock.recv_into(out, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError("the deadline has passed") from None
        with suppress(BlockingIOError):  # what has come is not held up by what has not
            if ahead and got == len(out):
                got += self._sock.recv_into(ahead, 0, socket.MSG_DONTWAIT)
        return got

    def close(self) -> None:
        """Close it."""
        self._sock.close()
