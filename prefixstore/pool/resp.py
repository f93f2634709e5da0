"""One connection to a Redis server: commands in one go, values into the caller's buffers.

Why not a Redis package: those assemble each value in memory of their own first, which halves the
bandwidth of values of a megabyte and more. What must hold: a call ends by its deadline; after an
error the connection is not used again; no answer, with all lists in it, makes us allocate more than
REPLY_BYTES_MAX.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefixstore.layout import Buffer

WINDOW_BYTES = 16 << 20  # of values that are asked for and have not come: the server holds them
WINDOW_COMMANDS = 512
REPLY_BYTES_MAX = 16 << 20  # of an answer that is not read into a buffer of the caller's
_DEPTH_MAX = 8  # of lists in lists
_ITEM_BYTES = 64  # what an answer, or one in a list, takes beside its bytes
_JOIN_BYTES = 16384  # smaller arguments are joined before they are sent
_IOV_MAX = 512
_SMALL_BYTES = 16384
_SURPLUS_BYTES = 64  # taken behind a value with it: the head of the next one, little of its bytes


class RespError(Exception):
    """The server refused a command; the first word of its text is the kind."""

    @property
    def kind(self) -> str:
        """Such as MOVED or OOM."""
        return str(self).partition(" ")[0]


class BrokenError(OSError):
    """The other side did not speak as it must, or stopped."""


class Command(NamedTuple):
    """A command: its words, one of which may be in parts; and where its value goes."""

    words: Sequence[bytes]
    value: Sequence[Buffer] = ()  # one more word, in parts
    rest: Sequence[bytes] = ()  # words behind it
    outs: Sequence[memoryview] = ()  # if given, the answer is how many bytes came into them


class Connection:
    """See the module docstring. Used by one caller at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._plain = type(sock) is socket.socket  # else TLS, which gathers and scatters nothing
        self._buffer = bytearray(_SMALL_BYTES)
        self._view = memoryview(self._buffer)
        self._at = self._stop = 0  # what is in the buffer and not yet taken
        self.deadline = 0.0  # monotonic
        self.answered = False  # in this call
        self._room = 0  # bytes that the rest of this answer may take

    def close(self) -> None:
        """Let go of it."""
        self._sock.close()

    def run(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        """The answer to each: None, int, bytes, str, list, or a RespError. Raises OSError."""
        self.deadline, self.answered = deadline, False
        replies: list[Any] = []
        sent, flying = 0, 0  # commands; bytes of values that have not come
        costs = [sum(out.nbytes for out in command.outs) for command in commands]
        for i, command in enumerate(commands):
            if sent == i or (sent < len(commands) and flying < WINDOW_BYTES // 2):
                first = sent
                while sent < len(commands) and sent - i < WINDOW_COMMANDS:
                    if sent > i and flying + costs[sent] > WINDOW_BYTES:
                        break
                    flying += costs[sent]
                    sent += 1
                if sent > first:
                    self._send(commands[first:sent])
            replies.append(self._value(command.outs) if command.outs else self._reply())
            self.answered = True
            flying -= costs[i]
        return replies

    # ------------------------------------------------------------------ sending
    def _send(self, commands: Sequence[Command]) -> None:
        parts: list[Buffer] = []
        small: list[Buffer] = []

        def add(data: Buffer) -> None:
            if memoryview(data).nbytes < _JOIN_BYTES:
                small.append(data)
                return
            parts.extend((b"".join(small), data))
            small.clear()

        for words, value, rest, _ in commands:
            count = len(words) + len(rest) + bool(value)
            small.append(b"*%d\r\n" % count)
            for word in words:
                small.append(b"$%d\r\n%b\r\n" % (len(word), word))
            if value:
                small.append(b"$%d\r\n" % sum(memoryview(part).nbytes for part in value))
                for part in value:
                    add(part)
                small.append(b"\r\n")
            for word in rest:
                small.append(b"$%d\r\n%b\r\n" % (len(word), word))
        parts.append(b"".join(small))
        self._send_all(parts)

    def _send_all(self, parts: list[Buffer]) -> None:
        if not self._plain:
            for part in parts:
                self._sock.settimeout(self._left())
                self._sock.sendall(part)
            return
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        at = 0
        while at < len(views):
            self._sock.settimeout(self._left())
            sent = self._sock.sendmsg(views[at : at + _IOV_MAX])
            while at < len(views) and sent >= views[at].nbytes:
                sent -= views[at].nbytes
                at += 1
            if sent:
                views[at] = views[at][sent:]

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer within the deadline")
        return left

    # ------------------------------------------------------------------ receiving
    def _receive(self, views: list[memoryview]) -> int:
        """Take what has come into buffers, one after the other; at least a byte."""
        self._sock.settimeout(self._left())
        sock = self._sock
        got = sock.recvmsg_into(views)[0] if self._plain else sock.recv_into(views[0])
        if not got:
            raise BrokenError("the server closed the connection")
        return got

    def _line(self) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", self._at, self._stop)
            if end >= 0:
                line = bytes(self._view[self._at : end])
                self._at = end + 2
                return line
            self._fill()

    def _fill(self, most: int = _SMALL_BYTES) -> None:
        """Have more in the buffer."""
        if self._at:
            rest = bytes(self._view[self._at : self._stop])
            self._view[: len(rest)] = rest
            self._at, self._stop = 0, len(rest)
        if self._stop == len(self._buffer):
            raise BrokenError("an answer with too long a line")
        self._stop += self._receive([self._view[self._stop : self._stop + most]])

    def _reply(self, depth: int = 0) -> Any:
        if not depth:
            self._room = REPLY_BYTES_MAX
        line = self._line()
        self._use(_ITEM_BYTES + len(line))
        kind, text = line[:1], line[1:]
        if kind == b"+":
            return text.decode(errors="replace")
        if kind == b"-":
            return RespError(text.decode(errors="replace"))
        count = _number(text)
        if kind == b":":
            return count
        if kind == b"$":
            return None if count < 0 else self._bulk(count)
        if kind == b"*" and depth < _DEPTH_MAX:
            return None if count < 0 else [self._reply(depth + 1) for _ in range(count)]
        raise BrokenError(f"an answer that begins with {line[:20]!r}")

    def _use(self, num_bytes: int) -> None:
        self._room -= num_bytes
        if self._room < 0:
            raise BrokenError(f"an answer of more than {REPLY_BYTES_MAX} bytes")

    def _bulk(self, count: int) -> bytes:
        self._use(count)
        value = bytearray(count)
        self._take([memoryview(value)])
        self._end_value()
        return bytes(value)

    def _value(self, outs: Sequence[memoryview]) -> Any:
        """A value into buffers: how many bytes came; None: there is none."""
        while self._buffer.find(b"\r\n", self._at, self._stop) < 0:
            self._fill(_SURPLUS_BYTES)
        line = self._line()
        if line[:1] == b"-":
            return RespError(line[1:].decode(errors="replace"))
        count = _number(line[1:]) if line[:1] == b"$" else -2
        if count == -1:
            return None
        views, left = [], count
        for out in outs:
            views.append(out[:left])
            left -= views[-1].nbytes
        if count < 0 or left:
            raise BrokenError(f"an answer that begins with {line[:20]!r}")
        self._take([view for view in views if view.nbytes])
        self._end_value()
        return count

    def _take(self, views: list[memoryview]) -> None:
        """Fill buffers, first from what is here."""
        while views:
            here = self._stop - self._at
            if here:
                taken = min(here, views[0].nbytes)
                views[0][:taken] = self._view[self._at : self._at + taken]
                self._at += taken
            else:
                self._at = self._stop = 0
                into = views[:_IOV_MAX]
                if len(into) == len(views):
                    into.append(self._view[:_SURPLUS_BYTES])
                taken = self._receive(into)
            while views and taken >= views[0].nbytes:
                taken -= views[0].nbytes
                views.pop(0)
            if views:
                views[0] = views[0][taken:]
            else:
                self._stop += taken

    def _end_value(self) -> None:
        while self._stop - self._at < 2:
            self._fill(_SURPLUS_BYTES)
        if self._buffer[self._at : self._at + 2] != b"\r\n":
            raise BrokenError("a value that is longer than it says")
        self._at += 2


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise BrokenError(f"a number that is {text[:20]!r}") from None
