"""A network that misbehaves: a TCP proxy in this process.

Owns its threads and sockets, which end with the context.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

CONNECT_S, JOIN_S = 20.0, 30.0


def connect(address: str) -> socket.socket:
    """Connect to a server's address."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), CONNECT_S)


@contextmanager
def between(
    address: str,
    change: Callable[[bytes, int], bytes | None],
    admits: Callable[[], bool] = lambda: True,
    *,
    requests: bool = False,
) -> Iterator[str]:
    """A proxy that changes what the server answers, or with ``requests`` what it is asked:
    ``change(data, bytes before)``, None: close. Who comes while it does not admit is turned away.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket, alter: bool) -> None:
        seen = 0
        with suppress(OSError):
            while data := source.recv(65536):
                altered = change(data, seen) if alter else data
                seen += len(data)
                if altered is None:
                    break
                target.sendall(altered)
        shut(source, target)

    def accept() -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                if not admits():
                    one.close()
                    continue
                other = connect(address)
                sockets.extend((one, other))
                for pair in ((one, other, requests), (other, one, not requests)):
                    start(pump, *pair)

    def start(work: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=work, args=arguments))
        threads[-1].start()

    start(accept)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        shut(listener, *sockets)
        for thread in list(threads):
            thread.join(JOIN_S)
        for sock in (listener, *sockets):
            sock.close()


def shut(*sockets: socket.socket) -> None:
    """End them in both directions; who waits on one comes back."""
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
