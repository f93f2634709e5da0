"""A listener of `/v1/events` over a plain socket, which reads when it is told to."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.serve.raw import WAIT_S, connect

Event = tuple[str, dict[str, Any]]


class Ears:
    """One stream of events."""

    def __init__(self, address: str, query: str = "", token: str = "", size: int = 0) -> None:
        self._sock = connect(address)
        if size:  # a small window: what is not read fills the server's side soon
            self._sock.setsockopt(1, 8, size)  # SOL_SOCKET, SO_RCVBUF
        auth = f"Authorization: Bearer {token}\r\n" if token else ""
        self._sock.sendall(
            f"GET /v1/events{query} HTTP/1.1\r\nHost: x\r\n{auth}\r\n".encode()
        )  # fmt: skip
        self._data = b""
        head = self._until(b"\r\n\r\n")
        self.status = int(head.split()[1])
        self.head = head.lower()
        self._text = b""

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            got = self._sock.recv(65536)
            if not got:
                raise EOFError("the stream has ended")
            self._data += got
        found, _, self._data = self._data.partition(end)
        return found

    def _block(self) -> str:
        while b"\n\n" not in self._text:
            length = int(self._until(b"\r\n"), 16)
            if not length:
                raise EOFError("the stream has ended")
            while len(self._data) < length + 2:
                self._data += self._sock.recv(65536)
            self._text += self._data[:length]
            self._data = self._data[length + 2 :]
        block, _, self._text = self._text.partition(b"\n\n")
        return block.decode()

    def next(self) -> Event:
        """The next event; comments are passed over. Raises EOFError at the end."""
        while True:
            fields = dict(
                line.split(": ", 1) for line in self._block().split("\n") if ": " in line[1:]
            )
            if "event" in fields:
                return fields["event"], json.loads(fields["data"])

    def until(self, kind: str) -> list[Event]:
        """Events up to the first of a kind, which is the last of the list."""
        end, heard = time.monotonic() + WAIT_S, [self.next()]
        while heard[-1][0] != kind:
            assert time.monotonic() < end, f"no {kind} in {heard}"
            heard.append(self.next())
        return heard

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Ears:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
