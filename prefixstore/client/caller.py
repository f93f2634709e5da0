"""Calls to a server: pooled connections, deadlines, retries, and errors of the store's own kinds.

`Calls` knows what to do when; its methods are coroutines. `Caller` makes them with connections that
block, in the thread that asks; `client.loop` has one for event loops.

What must hold: a call ends by its deadline, well or with a StoreError. Every request of the API may
be made twice, so one that got no answer is made again while there is time: at once on a new
connection if the old one had been idle (a server that was restarted closes it), else after a pause
that doubles.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from prefixstore import wire
from prefixstore.client.about import headers_about
from prefixstore.client.breaker import Breaker
from prefixstore.client.connection import (
    Address,
    BlockingConnection,
    BrokenError,
    Connection,
    finish,
)
from prefixstore.errors import (
    ConfigError,
    LayoutError,
    RemoteError,
    StoreClosedError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
)
from prefixstore.layout import Buffer

T = TypeVar("T")
IDLE_MAX = 32  # connections kept for the next call
ATTEMPTS_MAX = 4
TOO_MANY_LEASES = "leases"  # the code of a refusal that is not asked about again: it lasts
PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 1.0
CONNECT_S = 2.0
FAIR_S = 0.1  # time for an answer; a caller's deadline that is shorter tells nothing of the server
ANSWER_BYTES_MAX = 256 << 20
_KINDS: dict[str, type[StoreError]] = {
    "layout": LayoutError,
    "config": ConfigError,
    "full": StoreFullError,
    "timeout": StoreTimeoutError,
    "closed": StoreClosedError,
}


class RefusedError(RemoteError):
    """The server answered with an error that has no kind of its own; ``code`` says which."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.code = code


class Calls:
    """See the module docstring. Thread-safe."""

    def __init__(self, url: str, token: str | None, ca_file: str | None) -> None:
        self.url, self.address = url, Address.parse(url)
        token = token or ""
        if not token.isascii() or any(c.isspace() for c in token):
            raise ConfigError("a token with spaces or beyond ASCII", "give it as it is in the file")
        self._headers = {"Content-Type": wire.CONTENT_TYPE}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self.tls = ssl.create_default_context(cafile=ca_file) if ca_file else None
        self.breaker = Breaker()
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    async def call(
        self,
        method: str,
        path: str,
        parts: Sequence[Buffer],
        deadline_s: float,
        take: Callable[[Connection], Awaitable[T]],
    ) -> T:
        """Make a request; ``take`` reads the body of a good answer. Raises StoreError."""
        deadline = time.monotonic() + deadline_s
        pause_s, attempt, stale, problem = PAUSE_MIN_S, 0, False, ""
        while True:
            if self._closed:
                raise StoreClosedError(f"the store {self.url} is closed")
            if time.monotonic() >= deadline:
                raise StoreTimeoutError(f"{self.url} was not asked", f"within {deadline_s:g} s")
            if not stale:  # else this is the attempt that was admitted
                if not self.breaker.admits():
                    if problem:  # of this very call
                        raise RemoteError(problem, "is the server running?")
                    raise RemoteError(f"{self.url} did not answer lately", "it is tried again soon")
                attempt += 1
            stale, began = False, time.monotonic()
            connection, problem, wait_s, done = None, "", pause_s, False
            try:
                connection = await self._connection(deadline)
                was_used = connection.used
                await connection.ask(method, path, self._headers | headers_about(), parts)
                self.breaker.succeeded()
                if connection.status < 400:
                    result = await take(connection)
                    self._keep(connection)
                    done = True
                    return result
                error = await self._refused(connection)
                done = True
                lasting = isinstance(error, RefusedError) and error.code == TOO_MANY_LEASES
                if connection.status not in (429, 503) or lasting:
                    raise error
                problem, wait_s = str(error), max(pause_s, self._retry_after(connection))
            except ssl.SSLCertVerificationError as untrusted:  # it will not be other the next time
                self.breaker.succeeded()  # somebody answered: others are to be told this as well
                raise RemoteError(
                    f"the certificate of {self.url}: {untrusted.verify_message}", "give ca_file"
                ) from untrusted
            except OSError as broken:
                if connection is not None and was_used and not isinstance(broken, TimeoutError):
                    self._drop_idle()  # the others are of the same age
                    stale = True
                    continue
                self._failed(broken, began)
                problem, error = f"{self.url}: {broken}", None
            finally:
                if connection is not None and not done:  # also when whoever asked was cancelled
                    connection.close()
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
            wait_s *= random.uniform(0.7, 1.3)  # so that many clients do not come back at once
            if time.monotonic() + wait_s >= deadline:
                raise error or StoreTimeoutError(problem, f"within {deadline_s:g} s")
            if attempt >= ATTEMPTS_MAX:
                raise error or RemoteError(problem, "is the server running?")
            await self._pause(wait_s)

    async def json(
        self, method: str, path: str, fields: dict[str, Any], *rest: Buffer, deadline_s: float
    ) -> dict[str, Any]:
        """Make a request whose answer is a JSON object. Raises StoreError."""
        body = wire.pack_request(fields, *rest)
        return parse(await self.call(method, path, [body], deadline_s, whole))

    # ------------------------------------------------------------------ of a subclass
    async def _connect(self, deadline: float) -> Connection:
        """A new connection, by ``deadline`` (monotonic). Raises OSError."""
        raise NotImplementedError

    async def _pause(self, wait_s: float) -> None:
        """Wait before another attempt."""
        raise NotImplementedError

    # ------------------------------------------------------------------ connections
    async def _connection(self, deadline: float) -> Connection:
        with self._lock:
            if self._pid != os.getpid():  # after a fork these are the parent's
                self._idle, self._pid = [], os.getpid()
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            soon = min(deadline, time.monotonic() + CONNECT_S)
            connection = await self._connect(soon)
        connection.deadline = deadline
        return connection

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            if connection.reusable and len(self._idle) < IDLE_MAX and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections; calls fail from now on."""
        self._closed = True
        self._drop_idle()

    # ------------------------------------------------------------------ errors
    def _failed(self, broken: OSError, began: float) -> None:
        """No answer came: the server's fault, unless the caller left it next to no time."""
        if isinstance(broken, TimeoutError) and time.monotonic() - began < FAIR_S:
            self.breaker.undecided()
            return
        self.breaker.failed()
        if self.breaker.is_open:
            self._drop_idle()  # to whatever answers next they mean nothing

    async def _refused(self, connection: Connection) -> StoreError:
        try:
            told = parse(await whole(connection))["error"]
            code, message = str(told["code"]), str(told["message"])
            hint = str(told["hint"])
        except (RemoteError, KeyError, TypeError):
            code, message, hint = "http", f"{self.url} answered {connection.status}", ""
        self._keep(connection)
        kind = _KINDS.get(code)
        return RefusedError(code, message, hint) if kind is None else kind(message, hint)

    def _retry_after(self, connection: Connection) -> float:
        text = connection.headers.get("retry-after", "")
        return min(float(text), PAUSE_MAX_S) if text.isascii() and text.isdigit() else 0.0


class Caller:
    """Calls from any thread, each of which blocks it. Thread-safe."""

    def __init__(self, url: str, token: str | None, ca_file: str | None) -> None:
        self.calls = BlockingCalls(url, token, ca_file)
        self.url, self.breaker = url, self.calls.breaker

    def json(
        self, method: str, path: str, fields: dict[str, Any], *rest: Buffer, deadline_s: float
    ) -> dict[str, Any]:
        """See `Calls.json`."""
        return finish(self.calls.json(method, path, fields, *rest, deadline_s=deadline_s))

    def close(self) -> None:
        """See `Calls.close`."""
        self.calls.close()


class BlockingCalls(Calls):
    """Whose coroutines block instead of waiting: `connection.finish` runs them."""

    async def _connect(self, deadline: float) -> Connection:
        return BlockingConnection.connect(self.address, deadline, self.tls)

    async def _pause(self, wait_s: float) -> None:
        time.sleep(wait_s)


async def whole(connection: Connection) -> bytes:
    """The body of an answer."""
    if connection.left > ANSWER_BYTES_MAX:
        raise BrokenError(f"an answer of {connection.left} bytes")
    return await connection.read(connection.left)


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises RemoteError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"the answer is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RemoteError("the answer is not a JSON object")
    return fields
