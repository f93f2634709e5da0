"""Byte quotas of namespaces and salts, kept in the durable index.

A chunk that would take its namespace or salt over the quota makes older ones of the same give way;
if none can, it is not stored. Others' chunks are never evicted for it. Nor are those of another
group when a tier is full, whoever has a group.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixstore.errors import ConfigError
from prefixstore.index import Environment, Txn
from prefixstore.rows import Entry

_TIERS = (1, 2)  # MEMORY and DISK of the ledger, which knows this module
REREAD_S = 1.0  # another process's change takes effect after this


@dataclass(frozen=True)
class Group:
    """Namespaces that have one limit together: those of a tenant."""

    namespaces: frozenset[bytes]
    limit_bytes: int


@dataclass(frozen=True)
class Whose:
    """Whose chunks may give way: those of some namespaces, or of all ``others``; of any salt, or of
    one. Equal ones have one place in the eviction order (`seeking`)."""

    namespaces: frozenset[bytes]
    others: bool = False
    salt: bytes | None = None

    def __call__(self, entry: Entry) -> bool:
        """Whether a chunk is one of them."""
        of_salt = self.salt is None or self.salt == entry.salt
        return of_salt and (entry.namespace in self.namespaces) != self.others


@dataclass(frozen=True)
class Quota:
    """Byte limits of one tier: by namespace, by salt digest, and of groups of namespaces."""

    namespaces: dict[bytes, int]
    salts: dict[bytes, int]
    groups: dict[bytes, Group] = field(default_factory=dict)  # by each namespace of them
    _yielding: dict[Group | None, Whose] = field(default_factory=dict)  # asked for each chunk

    def together(self, namespace: bytes) -> frozenset[bytes]:
        """The namespaces that share a limit with one."""
        group = self.groups.get(namespace)
        return frozenset((namespace,)) if group is None else group.namespaces

    def yielding(self, namespace: bytes) -> Whose:
        """Whose chunks give way to those of a namespace when a tier is full: if it has a group, not
        those of other groups (unless they may hold nothing any more)."""
        own = self.groups.get(namespace)
        known = self._yielding.get(own)
        if known is None:
            groups = self.groups.items() if own is not None else ()
            spared = (name for name, group in groups if group is not own and group.limit_bytes > 0)
            known = self._yielding[own] = Whose(frozenset(spared), others=True)
        return known

    def over(
        self, txn: Txn, tier: int, more_bytes: int, namespace: bytes, salt: bytes
    ) -> tuple[Whose, int] | None:
        """Whose chunks must give way, and how many bytes, before ``more_bytes`` may enter.

        In a transaction of the live index. What is being filled counts as used.
        """
        used = txn.get_int("usage", b"n%c" % tier + namespace) + more_bytes
        if namespace in self.namespaces and used > self.namespaces[namespace]:
            return Whose(frozenset((namespace,))), used - self.namespaces[namespace]
        used = txn.get_int("usage", b"s%c" % tier + salt) + more_bytes
        group = self.groups.get(namespace)
        if salt in self.salts and used > self.salts[salt]:
            # The salt is what the writer says it is: of a tenant, only its own chunks make room.
            own = frozenset[bytes]() if group is None else group.namespaces
            return Whose(own, others=group is None, salt=salt), used - self.salts[salt]
        if group is not None:
            used = sum(txn.get_int("usage", b"n%c" % tier + n) for n in group.namespaces)
            if used + more_bytes > group.limit_bytes:
                return Whose(group.namespaces), used + more_bytes - group.limit_bytes
        return None


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
        """Limit a namespace, or a salt given by its `keys.salt_digest`; None lifts the limit.
        Raises ConfigError."""
        if bool(namespace) == bool(salt):
            raise ConfigError("a quota is for a namespace or for a salt", "give exactly one")
        _check(limit_bytes or 0)
        name = (b"n%c" % tier + namespace) if namespace else (b"s%c" % tier + salt)

        def change(txn: Txn) -> None:
            if limit_bytes is None:
                txn.delete("quota", name)
            else:
                txn.put_int("quota", name, limit_bytes)

        self._index.write(change)
        self._cache = (-REREAD_S, {})

    def set_groups(self, limits: Sequence[tuple[int, int, bytes, bytes]]) -> None:
        """Put namespaces under limits of groups: (tier, bytes, 16 bytes that name the group,
        namespace). The limit last given counts for the whole group. Raises ConfigError."""
        for _, limit_bytes, _, _ in limits:
            _check(limit_bytes)

        def change(txn: Txn) -> None:
            for tier, limit_bytes, group, namespace in limits:
                txn.put("quota", b"g%c" % tier + namespace, group)
                txn.put_int("quota", b"G%c" % tier + group, limit_bytes)

        if limits:
            self._index.write(change)
            self._cache = (-REREAD_S, {})

    def forget(self, namespace: bytes) -> None:
        """Lift all limits of a namespace that was retired: what is left of it goes first."""

        def change(txn: Txn) -> None:
            for tier in _TIERS:
                for kind in (b"n", b"g"):
                    txn.delete("quota", kind + b"%c" % tier + namespace)

        self._index.write(change)
        self._cache = (-REREAD_S, {})

    def ungrouped(self, tier: int) -> Whose:
        """What is evicted ahead of need: nothing of a group, which makes its own room."""
        return Whose(frozenset(self.of(tier).groups), others=True)

    def _read(self) -> dict[int, Quota]:
        known: dict[int, Quota] = {}
        members: dict[tuple[int, bytes], list[bytes]] = {}
        limit_of: dict[tuple[int, bytes], int] = {}
        with self._index.read() as txn:
            for name, value in txn.scan("quota"):
                quota = known.setdefault(name[1], Quota({}, {}))
                if name[:1] == b"g":
                    members.setdefault((name[1], value), []).append(name[2:])
                    continue
                if name[:1] == b"G":
                    limit_of[name[1], name[2:]] = int.from_bytes(value, "little")
                    continue
                limits = quota.namespaces if name[:1] == b"n" else quota.salts
                limits[name[2:]] = int.from_bytes(value, "little")
        for (tier, name), namespaces in members.items():
            group = Group(frozenset(namespaces), limit_of.get((tier, name), 0))
            known[tier].groups.update(dict.fromkeys(namespaces, group))
        return known


def _check(limit_bytes: int) -> None:
    if not 0 <= limit_bytes < 2**64:
        raise ConfigError(f"a quota of {limit_bytes} bytes", "give 0 to 2**64 - 1, or None")
