"""What an object looks like in Mooncake, and its address.

::

    u64 expires in ms since 1970, 0: never | u64 size | bytes | PAD_BYTES zeros

Zeros, so that a read past the end by so much is still inside of what Mooncake has. Pure.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from prefixstore.client.connection import Address
from prefixstore.config import PAGE_BYTES
from prefixstore.errors import ConfigError
from prefixstore.pool.backend import ABSENT, BEYOND_BYTES, LOST, Get, Put

ARENA_BYTES = 40 << 20  # of memory that is shared with the process of the client
HALF_BYTES = ARENA_BYTES // 2
PAD_BYTES = BEYOND_BYTES
KEYS_MAX = 4096  # in one request
HEAD_BYTES = 16
# What follows a head begins at a page: 16 bytes into one, memcpy takes three times as long on some
# CPUs.
_FIRST = PAGE_BYTES - HEAD_BYTES
_HEAD = struct.Struct("<QQ")
_NOT_FOUND = -704
_EXAMPLE = "give mooncake://master:port, as mooncake_master's --rpc_port says"


def parse_url(url: str) -> tuple[dict[str, Any], Address]:
    """What Mooncake's client is set up with, and where the master lists its keys. Raises
    ConfigError."""
    known = {"metadata": "P2PHANDSHAKE", "protocol": "tcp", "devices": "", "admin_port": "9003",
             "host": "127.0.0.1"}  # fmt: skip
    try:
        parts = urlsplit(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        host, port = parts.hostname, parts.port
        admin_port = int(given.get("admin_port", known["admin_port"]))
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address of Mooncake: {error}", _EXAMPLE) from error
    if not host or not port or parts.path.strip("/") or given.keys() - known.keys():
        raise ConfigError(f"{url!r} is no address of Mooncake", _EXAMPLE)
    settings = {**known, **given, "master": f"{host}:{port}", "segment_bytes": 0,
                "buffer_bytes": 16 << 20}  # fmt: skip
    return settings, Address("http", host, admin_port)


def parts_of(sizes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Objects that fit into half the arena together: the number of each and its place in the arena,
    in one half and the other by turns. Each size must fit (`fits`)."""
    part: list[tuple[int, int]] = []
    half, at = 0, _FIRST
    for i, size in enumerate(sizes):
        if part and (at + size > HALF_BYTES or len(part) == KEYS_MAX):
            yield part
            part, half, at = [], HALF_BYTES - half, _FIRST
        part.append((i, half + at))
        at += -(-size // PAGE_BYTES) * PAGE_BYTES
    if part:
        yield part


def fits(size: int) -> bool:
    """Whether an object of so many bytes, head and padding included, can be moved."""
    return _FIRST + size <= HALF_BYTES


def fill(out: memoryview, expires_ms: int, size: int, put: Put) -> None:
    """Write an object to where it is sent from."""
    _HEAD.pack_into(out, 0, expires_ms, size)
    at = HEAD_BYTES
    for part in put.whole:
        view = memoryview(part).cast("B")
        out[at : at + view.nbytes] = view
        at += view.nbytes
    out[at:] = bytes(out.nbytes - at)


def runs_of(get: Get) -> list[tuple[int, int]]:
    """What is read of an object as Mooncake has it: offsets and sizes, its head first. What touches
    is one: each costs a transfer."""
    runs = [(0, HEAD_BYTES)]
    for start, out in get.cuts:
        first, size = runs[-1]
        if HEAD_BYTES + start == first + size:
            runs[-1] = first, size + out.nbytes
        else:
            runs.append((HEAD_BYTES + start, out.nbytes))
    return runs


def take_from(get: Get, codes: Any, data: memoryview) -> int:
    """Copy what came of an object to where it is wanted; how many bytes, ABSENT or LOST. ``codes``
    are Mooncake's, of each of the runs; ``data`` is what it wrote, one after the other."""
    runs = runs_of(get)
    if not isinstance(codes, list) or len(codes) != len(runs):
        return LOST
    if codes[0] != runs[0][1]:
        return ABSENT if codes[0] == _NOT_FOUND else LOST
    expires_ms, size = _HEAD.unpack_from(data)
    if 0 < expires_ms <= 1000 * time.time():
        return ABSENT
    good = {start: code == length for (start, length), code in zip(runs, codes, strict=True)}
    came, at, is_good = 0, HEAD_BYTES, True
    for start, out in get.cuts:
        is_good = good.get(HEAD_BYTES + start, is_good)
        length = max(0, min(out.nbytes, size - start))
        if length and not is_good:
            return LOST
        out[:length] = data[at : at + length]
        came, at = came + length, at + out.nbytes
        if length < out.nbytes:
            break
    return came
