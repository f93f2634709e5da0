"""Damage to the files of a store that nobody has open: a few cases of each place.

The cases and what must come of them are those of `benchmarks.corruption`, which runs thousands.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import pytest

from benchmarks import corruption
from benchmarks.corruption_kinds import KINDS, Pristine
from prefixstore import Store
from prefixstore.errors import DamagedError
from prefixstore.keys import ChunkRef
from prefixstore.namespace import MISS
from prefixstore.testing_data import content_of, identity_for, outputs
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
pytestmark = pytest.mark.timeout(300)
CASES = 6
SEED = int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))
# Of `python -m benchmarks.corruption`, all places. A store's pages differ from run to run, so they
# need not hit the same byte again: what each found has a test of its own in tests/test_healing.py.
SEEDS_THAT_FAILED = (100201, 100242, 101288, 102097, 102639)


@pytest.mark.parametrize("place", sorted({kind.place for kind in KINDS}))
def test_nothing_wrong_is_served_and_nothing_crashes(place: str) -> None:
    tallies, failures = corruption.run(argparse.Namespace(cases=CASES, seed=SEED, places=[place]))
    assert failures == []
    assert sum(tally.cases for tally in tallies.values()) == CASES


@pytest.mark.parametrize("seed", SEEDS_THAT_FAILED)
def test_what_failed_once(seed: int) -> None:
    assert corruption.run(argparse.Namespace(cases=1, seed=seed, places=[]))[1] == []


def damaged(place: Place, kind: str, name: str) -> None:
    """Make a store, and damage it once."""
    folder = place.folder / "store"
    corruption.make_store(folder, place.memory_dir)
    namespace = identity_for("a", corruption.LAYOUT).namespace
    pristine = Pristine(folder, place.memory_dir, namespace)
    [how] = [one for one in KINDS if (one.place, one.name) == (kind, name)]
    how.damage(pristine, random.Random(1))


def test_a_harness_that_sees_wrong_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were checksums not compared, it would say so."""
    monkeypatch.setattr("prefixstore.namespace.read_checked", read_unchecked)
    damaged(place, "memory slots", "scribble")
    for seed in range(20):
        for path in place.memory_dir.rglob("*.slots"):
            data = bytearray(path.read_bytes())
            data[random.Random(seed).randrange(len(data))] ^= 1
            path.write_bytes(data)
    assert corruption.run_case(place.folder / "store").ended == "wrong bytes"


def read_unchecked(file: object, layout: object, key: bytes, row: object, *rest: object) -> bool:
    """As `reading.read_checked`, without the check."""
    out, roi = rest
    for run in layout.runs(roi):  # type: ignore[attr-defined]
        view = file.view(row.slot)  # type: ignore[attr-defined]
        run.in_buffer(out)[:] = run.in_slot(view)
    return True


def test_a_damaged_index_is_refused_with_a_remedy(place: Place) -> None:
    """And doing what it says helps."""
    folder = place.folder / "store"
    corruption.make_store(folder, place.memory_dir)
    index = folder / "index" / "data.mdb"
    data = bytearray(index.read_bytes())
    for at in range(2 * 4096, len(data), 4096):
        data[at : at + 8] = bytes(8)
    index.write_bytes(data)
    for _ in range(2):  # an engine tries again every five seconds
        with pytest.raises(DamagedError, match=r"remove that folder: the store, a cache, begins"):
            Store.open(folder, create=False)
    for path in (folder / "index").iterdir():
        path.unlink()
    (folder / "index").rmdir()
    check_empty_and_usable(folder)


def test_a_damaged_memory_tier_begins_anew(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    folder = place.folder / "store"
    corruption.make_store(folder, place.memory_dir)
    [live] = place.memory_dir.glob("prefixstore-*/live/data.mdb")
    with live.open("r+b") as file:
        file.truncate(3 * 4096)
    with Store.open(folder, create=False) as store:
        assert "the memory tier begins anew" in caplog.text
        namespace = store.namespace(identity_for("a", corruption.LAYOUT), corruption.LAYOUT)
        refs = corruption.refs_in(namespace)
        outs = outputs(corruption.LAYOUT, len(refs))
        assert MISS not in namespace.get(refs, outs), "all of it is on disk"


def check_empty_and_usable(folder: Path) -> None:
    with Store.open(folder, create=False) as store:
        namespace = store.namespace(identity_for("a", corruption.LAYOUT), corruption.LAYOUT)
        refs: list[ChunkRef] = corruption.refs_in(namespace)
        outs = outputs(corruption.LAYOUT, len(refs))
        assert set(namespace.get(refs, outs)) == {MISS}
        size = corruption.LAYOUT.payload_bytes
        namespace.put(refs, [content_of(ref.key, size) for ref in refs])
        assert MISS not in namespace.get(refs, outs)
