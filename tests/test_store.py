"""Opening, sharing, closing; and damage of every kind to the files of a store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from prefixstore import PutState, Store, admin, opened
from prefixstore.config import MIB, SETTINGS_FILE
from prefixstore.errors import ConfigError, FormatError, StoreClosedError, StoreError
from prefixstore.layout import Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.opening import LIVE_FORMAT, revive_live_dir
from prefixstore.reviving import nobody_holds
from prefixstore.rows import Row
from prefixstore.testing_data import outputs
from tests.store_helpers import (
    LAYOUT,
    ROOT,
    WAIT_S,
    Place,
    namespace_in,
    no_thread,
    put_content,
    read_content,
    refs_of,
    space_taken,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]
STORED = PutState.STORED


# ---------------------------------------------------------------------- opening
def test_what_was_put_is_there_after_reopening(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 20)
        assert put_content(ns, refs) == [STORED] * 20
    with place.open(None, None) as store:
        assert read_content(namespace_in(store), refs) == [MEMORY] * 20
        admin.empty_memory(store)
        assert read_content(namespace_in(store), refs) == [DISK] * 20


@pytest.mark.parametrize("written", ["before", "other"])
def test_a_live_index_of_another_version_is_begun_anew(
    place: Place, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records may mean something else: memory goes, what is on disk is served as ever."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 20)
        put_content(ns, refs)
        assert store.flush()
        # As the version before left it: without a format, and with records of another form.
        with store.index.read() as txn:
            name = txn.get("meta", b"incarnation") or b""
        token, boot, form = name.split(b" ")
        assert form == LIVE_FORMAT
        old = b"%s %s" % (token, boot) if written == "before" else b"%s %s live-1" % (token, boot)
        store.index.write(lambda txn: txn.put("meta", b"incarnation", old))
        store.live.write(lambda txn: txn.put("pending", bytes(16), b"\7" * 44))
        (store.live_dir / "incarnation").write_bytes(old)
        monkeypatch.setattr(store.liveness, "alone", lambda: False)  # somebody has it open
        with pytest.raises(ConfigError, match="another version"):
            revive_live_dir(store.folder, store.live_dir, old, store.liveness)
    with place.open(None, None) as store:
        assert read_content(namespace_in(store), refs) == [DISK] * 20
        assert admin.verify(store).sound
        marker = store.live_dir / "incarnation"
        before = marker.read_bytes()
    with place.open(None, None) as store:
        assert MISS not in read_content(namespace_in(store), refs)
        assert marker.read_bytes() == before, "one of this version stays"


def test_the_memory_tier_may_be_lost(place: Place) -> None:
    """As a reboot does: what was spilled is served from disk, and accounted for."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 20)
        put_content(ns, refs)
        live_dir = store.live_dir
    shutil.rmtree(live_dir)
    with place.open(None, None) as store:
        ns = namespace_in(store)
        assert read_content(ns, refs) == [DISK] * 20
        assert store.flush()
        report = admin.verify(store)
        assert report.sound, report
        assert report.chunks["disk"] == 20


def test_two_openings_in_a_process_are_one_store(place: Place) -> None:
    one = place.open()
    other = place.open(None, None)
    assert one is other
    ns = namespace_in(one)
    one.close()
    assert put_content(ns, refs_of(ns, 1, 1)) == [STORED]
    other.close()
    with pytest.raises(StoreClosedError):
        ns.match([])


@pytest.mark.parametrize("name", ["keeper", "lane-live", "lane-index"])
def test_a_store_for_which_no_thread_can_be_started(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It says so, and nothing of it stays open."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 4)
        put_content(ns, refs)
        live_dir = store.live_dir
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        no_thread(patch, name)
        with pytest.raises(StoreError, match=r"can't start new thread .*threads running"):
            place.open()
    assert opened.stores == {}
    assert len(os.listdir("/proc/self/fd")) == before
    assert nobody_holds(live_dir)
    with place.open() as store:
        assert read_content(namespace_in(store), refs) == [MEMORY] * 4
        assert admin.verify(store).sound


def test_closing_twice_is_harmless(place: Place) -> None:
    """A `with` around a store that is closed inside; descriptors are not closed twice."""
    with place.open() as store:
        store.close()
        spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]
    for fd in spare:
        os.close(fd)


def test_opening_and_closing_in_many_threads(place: Place) -> None:
    """LMDB allows an environment once a process: a closing store must not meet its successor."""
    place.open().close()
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(8):
                with place.open(None, None) as store:
                    ns = namespace_in(store)
                    refs = refs_of(ns, 100 * number + step, 2)
                    assert put_content(ns, refs) == [STORED] * 2
                    assert MISS not in read_content(ns, refs)
        except (StoreError, OSError, AssertionError) as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    with place.open(None, None) as store:
        assert admin.verify(store).sound


def test_many_processes_open_a_new_store_at_once(place: Place) -> None:
    """One creates it, the others find it; all see what each has put."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.store_helpers import *\n"
        "number = int(sys.argv[3])\n"
        "with Place(Path(sys.argv[1]), Path(sys.argv[2])).open() as store:\n"
        "    ns = namespace_in(store)\n"
        "    print([s.value for s in put_content(ns, refs_of(ns, number, 3))], flush=True)\n"
        "    sys.stdin.readline()\n"
        "    tiers = [t for n in range(6) for t in read_content(ns, refs_of(ns, n, 3))]\n"
        "    print(tiers, flush=True)\n"
    )
    script = place.folder / "child.py"
    script.write_text(code)
    children = [
        subprocess.Popen(
            [sys.executable, script, place.folder, place.memory_dir, str(number)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(6)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "['stored', 'stored', 'stored']\n"
    for child in children:
        out, _ = child.communicate("\n")
        assert out == f"{[MEMORY] * 18}\n"


def fits(store: Store, tier: str, cap_bytes: int) -> bool:
    found = admin.stats(store)["tiers"][tier]
    return bool(found["allocated_bytes"] + found["index_bytes"] <= cap_bytes)


def test_caps_lowered_on_reopening_shrink_the_tiers(place: Place) -> None:
    with place.open("8MiB", "16MiB") as store:
        ns = namespace_in(store)
        put_content(ns, refs_of(ns, 1, 150))
        assert store.flush()
        live_dir = store.live_dir
        assert space_taken(live_dir) > 4 * MIB
    with place.open("2MiB", "3MiB") as store:
        for tier, cap in (("memory", 2 * MIB), ("disk", 3 * MIB)):
            wait_for(partial(fits, store, tier, cap), f"the {tier} tier to shrink")
        assert space_taken(live_dir) < 3 * MIB
        report = admin.verify(store)
        assert report.sound, report
        assert report.chunks["disk"] > 0
        ns = namespace_in(store)
        assert put_content(ns, refs_of(ns, 2, 5)) == [STORED] * 5


def test_a_put_larger_than_the_memory_tier(place: Place) -> None:
    """It waits for the disk, and says STORED of all it has stored."""
    with place.open("2MiB", "32MiB") as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 200)
        assert set(put_content(ns, refs)) == {STORED}
        assert store.flush()
        assert MISS not in read_content(ns, refs)


# ---------------------------------------------------------------------- settings
def rewrite(folder: Path, **changes: object) -> None:
    path = folder / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"store_id": "x"}', "\x00\x01", "null"])
def test_damaged_settings_are_refused(place: Place, text: str) -> None:
    place.open().close()
    (place.folder / "store" / SETTINGS_FILE).write_text(text)
    with pytest.raises(FormatError, match="settings file"):
        place.open(None, None)


@pytest.mark.parametrize(
    "changes",
    [{"memory_bytes": "8"}, {"memory_bytes": None}, {"disk_bytes": 1.5}, {"memory_dir": 5},
     {"store_id": None}, {"unknown": 1}, {"store_id": "../../etc"}],
    ids=repr,
)  # fmt: skip
def test_settings_of_the_wrong_type_are_refused(place: Place, changes: dict[str, object]) -> None:
    place.open().close()
    rewrite(place.folder / "store", **changes)
    with pytest.raises((FormatError, ConfigError)):
        place.open(None, None).close()


def test_a_newer_format_is_refused(place: Place) -> None:
    place.open().close()
    rewrite(place.folder / "store", format_version=2)
    with pytest.raises(FormatError, match=r"version 2.*upgrade prefixstore"):
        place.open(None, None)


def test_a_folder_of_something_else_is_refused(place: Place) -> None:
    (place.folder / "store").mkdir()
    (place.folder / "store" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        place.open()
    assert (place.folder / "store" / "thesis.txt").read_text() == "precious"


def test_opening_without_creating(place: Place) -> None:
    with pytest.raises(ConfigError, match="holds no store"):
        Store.open(place.folder / "none", create=False)
    assert not (place.folder / "none").exists()


# ---------------------------------------------------------------------- copies and removals
def test_a_copied_store_does_not_share_memory(place: Place) -> None:
    """``cp -r`` of a store that is closed gives a second one: same chunks, from then on apart."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 8)
        put_content(ns, refs)
    shutil.copytree(place.folder / "store", place.folder / "copy")
    with place.open(None, None) as one, place.open(None, None, name="copy") as other:
        assert one.live_dir != other.live_dir
        ours, theirs = namespace_in(one), namespace_in(other)
        assert read_content(theirs, refs) == [DISK] * 8
        put_content(ours, refs_of(ours, 2, 4))
        assert theirs.match(refs_of(theirs, 2, 4)).num_chunks == 0
        admin.remove(other, admin.Selection(everything=True))
        assert read_content(ours, refs) == [MEMORY] * 8
        assert admin.verify(one).sound
        assert admin.verify(other).sound


def test_a_folder_removed_while_open(place: Place) -> None:
    store = place.open()
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 4)
    put_content(ns, refs)
    assert store.flush()  # or a file is made in the folder while it is removed
    shutil.rmtree(store.folder)

    def noticed() -> bool:
        try:
            read_content(ns, refs)
        except StoreClosedError as error:
            return "removed" in str(error)
        return False

    wait_for(noticed, "the store to notice")
    for call in (lambda: ns.match(refs), lambda: put_content(ns, refs)):
        with pytest.raises(StoreClosedError, match="removed"):
            call()
    store.close()
    with place.open() as again:
        fresh = namespace_in(again)
        assert read_content(fresh, refs) == [MISS] * 4
        assert put_content(fresh, refs) == [STORED] * 4


# ---------------------------------------------------------------------- parts
def descriptors(path: Path) -> int:
    """How many of this process are of a file."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(link) and os.readlink(link) == str(path) for link in links)


def test_nobody_waits_while_a_file_is_made(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is synced, on a disk that may be stalled. Two who make it at once get one file."""
    with place.open() as store, ThreadPoolExecutor(3) as pool:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 2)
        put_content(ns, refs)
        assert store.flush()
        path = slot_file(store, DISK)
        usual = descriptors(path)
        waiting, go_on = threading.Semaphore(0), threading.Event()

        def stalled(folder: Path) -> None:
            waiting.release()
            assert go_on.wait(WAIT_S)

        with monkeypatch.context() as patch:
            patch.setattr("prefixstore.slots.sync_folder", stalled)
            makers = [pool.submit(store.file_of, DISK, 2 * LAYOUT.slot_bytes) for _ in range(2)]
            assert waiting.acquire(timeout=WAIT_S)
            assert waiting.acquire(timeout=WAIT_S)

            def use() -> int:
                lease, held = ns.lease(refs, [MEMORY, MEMORY])
                assert 0 not in read_content(ns, refs)
                assert store.file_of(MEMORY, 2 * LAYOUT.slot_bytes).num_slots() == 0
                ns.release(lease)
                return held

            try:
                assert pool.submit(use).result(WAIT_S / 3) == 2
            finally:
                go_on.set()
            one, other = (maker.result(WAIT_S) for maker in makers)
        assert one is other is store.file_of(DISK, 2 * LAYOUT.slot_bytes)
        assert descriptors(one.path) == usual


def test_leases_after_four_billion_of_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that serves for months comes there."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 2)
        put_content(ns, refs)
        monkeypatch.setattr(store, "_lease_numbers", count(2**32 - 2))
        held = [ns.lease(refs, [MEMORY] * 2) for _ in range(4)]
        assert [number for _, number in held] == [2] * 4
        leases = [lease for lease, _ in held]
        assert len({lease.lease_id for lease in leases}) == 4
        assert {len(lease.lease_id) for lease in leases} == {8}
        for lease in leases:
            ns.release(lease)
        assert put_content(ns, refs_of(ns, 2, 2)) == [STORED] * 2
        assert admin.verify(store).sound


# ---------------------------------------------------------------------- damage to slots
def slot_file(store: Store, tier: int) -> Path:
    return store.file_of(tier, LAYOUT.slot_bytes).path


def slot_of(store: Store, tier: int, key: bytes) -> int:
    with (store.live if tier == MEMORY else store.index).read() as txn:
        data = txn.get("chunk", key)
    assert data is not None
    return Row.unpack(data).slot


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


def corrupt_count(store: Store, tier: int) -> int:
    name = {MEMORY: "corrupt_memory", DISK: "corrupt_disk"}[tier]
    return int(admin.stats(store)["counters"].get(name, 0))


def damage_and_heal(place: Place, tier: int, damage: Callable[[Path, int, int], None]) -> None:
    """Damage every chunk of a tier: each is a miss, counted, dropped, and can be stored again."""
    with place.open("4MiB", "16MiB" if tier == DISK else 0) as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 16)
        put_content(ns, refs)
        if tier == DISK:
            admin.empty_memory(store)
        assert ns.match(refs).tiers == (tier,) * 16
        for number, ref in enumerate(refs):
            damage(
                slot_file(store, tier), slot_of(store, tier, ref.key) * LAYOUT.slot_bytes, number
            )
        for ref in refs:
            assert read_content(ns, [ref]) == [MISS]
        wait_for(lambda: corrupt_count(store, tier) == 16, "the damage to be counted")
        wait_for(lambda: ns.match(refs).num_chunks == 0, "the rows to be dropped")
        assert put_content(ns, refs) == [STORED] * 16
        if tier == DISK:
            admin.empty_memory(store)
        assert read_content(ns, refs) == [tier] * 16
        assert corrupt_count(store, tier) == 16
        report = admin.verify(store)
        assert report.sound, report


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_flipped_bit_in_the_payload(place: Place, tier: int) -> None:
    """Anywhere: the first byte, the last, and those between."""
    step = (LAYOUT.payload_bytes - 1) // 15
    damage_and_heal(place, tier, lambda path, base, n: flip(path, base + n * step))


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_flipped_bit_in_the_trailer(place: Place, tier: int) -> None:
    """A whole read does not need the trailer; a read of a region and `verify` notice."""
    with place.open("4MiB", "16MiB" if tier == DISK else 0) as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 8)
        put_content(ns, refs)
        if tier == DISK:
            admin.empty_memory(store)
        for number, ref in enumerate(refs):
            base = slot_of(store, tier, ref.key) * LAYOUT.slot_bytes
            at = LAYOUT.payload_bytes + number * (LAYOUT.trailer_bytes - 1) // 7
            flip(slot_file(store, tier), base + at)
        assert len(admin.verify(store).damaged) == 8
        roi = Roi(0, 1, 0, 1)
        for ref in refs:
            assert ns.get([ref], outputs(LAYOUT, 1, roi), roi=roi) == [MISS]
        wait_for(lambda: corrupt_count(store, tier) == 8, "the damage to be counted")
        wait_for(lambda: ns.match(refs).num_chunks == 0, "the rows to be dropped")
        assert put_content(ns, refs) == [STORED] * 8
        assert admin.verify(store).sound


def test_two_slots_exchanged(place: Place) -> None:
    """Each is intact in itself; neither is what its row says."""
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 2)
        put_content(ns, refs)
        path, size = slot_file(store, MEMORY), LAYOUT.slot_bytes
        places = [slot_of(store, MEMORY, ref.key) * size for ref in refs]
        with open(path, "r+b") as file:
            parts = [os.pread(file.fileno(), size, at) for at in places]
            for at, part in zip(places, reversed(parts), strict=True):
                os.pwrite(file.fileno(), part, at)
        assert read_content(ns, refs) == [MISS] * 2


def test_damage_in_memory_is_served_from_disk(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 3)
        put_content(ns, refs)
        assert store.flush()
        for ref in refs:
            flip(slot_file(store, MEMORY), slot_of(store, MEMORY, ref.key) * LAYOUT.slot_bytes)
        assert read_content(ns, refs) == [DISK] * 3
        wait_for(lambda: corrupt_count(store, MEMORY) == 3, "the healing")
        wait_for(lambda: ns.match(refs).tiers == (MEMORY,) * 3, "the promotion")
        assert read_content(ns, refs) == [MEMORY] * 3


def test_verify_fix_drops_what_is_damaged(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 4)
        put_content(ns, refs)
        assert store.flush()
        for tier in (MEMORY, DISK):
            flip(slot_file(store, tier), slot_of(store, tier, refs[2].key) * LAYOUT.slot_bytes)
        found = admin.verify(store)
        assert [entry["key"] for entry in found.damaged] == [refs[2].key.hex()] * 2
        assert not found.fixed
        assert admin.verify(store, fix=True).fixed == 2
        assert admin.verify(store).sound
        assert ns.match(refs).num_chunks == 2


@pytest.mark.parametrize("what", ["truncated", "removed", "emptied"])
@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_slot_file_cut_while_closed(place: Place, tier: int, what: str) -> None:
    """What is gone is a miss, what is left is served, and the store works on."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 16)
        put_content(ns, refs)
        path = slot_file(store, tier)
        assert store.flush()
        if tier == DISK:
            admin.empty_memory(store)
        left = {ref.key for ref in refs if slot_of(store, tier, ref.key) < 8}
    if what == "removed":
        path.unlink()
    else:
        os.truncate(path, 8 * LAYOUT.slot_bytes if what == "truncated" else 0)
    with place.open(None, None) as store:
        ns = namespace_in(store)
        tiers = read_content(ns, refs)
        for ref, found in zip(refs, tiers, strict=True):
            if what == "truncated" and ref.key in left:
                assert found == tier
            else:
                assert found == (DISK if tier == MEMORY else MISS)
        store.flush()
        wait_for(lambda: MISS not in (put_content(ns, refs), read_content(ns, refs))[1], "healing")
        assert store.flush()
        report = admin.verify(store)
        assert report.sound, report


def test_a_disk_file_truncated_while_open(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 16)
        put_content(ns, refs)
        admin.empty_memory(store)
        os.truncate(slot_file(store, DISK), 5 * LAYOUT.slot_bytes)
        assert read_content(ns, refs).count(DISK) == 5
        wait_for(lambda: corrupt_count(store, DISK) == 11, "the damage to be counted")
        wait_for(lambda: set(put_content(ns, refs)) <= {STORED, PutState.EXISTS}, "healing")
        admin.empty_memory(store)
        assert read_content(ns, refs) == [DISK] * 16


def test_a_copy_of_a_slot_file_beside_it(place: Place) -> None:
    """Somebody's backup, met when the live index is begun anew."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 4)
        put_content(ns, refs)
        assert store.flush()
        live_dir = store.live_dir
    [path] = (place.folder / "store").glob("disk-*.slots")
    copy = path.with_name("disk-before.slots")
    shutil.copy(path, copy)
    shutil.rmtree(live_dir)
    with place.open() as store:
        assert read_content(namespace_in(store), refs) == [DISK] * 4
    assert copy.stat().st_size > 0


def test_a_damaged_index_is_refused_clearly(place: Place) -> None:
    place.open().close()
    path = place.folder / "store" / "index" / "data.mdb"
    path.write_bytes(b"garbage" * 2000)
    with pytest.raises(FormatError, match=r"the index .* is damaged: .*remove that folder"):
        place.open(None, None)
