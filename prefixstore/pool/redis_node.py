"""One Redis server: its connections, and a breaker that leaves it alone while it does not answer.

What must hold: a call ends by its deadline, or in no time while the breaker is open; at most
CONNECTIONS_MAX connections; a password is never part of a message.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from prefixstore import dialling
from prefixstore.client.breaker import Breaker
from prefixstore.errors import RemoteError
from prefixstore.pool.resp import Command, Connection, RespError
from prefixstore.wire import SOCKET_BYTES

CONNECTIONS_MAX = 8
PROBE_S = 0.25  # a server that failed must answer so soon, before it is asked anything again
# Replies that say the server, not the command, is the trouble.
_DOWN = ("CLUSTERDOWN", "LOADING", "MASTERDOWN", "NOAUTH", "NOPERM", "WRONGPASS")


@dataclass(frozen=True, slots=True)
class Login:
    """How a connection is begun, the same for all servers of a cluster."""

    user: str
    password: str
    database: int
    tls: ssl.SSLContext | None


class Node:
    """See the module docstring. Thread-safe."""

    def __init__(self, host: str, port: int, login: Login) -> None:
        self.host, self.port = host, port  # port 0: ``host`` is the path of a socket
        self.breaker = Breaker()
        self._login = login
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._closed = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else f"unix:{self.host}"

    def run(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        """The answer to each command, see `resp.Connection.run`; ``deadline`` is monotonic. All
        commands may be sent twice. Raises RemoteError."""
        if time.monotonic() >= deadline:  # which is not its fault
            raise RemoteError(f"no time was left to ask {self}")
        probing = self.breaker.is_failing
        if not self.breaker.admits():
            raise RemoteError(f"{self} has not answered lately", "it is asked again in a moment")
        if not self._room.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self.breaker.undecided()
            raise RemoteError(f"{CONNECTIONS_MAX} calls to {self} are under way")
        try:
            if probing:  # so that who happens to be the probe does not wait a deadline in vain
                self._run([Command([b"PING"])], min(deadline, time.monotonic() + PROBE_S))
            replies = self._run(commands, deadline)
        except (OSError, RespError) as error:
            self.breaker.failed()
            self._drop_idle()
            raise RemoteError(f"{self}: {error or type(error).__name__}") from error
        finally:
            self._room.release()
        for reply in replies:
            if isinstance(reply, RespError) and reply.kind in _DOWN:
                self.breaker.failed()
                raise RemoteError(f"{self}: {reply}")
        self.breaker.succeeded()
        return replies

    def _run(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                replies = connection.run(commands, deadline)
            except TimeoutError:
                connection.close()
                raise
            except OSError:
                # The server was started anew since: the other idle ones are of no use either.
                connection.close()
                self._drop_idle()
            else:
                self._keep(connection)
                return replies
        connection = self._connect(deadline)
        with ExitStack() as unless_it_answers:
            unless_it_answers.callback(connection.close)
            replies = connection.run(commands, deadline)
            unless_it_answers.pop_all()
        self._keep(connection)
        return replies

    def _connect(self, deadline: float) -> Connection:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer within the deadline")
        login = self._login
        if self.port:
            sock = dialling.connect(self.host, self.port, deadline)
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(left)
        with ExitStack() as unless_it_lets_us_in:
            unless_it_lets_us_in.callback(sock.close)
            if not self.port:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
                sock.connect(self.host)
            if login.tls is not None:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = login.tls.wrap_socket(sock, server_hostname=self.host)
                unless_it_lets_us_in.callback(sock.close)
            connection = Connection(sock)
            self._log_in(connection, deadline)
            unless_it_lets_us_in.pop_all()
        return connection

    def _log_in(self, connection: Connection, deadline: float) -> None:
        login, commands = self._login, []
        if login.password:
            names = [login.user.encode()] * bool(login.user)
            commands.append(Command([b"AUTH", *names, login.password.encode()]))
        if login.database:
            commands.append(Command([b"SELECT", b"%d" % login.database]))
        for reply in connection.run(commands, deadline):
            if isinstance(reply, RespError):
                raise reply

    def _keep(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Let go of the connections."""
        with self._lock:
            self._closed = True
        self._drop_idle()
