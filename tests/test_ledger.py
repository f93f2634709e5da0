"""The slot accounting under random operations: nothing is counted twice, no cap is passed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore.index import Environment, Txn
from prefixstore.leases import lease_chunks, release
from prefixstore.ledger import DISK, MEMORY, TABLES, Entry, Ledger
from prefixstore.quota import Whose
from prefixstore.rows import CLAIM_SPILL, Claim, pack_address, unpack_address

SLOT, CAP = 8192, 40 * 8192


class Punched(set[tuple[int, int, int]]):
    """Slots without space behind them, as the ledger says."""

    def __call__(self, tier: int, slot_bytes: int, slot: int) -> None:
        self.add((tier, slot_bytes, slot))


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    found = Environment(tmp_path / "live", TABLES, durable=False)
    yield found
    found.close()


def check(ledger: Ledger, txn: Txn, held: dict[tuple[int, int], int]) -> None:
    """allocated = in use + claimed + free, each slot once, within the cap."""
    for tier in (MEMORY, DISK):
        used = list(ledger.occupied(txn, tier))
        free = [unpack_address(name) for name, _ in txn.scan("free", bytes([tier]))]
        ours = [(tier, size, slot) for (size, slot), at in held.items() if at == tier]
        claimed = [unpack_address(name) for name, _ in txn.scan("claim", bytes([tier]))]
        every = used + free + list(set(ours) | set(claimed))
        assert len(set(every)) == len(every), "a slot has two owners"
        assert sum(size for _, size, _ in every) == ledger.allocated(txn, tier) <= CAP


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_keep_the_equation(env: Environment, seed: int) -> None:
    rng = random.Random(seed)
    ledger = Ledger(1, Punched(), lambda tier: 0)

    def setup(txn: Txn) -> None:
        ledger.set_cap(txn, MEMORY, CAP)
        ledger.set_cap(txn, DISK, CAP)

    env.write(setup)
    model: dict[int, set[bytes]] = {MEMORY: set(), DISK: set()}

    def step(txn: Txn) -> None:
        tier = rng.choice([MEMORY, DISK])
        kind = rng.choice(["insert", "insert", "insert", "detach", "touch", "pin", "evict"])
        there = sorted(model[tier])
        if kind == "insert":
            size = rng.choice([SLOT, SLOT, 2 * SLOT])
            slot = ledger.claim_slot(txn, tier, size)
            if slot is None:
                assert ledger.allocated(txn, tier) + size > CAP
                return
            key = rng.randbytes(16)
            entry = Entry(size, slot, rng.randrange(9), 0, b"n" * 16, b"s" * 8)
            ledger.insert(txn, tier, key, entry)
            assert ledger.entry(txn, tier, key) == entry
            model[tier].add(key)
        elif kind == "evict":
            for key, entry in ledger.victims(txn, tier, 3 * SLOT):
                assert ledger.detach(txn, tier, key) == entry
                ledger.free_slot(txn, tier, entry.slot_bytes, entry.slot)
                model[tier].remove(key)
        elif there:
            key = rng.choice(there)
            if kind == "touch":
                ledger.touch(txn, tier, [key])
            elif kind == "pin":
                ledger.set_pinned(txn, tier, key, rng.random() < 0.5)
            else:
                found = ledger.detach(txn, tier, key)
                assert found is not None
                ledger.free_slot(txn, tier, found.slot_bytes, found.slot)
                model[tier].remove(key)
        check(ledger, txn, {})
        assert txn.get_int("meta", b"pinned%d" % tier) <= CAP // 2

    for _ in range(300):
        env.write(step)
    with env.read() as txn:
        for tier, keys in model.items():
            used = sum(size for _, size, _ in ledger.occupied(txn, tier))
            assert txn.get_int("usage", b"n%c" % tier + b"n" * 16) == used
            assert len(list(ledger.occupied(txn, tier))) == len(keys)
        assert ledger.detach(txn, MEMORY, b"never there 1234") is None


def test_victims_are_the_coldest_and_no_others(env: Environment) -> None:
    """Not the pinned, not the dirty, not the leased; a prompt's leaf before its root."""
    ledger = Ledger(1, Punched(), lambda tier: 0)

    def work(txn: Txn) -> None:
        ledger.set_cap(txn, MEMORY, CAP)
        for depth in range(8):
            slot = ledger.claim_slot(txn, MEMORY, SLOT)
            assert slot is not None
            entry = Entry(SLOT, slot, depth, 0, b"n" * 16, b"s" * 8)
            ledger.insert(txn, MEMORY, b"%016d" % depth, entry)
        assert ledger.set_pinned(txn, MEMORY, b"%016d" % 7, True)
        txn.put("dirty", b"%016d" % 6, ledger.mark)
        txn.put("leased", pack_address(MEMORY, SLOT, 5) + b"lease id")
        ledger.touch(txn, MEMORY, [b"%016d" % 4])
        chosen = [int(key) for key, _ in ledger.victims(txn, MEMORY, 100 * SLOT)]
        assert chosen == [3, 2, 1, 0, 4]
        assert len(ledger.victims(txn, MEMORY, SLOT + 1)) == 2
        assert ledger.victims(txn, MEMORY, 0) == []

    env.write(work)


def test_chunks_behind_many_of_others_are_found_a_piece_at_a_time(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look goes over more rows than it may; what comes to stand colder is seen in time."""
    for module in ("ledger", "seeking"):
        monkeypatch.setattr(f"prefixstore.{module}.SWEEP_ROWS_MAX", 4)
    monkeypatch.setattr("prefixstore.seeking.RENEW_S", 0.0)
    monkeypatch.setattr("prefixstore.seeking._PIECES", 3)
    ledger, ours = Ledger(1, Punched(), lambda tier: 0), b"o" * 16
    looked: list[int] = []
    coldest = Ledger.coldest

    def counted(
        self: Ledger, txn: Txn, tier: int, names: list[bytes]
    ) -> Iterator[tuple[bytes, Entry]]:
        looked.append(0)
        for one in coldest(self, txn, tier, names):
            looked[-1] += 1
            yield one

    monkeypatch.setattr(Ledger, "coldest", counted)

    def insert(name: str, namespace: bytes, depth: int = 0) -> None:
        def work(txn: Txn) -> None:
            ledger.set_cap(txn, MEMORY, CAP)
            slot = ledger.claim_slot(txn, MEMORY, SLOT)
            assert slot is not None
            entry = Entry(SLOT, slot, depth, 0, namespace, b"s" * 8)
            ledger.insert(txn, MEMORY, name.rjust(16).encode(), entry)

        env.write(work)

    def look(slots: int = 1) -> list[str]:
        whose = Whose(frozenset((ours,)))
        chosen = env.write(lambda txn: ledger.victims(txn, MEMORY, slots * SLOT, whose))
        return [key.decode().strip() for key, _ in chosen]

    def walk(rounds: int) -> None:
        for _ in range(rounds):
            ledger.places.walk(ledger, env)

    for number in range(20):
        insert(f"theirs{number}", b"t" * 16)
    insert("first", ours)
    assert look() == look() == []
    walk(1)
    assert look() == [], "it has gone over 12 of 20"
    walk(1)
    assert look() == ["first"]
    insert("colder", ours, depth=1)
    assert look() == ["first"]
    walk(2)
    assert look() == ["colder"]
    env.write(lambda txn: ledger.drop_memory(txn, b"colder".rjust(16)))
    assert look() == ["first"]
    for number in range(6):
        insert(f"more{number}", b"t" * 16)
    insert("second", ours)
    assert look(2) == ["first"]
    walk(3)
    assert look(2) == ["first", "second"], "however many of others are between them"
    assert max(looked) <= 5
    walk(4)
    assert look() == [], "nobody looked for a while: it is forgotten"
    walk(4)
    assert look(2) == ["first", "second"]
    monkeypatch.setattr("prefixstore.seeking.RENEW_S", 1000.0)
    known = [name.rjust(16).encode() for name in ("first", "second")]
    for name in ("first", "second"):
        insert(f"before {name}", ours, depth=2)  # colder than what is known
    env.write(lambda txn: [ledger.drop_memory(txn, key) for key in known])
    for _ in range(3):  # a walk under way was beyond them already, and has noted those
        look()
        walk(4)
    assert look(2) == ["before first", "before second"], "those that were known are gone"


def test_a_leased_slot_is_not_reused_before_its_lease_ends(env: Environment) -> None:
    ledger = Ledger(1, Punched(), lambda tier: 0)

    def work(txn: Txn) -> None:
        ledger.set_cap(txn, MEMORY, SLOT)
        slot = ledger.claim_slot(txn, MEMORY, SLOT)
        assert slot is not None
        ledger.insert(txn, MEMORY, b"k" * 16, Entry(SLOT, slot, 0, 0, b"n" * 16, b"s" * 8))
        for name in (b"lease-01", b"lease-02"):
            wanted = [(MEMORY, b"k" * 16), (DISK, b"k" * 16)]
            stranger = lease_chunks(ledger, txn, name, 2e9, wanted, b"m" * 16)
            assert stranger == [False, False]
            own = lease_chunks(ledger, txn, name, 2e9, wanted, b"n" * 16)
            assert own == [True, False]
        assert ledger.drop_memory(txn, b"k" * 16)
        release(ledger, txn, b"lease-01")
        assert ledger.claim_slot(txn, MEMORY, SLOT) is None
        release(ledger, txn, b"lease-02")
        release(ledger, txn, b"lease-02")
        assert ledger.claim_slot(txn, MEMORY, SLOT) == slot

    env.write(work)


def test_a_lowered_cap_gives_space_back(env: Environment) -> None:
    punched = Punched()
    ledger = Ledger(1, punched, lambda tier: 0)

    def work(txn: Txn) -> None:
        ledger.set_cap(txn, DISK, CAP)
        slots = [ledger.claim_slot(txn, DISK, SLOT) for _ in range(40)]
        assert slots == list(range(40))
        assert ledger.claim_slot(txn, DISK, SLOT) is None
        for slot in range(30):
            txn.put(
                "claim", pack_address(DISK, SLOT, slot), Claim(1, CLAIM_SPILL, b"k" * 16).pack()
            )
            ledger.free_slot(txn, DISK, SLOT, slot)
        ledger.set_cap(txn, DISK, 15 * SLOT)
        ledger.trim(txn, DISK)
        assert ledger.allocated(txn, DISK) == 15 * SLOT
        assert len(punched) == 25
        assert txn.count("free") == 5
        assert txn.count("claim") == 0
        # A hole is used again before the file grows.
        ledger.set_cap(txn, DISK, CAP)
        again = [ledger.claim_slot(txn, DISK, SLOT) for _ in range(30)]
        assert sorted(slot for slot in again if slot is not None) == list(range(30))

    env.write(work)
