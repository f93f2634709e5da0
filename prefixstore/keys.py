"""Prefix keys: a chained hash over (namespace, salt, token ids, multimodal items).

``root = H("prefixstore-root\\0" + namespace + salt)``; the preimage of chunk i is
``parent key + token ids as int32 little-endian + multimodal items``; its key is H of that. H is
BLAKE2b with a 16-byte digest (RFC 7693). Same in every process, platform and version; golden
vectors are in ``docs/format.md``.

Why a cryptographic hash, where xxh3_128 plus a comparison of token ids was the first plan: with a
hash that can be collided, a parent can be evicted and replaced by a colliding one whose tokens are
honestly its own, and the children of the first, whose tokens also agree, are then served behind the
wrong prefix. No comparison inside one row sees that (docs/decisions.md). BLAKE2b costs 1.7 us a
chunk instead of 0.3: 0.9 ms for 32k tokens. The row keeps the preimage, and a hit compares it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefixstore.config import SALT_BYTES_MAX
from prefixstore.errors import ConfigError

KEY_BYTES = 16
_ROOT = b"prefixstore-root\0"
_ITEM = struct.Struct("<iIH")

Tokens = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """An image, audio clip or such: where its placeholder tokens stand, and its content hash."""

    offset: int
    num_tokens: int
    digest: bytes


class ChunkRef(NamedTuple):
    """All that names one chunk: its key, what the key is the hash of, its place in the prompt."""

    key: bytes
    preimage: bytes
    depth: int
    salt: bytes  # salt_digest of the chain


def root_key(namespace: bytes, salt: bytes = b"") -> bytes:
    """Key the chain of a (namespace, salt) starts from."""
    if len(namespace) != KEY_BYTES:
        raise ConfigError(f"a namespace has 16 bytes, not {len(namespace)}")
    if len(salt) > SALT_BYTES_MAX:
        raise ConfigError(f"salt of {len(salt)} bytes", f"give at most {SALT_BYTES_MAX}")
    return blake2b(_ROOT + namespace + salt, digest_size=KEY_BYTES).digest()


def key_of(preimage: bytes) -> bytes:
    """The key of a chunk."""
    return blake2b(preimage, digest_size=KEY_BYTES).digest()


def is_honest(ref: ChunkRef) -> bool:
    """Whether its key is the hash of its preimage, as that of any chunk that is stored."""
    return key_of(ref.preimage) == ref.key


def salt_digest(salt: bytes) -> bytes:
    """Eight bytes that name a salt in rows and quotas without revealing it; zero for no salt."""
    return blake2b(salt, digest_size=8, person=b"prefixstore-salt").digest() if salt else bytes(8)


def token_bytes(tokens: Tokens) -> bytes:
    """Token ids as int32 little-endian. Raises ConfigError for ids that do not fit."""
    if isinstance(tokens, list):
        with suppress(struct.error, TypeError):  # then numpy says what is wrong
            return struct.pack(f"<{len(tokens)}i", *tokens)  # in less than half of numpy's time
    try:
        array = np.asarray(tokens)
    except (OverflowError, ValueError, TypeError) as error:
        raise ConfigError(f"token ids must be whole numbers below 2**31: {error}") from error
    if array.ndim != 1:
        raise ConfigError(f"token ids must be one list, got shape {array.shape}")
    if array.size == 0:
        return b""
    if array.dtype.kind not in "iu":
        raise ConfigError(f"token ids must be whole numbers, got {array.dtype}")
    if array.dtype != np.int32 and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise ConfigError(f"token ids must be below 2**31, got up to {int(array.max())}")
    return array.astype("<i4", copy=False).tobytes()


class KeyChain:
    """The keys of one token sequence; grows as tokens are appended.

    ``keys[i]`` and ``preimages[i]`` are of tokens ``[i * chunk_tokens, (i + 1) * chunk_tokens)``.
    """

    def __init__(
        self,
        namespace: bytes,
        chunk_tokens: int,
        tokens: Tokens = (),
        salt: bytes = b"",
        items: Sequence[MultimodalItem] = (),
    ) -> None:
        self.namespace, self.salt = namespace, salt
        self.chunk_tokens = chunk_tokens
        self.items = sorted(items, key=lambda item: item.offset)
        self.keys: list[bytes] = []
        self.preimages: list[bytes] = []
        self._refs: list[ChunkRef] = []  # as far as they were asked for
        self._parent = root_key(namespace, salt)
        self._tail = b""
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far, those of the unfinished last chunk included."""
        return len(self.keys) * self.chunk_tokens + len(self._tail) // 4

    def __len__(self) -> int:
        return len(self.keys)

    def refs(self, start: int = 0, stop: int | None = None) -> list[ChunkRef]:
        """The chunks ``[start, stop)`` of this chain."""
        stop = len(self.keys) if stop is None else min(stop, len(self.keys))
        refs = self._refs
        if (known := len(refs)) < stop:
            salt = salt_digest(self.salt)
            named = zip(self.keys[known:stop], self.preimages[known:stop], strict=True)
            more = [ChunkRef(*names, known + i, salt) for i, names in enumerate(named)]
            self._refs = refs = refs + more  # a new list: two threads may be here
        return refs[start:stop]

    def extend(self, tokens: Tokens) -> None:
        """Append token ids; each chunk they complete gets its key."""
        data = memoryview(self._tail + token_bytes(tokens))
        size, parent = self.chunk_tokens * 4, self._parent
        whole = len(data) // size * size
        keys, preimages = self.keys, self.preimages
        for at in range(0, whole, size):
            preimage = parent + data[at : at + size]
            if self.items:
                preimage += self._items_of(len(keys))
            parent = blake2b(preimage, digest_size=KEY_BYTES).digest()
            keys.append(parent)
            preimages.append(preimage)
        self._parent, self._tail = parent, bytes(data[whole:])

    def _items_of(self, chunk: int) -> bytes:
        start = chunk * self.chunk_tokens
        stop = start + self.chunk_tokens
        return b"".join(
            _ITEM.pack(item.offset - start, item.num_tokens, len(item.digest)) + item.digest
            for item in self.items
            if item.offset < stop and item.offset + item.num_tokens > start
        )


def preimage_tokens(preimage: bytes, chunk_tokens: int) -> npt.NDArray[np.int32]:
    """Token ids of a chunk, int32 of shape [chunk_tokens], from its preimage."""
    return np.frombuffer(preimage, dtype="<i4", count=chunk_tokens, offset=KEY_BYTES)
