"""The other side of a bare-socket loop: what the network could do if nothing else were to be done.

A request is ``u64 bytes | g or p``: send so many, or receive so many and answer with a byte; each
from, or to, the next place in a buffer that no cache holds. A thread a connection. Prints its port,
ends with its standard input.
"""

from __future__ import annotations

import socket
import sys
import threading

BYTES_MAX = 64 << 20


def serve(sock: socket.socket, source: memoryview, target: memoryview) -> None:
    """One connection, to its end."""
    place = 0
    with sock:
        while len(head := sock.recv(9, socket.MSG_WAITALL)) == 9:
            size = int.from_bytes(head[:8], "little")
            place = place + size if place + 2 * size <= BYTES_MAX else 0
            if head[8:] == b"g":
                sock.sendall(source[place : place + size])
                continue
            at, own = 0, target[place : place + size]
            while at < size:
                at += sock.recv_into(own[at:])
            sock.sendall(b"k")


def main() -> None:
    """Accept until told to end."""
    source, target = (memoryview(bytearray(b"\xa5" * BYTES_MAX)) for _ in range(2))
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock, source, target), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
