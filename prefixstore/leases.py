"""Leases: promises that the slots of chunks stay theirs while somebody reads them.

A lease is held by a process and bounded in time; it ends when it is released, when its time is
over, or when its process is dead. A chunk may be removed under a lease, its slot only changes hands
after: until then the slot is in limbo. A reader that outlives its lease reads a checksum mismatch.

Functions of a live transaction, like the ledger's methods.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from prefixstore.index import Txn
from prefixstore.ledger import Ledger
from prefixstore.rows import CLAIM_LIMBO, Claim, pack_address, unpack_address

LEASE = struct.Struct("<Id")  # owner, end; the addresses follow
_ADDRESS_BYTES = 9


def lease_chunks(
    ledger: Ledger,
    txn: Txn,
    lease_id: bytes,
    end_s: float,
    wanted: Sequence[tuple[int, bytes]],
    namespace: bytes,
) -> list[bool]:
    """Lease the slots of chunks of a namespace, ``wanted`` being (tier, key); False: gone."""
    granted, addresses = [], []
    for tier, key in wanted:
        entry = ledger.entry(txn, tier, key)
        granted.append(entry is not None and entry.namespace == namespace)
        if entry is not None and granted[-1]:
            addresses.append(pack_address(tier, entry.slot_bytes, entry.slot))
    lease_slots(ledger, txn, lease_id, end_s, addresses)
    return granted


def lease_slots(
    ledger: Ledger, txn: Txn, lease_id: bytes, end_s: float, addresses: Sequence[bytes]
) -> None:
    """The same for slots whose chunks were looked up in this transaction."""
    txn.put("lease", lease_id, LEASE.pack(ledger.owner, end_s) + b"".join(addresses))
    for address in addresses:
        txn.put("leased", address + lease_id)


def release(ledger: Ledger, txn: Txn, lease_id: bytes) -> None:
    """End a lease. Slots in limbo that nobody else leases become free."""
    record = txn.get("lease", lease_id)
    if record is None:
        return
    txn.delete("lease", lease_id)
    for at in range(LEASE.size, len(record), _ADDRESS_BYTES):
        address = record[at : at + _ADDRESS_BYTES]
        txn.delete("leased", address + lease_id)
        claim = txn.get("claim", address)
        if claim is not None and Claim.unpack(claim).kind == CLAIM_LIMBO:
            ledger.free_slot(txn, *unpack_address(address))
