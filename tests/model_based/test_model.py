"""Random operations from several processes on one small store, against a model.

The store is far smaller than what is put, so that every operation meets evictions of others.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter

import pytest

from prefixstore import admin
from prefixstore.config import MIB
from tests.store_helpers import LAYOUT, Place, namespace_in, space_taken, start_child, wait_for

pytest_plugins = ["tests.store_fixtures"]
WORKERS, OPERATIONS = 4, 400
MEMORY_BYTES, DISK_BYTES = 2 * MIB, 8 * MIB


def test_random_operations_of_several_processes(place: Place) -> None:
    """Thousands of chunk operations; no wrong byte, nothing lost that was promised, and sound.

    Set PREFIXSTORE_TEST_SEED to repeat a run's choices (not its timing).
    """
    seed = int(os.environ.get("PREFIXSTORE_TEST_SEED", time.time_ns() % 10**9))
    print(f"PREFIXSTORE_TEST_SEED={seed}")
    with place.open(MEMORY_BYTES, DISK_BYTES) as store:
        namespace_in(store)
        folder, live_dir = store.folder, store.live_dir
    children = [
        start_child("tests.model_based.worker", folder, number, seed + number, OPERATIONS)
        for number in range(WORKERS)
    ]
    most = {"memory": 0, "disk": 0}
    while any(child.poll() is None for child in children):
        most["memory"] = max(most["memory"], space_taken(live_dir))
        most["disk"] = max(most["disk"], space_taken(folder))
        time.sleep(0.05)
    done: Counter[str] = Counter()
    faults = []
    for child in children:
        out, errors = child.communicate()
        if child.returncode != 0:
            faults.append(errors)
        else:
            done.update(json.loads(out))
    print(dict(done), most)
    assert not faults, f"seed {seed}:\n" + "\n".join(faults)
    # The run meant something: every kind of outcome occurred, and everything was under pressure.
    for kind in ("put stored", "put exists", "tier 0", "tier 1", "tier 2", "leased", "deleted",
                 "emptied", "reopened", "own pin stored", "own ttl stored"):  # fmt: skip
        assert done[kind] > 0, f"{kind!r} never happened: {dict(done)}"
    assert done["put stored"] > 2 * DISK_BYTES // LAYOUT.slot_bytes
    check_end(place)


def check_end(place: Place) -> None:
    """Sound, nothing leaked, no larger than allowed, no good chunk taken for a damaged one."""
    with place.open(None, None) as store:
        store.on_keeper(store.reap)
        report = admin.verify(store)
        assert report.sound, report
        found = admin.stats(store)
        assert (found["leases"], found["pending"]) == (0, 0)
        counters = found["counters"]
        for name in ("corrupt_memory", "corrupt_disk", "key_collisions", "keeper_errors"):
            assert counters.get(name, 0) == 0, counters
        wait_for(lambda: space_taken(store.live_dir) <= MEMORY_BYTES, "the memory tier to fit")
        wait_for(lambda: space_taken(store.folder) <= DISK_BYTES, "the disk tier to fit")


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_of_one_process(place: Place, seed: int) -> None:
    """The same, alone: what fails here fails again with the same seed."""
    with place.open(MEMORY_BYTES, DISK_BYTES) as store:
        namespace_in(store)
        folder = store.folder
    with start_child("tests.model_based.worker", folder, 0, seed, OPERATIONS) as child:
        _, errors = child.communicate()
    assert child.returncode == 0, f"seed {seed}:\n{errors}"
    check_end(place)
