"""Fuzzing targets: what comes over the network to a client, from whatever answers."""

from __future__ import annotations

import struct
from typing import Any

import xxhash

from benchmarks.fuzz_network import LAYOUT, refs_for
from benchmarks.fuzz_target import Target
from prefixstore import wire
from prefixstore.client import answers
from prefixstore.client.caller import parse
from prefixstore.client.connection import Address, BrokenError, Connection, finish
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.layout import checksum, pack_sums
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS

ANSWERS = 6


def parse_answer(data: bytes) -> None:
    """An answer without KV. The first byte says of which kind."""
    kind, body = data[0] % ANSWERS if data else 0, data[1:]
    if kind == 0:
        assert type(answers.count_of(parse(body))) is int
    elif kind == 1:
        found = answers.tiers_of(parse(body), 3)
        assert len(found) <= 3
        assert all(type(t) is int and t in (MEMORY, DISK) for t in found)
    elif kind == 2:
        found = answers.each_of(parse(body), 3)
        assert len(found) == 3
        assert all(type(t) is int and t in (MISS, MEMORY, DISK) for t in found)
    elif kind == 3:
        assert len(answers.states_of(body, 2)) == 2
    elif kind == 4:
        for one in answers.segments_of(body, LAYOUT.chunk_tokens):
            assert sum(piece.num_tokens for piece in one.pieces) == one.num_tokens > 0
            assert all(piece.num_tokens > 0 for piece in one.pieces)
            assert 0 <= one.start < one.stop
            assert type(one.alone) is bool
    else:
        Address.parse(body.decode("utf-8", "replace"))


def answer_seeds() -> list[bytes]:
    """Good answers."""
    found = {"start": 3, "num_tokens": 6, "source_start": 1, "alone": True, "tiers": [1, 2]}
    segments = wire.pack_request({"segments": [found]}, wire.pack_refs(refs_for(2)))
    return [
        b'\0{"chunks": 3}', b'\1{"tiers": [[1, 2]]}', b'\2{"tiers": [[0, 1, 2]]}',
        b'\3{"states": ["stored", "exists"]}', b"\4" + segments,
        b"\5http://host:7575", b"\5https://[::1]:1/", b"\5unix:/run/kv.sock",
    ]  # fmt: skip


def parse_answer_json(data: bytes) -> None:
    """The same JSON as each kind of answer that is JSON, or has it in front."""
    head, refs = struct.pack("<I", len(data)), wire.pack_refs(refs_for(2))
    failed: RemoteError | None = None
    taken = False
    for body in (
        b"\0" + data,
        b"\1" + data,
        b"\2" + data,
        b"\3" + data,
        b"\4" + head + data + refs,
    ):
        try:
            parse_answer(body)
            taken = True
        except RemoteError as error:
            failed = error
    if failed is not None and not taken:
        raise failed


def answer_json_seeds() -> list[bytes]:
    """The JSON of good answers."""
    kinds = [seed[1:] for seed in answer_seeds() if seed[0] < 4]
    return [*kinds, answer_seeds()[4][5:].partition(b"]}]}")[0] + b"]}]}"]


class _Said(Connection):
    """A connection whose other side has said all it will, in parts of ``step`` bytes."""

    def __init__(self, said: bytes, step: int) -> None:
        super().__init__("host")
        self._said, self._step = said, max(1, step)

    async def _send_all(self, data: Any) -> None:
        pass

    async def _receive(self, out: memoryview) -> int:
        count = min(len(out), self._step, len(self._said))
        out[:count], self._said = self._said[:count], self._said[count:]
        return count

    def close(self) -> None:
        pass


def parse_get(data: bytes) -> None:
    """The answer to a get, head and records, into a caller's buffers."""
    said = data[1:]
    connection = _Said(said, data[0] if data else 0)
    outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in range(2)]
    result, bad = [MISS] * 2, list[int]()
    reading = answers.Reading(refs_for(2), outs, [0, 1], result, bad, None)

    async def ask() -> None:
        await connection.ask("POST", "/v1/get", {}, [])
        await reading.take(connection)

    try:
        finish(ask())
    finally:
        rest = said.partition(b"\r\n\r\n")[2]
        for tier, out in zip(result, outs, strict=True):
            if len(rest) < wire.RECORD.size:
                assert tier == MISS
                continue
            told, kind, _, sums, size = wire.RECORD.unpack_from(rest)
            table, rest = rest[wire.RECORD.size :][:sums], rest[wire.RECORD.size + sums :]
            payload, rest = rest[:size], rest[size:]
            if tier != MISS:
                assert tier == told
                assert out == payload
                assert sums_fit(kind, table, payload), "KV that nobody has checked"


def get_seeds() -> list[bytes]:
    """Good answers to gets, received in one piece and in small ones."""
    payload = bytes(range(256)) * (LAYOUT.payload_bytes // 256)
    sums = pack_sums(LAYOUT.piece_sums(payload))
    whole = wire.Record(1, wire.SUM_WHOLE, checksum(payload), len(payload)).pack() + payload
    pieces = wire.Record(2, wire.SUM_PIECES, sums, len(payload)).pack() + payload
    miss = wire.Record(MISS, wire.SUM_NONE, b"", 0).pack()
    seeds = []
    for body in (whole + pieces, miss + whole):
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nX-A: b\r\n\r\n".encode()
        seeds += [b"\xff" + head + body, b"\7" + head + body]
    return seeds


def parse_record_sums(data: bytes) -> None:
    """Whether a payload is what a record says: never an exception, and the truth."""
    kind, cut = (data[0], data[1]) if len(data) > 1 else (0, 0)
    sums, payload = data[2 : 2 + cut], data[2 + cut :]
    record = wire.Record(1, kind, sums, len(payload))
    assert wire.payload_is(record, memoryview(payload)) == sums_fit(kind, sums, payload)


def sums_fit(kind: int, sums: bytes, payload: bytes) -> bool:
    """The same, said in another way."""
    if kind == wire.SUM_WHOLE:
        return xxhash.xxh3_128(payload).digest() == sums
    count = len(sums) // 8
    if kind != wire.SUM_PIECES or not count or 8 * count != len(sums) or len(payload) % count:
        return False
    size = len(payload) // count
    parts = [payload[at * size : (at + 1) * size] for at in range(count)]
    return b"".join(xxhash.xxh3_64(part).digest()[::-1] for part in parts) == sums


def sums_seeds() -> list[bytes]:
    """Payloads with sums that fit."""
    payload = bytes(range(64))
    whole = checksum(payload)
    table = b"".join(xxhash.xxh3_64(part).digest()[::-1] for part in (payload[:32], payload[32:]))
    return [
        bytes((wire.SUM_WHOLE, len(whole))) + whole + payload,
        bytes((wire.SUM_PIECES, len(table))) + table + payload,
        struct.pack("<BB", wire.SUM_PIECES, 8) + bytes(8),
    ]


TARGETS = [
    Target("answer", parse_answer, (RemoteError, ConfigError), answer_seeds),
    Target("answer_json", parse_answer_json, (RemoteError,), answer_json_seeds, "json"),
    Target("get", parse_get, (BrokenError,), get_seeds),
    Target("record_sums", parse_record_sums, (), sums_seeds),
]
