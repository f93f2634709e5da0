"""The process in which Mooncake's client runs: see `mooncake`. Started by it, ends with it.

``python -m prefixstore.pool.mooncake_helper SOCKET ARENA SETTINGS``: descriptors of a socket and of
shared memory, and JSON. Requests and answers are ``u32 length | u32 length | JSON | keys with
spaces between`` (as JSON they took longer than Mooncake does); payloads are in the arena.
What must hold: nothing is done but what a request says; when the socket ends, so does the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

LENGTHS = struct.Struct("<II")
MESSAGE_BYTES_MAX = 64 << 20


def send(sock: socket.socket, message: object, keys: Sequence[str] = ()) -> None:
    """Send a message. Raises OSError."""
    data, names = json.dumps(message).encode(), " ".join(keys).encode()
    sock.sendall(LENGTHS.pack(len(data), len(names)) + data + names)


def receive(sock: socket.socket) -> tuple[Any, list[str]]:
    """A message and its keys. Raises OSError, also at the end, and ValueError."""
    size, more = LENGTHS.unpack(_take(sock, LENGTHS.size))
    if size + more > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {size + more} bytes")
    data = _take(sock, size + more)
    return json.loads(data[:size]), data[size:].decode().split()


def _take(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise ConnectionResetError("the other process has ended")
        view = view[got:]
    return bytes(data)


class Helper:
    """Mooncake's client, and the memory that is registered with it."""

    def __init__(self, arena: mmap.mmap, settings: dict[str, Any]) -> None:
        from mooncake.store import MooncakeDistributedStore

        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(
            settings["host"], settings["metadata"], settings["segment_bytes"],
            settings["buffer_bytes"], settings["protocol"], settings["devices"],
            settings["master"],
        )  # fmt: skip
        if code:
            raise RuntimeError(f"Mooncake's client cannot begin (error {code})")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(arena))
        if code := self._store.register_buffer(self._base, len(arena)):
            raise RuntimeError(f"Mooncake's client takes no memory (error {code})")

    def answer(self, asked: dict[str, Any], keys: list[str]) -> list[Any]:
        """What Mooncake says to a request, key by key: see its ``batch_*`` functions."""
        verb = asked["verb"]
        found: list[Any]
        if verb == "exist":
            found = self._store.batch_is_exist(keys)
        elif verb == "remove":
            found = self._store.batch_remove(keys, force=True)
        elif verb == "get":
            [found] = self._store.get_into_ranges(
                [self._base], [keys], [asked["to"]], [asked["at"]], [asked["sizes"]]
            )
        else:
            put = self._store.batch_upsert_from if verb == "replace" else self._store.batch_put_from
            found = put(keys, [self._base + at for at in asked["to"]], asked["sizes"])
        return found


def main() -> None:
    """See the module docstring."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    arena = mmap.mmap(int(sys.argv[2]), 0)
    try:
        helper = Helper(arena, json.loads(sys.argv[3]))
        send(sock, {"ready": True})
        while True:
            send(sock, helper.answer(*receive(sock)))
    except OSError:
        pass
    except (ImportError, RuntimeError) as error:
        send(sock, {"error": str(error)})
    finally:
        os._exit(0)  # without the destructors of the client, which have crashed


if __name__ == "__main__":
    main()
