"""Quotas: what is being filled counts, and nobody with a quota makes room among others' chunks."""

from __future__ import annotations

from collections import Counter

import pytest

from prefixstore import Namespace, Roi, Store, admin, putting
from prefixstore.identity import ModelIdentity
from prefixstore.keys import ChunkRef, salt_digest
from prefixstore.ledger import DISK, MEMORY
from prefixstore.owned import Region, locate, own_keys, why_missing
from prefixstore.putting import PutState
from prefixstore.room import make_room
from prefixstore.rows import Pending
from prefixstore.testing_data import content_of, region_of
from tests.store_helpers import (
    LAYOUT,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]
HALF = Roi(0, LAYOUT.num_layers, 0, 2)
SIZE = LAYOUT.slot_bytes


def put_part(ns: Namespace, refs: list[ChunkRef], roi: Roi = HALF) -> list[PutState]:
    data = [region_of(content_of(ref.key, LAYOUT.payload_bytes), LAYOUT, roi) for ref in refs]
    return ns.put(refs, data, roi=roi)


def used(store: Store) -> Counter[bytes]:
    """Bytes of the memory tier by namespace as the ledger has them: those of chunks and slots."""
    counted: Counter[bytes] = Counter()
    with store.live.read() as txn:
        told = {
            name[2:]: int.from_bytes(value, "little") for name, value in txn.scan("usage", b"n\1")
        }
        for _, data in txn.scan("chunk"):
            counted[data[24:40]] += SIZE
        for _, data in txn.scan("pending"):
            counted[Pending.unpack(data).namespace] += SIZE
    assert +Counter(told) == counted
    return counted


def group(store: Store, limits: dict[str, int], tier: int = MEMORY) -> dict[str, Namespace]:
    spaces = {label: namespace_in(store, label) for label in limits}
    store.quotas.set_groups(
        [(tier, limits[label], label.encode() * 16, ns.name) for label, ns in spaces.items()]
    )
    return spaces


def test_parts_count_from_the_first_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that other ranks never complete take no more than a quota, until they are given up."""
    monkeypatch.setattr(putting, "PENDING_S", -1.0)
    with place.open("4MiB", 0) as store:
        ns = group(store, {"a": 5 * SIZE})["a"]
        refs = refs_of(ns, 1, 16)
        states = put_part(ns, refs)
        assert states == [PutState.PARTIAL] * 5 + [PutState.QUOTA] * 11
        assert used(store) == {ns.name: 5 * SIZE}
        assert put_part(ns, refs[:2], Roi(0, LAYOUT.num_layers, 2, 4)) == [PutState.STORED] * 2
        assert used(store) == {ns.name: 5 * SIZE}
        assert store.on_keeper(store.reap) == 3
        assert used(store) == {ns.name: 2 * SIZE}
        assert put_content(ns, refs[2:5]) == [PutState.STORED] * 3
        assert used(store) == {ns.name: 5 * SIZE}
        assert admin.verify(store).sound


def test_a_put_that_fails_is_not_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store)

        def broken(*_: object) -> None:
            raise OSError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr("prefixstore.filling.fill", broken)
            assert put_content(ns, refs_of(ns, 1, 3)) == [PutState.FULL] * 3
        assert used(store) == {}


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_full_tier_makes_no_victims_in_another_group(place: Place, tier: int) -> None:
    """Two groups whose limits are more than the tier: the second finds it full."""
    sizes = {"memory_bytes": "2MiB", "disk_bytes": 0}
    if tier == DISK:
        sizes = {"memory_bytes": "8MiB", "disk_bytes": "2MiB"}
    with place.open(**sizes) as store:  # type: ignore[arg-type]
        spaces = group(store, {"a": 100 * SIZE, "b": 100 * SIZE}, tier)
        mine = refs_of(spaces["a"], 1, 90)
        put_content(spaces["a"], mine)
        store.flush()
        before = [ref for ref in mine if found(store, tier, ref)]
        assert before
        for seed in range(3):
            put_content(spaces["b"], refs_of(spaces["b"], seed, 40))
            store.flush()
        assert [ref for ref in before if not found(store, tier, ref)] == []
        free = namespace_in(store, "engine")
        assert PutState.STORED in put_content(free, refs_of(free, 1, 8)), "engines have no quota"


@pytest.mark.parametrize("grouped", [True, False])
def test_housekeeping_takes_nothing_of_a_group(place: Place, grouped: bool) -> None:
    """A group makes its own room: what is evicted ahead of need would be for somebody else."""
    with place.open("2MiB", 0) as store:
        ns = group(store, {"a": 100 * SIZE})["a"] if grouped else namespace_in(store, "a")
        mine = refs_of(ns, 1, 90)
        for ref in mine:
            put_content(ns, [ref])
        free = namespace_in(store, "engine")
        others = refs_of(free, 2, 4)
        put_content(free, others)
        before = sum(found(store, MEMORY, ref) for ref in mine)
        store.on_keeper(lambda: make_room(store))
        after = sum(found(store, MEMORY, ref) for ref in mine)
        assert (after == before) is grouped
        assert (sum(found(store, MEMORY, ref) for ref in others) < 4) is grouped


def found(store: Store, tier: int, ref: ChunkRef) -> bool:
    with (store.live if tier == MEMORY else store.index).read() as txn:
        return txn.get("chunk", ref.key) is not None


def test_a_group_with_no_room_left_gives_way(place: Place) -> None:
    """Of a tenant that is gone: nothing may enter, and what is there makes room for others."""
    with place.open("2MiB", 0) as store:
        spaces = group(store, {"a": 100 * SIZE, "b": 100 * SIZE})
        put_content(spaces["a"], refs_of(spaces["a"], 1, 90))
        group(store, {"a": 0})
        new = refs_of(spaces["b"], 2, 8)
        assert put_content(spaces["b"], new) == [PutState.STORED] * 8
        assert 0 not in read_content(spaces["b"], new)
        assert set(put_content(spaces["a"], refs_of(spaces["a"], 3, 2))) == {PutState.QUOTA}


def test_a_salt_is_no_way_to_others_chunks(place: Place) -> None:
    """Whoever names another's salt, which its owner has a quota for, makes nobody give way."""
    with place.open("4MiB", 0) as store:
        spaces = group(store, {"a": 50 * SIZE, "b": 50 * SIZE})
        store.quotas.set(MEMORY, 4 * SIZE, salt=salt_digest(b"s"))
        mine = refs_of(spaces["a"], 1, 4, salt=b"s")
        assert put_content(spaces["a"], mine) == [PutState.STORED] * 4
        theirs = refs_of(spaces["b"], 1, 4, salt=b"s")
        assert put_content(spaces["b"], theirs) == [PutState.QUOTA] * 4
        assert 0 not in read_content(spaces["a"], mine)
        newer = refs_of(spaces["a"], 2, 2, salt=b"s")
        assert put_content(spaces["a"], newer) == [PutState.STORED] * 2


def test_the_name_of_a_namespace_is_computed_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as long as hundreds of look-ups."""
    with place.open("4MiB", 0) as store:
        ns = namespace_in(store)
        monkeypatch.setattr(ModelIdentity, "namespace", property(lambda _: 1 / 0))
        chain = ns.chain([*range(40 * LAYOUT.chunk_tokens)])
        refs = chain.refs()
        assert put_content(ns, refs) == [PutState.STORED] * 40
        assert ns.match(chain).num_chunks == 40
        assert 0 not in read_content(ns, refs)
        lease, held = ns.lease(refs, [MEMORY] * 40)
        assert held == len(own_keys(ns, refs)) == 40
        assert None not in locate(ns, refs, Region(LAYOUT, LAYOUT.whole))
        assert ns.find_segments([*range(40 * LAYOUT.chunk_tokens)])
        ns.release(lease)


def test_only_its_own_chunks_are_being_stored(place: Place) -> None:
    with place.open("4MiB", 0) as store:
        ns, other = namespace_in(store, "a"), namespace_in(store, "b")
        [ref] = refs_of(ns, 1, 1)
        assert put_part(ns, [ref]) == [PutState.PARTIAL]
        assert why_missing(ns, ref) == "being_stored"
        assert why_missing(other, ref) == "absent"


@pytest.mark.parametrize("limited", ["namespace", "salt", "group"])
@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_quota_finds_its_own_behind_many_of_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, tier: int, limited: str
) -> None:
    """Its oldest makes way, however many of others are colder."""
    for module in ("ledger", "seeking"):
        monkeypatch.setattr(f"prefixstore.{module}.SWEEP_ROWS_MAX", 8)
    with place.open("8MiB", "8MiB" if tier == DISK else 0) as store:
        theirs, ours = namespace_in(store, "b"), namespace_in(store, "a")
        cold = refs_of(theirs, 1, 60)
        put_content(theirs, cold)
        store.flush()
        salt = b"s" if limited == "salt" else b""
        if limited == "group":
            store.quotas.set_groups([(tier, 3 * SIZE, b"g" * 16, ours.name)])
        elif limited == "salt":
            store.quotas.set(tier, 3 * SIZE, salt=salt_digest(salt))
        else:
            store.quotas.set(tier, 3 * SIZE, namespace=ours.name)
        mine = [refs_of(ours, seed, 1, salt)[0] for seed in range(2, 6)]
        put_content(ours, mine[:3])
        store.flush()
        assert [found(store, tier, ref) for ref in mine[:3]] == [True] * 3

        def stored() -> bool:
            put_content(ours, mine[3:])
            store.flush()
            if found(store, tier, mine[3]):
                return True
            ours.delete(mine[3:])  # else it exists, in memory only, and is not put again
            return False

        wait_for(stored, "a chunk of its own to make way")
        # Of a second try, if there was one, another one has made way.
        assert [found(store, tier, mine[i]) for i in (0, 2)] == [False, True]
        assert all(found(store, tier, ref) for ref in cold)
        assert admin.verify(store).sound
