"""The process that Mooncake's client runs in, from outside: started, asked, and killed if it must.

Why a process: the client is C++ with threads of its own, in which some calls have no deadline and
some deaths of servers have ended the process. What must hold: a call ends by its deadline; one that
does not answer by then is killed, and its memory is never read or written again.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from prefixstore.errors import RemoteError
from prefixstore.pool.mooncake_helper import receive, send

END_S = 1.0
_MODULE = "prefixstore.pool.mooncake_helper"


class Process:
    """See the module docstring. Used by one thread at a time."""

    def __init__(self, settings: dict[str, Any], arena_bytes: int, deadline: float) -> None:
        """Raises RemoteError."""
        memory = os.memfd_create("prefixstore-mooncake", os.MFD_CLOEXEC)
        os.ftruncate(memory, arena_bytes)
        self._arena = mmap.mmap(memory, arena_bytes)
        self.arena = memoryview(self._arena)
        self._sock, theirs = socket.socketpair()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(memory),
                 json.dumps(settings)],
                pass_fds=(theirs.fileno(), memory), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            self._sock.close()
            raise RemoteError(f"Mooncake's client does not start: {error}") from error
        finally:
            theirs.close()
            os.close(memory)
        told = self.hear(deadline)
        if told != {"ready": True}:
            self.kill()
            raise RemoteError(f"Mooncake's client does not start: {told.get('error')}")

    def ask(self, request: dict[str, Any], keys: Sequence[str], deadline: float) -> None:
        """Send a request; the answers come in order. Raises RemoteError."""
        try:
            self._bound(deadline)
            send(self._sock, request, keys)
        except OSError as error:
            raise self._broken(error) from error

    def hear(self, deadline: float) -> Any:
        """The next answer. Raises RemoteError."""
        try:
            self._bound(deadline)
            return receive(self._sock)[0]
        except (OSError, ValueError) as error:
            raise self._broken(error) from error

    def _bound(self, deadline: float) -> None:
        self._sock.settimeout(max(0.001, deadline - time.monotonic()))

    def _broken(self, error: Exception) -> RemoteError:
        self.kill()
        late = isinstance(error, TimeoutError)
        told = "no answer within the deadline" if late else str(error)
        return RemoteError(f"Mooncake's client: {told}")

    def kill(self) -> None:
        """End it, whatever it does."""
        self._sock.close()
        self._child.kill()
        with suppress(subprocess.TimeoutExpired):  # it is in a device call, and ends behind that
            self._child.wait(END_S)
        self.arena.release()
        self._arena.close()
