"""Leases that clients hold.

What must hold: nothing of a lease is held longer than its client asked for, whatever the client
does at the same time: each lease of the library's has one place that lets it go. Lost in a crash,
when the library's leases end by themselves.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from prefixstore.keys import ChunkRef
from prefixstore.namespace import Lease, Namespace
from prefixstore.serve import limits
from prefixstore.serve.auth import Tenant
from prefixstore.serve.refusal import RefusedError, busy


def no_lease() -> RefusedError:
    """What is answered about a lease that is not there, or not the asker's."""
    return RefusedError(404, "lease", "no such lease", "it ended, or was released")


@dataclass
class HeldLease:
    """A lease a client holds; renewing it takes a new one of the library's."""

    tenant: str
    namespace: Namespace
    chunks: list[tuple[int, bytes]]  # tier and key of each that it holds
    lease: Lease

    def again(self, duration_s: float) -> tuple[Lease, int]:
        """A new one of the same chunks (on a thread)."""
        refs = [ChunkRef(key, b"", 0, b"") for _, key in self.chunks]
        return self.namespace.lease(refs, [tier for tier, _ in self.chunks], duration_s)


class HeldLeases:
    """See the module docstring. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._leases: dict[str, HeldLease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, held: HeldLease) -> str:
        """Remember a lease; its name. Raises RefusedError, and then it has been let go."""
        now = time.time()
        for name in [name for name, one in self._leases.items() if one.lease.end_s <= now]:
            del self._leases[name]
        mine = [len(one.chunks) for one in self._leases.values() if one.tenant == held.tenant]
        chunks = sum(mine) + len(held.chunks)
        if len(mine) >= limits.LEASES_PER_TENANT_MAX or chunks > limits.LEASE_CHUNKS_MAX:
            held.namespace.release(held.lease)
            raise busy(f"you hold {len(mine)} leases of {sum(mine)} chunks", 429, "leases")
        name = secrets.token_hex(16)
        self._leases[name] = held
        return name

    def of(self, tenant: Tenant, name: str) -> HeldLease:
        """A tenant's lease. Raises RefusedError."""
        found = self._leases.get(name)
        if found is None or found.tenant != tenant.name or found.lease.end_s <= time.time():
            raise no_lease()
        return found

    def renewed(self, name: str, held: HeldLease, lease: Lease) -> bool:
        """Have a new one of the library's stand for it; False if it was released meanwhile."""
        if self._leases.get(name) is not held:
            return False
        before, held.lease = held.lease, lease
        held.namespace.release(before)
        return True

    def release(self, tenant: Tenant, name: str) -> None:
        """End a tenant's lease. Raises RefusedError."""
        found = self.of(tenant, name)
        del self._leases[name]
        found.namespace.release(found.lease)
