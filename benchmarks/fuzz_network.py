"""Fuzzing targets: what comes over the network to a server."""

from __future__ import annotations

import asyncio
import json
from functools import lru_cache
from typing import Any, cast
from urllib.parse import parse_qsl

import numpy as np

from benchmarks.fuzz_target import Target
from prefixstore import wire
from prefixstore.errors import ConfigError, LayoutError, StoreError
from prefixstore.keys import ChunkRef, KeyChain, key_of
from prefixstore.layout import Layout, checksum
from prefixstore.namespace import Namespace
from prefixstore.serve import bodies, limits, receiving
from prefixstore.serve.refusal import RefusedError
from prefixstore.testing_data import tokens_of

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=16)
NAME = bytes(range(16))


class _Space:
    """As much of a namespace as requests are compared with."""

    name, layout = NAME, LAYOUT

    def chain(self, tokens: Any = (), salt: bytes = b"", items: Any = ()) -> KeyChain:
        return KeyChain(NAME, LAYOUT.chunk_tokens, tokens, salt, items)


SPACE = cast(Namespace, _Space())


def refs_for(count: int) -> list[ChunkRef]:
    """Chunks of a prompt."""
    return SPACE.chain(tokens_of(1, count, LAYOUT)).refs()


# ---------------------------------------------------------------------- to the server
def parse_request(data: bytes) -> None:
    """The body of a control request: fields, and chunks by reference, key or token."""
    fields, rest = wire.unpack_request(data)
    take_fields(fields, rest)


def parse_json_request(data: bytes) -> None:
    """The same as plain JSON."""
    take_fields(wire.parse_fields(data), memoryview(b""))


def take_fields(fields: dict[str, Any], rest: memoryview) -> None:
    """Each field as some handler takes it."""
    failed: StoreError | None = None
    for name, low, high in (("lease_s", 0, 60), ("start", 0, 2**31), ("ttl_s", 0, 2**31)):
        try:
            value = bodies.number(fields, name, 1, low, high)
            assert low <= value <= high
        except ConfigError as error:
            failed = error
    try:
        receiving._put_options(fields)
    except ConfigError as error:
        failed = error
    refs = bodies.refs_of(SPACE, fields, rest)
    assert len(refs) <= wire.REFS_MAX
    if "tokens" in fields:
        assert all(key_of(ref.preimage) == ref.key for ref in refs)
    if failed is not None:
        raise failed


def request_seeds() -> list[bytes]:
    """Good requests."""
    refs = wire.pack_refs(refs_for(2))
    tokens = np.arange(9, dtype="<i4").tobytes()
    named = {"namespace": NAME.hex()}
    return [
        wire.pack_request(named, refs),
        wire.pack_request({**named, "keys": True}, bytes(32)),
        wire.pack_request({**named, "tokens": True, "salt": "00ff"}, tokens),
        *(wire.pack_request(json.loads(text)) for text in json_request_seeds()),
    ]


def json_request_seeds() -> list[bytes]:
    """Good requests in JSON."""
    full = {
        "namespace": NAME.hex(), "tokens": list(range(9)), "salt": "ab", "items": [[1, 2, "ff"]],
        "lease_s": 1, "start": 0, "ttl_s": 5.5, "deadline_s": 1, "group": 7, "tag": "x",
        "pin": True, "alone": False, "wait": True,
    }  # fmt: skip
    return [json.dumps(full).encode(), b'{"tokens": []}']


@lru_cache(1)
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


class _Content:
    """A body that has come, whole or in parts: ``aiohttp.StreamReader``, as far as it is used."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = data, max(1, step)

    def read_nowait(self, most: int) -> bytes:
        taken, self._data = self._data[: min(most, self._step)], self._data[min(most, self._step) :]
        return taken

    async def read(self, most: int) -> bytes:
        return self.read_nowait(most)


def parse_put(data: bytes) -> None:
    """The body of a put, piece by piece, as it is received."""
    step, claimed, data = data[0] if data else 0, data[1:3], data[3:]
    length = max(0, len(data) + int.from_bytes(claimed, "little", signed=True))

    async def receive() -> None:
        body = bodies.BodyReader(cast(Any, _Content(data, step)), length)
        fields = wire.parse_fields(await body.fields())
        receiving._put_options(fields)

        def check(num_bytes: int) -> None:
            assert num_bytes <= limits.BODY_BYTES_MAX, "more than the server would take"
            if num_bytes > body.left:  # as the server's sum for bodies has an end
                raise RefusedError(503, "busy", "no memory")

        refs, rest = wire.unpack_refs(await body.refs(check))
        assert not len(rest)
        for ref in refs:
            receiving._check_ref(SPACE, ref)
            assert key_of(ref.preimage) == ref.key
        if body.left != len(refs) * (16 + LAYOUT.payload_bytes):
            raise ConfigError("payloads of another size")
        for _ in refs:
            expected, payload = await body.take(16), bytearray(LAYOUT.payload_bytes)
            await body.into(memoryview(payload))
            if checksum(payload) != expected:
                raise RefusedError(400, "checksum", "not what its checksum says")

    _loop().run_until_complete(receive())


def put_seeds() -> list[bytes]:
    """Good puts, received in one piece and in small ones."""
    payload = bytes(range(256)) * (LAYOUT.payload_bytes // 256)
    body = wire.pack_request(
        {"tag": "t", "ttl_s": 1}, wire.pack_refs(refs_for(1)), checksum(payload), payload
    )
    return [bytes((step, 0, 0)) + body for step in (255, 7)]


def parse_query(data: bytes) -> None:
    """The region of a get or put."""
    text = data.decode("utf-8", "replace")
    region = bodies.region_of(SPACE, dict(parse_qsl(text, keep_blank_values=True)))
    assert 0 < region.num_bytes <= LAYOUT.payload_bytes


TARGETS = [
    Target("request", parse_request, (StoreError,), request_seeds),
    Target("request_json", parse_json_request, (StoreError,), json_request_seeds, "json"),
    Target("put", parse_put, (StoreError, RefusedError), put_seeds),
    Target(
        "query", parse_query, (ConfigError, LayoutError),
        lambda: [b"layers=0:1&heads=1:2&part=v", b"layers=0:2", b""],
    ),
]  # fmt: skip
