"""Slot accounting of both tiers, inside one transaction of the live index.

Owns: which slots exist, are free, hold a chunk, are claimed or leased; the eviction order; bytes
used by each namespace and salt. What must hold (``check`` counts it): for each tier

    allocated bytes = slots in use + claimed + pending + free        and        allocated <= cap

so a tier never takes more than it was given, by construction. A crash leaves at worst claims and
leases of a dead owner, which ``reap`` resolves: a disk slot is kept when the durable row names it,
else freed; there is no other state between the two.

Tables of the live index:
  meta     counters of the ledger         pool     (tier, slot_bytes) -> first slot never used
  free     slots with space, unused       hole     slots whose space was given back
  claim    address -> Claim               pending  key -> Pending (memory tier)
  chunk    key -> Row (memory tier)       heat     (tier, key) -> rank, hits
  order    (tier, rank, key) -> Entry     expiry   (time, tier, key)
  lease    id -> owner, end, addresses    leased   (address, lease id)
  usage    bytes by namespace and salt    dirty    keys of the memory tier not yet on disk
  counter  statistics of the store
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prefixstore import evict
from prefixstore.config import PIN_SHARE_MAX, SWEEP_ROWS_MAX
from prefixstore.index import Txn
from prefixstore.rows import CLAIM_LIMBO, Claim, Pending, pack_address, unpack_address

MEMORY, DISK = 1, 2
TIER_NAMES = {MEMORY: "memory", DISK: "disk"}
TABLES = (
    "meta", "pool", "free", "hole", "claim", "pending", "chunk", "heat",
    "order", "expiry", "lease", "leased", "usage", "dirty", "counter",
)  # fmt: skip

_ENTRY = struct.Struct("<III16s8s")
_HEAT = struct.Struct(">QB")
_LEASE = struct.Struct("<Id")
_POOL = struct.Struct(">BI")
RANK_PINNED = 2**64 - 1


class Entry(NamedTuple):
    """What the eviction order knows of a chunk without reading its row."""

    slot_bytes: int
    slot: int
    depth: int
    namespace: bytes
    salt: bytes


Punch = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Quota:
    """Byte limits of one tier: by namespace and by salt digest."""

    namespaces: dict[bytes, int]
    salts: dict[bytes, int]


class Ledger:
    """The accounting rules. Stateless but for the caps; each method works on a given Txn."""

    def __init__(self, owner: int, punch: Punch, overhead: Callable[[int], int]) -> None:
        self.owner, self._punch, self._overhead = owner, punch, overhead

    def set_cap(self, txn: Txn, tier: int, cap_bytes: int) -> None:
        """Bound a tier, for every process that has the store open."""
        put_int(txn, "meta", b"cap%d" % tier, cap_bytes)

    def cap(self, txn: Txn, tier: int) -> int:
        """Bytes the slots of a tier may take: what it was given less what its index takes."""
        return max(0, get_int(txn, "meta", b"cap%d" % tier) - self._overhead(tier))

    # ------------------------------------------------------------------ slots
    def allocated(self, txn: Txn, tier: int) -> int:
        """Bytes of the tier that have space behind them."""
        return get_int(txn, "meta", b"allocated%d" % tier)

    def claim_slot(self, txn: Txn, tier: int, slot_bytes: int) -> int | None:
        """A slot nobody else has, or None when the tier must evict first. Touches no chunk."""
        prefix = _POOL.pack(tier, slot_bytes)
        if (address := txn.first("free", prefix)) is not None:
            txn.delete("free", address)
            return unpack_address(address)[2]
        while self.allocated(txn, tier) + slot_bytes > self.cap(txn, tier):
            other = txn.first("free", prefix[:1])
            if other is None:
                return None
            txn.delete("free", other)
            self.give_back(txn, *unpack_address(other))
        if (address := txn.first("hole", prefix)) is not None:
            txn.delete("hole", address)
            slot = unpack_address(address)[2]
        else:
            slot = get_int(txn, "pool", prefix)
            put_int(txn, "pool", prefix, slot + 1)
        add_int(txn, "meta", b"allocated%d" % tier, slot_bytes)
        return slot

    def trim(self, txn: Txn, tier: int) -> None:
        """Give free slots back while the tier is over its cap (after the cap was lowered)."""
        while self.allocated(txn, tier) > self.cap(txn, tier):
            address = txn.first("free", b"%c" % tier)
            if address is None:
                return
            txn.delete("free", address)
            self.give_back(txn, *unpack_address(address))

    def give_back(self, txn: Txn, tier: int, slot_bytes: int, slot: int) -> None:
        """Return the space of an unused slot to the file system."""
        self._punch(tier, slot_bytes, slot)
        txn.put("hole", pack_address(tier, slot_bytes, slot))
        add_int(txn, "meta", b"allocated%d" % tier, -slot_bytes)

    def free_slot(self, txn: Txn, tier: int, slot_bytes: int, slot: int) -> None:
        """A slot is no longer needed; one that is leased stays in limbo until the lease ends."""
        address = pack_address(tier, slot_bytes, slot)
        if txn.first("leased", address) is not None:
            txn.put("claim", address, Claim(0, CLAIM_LIMBO, bytes(16)).pack())
            return
        txn.delete("claim", address)
        txn.put("free", address)

    # ------------------------------------------------------------------ chunks
    def insert(self, txn: Txn, tier: int, key: bytes, entry: Entry, expires_s: int) -> None:
        """A chunk now stands in its slot: enter it into the order and the sums."""
        clock = add_int(txn, "meta", b"clock%d" % tier, evict.clock_step(None))
        heat = evict.admit(clock, entry.depth, self.cap(txn, tier) // entry.slot_bytes)
        self._place(txn, tier, key, heat.rank, heat.freq, _ENTRY.pack(*entry))
        for name in _usage_keys(tier, entry):
            add_int(txn, "usage", name, entry.slot_bytes)
        if expires_s:
            txn.put("expiry", _expiry_key(expires_s, tier, key))
        txn.delete("claim", pack_address(tier, entry.slot_bytes, entry.slot))

    def entry(self, txn: Txn, tier: int, key: bytes) -> Entry | None:
        """Where a chunk stands in a tier; None when it is not there."""
        found = self._find(txn, tier, key)
        return None if found is None else Entry(*_ENTRY.unpack(found[1]))

    def detach(self, txn: Txn, tier: int, key: bytes) -> Entry | None:
        """Take a chunk out of the order and the sums; its slot stays with the caller."""
        found = self._find(txn, tier, key)
        if found is None:
            return None
        rank = _HEAT.unpack(found[0])[0]
        entry = Entry(*_ENTRY.unpack(found[1]))
        self._displace(txn, tier, key, rank)
        for name in _usage_keys(tier, entry):
            add_int(txn, "usage", name, -entry.slot_bytes)
        if rank == RANK_PINNED:
            add_int(txn, "meta", b"pinned%d" % tier, -entry.slot_bytes)
        return entry

    def drop_memory(self, txn: Txn, key: bytes) -> bool:
        """Remove a chunk from the memory tier: row, order and slot in this one transaction."""
        entry = self.detach(txn, MEMORY, key)
        if entry is None:
            return False
        txn.delete("chunk", key)
        txn.delete("dirty", key)
        self.free_slot(txn, MEMORY, entry.slot_bytes, entry.slot)
        return True

    def touch(self, txn: Txn, tier: int, key: bytes) -> None:
        """A chunk was used: it moves up in the order (pinned ones have no place to move to)."""
        found = self._find(txn, tier, key)
        if found is None:
            return
        rank, freq = _HEAT.unpack(found[0])
        if rank == RANK_PINNED:
            return
        before = evict.Heat(rank, freq)
        entry = Entry(*_ENTRY.unpack(found[1]))
        clock = add_int(txn, "meta", b"clock%d" % tier, evict.clock_step(before))
        capacity = self.cap(txn, tier) // entry.slot_bytes
        heat = evict.touch(before, clock, entry.depth, capacity)
        self._displace(txn, tier, key, rank)
        self._place(txn, tier, key, heat.rank, heat.freq, found[1])

    def set_pinned(self, txn: Txn, tier: int, key: bytes, pinned: bool) -> bool:
        """Exempt a chunk from eviction, or not. False when absent or over the share for pins."""
        found = self._find(txn, tier, key)
        if found is None:
            return False
        rank, freq = _HEAT.unpack(found[0])
        entry = Entry(*_ENTRY.unpack(found[1]))
        if pinned == (rank == RANK_PINNED):
            return True
        name = b"pinned%d" % tier
        if pinned:
            if get_int(txn, "meta", name) + entry.slot_bytes > PIN_SHARE_MAX * self.cap(txn, tier):
                return False
            new_rank = RANK_PINNED
        else:
            clock = get_int(txn, "meta", b"clock%d" % tier)
            new_rank = evict.admit(clock, entry.depth, self.cap(txn, tier) // entry.slot_bytes).rank
        add_int(txn, "meta", name, entry.slot_bytes if pinned else -entry.slot_bytes)
        self._displace(txn, tier, key, rank)
        self._place(txn, tier, key, new_rank, freq, found[1])
        return True

    def victims(
        self, txn: Txn, tier: int, need_bytes: int, of: Callable[[Entry], bool] | None = None
    ) -> list[tuple[bytes, Entry]]:
        """Chunks to evict, coldest first, until ``need_bytes``; skips leased, pinned and dirty."""
        chosen: list[tuple[bytes, Entry]] = []
        looked = 0
        for name, value in txn.scan("order", b"%c" % tier):
            looked += 1
            rank = int.from_bytes(name[1:9], "big")
            if need_bytes <= 0 or rank == RANK_PINNED or looked > SWEEP_ROWS_MAX:
                break
            key, entry = name[9:], Entry(*_ENTRY.unpack(value))
            if of is not None and not of(entry):
                continue
            if tier == MEMORY and txn.get("dirty", key) is not None:
                continue
            if txn.first("leased", pack_address(tier, entry.slot_bytes, entry.slot)) is not None:
                continue
            chosen.append((key, entry))
            need_bytes -= entry.slot_bytes
        return chosen

    def over_quota(
        self, txn: Txn, tier: int, slot_bytes: int, namespace: bytes, salt: bytes, quota: Quota
    ) -> Callable[[Entry], bool] | None:
        """The filter of chunks that must give way before one more may enter; None if it fits."""
        used = get_int(txn, "usage", b"n%c" % tier + namespace)
        if namespace in quota.namespaces and used + slot_bytes > quota.namespaces[namespace]:
            return lambda entry: entry.namespace == namespace
        used = get_int(txn, "usage", b"s%c" % tier + salt)
        if salt in quota.salts and used + slot_bytes > quota.salts[salt]:
            return lambda entry: entry.salt == salt
        return None

    def occupied(self, txn: Txn, tier: int) -> Iterator[tuple[int, int, int]]:
        """Addresses of slots that hold a chunk."""
        for _, value in txn.scan("order", b"%c" % tier):
            entry = Entry(*_ENTRY.unpack(value))
            yield tier, entry.slot_bytes, entry.slot

    def pending_slots(self, txn: Txn) -> Iterator[tuple[int, int, int]]:
        """Addresses of slots of the memory tier that are being filled."""
        for _, value in txn.scan("pending"):
            pending = Pending.unpack(value)
            yield MEMORY, pending.slot_bytes, pending.slot

    # ------------------------------------------------------------------ leases
    def lease(
        self, txn: Txn, lease_id: bytes, end_s: float, wanted: Iterable[tuple[int, bytes]]
    ) -> list[bool]:
        """Promise that the slots of chunks stay theirs; False for a chunk that is gone."""
        granted, addresses = [], []
        for tier, key in wanted:
            entry = self.entry(txn, tier, key)
            granted.append(entry is not None)
            if entry is not None:
                addresses.append(pack_address(tier, entry.slot_bytes, entry.slot))
        self.lease_slots(txn, lease_id, end_s, addresses)
        return granted

    def lease_slots(
        self, txn: Txn, lease_id: bytes, end_s: float, addresses: list[bytes]
    ) -> None:
        """The same for slots whose chunks were looked up in this transaction."""
        txn.put("lease", lease_id, _LEASE.pack(self.owner, end_s) + b"".join(addresses))
        for address in addresses:
            txn.put("leased", address + lease_id)

    def release(self, txn: Txn, lease_id: bytes) -> None:
        """End a lease. Slots in limbo become free."""
        record = txn.get("lease", lease_id)
        if record is None:
            return
        txn.delete("lease", lease_id)
        for at in range(_LEASE.size, len(record), 9):
            address = record[at : at + 9]
            txn.delete("leased", address + lease_id)
            claim = txn.get("claim", address)
            if claim is not None and Claim.unpack(claim).kind == CLAIM_LIMBO:
                self.free_slot(txn, *unpack_address(address))

    # ------------------------------------------------------------------ recovery
    def reap(
        self,
        txn: Txn,
        now_s: float,
        is_dead: Callable[[int], bool],
        disk_entry: Callable[[bytes], tuple[Entry, bool, int] | None],
    ) -> int:
        """Resolve what dead owners left. ``disk_entry`` reads the durable row of a key.

        Returns how many leases, pending chunks and claims were resolved.
        """
        resolved = 0
        for lease_id, record in _some(txn.scan("lease")):
            owner, end_s = _LEASE.unpack_from(record)
            if end_s < now_s or is_dead(owner):
                self.release(txn, lease_id)
                resolved += 1
        for key, record in _some(txn.scan("pending")):
            pending = Pending.unpack(record)
            writers = [w for w in pending.writers if not is_dead(w)]
            given_up = len(writers) < len(pending.writers) or pending.deadline_s < now_s
            if given_up and not writers:
                txn.delete("pending", key)
                self.free_slot(txn, MEMORY, pending.slot_bytes, pending.slot)
                resolved += 1
        for address, record in _some(txn.scan("claim")):
            claim = Claim.unpack(record)
            # The keeper thread alone makes claims and alone reaps: one of ours is left from an error.
            if claim.kind == CLAIM_LIMBO or (
                claim.owner != self.owner and not is_dead(claim.owner)
            ):
                continue
            tier, slot_bytes, slot = unpack_address(address)
            durable = disk_entry(claim.key)
            if durable is not None and durable[0][:2] == (slot_bytes, slot):
                entry, pinned, expires_s = durable
                self.insert(txn, tier, claim.key, entry, expires_s)
                self.set_pinned(txn, tier, claim.key, pinned)
            else:
                self.free_slot(txn, tier, slot_bytes, slot)
            resolved += 1
        return resolved

    def adopt_disk(self, txn: Txn, rows: Iterable[tuple[bytes, Entry, bool, int]]) -> int:
        """Rebuild the disk tier's accounting from durable rows, oldest first, after a reboot."""
        taken: dict[int, set[int]] = {}
        count = 0
        for key, entry, pinned, expires_s in rows:
            taken.setdefault(entry.slot_bytes, set()).add(entry.slot)
            self.insert(txn, DISK, key, entry, expires_s)
            self.set_pinned(txn, DISK, key, pinned)
            add_int(txn, "meta", b"allocated%d" % DISK, entry.slot_bytes)
            count += 1
        for slot_bytes, slots in taken.items():
            top = max(slots) + 1
            put_int(txn, "pool", _POOL.pack(DISK, slot_bytes), top)
            for slot in set(range(top)) - slots:
                self._punch(DISK, slot_bytes, slot)
                txn.put("hole", pack_address(DISK, slot_bytes, slot))
        return count

    # ------------------------------------------------------------------ internals
    def _find(self, txn: Txn, tier: int, key: bytes) -> tuple[bytes, bytes] | None:
        heat = txn.get("heat", b"%c" % tier + key)
        if heat is None:
            return None
        entry = txn.get("order", b"%c" % tier + heat[:8] + key)
        assert entry is not None, "heat without a place in the order"
        return heat, entry

    def _place(
        self, txn: Txn, tier: int, key: bytes, rank: int, freq: int, entry: bytes
    ) -> None:
        txn.put("heat", b"%c" % tier + key, _HEAT.pack(rank, freq))
        txn.put("order", b"%c" % tier + rank.to_bytes(8, "big") + key, entry)

    def _displace(self, txn: Txn, tier: int, key: bytes, rank: int) -> None:
        txn.delete("heat", b"%c" % tier + key)
        txn.delete("order", b"%c" % tier + rank.to_bytes(8, "big") + key)


def _usage_keys(tier: int, entry: Entry) -> tuple[bytes, bytes]:
    return b"n%c" % tier + entry.namespace, b"s%c" % tier + entry.salt


def _expiry_key(expires_s: int, tier: int, key: bytes) -> bytes:
    return expires_s.to_bytes(4, "big") + b"%c" % tier + key


def _some(pairs: Iterator[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A bounded copy, so that the table may be changed while it is walked."""
    return [pair for pair, _ in zip(pairs, range(SWEEP_ROWS_MAX), strict=False)]


def get_int(txn: Txn, table: str, key: bytes) -> int:
    """A counter; 0 when it is not there."""
    value = txn.get(table, key)
    return 0 if value is None else int.from_bytes(value, "little")


def put_int(txn: Txn, table: str, key: bytes, value: int) -> None:
    """Set a counter. It must not be negative: that would be a slot counted twice."""
    assert value >= 0, f"{table}/{key!r} fell to {value}"
    txn.put(table, key, value.to_bytes(8, "little"))


def add_int(txn: Txn, table: str, key: bytes, change: int) -> int:
    """Add to a counter and return it."""
    value = get_int(txn, table, key) + change
    put_int(txn, table, key, value)
    return value
