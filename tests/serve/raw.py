"""Requests as bytes over a plain socket: what no well-behaved client sends."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

WAIT_S = 20.0


def connect(address: str) -> socket.socket:
    """Connect to a server's address."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT_S)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body; (0, b"") when the server closed without a word."""
    data = b""
    while b"\r\n\r\n" not in data:
        got = sock.recv(65536)
        if not got:
            return 0, b""
        data += got
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    [length] = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")] or [0]  # fmt: skip
    while len(body) < length:
        got = sock.recv(65536)
        if not got:
            break
        body += got
    return status, body


def ask(address: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    """One request on a connection of its own; JSON is parsed."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    given = {
        "Content-Length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    lines += [f"{name}: {value}" for name, value in given.items() if value]
    with connect(address) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has all
            sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        status, answer = read_answer(sock)
    try:
        return status, json.loads(answer)
    except ValueError:
        return status, answer
