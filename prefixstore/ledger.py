"""Slot accounting of both tiers, inside one transaction of the live index.

Owns: which slots exist, are free, hold a chunk, are claimed or leased; the eviction order; bytes
used by each namespace and salt, of chunks and of slots being filled. What must hold
(`admin.verify` counts it): for each tier

    allocated bytes = slots in use + claimed + pending + free        and        allocated <= cap

so a tier never takes more than it was given, by construction. A crash leaves at worst claims and
leases of a dead owner, which `recovery.reap` resolves.

Tables of the live index:
  meta     counters of the ledger         pool     (tier, slot_bytes) -> first slot never used
  free     slots with space, unused       hole     slots whose space was given back
  claim    address -> Claim               pending  key -> Pending (memory tier)
  chunk    key -> Row (memory tier)       heat     (tier, key) -> rank, hits
  order    (tier, rank, key) -> Entry     expiry   (time, tier, key)
  lease    id -> owner, end, addresses    leased   (address, lease id)
  usage    bytes by namespace and salt    dirty    keys of the memory tier not yet on disk
  counter  statistics of the store        change   the last changes (journal)
  unsettled  see settling                 punched  memory slot -> times its space was given back
  and those of segment_index, if there is no disk
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from prefixstore import evict, journal, rows, segment_index
from prefixstore.config import PIN_SHARE_MAX, PUNCH_AFTER_S, SWEEP_ROWS_MAX
from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.quota import Whose
from prefixstore.rows import CLAIM_LIMBO, Claim, Pending, pack_address, pool_key, unpack_address
from prefixstore.rows import ENTRY as ENTRY
from prefixstore.rows import Entry as Entry
from prefixstore.seeking import Places

MEMORY, DISK = 1, 2
TIER_NAMES = {MEMORY: "memory", DISK: "disk"}
TABLES = (
    "meta", "pool", "free", "hole", "claim", "pending", "chunk", "heat", "order", "expiry",
    "lease", "leased", "usage", "dirty", "counter", "unsettled", "punched",
    *journal.TABLES, *segment_index.TABLES,
)  # fmt: skip

_HEAT = struct.Struct(">QB")
RANK_PINNED = 2**64 - 1
Punch = Callable[[int, int, int], None]


class Ledger:
    """The accounting rules; each method works on a given Txn."""

    def __init__(self, owner: int, punch: Punch, overhead: Callable[[int], int]) -> None:
        self.owner, self._punch, self._overhead = owner, punch, overhead
        self.mark = owner.to_bytes(4, "little")  # the value of this process's dirty records
        self.held: set[bytes] = set()  # addresses that this process holds now: see `holding`
        self.filling: set[tuple[bytes, int]] = set()  # keys and slots of its puts under way
        self.places = Places()

    def set_cap(self, txn: Txn, tier: int, cap_bytes: int) -> None:
        """Bound a tier, for every process that has the store open."""
        txn.put_int("meta", b"cap%d" % tier, cap_bytes)

    def correct_allocated(self, txn: Txn, tier: int, change: int) -> None:
        """Change the counter, where no slot is claimed or given back."""
        txn.add_int("meta", b"allocated%d" % tier, change)

    def cap(self, txn: Txn, tier: int) -> int:
        """Bytes the slots of a tier may take: what it was given less what its index takes."""
        return max(0, txn.get_int("meta", b"cap%d" % tier) - self._overhead(tier))

    # ------------------------------------------------------------------ slots
    def allocated(self, txn: Txn, tier: int) -> int:
        """Bytes of the tier that have space behind them."""
        return txn.get_int("meta", b"allocated%d" % tier)

    def claim_slot(self, txn: Txn, tier: int, slot_bytes: int) -> int | None:
        """A slot nobody else has, or None when the tier must evict first. Touches no chunk."""
        prefix = pool_key(tier, slot_bytes)
        if (address := txn.first("free", prefix)) is not None:
            txn.delete("free", address)
            return unpack_address(address)[2]
        while self.allocated(txn, tier) + slot_bytes > self.cap(txn, tier):
            if not self.give_back_one(txn, tier):
                return None
        return self.new_slot(txn, tier, slot_bytes)

    def new_slot(self, txn: Txn, tier: int, slot_bytes: int) -> int:
        """One that has no space yet, for a caller that knows there is room."""
        prefix = pool_key(tier, slot_bytes)
        if (address := txn.first("hole", prefix)) is not None:
            txn.delete("hole", address)
            slot = unpack_address(address)[2]
        else:
            slot = txn.get_int("pool", prefix)
            txn.put_int("pool", prefix, slot + 1)
        txn.add_int("meta", b"allocated%d" % tier, slot_bytes)
        return slot

    def trim(self, txn: Txn, tier: int) -> None:
        """Give free slots back while the tier is over its cap (after the cap was lowered)."""
        while self.allocated(txn, tier) > self.cap(txn, tier):
            if not self.give_back_one(txn, tier):
                return

    def give_back_one(self, txn: Txn, tier: int) -> bool:
        """Return the space of one free slot; False when there is none that may go now.

        A slot of the memory tier waits for PUNCH_AFTER_S after it was freed: somebody may still be
        reading it through a mapping, where a hole means new memory, or a SIGBUS if there is none.
        """
        now_ms, after_ms = int(time.time() * 1000), int(PUNCH_AFTER_S * 1000)
        for address, freed in txn.scan("free", b"%c" % tier):
            age_ms = now_ms - int.from_bytes(freed, "little")
            if tier != MEMORY or abs(age_ms) >= after_ms:  # in the future: the clock went back
                txn.delete("free", address)
                self.give_back(txn, *unpack_address(address))
                return True
        return False

    def give_back(self, txn: Txn, tier: int, slot_bytes: int, slot: int) -> None:
        """Return the space of an unused slot; in memory it is counted, for `lending`."""
        self._punch(tier, slot_bytes, slot)
        reached("give_back.punching")
        address = pack_address(tier, slot_bytes, slot)
        txn.put("hole", address)
        if tier == MEMORY:
            txn.add_int("punched", address, 1)
            txn.add_int("meta", b"punched", 1)
        txn.add_int("meta", b"allocated%d" % tier, -slot_bytes)

    def free_slot(self, txn: Txn, tier: int, slot_bytes: int, slot: int) -> None:
        """A slot is no longer needed; one that is leased stays in limbo until the lease ends."""
        address = pack_address(tier, slot_bytes, slot)
        if txn.first("leased", address) is not None:
            txn.put("claim", address, Claim(0, CLAIM_LIMBO, bytes(16)).pack())
            return
        txn.delete("claim", address)
        txn.put("free", address, int(time.time() * 1000).to_bytes(8, "little"))

    # ------------------------------------------------------------------ chunks
    def begin_pending(self, txn: Txn, key: bytes, pending: Pending) -> None:
        """A chunk is being filled: its slot counts for its namespace from now on."""
        txn.put("pending", key, pending.pack())
        _use(txn, MEMORY, pending, pending.slot_bytes)

    def end_pending(self, txn: Txn, key: bytes, pending: Pending) -> None:
        """It is whole, or given up; its slot stays with the caller."""
        txn.delete("pending", key)
        _use(txn, MEMORY, pending, -pending.slot_bytes)

    def insert(self, txn: Txn, tier: int, key: bytes, entry: Entry) -> None:
        """A chunk now stands in its slot: enter it into the order and the sums."""
        assert self._find(txn, tier, key) is None, "a chunk entered twice"
        journal.note(txn, True, tier, key, entry.namespace, entry.slot_bytes, entry.depth)
        clock = txn.add_int("meta", b"clock%d" % tier, evict.clock_step(None))
        heat = evict.admit(clock, entry.depth, self.cap(txn, tier) // entry.slot_bytes)
        self._place(txn, tier, key, heat.rank, heat.freq, ENTRY.pack(*entry))
        _use(txn, tier, entry, entry.slot_bytes)
        if entry.expires_s:
            txn.put("expiry", expiry_key(entry.expires_s, tier, key))
        txn.delete("claim", pack_address(tier, entry.slot_bytes, entry.slot))

    def entry(self, txn: Txn, tier: int, key: bytes) -> Entry | None:
        """Where a chunk stands in a tier; None when it is not there."""
        found = self._find(txn, tier, key)
        return None if found is None else Entry(*ENTRY.unpack(found[1]))

    def detach(self, txn: Txn, tier: int, key: bytes) -> Entry | None:
        """Take a chunk out of the order and the sums; its slot stays with the caller."""
        found = self._find(txn, tier, key)
        if found is None:
            return None
        rank = _HEAT.unpack(found[0])[0]
        entry = Entry(*ENTRY.unpack(found[1]))
        self._displace(txn, tier, key, rank)
        journal.note(txn, False, tier, key, entry.namespace, entry.slot_bytes, entry.depth)
        if entry.expires_s:
            txn.delete("expiry", expiry_key(entry.expires_s, tier, key))
        _use(txn, tier, entry, -entry.slot_bytes)
        if rank == RANK_PINNED:
            txn.add_int("meta", b"pinned%d" % tier, -entry.slot_bytes)
        return entry

    def drop_memory(self, txn: Txn, key: bytes) -> bool:
        """Remove a chunk from the memory tier: row, order and slot in this one transaction.

        Where its row says another slot than we do, the slot is left to nobody: it may be the slot
        of another chunk (`accounting.mend` finds out).
        """
        entry, data = self.detach(txn, MEMORY, key), txn.get("chunk", key)
        if entry is None:
            return False
        txn.delete("chunk", key)
        segment_index.forget(txn, key)
        txn.delete("dirty", key)
        if data is None or rows.stands_in(data, entry.slot_bytes, entry.slot):
            self.free_slot(txn, MEMORY, entry.slot_bytes, entry.slot)
        return True

    def touch(self, txn: Txn, tier: int, keys: Iterable[bytes]) -> None:
        """Chunks were used: they move up in the order (pinned ones have no place to move to)."""
        cap, clock = self.cap(txn, tier), b"clock%d" % tier
        for key in keys:
            if (found := self._find(txn, tier, key)) is None:
                continue
            before, entry = evict.Heat(*_HEAT.unpack(found[0])), Entry(*ENTRY.unpack(found[1]))
            if before.rank == RANK_PINNED:
                continue
            ticks = txn.add_int("meta", clock, evict.clock_step(before))
            heat = evict.touch(before, ticks, entry.depth, cap // entry.slot_bytes)
            if heat != before:
                self._displace(txn, tier, key, before.rank)
                self._place(txn, tier, key, heat.rank, heat.freq, found[1])

    def set_pinned(self, txn: Txn, tier: int, key: bytes, pinned: bool) -> bool:
        """Exempt a chunk from eviction, or not. False when absent or over the share for pins."""
        found = self._find(txn, tier, key)
        if found is None:
            return False
        rank, freq = _HEAT.unpack(found[0])
        entry = Entry(*ENTRY.unpack(found[1]))
        if pinned == (rank == RANK_PINNED):
            return True
        name = b"pinned%d" % tier
        if pinned:
            if txn.get_int("meta", name) + entry.slot_bytes > PIN_SHARE_MAX * self.cap(txn, tier):
                return False
            new_rank = RANK_PINNED
        else:
            clock = txn.get_int("meta", b"clock%d" % tier)
            new_rank = evict.admit(clock, entry.depth, self.cap(txn, tier) // entry.slot_bytes).rank
        txn.add_int("meta", name, entry.slot_bytes if pinned else -entry.slot_bytes)
        self._displace(txn, tier, key, rank)
        self._place(txn, tier, key, new_rank, freq, found[1])
        return True

    def victims(
        self, txn: Txn, tier: int, need_bytes: int, of: Whose | None = None
    ) -> list[tuple[bytes, Entry]]:
        """Chunks to evict, coldest first, until ``need_bytes``; skips leased, pinned and dirty."""
        chosen: list[tuple[bytes, Entry]] = []
        met, end, names = False, b"", self.places.names(tier, of)
        for looked, (name, entry) in enumerate(self.coldest(txn, tier, names)):
            if need_bytes <= 0:
                break
            if looked == SWEEP_ROWS_MAX:
                end = name
                break
            if of is None or of(entry):
                met = True
                if not self.is_held(txn, tier, name[9:], entry):
                    chosen.append((name[9:], entry))
                    need_bytes -= entry.slot_bytes
        if need_bytes > 0 and (end or names):
            self.places.stopped(tier, of, end, met)
        return chosen

    def coldest(self, txn: Txn, tier: int, names: list[bytes]) -> Iterator[tuple[bytes, Entry]]:
        """Chunks that are not pinned as they stand in table ``order``: those of the names that are
        there, and all from the last of them on."""
        known = ((n, value) for n in names[:-1] if (value := txn.get("order", n)) is not None)
        for name, value in chain(known, txn.scan("order", b"%c" % tier, *names[-1:])):
            if int.from_bytes(name[1:9], "big") == RANK_PINNED:
                return
            yield name, Entry(*ENTRY.unpack(value))

    def is_held(self, txn: Txn, tier: int, key: bytes, entry: Entry) -> bool:
        """Whether somebody reads a chunk, or has yet to write it to disk."""
        if tier == MEMORY and txn.get("dirty", key) is not None:
            return True
        return txn.first("leased", pack_address(tier, entry.slot_bytes, entry.slot)) is not None

    def occupied(self, txn: Txn, tier: int) -> Iterator[tuple[int, int, int]]:
        """Addresses of slots that hold a chunk."""
        for _, entry in self.entries(txn, tier):
            yield tier, entry.slot_bytes, entry.slot

    def entries(self, txn: Txn, tier: int) -> Iterator[tuple[bytes, Entry]]:
        """The chunks of a tier and where they stand."""
        for name, value in txn.scan("order", b"%c" % tier):
            yield name[9:], Entry(*ENTRY.unpack(value))

    def pending_slots(self, txn: Txn) -> Iterator[tuple[int, int, int]]:
        """Addresses of slots of the memory tier that are being filled."""
        for _, value in txn.scan("pending"):
            pending = Pending.unpack(value)
            yield MEMORY, pending.slot_bytes, pending.slot

    # ------------------------------------------------------------------ internals
    def _find(self, txn: Txn, tier: int, key: bytes) -> tuple[bytes, bytes] | None:
        heat = txn.get("heat", b"%c" % tier + key)
        if heat is None:
            return None
        entry = txn.get("order", b"%c" % tier + heat[:8] + key)
        assert entry is not None, "heat without a place in the order"
        return heat, entry

    def _place(self, txn: Txn, tier: int, key: bytes, rank: int, freq: int, entry: bytes) -> None:
        txn.put("heat", b"%c" % tier + key, _HEAT.pack(rank, freq))
        txn.put("order", b"%c" % tier + rank.to_bytes(8, "big") + key, entry)

    def _displace(self, txn: Txn, tier: int, key: bytes, rank: int) -> None:
        txn.delete("heat", b"%c" % tier + key)
        txn.delete("order", b"%c" % tier + rank.to_bytes(8, "big") + key)


def _use(txn: Txn, tier: int, chunk: Entry | Pending, change: int) -> None:
    txn.add_int("usage", b"n%c" % tier + chunk.namespace, change)
    txn.add_int("usage", b"s%c" % tier + chunk.salt, change)


def expiry_key(expires_s: int, tier: int, key: bytes) -> bytes:
    """Key of table ``expiry``."""
    return expires_s.to_bytes(4, "big") + b"%c" % tier + key
