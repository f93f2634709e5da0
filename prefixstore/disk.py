"""The disk tier: spilling chunks from memory, evicting, dropping. Owns the order of durable writes.

Spill:  claim slot (live) -> write -> fdatasync -> row (index, durable) -> enter the order (live)
Evict:  leave the order, claim (live) -> delete row (index, durable) -> free slot (live)

Whatever step a crash interrupts, the claim says which key was under way and the durable row says
whether its slot is in use, so `Ledger.reap` finishes or undoes it. Data is synced before the row
is: a row never speaks of bytes that a power loss can take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from prefixstore.config import LEASE_S, SPILL_BATCH_BYTES
from prefixstore.failpoints import reached
from prefixstore.index import Environment, Txn
from prefixstore.leases import lease_slots, release
from prefixstore.ledger import DISK, MEMORY, Entry, Ledger
from prefixstore.quota import Quota, Whose
from prefixstore.recovery import resolve
from prefixstore.registry import NamespaceRecord
from prefixstore.room import pinned_victims
from prefixstore.rows import (
    CLAIM_EVICT,
    CLAIM_SPILL,
    Claim,
    Row,
    pack_address,
    readable,
    same_place,
    stands_in,
)
from prefixstore.segment_index import enter, forget
from prefixstore.settling import announce, settle_announced
from prefixstore.slots import SlotFile
from prefixstore.spilling import NO_ROOM, Move, Spilled, copy_to_disk


@dataclass(frozen=True)
class DiskTier:
    """The procedures that change the disk tier. They wait for the device: keeper thread only."""

    live: Environment
    index: Environment
    ledger: Ledger
    file_of: Callable[[int, int], SlotFile]
    quota: Callable[[int], Quota]
    new_lease_id: Callable[[], bytes]
    now_s: Callable[[], float]
    deadline_s: float
    pool: Executor

    def spill(self, keys: Sequence[bytes]) -> Spilled:
        """Write chunks of the memory tier to disk.

        One fdatasync and one commit serve the batch. A chunk for which the file system has no room
        makes others give way and may be tried again. Who calls gives up what failed or was refused:
        until then it is dirty, so that an error in a later step loses no news of it.
        """
        lease_id = self.new_lease_id()
        moves, over_quota, refused = self.live.write(
            lambda txn: self._claim(txn, keys, lease_id), self.deadline_s
        )
        reached("spill.claimed")
        self._remove(over_quota)
        errors = copy_to_disk(moves, self.file_of, self.pool)
        reached("spill.copied")
        written = [move for move, error in zip(moves, errors, strict=True) if error is None]
        failed = [move for move, error in zip(moves, errors, strict=True) if error is not None]
        no_room_bytes = sum(
            move.row.slot_bytes
            for move, error in zip(moves, errors, strict=True)
            if error is not None and error.errno in NO_ROOM
        )
        try:
            for size in {move.row.slot_bytes for move in written}:
                self.file_of(DISK, size).sync()
        except OSError:
            failed, written = failed + written, []  # unsynced is lost; never retried into success
        reached("spill.synced")
        if written:
            self.index.write(lambda txn: self._put_rows(txn, written), self.deadline_s)
            reached("spill.entered")
        retry = no_room_bytes > 0 and self.evict(no_room_bytes) > 0
        self.live.write(lambda txn: self._settle(txn, written, failed, lease_id), self.deadline_s)
        reached("spill.settled")
        return Spilled([m.key for m in written], [m.key for m in failed], retry, refused)

    def _claim(
        self, txn: Txn, keys: Sequence[bytes], lease_id: bytes
    ) -> tuple[list[Move], list[tuple[bytes, Entry]], list[bytes]]:
        """Claim disk slots; also what must be removed to keep quotas, and what those refuse."""
        moves: list[Move] = []
        evicted: list[tuple[bytes, Entry]] = []
        refused: list[bytes] = []
        total = 0
        for key in keys:
            if txn.get("dirty", key) != self.ledger.mark:
                continue  # done, deleted, or another process's to do
            data = txn.get("chunk", key)
            there = self.ledger.entry(txn, DISK, key)
            if there is not None and 0 < there.expires_s <= self.now_s():
                evicted += self._take(txn, [(key, there)])  # its successor was stored meanwhile
                there = None
            source = self.ledger.entry(txn, MEMORY, key)
            # One whose row and entry differ is damaged: its reader finds out, or `verify`.
            sound = data is not None and source is not None and stands_in(data, *source[:2])
            if data is None or not sound or there is not None:
                txn.delete("dirty", key)
                continue
            row = Row.unpack(data)
            total += row.slot_bytes
            if total > SPILL_BATCH_BYTES and moves:
                break
            quota = self.quota(DISK)
            ours = quota.together(row.namespace)
            mine = sum(m.row.slot_bytes for m in moves if m.row.namespace in ours)
            over = quota.over(txn, DISK, mine + row.slot_bytes, row.namespace, row.salt)
            if over is not None:
                given = self.ledger.victims(txn, DISK, over[1], over[0])
                evicted += self._take(txn, given)
                if sum(entry.slot_bytes for _, entry in given) < over[1]:
                    refused.append(key)
                    continue
            slot = self.ledger.claim_slot(txn, DISK, row.slot_bytes)
            if slot is None:
                break
            address = pack_address(DISK, row.slot_bytes, slot)
            txn.put("claim", address, Claim(self.ledger.owner, CLAIM_SPILL, key).pack())
            moves.append(Move(key, row, slot))
        sources = [pack_address(MEMORY, m.row.slot_bytes, m.row.slot) for m in moves]
        lease_slots(self.ledger, txn, lease_id, self.now_s() + LEASE_S, sources)
        reached("spill.claiming")
        return moves, evicted, refused

    def _put_rows(self, txn: Txn, moves: Sequence[Move]) -> None:
        with self.live.read() as live:
            found = [(move, live.get("chunk", move.key)) for move in moves]
        # What is not there was deleted while it was written, or stored again. How long it is kept,
        # and whether it is pinned, may have been changed.
        there = [(m, data) for m, data in found if data and same_place(data, m.row.pack())]
        moves = [move for move, _ in there]
        for move, data in there:
            txn.put("chunk", move.key, Row.unpack(data).at(move.disk_slot).pack())
        chunk_tokens = {
            namespace: NamespaceRecord.unpack(record).layout.chunk_tokens
            for namespace in {move.row.namespace for move in moves}
            if (record := txn.get("namespace", namespace)) is not None
        }
        for move in sorted(moves, key=lambda move: move.row.depth):
            if move.row.namespace in chunk_tokens:
                enter(txn, move.key, chunk_tokens[move.row.namespace])
        reached("spill.entering")

    def _settle(
        self,
        txn: Txn,
        written: Sequence[Move],
        failed: Sequence[Move],
        lease_id: bytes,
    ) -> None:
        for move in written:
            address = pack_address(DISK, move.row.slot_bytes, move.disk_slot)
            resolve(self.ledger, txn, address, self.durable_row(move.key), move.key)
            if self.ledger.entry(txn, DISK, move.key) is not None:
                txn.delete("dirty", move.key)
        for move in failed:
            address = pack_address(DISK, move.row.slot_bytes, move.disk_slot)
            txn.delete("claim", address)
            try:
                self.ledger.give_back(txn, DISK, move.row.slot_bytes, move.disk_slot)
            except OSError:  # as where no more files can be opened: it keeps its space
                self.ledger.free_slot(txn, DISK, move.row.slot_bytes, move.disk_slot)
        release(self.ledger, txn, lease_id)
        reached("spill.settling")

    def evict(self, need_bytes: int, of: Whose | None = None) -> int:
        """Free at least ``need_bytes`` of the coldest chunks, if as many may go. Returns bytes."""
        return self._evict(lambda txn: self.ledger.victims(txn, DISK, need_bytes, of))

    def evict_pinned(self, need_bytes: int) -> int:
        """The same of pinned chunks: the cap is below them."""
        return self._evict(lambda txn: pinned_victims(self.ledger, txn, DISK, need_bytes))

    def _evict(self, choose: Callable[[Txn], list[tuple[bytes, Entry]]]) -> int:
        return self._remove(
            self.live.write(lambda txn: self._take(txn, choose(txn)), self.deadline_s)
        )

    def drop(
        self,
        keys: Sequence[bytes],
        only: dict[bytes, bytes] | None = None,
        *,
        memory: bool = False,
    ) -> int:
        """Remove chunks from the disk tier (deleted, expired or damaged). Returns bytes freed.

        With ``memory`` from that tier too, in the transaction that takes them out of this one: a
        promotion of another process comes before it, or finds that there is nothing to promote.

        The durable rows go in any case, also those the live index knows nothing of; with ``only``,
        just those whose encoded row is still the one given.
        """

        def take(txn: Txn) -> list[tuple[bytes, Entry]]:
            for key in keys if memory else ():
                self.ledger.drop_memory(txn, key)
            found = [(key, self.ledger.entry(txn, DISK, key)) for key in keys]
            known = [(key, entry) for key, entry in found if entry is not None]
            announce(self.ledger, txn, sorted(set(keys) - {key for key, _ in known}))
            return self._take(txn, known)

        reached("drop.begun")
        if only is not None:
            with self.index.read() as txn:
                keys = [key for key in keys if txn.get("chunk", key) == only.get(key, b"")]
        chosen = self.live.write(take, self.deadline_s)
        unknown = sorted(set(keys) - {key for key, _ in chosen})

        def delete_unknown(txn: Txn) -> None:
            with self.live.read() as live:
                again = {key for key in unknown if memory and live.get("chunk", key) is not None}
            for key in unknown:
                if key not in again:  # else it was stored again since it left memory
                    delete_row(txn, key)

        def settle(txn: Txn) -> int:
            freed = settle_announced(self.ledger, txn, unknown, self.durable_row)
            reached("drop.settling")
            return freed

        freed = 0
        if unknown:
            # A spill by another process may have entered its chunk between the two transactions.
            self.index.write(delete_unknown, self.deadline_s)
            reached("drop.deleted")
            freed = self.live.write(settle, self.deadline_s)
        return freed + self._remove(chosen)

    def expire(self, keys: Sequence[bytes], now_s: float) -> int:
        """Remove those whose time is over: it may be another than when they were chosen."""

        def take(txn: Txn) -> list[tuple[bytes, Entry]]:
            found = [(key, self.ledger.entry(txn, DISK, key)) for key in keys]
            return self._take(txn, [(k, e) for k, e in found if e and 0 < e.expires_s <= now_s])

        return self._remove(self.live.write(take, self.deadline_s))

    def _take(self, txn: Txn, chosen: list[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Claim the slots of these. Not where the row says another slot than the ledger: that slot
        may be another chunk's (`accounting.mend` finds out)."""
        with self.index.read() as index:
            rows = {key: index.get("chunk", key) for key, _ in chosen}
        taken = []
        for key, entry in chosen:
            self.ledger.detach(txn, DISK, key)
            data = rows[key]
            if data is None or stands_in(data, entry.slot_bytes, entry.slot):
                address = pack_address(DISK, entry.slot_bytes, entry.slot)
                txn.put("claim", address, Claim(self.ledger.owner, CLAIM_EVICT, key).pack())
                taken.append((key, entry))
        reached("evict.claiming")
        return taken

    def _remove(self, chosen: list[tuple[bytes, Entry]]) -> int:
        if not chosen:
            return 0
        reached("evict.claimed")

        def delete(txn: Txn) -> None:
            for key, entry in chosen:
                data = txn.get("chunk", key)
                if data is not None and stands_in(data, entry.slot_bytes, entry.slot):
                    delete_row(txn, key)  # else it was stored again, elsewhere
            reached("evict.deleting")

        def free(txn: Txn) -> None:
            for _, entry in chosen:
                self.ledger.free_slot(txn, DISK, entry.slot_bytes, entry.slot)
            reached("evict.freeing")

        self.index.write(delete, self.deadline_s)
        reached("evict.deleted")
        self.live.write(free, self.deadline_s)
        reached("evict.freed")
        return sum(entry.slot_bytes for _, entry in chosen)

    def durable_row(self, key: bytes) -> Row | None:
        """The durable row of a chunk; None also for one that cannot be read."""
        with self.index.read() as txn:
            data = txn.get("chunk", key)
        return None if data is None else readable(data)


def delete_row(txn: Txn, key: bytes) -> None:
    """Delete the durable row of a chunk and what the segment index has of it."""
    txn.delete("chunk", key)
    forget(txn, key)
