"""Running the server: sockets, TLS, signals, and an orderly end.

What must hold: it listens on this host only, or asks for tokens; a first SIGTERM or SIGINT lets
requests under way end and writes the store to disk, within DRAIN_S; the socket file is removed. A
crash leaves a socket file, which the next server replaces if nobody listens on it.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import ssl
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from prefixstore.errors import ConfigError
from prefixstore.serve import limits
from prefixstore.serve.app import GUARDS, make_app
from prefixstore.serve.auth import Tenants, read_tokens
from prefixstore.serve.eyes import EYES, EyesOptions
from prefixstore.serve.mending import Mender
from prefixstore.serve.state import State
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
SAY_AGAIN_S = 10.0  # of a trouble that lasts
BACKLOG = 512


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any that is free; with ``uds``: no TCP
    uds: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tokens: str | None = None
    read_only: bool = False
    insecure: bool = False
    json_log: bool = False
    eyes: EyesOptions = field(default_factory=EyesOptions)

    def check(self) -> None:
        """Raise ConfigError for what must not be."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("one of --tls-cert and --tls-key", "give both")
        if self.uds is not None and self.tls_cert is not None:
            raise ConfigError("TLS on a unix socket", "leave it out")
        if self.uds is None and self.tokens is None and not self.insecure:
            _check_loopback(self.host)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port}", "0 to 65535")
        self.eyes.check(self.insecure)


def _check_loopback(host: str) -> None:
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    if not here:
        raise ConfigError(
            f"--host {host} without --tokens: everybody who can reach it could read and write KV",
            "give --tokens FILE, or --insecure if the network is yours alone",
        )


class Server:
    """A server in this thread's event loop."""

    def __init__(
        self, store: Store, options: ServeOptions, open_it: Callable[[], Store] | None = None
    ) -> None:
        """``open_it`` opens the store again should it be lost; then `state` has another one, which
        is the caller's to close."""
        options.check()
        self.options, self._open_it = options, open_it
        tenants = Tenants([], {})
        if options.tokens is not None:
            tenants = read_tokens(Path(options.tokens), store)
            if not options.read_only:
                tenants.limit_known(store)
        self.state = State(store, tenants, options.read_only)
        self.app = make_app(self.state, json_log=options.json_log, options=options.eyes)
        self.address = ""
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen. Raises ConfigError when it cannot."""
        runner = web.AppRunner(
            self.app, access_log=None, handle_signals=False,
            keepalive_timeout=limits.IDLE_S, read_bufsize=limits.READ_BYTES,
            handler_cancellation=True, shutdown_timeout=limits.ABORT_S,
            max_line_size=16384, max_field_size=16384, logger=_quiet_logger(),
        )  # fmt: skip
        await runner.setup()
        self._runner = runner
        assert runner.server is not None
        guards = self.app[GUARDS]
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(OutOfFiles())
        listener = self._listener()
        self._server = await loop.create_server(
            guards.factory(runner.server), sock=listener, ssl=self._tls(), backlog=BACKLOG,
            ssl_handshake_timeout=None if self.options.tls_cert is None else limits.HEADER_S,
        )  # fmt: skip
        self._tasks.append(loop.create_task(guards.run()))
        if self._open_it is not None:
            mender = Mender(self.state, self.app[EYES], self._open_it)
            self._tasks.append(loop.create_task(mender.run()))

    def _listener(self) -> socket.socket:
        options = self.options
        try:
            if options.uds is not None:
                listener = _unix_listener(Path(options.uds))
                self.address = f"unix:{options.uds}"
                return listener
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listener = socket.create_server(
                (options.host, options.port), family=family, backlog=BACKLOG
            )
        except OSError as error:
            where = options.uds or f"{options.host}:{options.port}"
            raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.address = f"{'https' if options.tls_cert else 'http'}://{name}:{port}"
        return listener

    def _tls(self) -> ssl.SSLContext | None:
        if self.options.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.options.tls_cert, self.options.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use {self.options.tls_cert}: {error}") from error
        return context

    async def stop(self, deadline_s: float = limits.DRAIN_S) -> None:
        """Take no more requests, let those under way end, and the threads; then the store may be
        closed, which writes it to disk."""
        self.state.draining = True
        end = asyncio.get_running_loop().time() + deadline_s
        if self._server is not None:
            self._server.close()
        if self.options.uds is not None and self.address:  # else the file is another server's
            with suppress(OSError):
                os.unlink(self.options.uds)
        loop = asyncio.get_running_loop()
        guards = self.app[GUARDS]  # a connection is closed after the answer that is under way
        while loop.time() < end and any(g.busy for g in guards.connections.values()):
            await asyncio.sleep(0.02)
        for task in self._tasks:
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        if not await self.state.close(max(limits.ABORT_S, end - loop.time())):
            logger.warning("threads of requests have not ended within %.0f s", deadline_s)


def _unix_listener(path: Path) -> socket.socket:
    """Listen on a socket file, replacing one that nobody listens on."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is there and no socket", "give another path")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.settimeout(1.0)
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            except FileNotFoundError:
                pass  # its server has just removed it
            except OSError as error:  # not ours to open, or its queue is full: somebody's
                raise ConfigError(
                    f"cannot tell whether a server listens on {path}: {error}", "remove it if none"
                ) from error
            else:
                raise ConfigError(f"another server listens on {path}", "stop it first")
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # only this user may connect
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


class OutOfFiles:
    """A loop's handler of exceptions: one line in a while when no connection can be accepted.

    asyncio's own writes a traceback for each of BACKLOG tries, and tries again each second.
    """

    def __init__(self) -> None:
        self._said = -SAY_AGAIN_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tell of what nobody has caught."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said >= SAY_AGAIN_S:
            self._said = time.monotonic()
            logger.warning("new connections wait: %s; raise the limit of open files", error)


def _quiet_logger() -> logging.Logger:
    """For aiohttp, which writes a traceback for each request that is not HTTP."""
    found = logging.getLogger("prefixstore.http")
    if not found.filters:
        found.addFilter(_is_ours)
    return found


def _is_ours(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, HttpProcessingError)


def _want_files() -> None:
    """Shells often allow a process 1,024 files: fewer than CONNECTIONS_MAX takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        limits.FILES_WANTED if hard == resource.RLIM_INFINITY else min(limits.FILES_WANTED, hard)
    )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < limits.FILES_WANTED:
        logger.warning("this process may have %d files open only", wanted)


async def serve(
    open_it: Callable[[], Store], options: ServeOptions, ready: Callable[[Server], Any]
) -> None:
    """Open a store, again should it be lost, and serve it until SIGTERM or SIGINT. ``ready`` is
    called once it listens. Raises ConfigError, and what opening does."""
    options.check()
    _want_files()
    store, server = open_it(), None
    try:
        server = Server(store, options, open_it)
        await _until_stopped(server, ready)
    finally:
        (store if server is None else server.state.store).close()


async def _until_stopped(server: Server, ready: Callable[[Server], Any]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    ready(server)
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)  # a second one ends it at once
    await server.stop()
