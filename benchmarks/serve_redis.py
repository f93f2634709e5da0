"""Redis as the peer of `benchmarks.serve`: a server without persistence, and GET and SET.

The client is the fastest we know of: requests of several keys in one go, values from the caller's
buffer to the socket and from the socket into the caller's buffer. (redis-py copies twice and gets a
third of that.) It compares no checksums; Redis has none.

As a program, ``python -m benchmarks.serve_redis PATH_OF_SERVER MAXMEMORY``, it owns a server of its
own: prints its port, and ends it with standard input, whichever way that ends.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

START_S = 30.0
_HEAD_BYTES = 64  # of an answer: "$", digits, "\r\n"
_OPTIONS = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no",
            "--maxmemory-policy", "allkeys-lru")  # fmt: skip


class RedisClient:
    """Whole values by key over one connection. Raises OSError, RuntimeError."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._head = bytearray(_HEAD_BYTES)

    def set(self, key: bytes, value: memoryview) -> None:
        """Store a value."""
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
        self._sock.sendall(head, socket.MSG_MORE)
        self._sock.sendall(value, socket.MSG_MORE)
        self._sock.sendall(b"\r\n")
        if (answer := self._sock.recv(_HEAD_BYTES)) != b"+OK\r\n":
            raise RuntimeError(f"redis: {answer!r}")

    def get(self, keys: Sequence[bytes], outs: Sequence[memoryview]) -> None:
        """Fill buffers with the values of as many keys."""
        self._sock.sendall(
            b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(k), k) for k in keys)
        )
        have = 0  # bytes of the next answer's head that came with the last
        for i, out in enumerate(outs):
            have = self._value(out, have, last=i + 1 == len(outs))

    def _value(self, out: memoryview, have: int, last: bool) -> int:
        want = b"$%d\r\n" % len(out)
        head = memoryview(self._head)
        while b"\r\n" not in self._head[:have] and have < _HEAD_BYTES:
            have += self._some([head[have:]])
        if self._head[: len(want)] != want:
            raise RuntimeError(f"redis: {bytes(self._head[:have])!r}, wanted {want!r}")
        at = have - len(want)  # values are longer than this buffer
        out[:at] = head[len(want) : have]
        have, most = 0, 2 if last else _HEAD_BYTES
        while at < len(out) or have < 2:
            got = self._some([out[at:], head[have:most]])
            taken = min(got, len(out) - at)
            at, have = at + taken, have + got - taken
        if self._head[:2] != b"\r\n":
            raise RuntimeError("redis: a value that is longer than it must be")
        self._head[: have - 2] = self._head[2:have]
        return have - 2

    def _some(self, parts: list[memoryview]) -> int:
        got = self._sock.recvmsg_into([part for part in parts if len(part)])[0]
        if not got:
            raise ConnectionResetError("redis closed the connection")
        return got


def found_server(path: str) -> str:
    """Where the program is. Raises RuntimeError."""
    found = shutil.which(path)
    if found is None:
        raise RuntimeError(f"{path} is not there: install it (Debian: apt install redis-server)")
    return found


def version_of(path: str) -> str:
    """What the server calls itself."""
    told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=START_S)
    words = dict(word.split("=", 1) for word in told.stdout.split() if "=" in word)
    return f"redis-server {words.get('v', '?')}"


def main(path: str, maxmemory: str) -> None:
    """See the module docstring."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [path, "--port", str(port), "--maxmemory", maxmemory, "--dir", folder, *_OPTIONS]
        null = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=null, stdout=null) as server:
            try:
                end = time.monotonic() + START_S
                while True:
                    try:
                        socket.create_connection(("127.0.0.1", port), 1.0).close()
                        break
                    except ConnectionRefusedError:
                        if server.poll() is not None or time.monotonic() > end:
                            raise RuntimeError("redis-server did not start") from None
                        time.sleep(0.05)
                print(port, flush=True)
                sys.stdin.read()
            finally:
                server.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
