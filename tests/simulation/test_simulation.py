"""The simulation: a few seeds, that a seed repeats itself, and that planted bugs are found.

`python -m benchmarks.simulate` runs thousands. What they found is played with real parts in
`tests/test_races.py`: a seed by itself finds nothing any more once the product or the simulation
takes a step more or less.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest

from benchmarks.simulation.world import Profile, simulate
from prefixstore import disk, recovery
from prefixstore.disk import DiskTier
from prefixstore.given_up import GivenUp
from prefixstore.index import Txn
from prefixstore.ledger import DISK, Entry, Ledger
from prefixstore.putting import Putting
from tests.store_helpers import ROOT

FIRST = int(os.environ.get("PREFIXSTORE_TEST_SEED", 1))
SEEDS = 6
TRIES = 40


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_all_that_must_hold_holds(seed: int) -> None:
    result = simulate(seed)
    assert result.failure == "", f"python -m benchmarks.simulate --first {seed} --seeds 1"


def test_what_happens_in_a_run_happens() -> None:
    """A run in which nothing is killed, or nothing is read, shows nothing."""
    profile = Profile(kill=400, power=2000, fault=60, stall=300, jump=1000, operations=100)
    counts = sum((simulate(seed, profile).counts for seed in range(2)), start=Counter[str]())
    for name in ("kills", "power_cuts", "faults", "stalls", "jumps", "hits", "stored", "lease"):
        assert counts[name] > 0, name


def test_a_seed_gives_the_same_run_again() -> None:
    """Step for step, also in another interpreter whose hashes are salted otherwise."""
    first, again = simulate(FIRST), simulate(FIRST)
    assert first == again
    code = f"from benchmarks.simulation.world import simulate; print(simulate({FIRST}).digest)"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert other.stdout.strip() == first.digest
    assert simulate(FIRST + 1).digest != first.digest


# ---------------------------------------------------------------------- planted bugs
Plant = Callable[[pytest.MonkeyPatch], None]


def free_before_the_row(patch: pytest.MonkeyPatch) -> None:
    """An evicted slot is free while the durable row still speaks of it."""

    def remove(self: DiskTier, chosen: list[tuple[bytes, Entry]]) -> int:
        def free(txn: Txn) -> None:
            for _, entry in chosen:
                self.ledger.free_slot(txn, DISK, entry.slot_bytes, entry.slot)

        def delete(txn: Txn) -> None:
            for key, _ in chosen:
                disk.delete_row(txn, key)

        if chosen:
            self.live.write(free)
            self.index.write(delete)
        return sum(entry.slot_bytes for _, entry in chosen)

    patch.setattr(DiskTier, "_remove", remove)


def no_sync(patch: pytest.MonkeyPatch) -> None:
    """A durable row may speak of bytes that are not on the device."""
    patch.setattr("benchmarks.simulation.files.SimSlotFile.sync", lambda self: None)


class Blind:
    """A transaction in which one table looks empty."""

    def __init__(self, txn: Txn, table: str) -> None:
        self._txn, self._table = txn, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)

    def get(self, table: str, key: bytes) -> bytes | None:
        return None if table == self._table else self._txn.get(table, key)

    def first(self, table: str, prefix: bytes) -> bytes | None:
        return None if table == self._table else self._txn.first(table, prefix)


def frees_what_is_leased(patch: pytest.MonkeyPatch) -> None:
    """A slot changes hands while somebody reads it."""
    free_slot = Ledger.free_slot

    def blind(self: Ledger, txn: Txn, tier: int, slot_bytes: int, slot: int) -> None:
        free_slot(self, cast(Txn, Blind(txn, "leased")), tier, slot_bytes, slot)

    patch.setattr(Ledger, "free_slot", blind)


def evicts_what_is_leased(patch: pytest.MonkeyPatch) -> None:
    """Victims are chosen without a look at the leases."""
    victims = Ledger.victims

    def blind(self: Ledger, txn: Txn, tier: int, *rest: Any) -> list[tuple[bytes, Entry]]:
        return victims(self, cast(Txn, Blind(txn, "leased")), tier, *rest)

    patch.setattr(Ledger, "victims", blind)


def two_writers(patch: pytest.MonkeyPatch) -> None:
    """A put does not see that another is storing the same chunk."""
    patch.setattr(Putting, "_standing", lambda self, txn, ref, pieces, now_s: None)


def reaps_the_living(patch: pytest.MonkeyPatch) -> None:
    """Everybody is taken for dead."""
    patch.setattr("benchmarks.simulation.machine.SimLiveness.is_dead", lambda self, owner: True)


def forgets_claims(patch: pytest.MonkeyPatch) -> None:
    """What a dead process had under way on disk is never resolved."""
    patch.setattr(recovery, "resolve", lambda *arguments: None)


def evicts_dirty(patch: pytest.MonkeyPatch) -> None:
    """Chunks go from memory before they are on disk."""
    victims = Ledger.victims

    def blind(self: Ledger, txn: Txn, tier: int, *rest: Any) -> list[tuple[bytes, Entry]]:
        return victims(self, cast(Txn, Blind(txn, "dirty")), tier, *rest)

    patch.setattr(Ledger, "victims", blind)


def calls_all_flushed(patch: pytest.MonkeyPatch) -> None:
    """A flush keeps to itself what had to be given up."""
    patch.setattr(GivenUp, "tell", lambda self, told, owns: True)


# Each with a seed that finds it: of most, every third or tenth does.
PLANTS: dict[Plant, int] = {
    free_before_the_row: 0, no_sync: 0, frees_what_is_leased: 0, evicts_what_is_leased: 0,
    two_writers: 0, reaps_the_living: 1, forgets_claims: 2, evicts_dirty: 2,
    calls_all_flushed: 16,
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    first = PLANTS[plant]
    failures = (simulate(seed).failure for seed in range(first, first + TRIES))
    assert any(failures), f"not found with {TRIES} seeds"
