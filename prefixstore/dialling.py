"""Connecting to a host by a deadline, with the look-up of its name in it.

The system's look-up knows no deadline, and takes half a minute where no name server answers. So it
runs on a thread, which is left behind when it is late: one for a name, LOOKUPS_MAX at most. Who
asks for the name next waits for the same one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

LOOKUPS_MAX = 32
ADDRESSES_MAX = 8  # of one name that are tried

_room = threading.BoundedSemaphore(LOOKUPS_MAX)
_lock = threading.Lock()
_under_way: dict[tuple[str, int], Future[list[Any]]] = {}


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A TCP connection by ``deadline`` (monotonic): each address of the host has its share of the
    time that is left. Raises OSError."""
    found = _look_up(host, port, deadline)[:ADDRESSES_MAX]
    problem = OSError(f"{host} has no address")
    for i, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(found) - i))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        return look_up(flags=socket.AI_NUMERICHOST)  # of an address nobody is asked
    except socket.gaierror:
        pass
    except ValueError as error:  # what IDNA cannot spell
        raise OSError(f"{host!r:.80} is no name of a host: {error}") from error
    told = _asked(host, port, look_up, deadline)
    try:
        return told.result(_left(deadline))
    except FutureTimeout:
        raise TimeoutError(f"the name {host} was not found within the deadline") from None


def _asked(
    host: str, port: int, look_up: Callable[[], list[Any]], deadline: float
) -> Future[list[Any]]:
    with _lock:
        if (told := _under_way.get((host, port))) is not None:
            return told
    if not _room.acquire(timeout=_left(deadline)):
        raise TimeoutError(f"{LOOKUPS_MAX} look-ups of names are under way")
    mine: Future[list[Any]] = Future()
    with _lock:
        told = _under_way.setdefault((host, port), mine)
    if told is not mine:  # another began it while this one waited for room
        _room.release()
        return told

    def work() -> None:
        try:
            found: list[Any] | OSError = look_up()
        except OSError as error:
            found = error
        with _lock:
            del _under_way[host, port]
        _room.release()
        if isinstance(found, OSError):
            mine.set_exception(found)
        else:
            mine.set_result(found)

    try:
        threading.Thread(target=work, name="prefixstore-lookup", daemon=True).start()
    except RuntimeError as error:  # no more threads
        with _lock:
            del _under_way[host, port]
        _room.release()
        mine.set_exception(OSError(f"the name {host} is not looked up: {error}"))
    return mine


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline has passed")
    return left_s
