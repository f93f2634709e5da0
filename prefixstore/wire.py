"""What goes over the network, as bytes: requests, chunk references, records of a get. See
docs/http.md.

A request is ``u32 length | JSON fields | rest``; the rest is a block of references, or token ids,
then payloads. All numbers are little-endian. What must hold: no input makes anything but a
ConfigError, and nothing is allocated that was not received. Pure functions: a crash leaves nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import accumulate, repeat
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import xxhash

from prefixstore.errors import ConfigError
from prefixstore.keys import KEY_BYTES, ChunkRef, KeyChain, MultimodalItem
from prefixstore.layout import Buffer

CONTENT_TYPE = "application/x-prefixstore"
FIELDS_BYTES_MAX = 1 << 20
REFS_MAX = 16384  # chunks in one request: 1M tokens of 64
REFS_BYTES_MAX = 32 << 20
ITEMS_MAX = 1024  # multimodal items in one request
SALT_BYTES = 8
# Of a unix socket: 5 GB/s, where the usual 208 KiB have 1.7 with sendfile. Those of TCP grow.
SOCKET_BYTES = 2 << 20
_LENGTH = struct.Struct("<I")
_KEY = struct.Struct(f"{KEY_BYTES}s")
RECORD = struct.Struct("<BBHIQ")  # tier, kind of checksum, 0, bytes of it, bytes of the payload
SUM_NONE, SUM_WHOLE, SUM_PIECES = 0, 1, 2


class Record(NamedTuple):
    """What stands before each payload of a get: where it came from and what it must hash to.

    kind: SUM_WHOLE, one xxh3_128 (big-endian); SUM_PIECES, a table of u64 xxh3_64, one for each
    piece. Tier 0 is a miss; ``num_bytes`` may still follow, which mean nothing.
    """

    tier: int
    kind: int
    sums: bytes
    num_bytes: int

    def pack(self) -> bytes:
        """Encode."""
        return RECORD.pack(self.tier, self.kind, 0, len(self.sums), self.num_bytes) + self.sums


def payload_is(record: Record, payload: memoryview) -> bool:
    """Whether a payload is what its record says: every byte is checked, or it is not good."""
    if record.kind == SUM_WHOLE:
        return xxhash.xxh3_128_digest(payload) == record.sums
    if record.kind != SUM_PIECES or len(record.sums) % 8 or not record.sums:
        return False
    table = memoryview(record.sums).cast("Q")
    size, rest = divmod(payload.nbytes, len(table))
    digest = xxhash.xxh3_64_intdigest
    return rest == 0 and all(
        digest(payload[at * size : (at + 1) * size]) == value for at, value in enumerate(table)
    )


def pack_request(fields: dict[str, Any], *rest: Buffer) -> bytes:
    """A request body."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *rest))


def fields_length(head: Buffer) -> int:
    """Bytes of the JSON fields, from the first four of a request. Raises ConfigError."""
    if len(head) < _LENGTH.size:
        raise ConfigError("a request of fewer than 4 bytes", "see docs/http.md")
    length: int = _LENGTH.unpack_from(head)[0]
    if length > FIELDS_BYTES_MAX:
        raise ConfigError(f"{length} bytes of fields", f"at most {FIELDS_BYTES_MAX}")
    return length


def parse_fields(text: Buffer) -> dict[str, Any]:
    """The JSON fields. Raises ConfigError."""
    try:
        fields = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the fields are not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError("the fields are not a JSON object")
    return fields


def shown(value: Any) -> str:
    """A value of a request in a message: short, and however deep it is no deeper than its kind.

    JSON that could just be read may be too deep to be written.
    """
    is_small = value is None or isinstance(value, (bool, int, float, str))
    return ascii(value)[:40] if is_small else f"a {type(value).__name__}"


def unpack_request(body: Buffer) -> tuple[dict[str, Any], memoryview]:
    """Fields and rest. Raises ConfigError."""
    view = memoryview(body)
    stop = _LENGTH.size + fields_length(view)
    if stop > len(view):
        raise ConfigError("a request that ends within its fields", "see docs/http.md")
    return parse_fields(view[_LENGTH.size : stop]), view[stop:]


def pack_refs(refs: Sequence[ChunkRef] | KeyChain) -> bytes:
    """``u32 count | u32 depths | u32 lengths of preimages | keys | salt digests | preimages``."""
    if isinstance(refs, KeyChain):
        refs = refs.refs()
    count = len(refs)
    numbers = struct.pack(
        f"<I{count}I{count}I",
        count,
        *(ref.depth for ref in refs),
        *(len(ref.preimage) for ref in refs),
    )
    return b"".join(
        (
            numbers,
            *(ref.key for ref in refs),
            *(ref.salt for ref in refs),
            *(ref.preimage for ref in refs),
        )
    )


def refs_length(head: Buffer) -> int:
    """Bytes of the fixed part of a block of references, from its first four."""
    if len(head) < _LENGTH.size:
        raise ConfigError("a block of references of fewer than 4 bytes", "see docs/http.md")
    count: int = _LENGTH.unpack_from(head)[0]
    if count > REFS_MAX:
        raise ConfigError(f"{count} chunks in one request", f"at most {REFS_MAX}")
    return _LENGTH.size + count * (8 + KEY_BYTES + SALT_BYTES)


def preimages_length(fixed: Buffer) -> int:
    """Bytes of the preimages behind the fixed part."""
    count = _LENGTH.unpack_from(fixed)[0]
    lengths = np.frombuffer(fixed, "<u4", count, _LENGTH.size + 4 * count)
    total = int(lengths.sum(dtype=np.uint64))
    if total > REFS_BYTES_MAX:
        raise ConfigError(f"{total} bytes of preimages", f"at most {REFS_BYTES_MAX}")
    return total


def unpack_refs(block: Buffer) -> tuple[list[ChunkRef], memoryview]:
    """References, and what stands behind them. Raises ConfigError."""
    view = memoryview(block)
    at = refs_length(view)
    if at > len(view):
        raise ConfigError("a block of references that is cut short", "see docs/http.md")
    stop = at + preimages_length(view)
    if stop > len(view):
        raise ConfigError("a block of references that is cut short", "see docs/http.md")
    count = _LENGTH.unpack_from(view)[0]
    depths = np.frombuffer(view, "<u4", count, 4).tolist()
    lengths = np.frombuffer(view, "<u4", count, 4 + 4 * count).tolist()
    keys_at, salts_at = 4 + 8 * count, 4 + (8 + KEY_BYTES) * count
    keys, salts, texts = (
        bytes(view[keys_at:salts_at]),
        bytes(view[salts_at:at]),
        bytes(view[at:stop]),
    )
    ends = list(accumulate(lengths, initial=0))
    refs = [
        ChunkRef(
            keys[KEY_BYTES * i : KEY_BYTES * (i + 1)],
            texts[ends[i] : ends[i + 1]],
            depths[i],
            salts[SALT_BYTES * i : SALT_BYTES * (i + 1)],
        )
        for i in range(count)
    ]
    return refs, view[stop:]


def refs_of_keys(keys: Buffer) -> list[ChunkRef]:
    """References by keys alone, 16 bytes each: a key is the hash of its preimage. ConfigError."""
    text = bytes(keys)
    if len(text) % KEY_BYTES or len(text) > KEY_BYTES * REFS_MAX:
        raise ConfigError(f"{len(text)} bytes of keys", f"16 for each of at most {REFS_MAX}")
    fields = zip(
        map(itemgetter(0), _KEY.iter_unpack(text)), repeat(b""), repeat(0),
        repeat(bytes(SALT_BYTES)),
    )  # fmt: skip
    # Not ChunkRef(...), which is a function of Python: a third of the time of a whole match.
    return list(map(tuple.__new__, repeat(ChunkRef), fields))


def items_to_json(items: Sequence[MultimodalItem]) -> list[list[Any]]:
    """Multimodal items as ``[[offset, num_tokens, digest in hex], ...]``."""
    return [[item.offset, item.num_tokens, item.digest.hex()] for item in items]


def items_from_json(value: Any) -> list[MultimodalItem]:
    """The reverse. Raises ConfigError."""
    try:
        items = [
            MultimodalItem(offset, count, bytes.fromhex(digest)) for offset, count, digest in value
        ]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"items: {error}", "give [[offset, num_tokens, hex digest]]") from error
    if len(items) > ITEMS_MAX:
        raise ConfigError(f"{len(items)} items", f"at most {ITEMS_MAX}")
    for item in items:
        whole = type(item.offset) is int and type(item.num_tokens) is int
        if not (whole and 0 <= item.offset < 2**31 and 0 < item.num_tokens < 2**31):
            raise ConfigError(f"items: {shown(item.num_tokens)} tokens at {shown(item.offset)}")
        if len(item.digest) > 1024:
            raise ConfigError(f"items: a digest of {len(item.digest)} bytes", "at most 1024")
    return items
