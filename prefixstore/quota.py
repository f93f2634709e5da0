"""Byte quotas of namespaces and salts, kept in the durable index.

A chunk that would take its namespace or salt over the quota makes older ones of the same give way;
if none can, it is not stored. Others' chunks are never evicted for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from prefixstore.errors import ConfigError
from prefixstore.index import Environment, Txn

REREAD_S = 1.0  # another process's change takes effect after this


@dataclass(frozen=True)
class Quota:
    """Byte limits of one tier: by namespace and by salt digest."""

    namespaces: dict[bytes, int]
    salts: dict[bytes, int]


class QuotaBook:
    """Reads and sets quotas. Thread-safe."""

    def __init__(self, index: Environment) -> None:
        self._index = index
        self._cache: tuple[float, dict[int, Quota]] = (-REREAD_S, {})

    def of(self, tier: int) -> Quota:
        """The limits of a tier; at most REREAD_S old."""
        read_at, known = self._cache
        if time.monotonic() - read_at >= REREAD_S:
            known = self._read()
            self._cache = (time.monotonic(), known)
        return known.get(tier) or Quota({}, {})

    def set(
        self, tier: int, limit_bytes: int | None, *, namespace: bytes = b"", salt: bytes = b""
    ) -> None:
        """Limit a namespace, or a salt given by its `keys.salt_digest`; None lifts the limit."""
        if bool(namespace) == bool(salt):
            raise ConfigError("a quota is for a namespace or for a salt", "give exactly one")
        name = (b"n%c" % tier + namespace) if namespace else (b"s%c" % tier + salt)

        def change(txn: Txn) -> None:
            if limit_bytes is None:
                txn.delete("quota", name)
            else:
                txn.put_int("quota", name, limit_bytes)

        self._index.write(change)
        self._cache = (-REREAD_S, {})

    def _read(self) -> dict[int, Quota]:
        known: dict[int, Quota] = {}
        with self._index.read() as txn:
            for name, value in txn.scan("quota"):
                quota = known.setdefault(name[1], Quota({}, {}))
                limits = quota.namespaces if name[:1] == b"n" else quota.salts
                limits[name[2:]] = int.from_bytes(value, "little")
        return known
