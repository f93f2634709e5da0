"""Recovery: what dead processes and reboots leave, brought back to a sound state.

A crash leaves four kinds of things in the live index: leases, pending chunks (memory slots being
filled), claims (disk slots between two steps of a spill or an eviction, memory slots that were
held: `holding`) and announcements of rows that change (`settling`). ``reap`` ends them: a claimed
disk slot is kept if the durable row of its key names it, else freed; nothing else can have happened
in between. A reboot takes the whole live index; ``rebuild`` makes it again from the durable rows,
dropping rows that cannot be true (a slot beyond the file, or a second owner of one).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from prefixstore.config import LEASE_S, OPEN_DEADLINE_S, PENDING_S, SWEEP_ROWS_MAX
from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.leases import LEASE, release
from prefixstore.ledger import DISK, MEMORY, Entry, Ledger
from prefixstore.rows import CLAIM_HELD, CLAIM_LIMBO, Claim, Pending, Row, pool_key, unpack_address
from prefixstore.segment_index import forget
from prefixstore.settling import KEY, DurableRow, settle

if TYPE_CHECKING:
    from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
IsDead = Callable[[int], bool]


def reap(
    ledger: Ledger,
    txn: Txn,
    now_s: float,
    is_dead: IsDead,
    disk_row: DurableRow,
    own_claims: bool,
) -> int:
    """Resolve what dead owners left; returns how many leases, pending chunks, claims and rows
    that were announced and not settled.

    ``own_claims``: this process has no disk operation under way (claims are made by the keeper
    thread, which also reaps, and no write of its own waits for the index), so that claims and
    announcements of its own are left from an error.
    """
    resolved = 0
    for lease_id, record in _some(txn.scan("lease")):
        owner, end_s = LEASE.unpack_from(record)
        if end_s < now_s or is_dead(owner):
            release(ledger, txn, lease_id)
            resolved += 1
        elif end_s > now_s + LEASE_S:  # the clock went back: no lease may last the longer for it
            txn.put("lease", lease_id, LEASE.pack(owner, now_s + LEASE_S) + record[LEASE.size :])
    for key, record in _some(txn.scan("pending")):
        pending = Pending.unpack(record)
        writers = [writer for writer in pending.writers if not is_dead(writer)]
        given_up = len(writers) < len(pending.writers) or pending.deadline_s < now_s
        if given_up and writers == [ledger.owner] and (key, pending.slot) not in ledger.filling:
            writers = []  # what was to give it up could not be written
        if given_up and not writers:
            ledger.end_pending(txn, key, pending)
            ledger.free_slot(txn, MEMORY, pending.slot_bytes, pending.slot)
            resolved += 1
        elif pending.deadline_s > now_s + PENDING_S:  # likewise
            txn.put("pending", key, replace(pending, deadline_s=now_s + PENDING_S).pack())
    for address, record in _some(txn.scan("claim")):
        claim = Claim.unpack(record)
        if claim.owner != ledger.owner:
            ended = is_dead(claim.owner)
        elif claim.kind == CLAIM_HELD:  # another thread's
            ended = address not in ledger.held
        else:
            ended = own_claims
        if claim.kind != CLAIM_LIMBO and ended:
            resolve(ledger, txn, address, disk_row(claim.key), claim.key)
            resolved += 1
    for name, _ in _some(txn.scan("unsettled")):
        owner = int.from_bytes(name[KEY.stop :], "little")
        if own_claims if owner == ledger.owner else is_dead(owner):
            settle(ledger, txn, name[KEY], disk_row(name[KEY]))
            txn.delete("unsettled", name)
            resolved += 1
    if resolved:
        reached("reap.reaping")
    return resolved


def resolve(ledger: Ledger, txn: Txn, address: bytes, row: Row | None, key: bytes) -> None:
    """A claimed disk slot is its chunk's if the durable row says so, else free.

    The durable row decides, whatever the claim was for: another process may have removed the chunk,
    or stored it again elsewhere, since the claim was made.
    """
    tier, slot_bytes, slot = unpack_address(address)
    if row is None or (row.slot_bytes, row.slot) != (slot_bytes, slot):
        ledger.free_slot(txn, tier, slot_bytes, slot)
        return
    before = ledger.entry(txn, tier, key)
    if before is not None:
        if (before.slot_bytes, before.slot) == (slot_bytes, slot):
            txn.delete("claim", address)  # somebody has resolved it
            return
        ledger.detach(txn, tier, key)
        ledger.free_slot(txn, tier, before.slot_bytes, before.slot)
    ledger.insert(txn, tier, key, entry_of(row))
    ledger.set_pinned(txn, tier, key, row.pinned)


def rebuild(
    ledger: Ledger, txn: Txn, rows: list[tuple[bytes, Row]], slots_of: Callable[[int], int]
) -> list[bytes]:
    """Enter the durable rows into an empty live index; ``slots_of`` a slot size is how many slots
    its file has. Returns the keys of rows that cannot be true and must be deleted."""
    owner_of: dict[tuple[int, int], tuple[bytes, Row]] = {}
    impossible = []
    for key, row in sorted(rows, key=lambda item: (item[1].created_s, -item[1].depth)):
        place = (row.slot_bytes, row.slot)
        if row.slot >= slots_of(row.slot_bytes):
            impossible.append(key)
            continue
        if place in owner_of:  # the slot was reused: the newer row is the true one
            impossible.append(owner_of.pop(place)[0])
        owner_of[place] = (key, row)
    for key, row in owner_of.values():
        ledger.insert(txn, DISK, key, entry_of(row))
        ledger.correct_allocated(txn, DISK, row.slot_bytes)
        ledger.set_pinned(txn, DISK, key, row.pinned)
    for slot_bytes in {size for size, _ in owner_of}:
        slots = {slot for size, slot in owner_of if size == slot_bytes}
        top = max(slots) + 1
        txn.put_int("pool", pool_key(DISK, slot_bytes), top)
        for slot in set(range(top)) - slots:  # has space no more, whatever it had
            ledger.correct_allocated(txn, DISK, slot_bytes)
            ledger.give_back(txn, DISK, slot_bytes, slot)
    return impossible


def rebuild_live(store: Store, incarnation: str) -> None:
    """Enter the durable rows into a fresh live index, then declare it usable."""
    rows: list[tuple[bytes, Row]] = []
    unreadable: dict[bytes, str] = {}
    with store.index.read() as txn:
        for key, data in txn.scan("chunk"):
            try:
                rows.append((key, Row.unpack(data)))
            except ValueError as error:  # a damaged page of the index
                unreadable[key] = str(error)
    if unreadable:
        logger.warning(
            "%s: %d rows of the index are damaged and are dropped: the first is %s",
            store.folder, len(unreadable), next(iter(unreadable.values())),
        )  # fmt: skip
    for path in store.folder.glob("disk-*.slots"):
        used = [r.slot for _, r in rows if path.name == f"disk-{r.slot_bytes}.slots"]
        name = path.stem.partition("-")[2]
        if not name.isdecimal():
            continue  # a copy that somebody has put there
        slot_bytes = int(name)
        os.truncate(path, min(path.stat().st_size, (max(used, default=-1) + 1) * slot_bytes))
    reached("open.truncated")

    def enter_all(txn: Txn) -> list[bytes]:
        found = rebuild(store.ledger, txn, rows, lambda size: store.file_of(DISK, size).num_slots())
        reached("open.rebuilding")
        return found

    impossible = store.live.write(enter_all, OPEN_DEADLINE_S)
    reached("open.rebuilt")

    def declare(txn: Txn) -> None:
        for key in (*impossible, *unreadable):
            txn.delete("chunk", key)
            forget(txn, key)
        txn.put("meta", b"incarnation", incarnation.encode())
        reached("open.declaring")

    store.index.write(declare)
    reached("open.declared")
    (store.live_dir / "incarnation").write_text(incarnation)
    reached("open.marked")


def adopt_dirty(store: Store, txn: Txn, own: bool) -> list[bytes]:
    """Chunks not yet on disk whose writer is dead, and with ``own`` ours: this process spills them
    from now on."""
    dead: dict[bytes, bool] = {store.ledger.mark: own}
    keys: list[bytes] = []
    for key, owner in txn.scan("dirty"):
        if owner not in dead:
            dead[owner] = store.liveness.is_dead(int.from_bytes(owner, "little"))
        if dead[owner]:
            keys.append(key)
        if len(keys) >= SWEEP_ROWS_MAX:
            break
    for key in keys:
        txn.put("dirty", key, store.ledger.mark)
    return keys


def entry_of(row: Row) -> Entry:
    """What the ledger keeps of a row."""
    return Entry(row.slot_bytes, row.slot, row.depth, row.expires_s, row.namespace, row.salt)


def _some(pairs: Iterator[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A bounded copy, so that the table may be changed while it is walked."""
    return list(islice(pairs, SWEEP_ROWS_MAX))
