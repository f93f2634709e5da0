"""Listening, TLS, signals: what a server of ours needs of its host, whatever it serves.

What must hold: it listens on this host only, or whoever runs it has said who may ask; a first
SIGTERM or SIGINT lets requests under way end; the socket file is removed. A crash leaves a socket
file, which the next server replaces if nobody listens on it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from prefixstore.errors import ConfigError
from prefixstore.serve import limits
from prefixstore.serve.guard import Guards

logger = logging.getLogger("prefixstore")
SAY_AGAIN_S = 10.0  # of a trouble that lasts
BACKLOG = 512


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any that is free; with ``uds``: no TCP
    uds: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False

    def check_listening(self, asks: bool, danger: str, remedy: str) -> None:
        """Raise ConfigError for what must not be. ``asks``: whether callers must have a token."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("one of --tls-cert and --tls-key", "give both")
        if self.uds is not None and self.tls_cert is not None:
            raise ConfigError("TLS on a unix socket", "leave it out")
        if self.uds is None and not asks and not self.insecure and not _is_loopback(self.host):
            raise ConfigError(f"--host {self.host} {danger}", remedy)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port}", "0 to 65535")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpServer:
    """An application that listens, in this thread's event loop; ``guards`` has its connections."""

    def __init__(self, app: web.Application, guards: Guards, options: ListenOptions) -> None:
        self.app, self._guards, self._where = app, guards, options
        self.address = ""
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises ConfigError when it cannot."""
        runner = web.AppRunner(
            self.app, access_log=None, handle_signals=False,
            keepalive_timeout=limits.IDLE_S, read_bufsize=limits.READ_BYTES,
            handler_cancellation=True, shutdown_timeout=limits.ABORT_S,
            max_line_size=16384, max_field_size=16384, logger=_quiet_logger(),
            auto_decompress=False,  # it would be done in the event loop, for anybody
        )  # fmt: skip
        await runner.setup()
        self._runner = runner
        assert runner.server is not None
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(OutOfFiles())
        listener = self._listener()
        self._server = await loop.create_server(
            self._guards.factory(runner.server), sock=listener, ssl=self._tls(), backlog=BACKLOG,
            ssl_handshake_timeout=None if self._where.tls_cert is None else limits.HEADER_S,
        )  # fmt: skip
        self._sweeper = loop.create_task(self._guards.run())

    def _listener(self) -> socket.socket:
        options = self._where
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
        if self._where.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._where.tls_cert, self._where.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot use {self._where.tls_cert}: {error}") from error
        return context

    async def stop(self) -> None:
        """End in order, within DRAIN_S."""
        await self.stop_listening(asyncio.get_running_loop().time() + limits.DRAIN_S)

    async def stop_listening(self, end: float) -> None:
        """Take no more requests, and let those under way end until ``end`` on the loop's clock."""
        if self._server is not None:
            self._server.close()
        if self._where.uds is not None and self.address:  # else the file is another server's
            with suppress(OSError):
                os.unlink(self._where.uds)
        loop = asyncio.get_running_loop()
        # A connection is closed after the answer that is under way.
        while loop.time() < end and any(g.busy for g in self._guards.connections.values()):
            await asyncio.sleep(0.02)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._runner is not None:
            await self._runner.cleanup()


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


ServerT = TypeVar("ServerT", bound=HttpServer)


async def until_told(make: Callable[[], ServerT], ready: Callable[[ServerT], Any]) -> None:
    """Run a server until SIGTERM or SIGINT. ``ready`` is called once it listens."""
    _want_files()
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    server = make()
    await server.start()
    ready(server)
    await told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)  # a second one ends it at once
    await server.stop()
