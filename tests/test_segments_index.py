"""The segment index: what is entered, what goes with its chunk, and what `verify` says of it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from prefixstore import Namespace, Store, admin, winnow
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.segment_check import check_segments
from prefixstore.segment_index import SOURCES_MAX
from prefixstore.testing_data import outputs
from tests.segments_truth import check, faults, keep, missed, space_of, tables, words
from tests.store_helpers import Place, on_keeper, wait_for

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture(params=["memory", "disk"])
def store(place: Place, request: pytest.FixtureRequest) -> Iterator[Store]:
    with place.open("4MiB", 0 if request.param == "memory" else "4MiB") as opened:
        yield opened
        assert faults(opened) == []


def starts(namespace: Namespace, prompt: list[int]) -> list[tuple[int, int, int]]:
    """(start, tokens, start in the source) of each segment."""
    found = namespace.find_segments(prompt)
    return [(one.start, one.num_tokens, one.source_start) for one in found]


# --- gone with its chunk -------------------------------------------------------------------------


def delete(namespace: Namespace, tokens: list[int]) -> None:
    for ref in namespace.chain(tokens).refs():
        assert admin.remove(namespace.store, admin.Selection(key=ref.key)) == 1


def delete_namespace(namespace: Namespace, tokens: list[int]) -> None:
    admin.remove(namespace.store, admin.Selection(namespace=namespace.identity.namespace))


def evict(namespace: Namespace, tokens: list[int]) -> None:
    store = namespace.store
    admin.empty_memory(store)
    on_keeper(store, lambda: store.disk.evict(1 << 30))


def overwrite(namespace: Namespace, tokens: list[int]) -> None:
    store = namespace.store
    for ref in namespace.chain(tokens).refs():
        for env, tier in ((store.live, MEMORY), (store.index, DISK)):
            with env.read() as txn:
                row = txn.get("chunk", ref.key)
            if row is not None:
                slot = int.from_bytes(row[8:12], "little")
                store.file_of(tier, 4096).write(slot, memoryview(b"damage"))


def damage(namespace: Namespace, tokens: list[int]) -> None:
    """Overwritten; `verify --fix` drops it."""
    overwrite(namespace, tokens)
    assert admin.verify(namespace.store, fix=True).fixed >= 20


def heal(namespace: Namespace, tokens: list[int]) -> None:
    """Overwritten; reading it drops it, the memory tier's copy as well as the disk tier's."""
    overwrite(namespace, tokens)
    refs = namespace.chain(tokens).refs()
    assert namespace.get(refs, outputs(namespace.layout, len(refs))) == [MISS] * len(refs)
    on_keeper(namespace.store, lambda: None)


@pytest.mark.parametrize("remove", [delete, delete_namespace, evict, damage, heal])
def test_a_segment_goes_with_its_chunk(
    store: Store, remove: Callable[[Namespace, list[int]], None]
) -> None:
    ns = space_of(store)
    text = keep(ns, words(1, 320))
    assert starts(ns, text[7:]) == [(0, 313, 7)]
    names = set(tables(store)["segment"])
    remove(ns, text)
    assert ns.match(ns.chain(text)).num_chunks == 0
    assert starts(ns, text[7:]) == []
    assert not names & set(tables(store)["segment"])
    assert faults(store) == []
    keep(ns, text)
    assert starts(ns, text[7:]) == [(0, 313, 7)]


def test_a_segment_ends_with_its_time(store: Store) -> None:
    ns = space_of(store)
    brief, text = keep(ns, words(2, 160), ttl_s=0.3), keep(ns, words(3, 160), ttl_s=3600)
    assert len(tables(store)["indexed"]) == 20
    wait_for(lambda: starts(ns, brief[3:]) == [], "the end of the time to live")
    wait_for(lambda: len(tables(store)["indexed"]) == 10, "the index to forget it")
    assert starts(ns, text[3:]) == [(0, 157, 3)]


def test_what_has_expired_is_not_found_though_it_is_there(store: Store) -> None:
    """Nor gone through: while the keeper is busy elsewhere its rows are still in the index."""
    ns = space_of(store)
    text = words(47, 480)
    refs = ns.chain(text).refs()
    payload = bytes(ns.layout.payload_bytes)
    ns.put(refs[:10] + refs[20:], [payload] * 20)
    ns.put(refs[10:20], [payload] * 10, ttl_s=0.2)
    assert store.flush(30)
    assert starts(ns, text) == [(0, 480, 0)]
    busy = threading.Event()
    store.keeper.submit(lambda: busy.wait(30))
    try:
        wait_for(lambda: len(starts(ns, text)) > 1, "the end of the time to live")
        assert starts(ns, text) == [(0, 160, 0), (320, 160, 320)]
        assert starts(ns, text[150:330]) == []
        assert len(tables(store)["indexed"]) == 30
    finally:
        busy.set()


def test_only_what_is_left_is_found(store: Store) -> None:
    """A chunk in the middle goes: the run ends there, and goes on when it comes back."""
    ns = space_of(store)
    text = keep(ns, words(4, 480))
    admin.remove(store, admin.Selection(key=ns.chain(text).keys[12]))
    assert starts(ns, text[5:475]) == [(0, 187, 5), (203, 267, 208)]
    for at in range(120, 200):
        expected = [(0, 64, at)] if at <= 128 else []
        assert starts(ns, text[at : at + 64]) == expected
    keep(ns, text)
    for at in range(480 - 63):
        assert starts(ns, text[at : at + 64]) == [(0, 64, at)]


@pytest.mark.parametrize("chunk_tokens", [4, 16, 64, 100])
def test_chunks_that_come_in_any_order_are_found_whole(place: Place, chunk_tokens: int) -> None:
    """The later before the earlier: windows over both are entered when the earlier one comes."""
    with place.open("4MiB", 0) as opened:
        ns = space_of(opened, chunk_tokens)
        text = words(5, 400 // chunk_tokens * chunk_tokens)
        refs = ns.chain(text).refs()
        order = [*refs[1::2], *reversed(refs[0::2])]
        for ref in order:
            ns.put([ref], [bytes(ns.layout.payload_bytes)])
        for at in range(len(text) - 63):
            assert starts(ns, text[at : at + 64]) == [(0, 64, at)]


# --- kept with its chunk -------------------------------------------------------------------------


@pytest.mark.parametrize("reboot", [False, True])
def test_segments_outlive_the_process_and_the_boot(place: Place, reboot: bool) -> None:
    with place.open("4MiB", "16MiB") as opened:
        text = keep(space_of(opened), words(6, 320))
        live_dir = opened.live_dir
    if reboot:
        shutil.rmtree(live_dir)
    with place.open(None, None) as opened:
        assert starts(space_of(opened), text[9:]) == [(0, 311, 9)]
        assert admin.verify(opened).sound


def test_segments_of_memory_outlive_the_process(place: Place) -> None:
    with place.open("4MiB", 0) as opened:
        text = keep(space_of(opened), words(7, 320))
    with place.open(None, None) as opened:
        assert starts(space_of(opened), text[9:]) == [(0, 311, 9)]


def test_a_lost_slot_file_takes_its_segments_along(place: Place) -> None:
    """After a reboot rows without bytes are dropped, and so is what the index has of them."""
    with place.open("4MiB", "16MiB") as opened:
        text = keep(space_of(opened), words(8, 320))
        live_dir = opened.live_dir
    shutil.rmtree(live_dir)
    [slots] = (place.folder / "store").glob("disk-*.slots")
    os.truncate(slots, 5 * 4096)
    with place.open(None, None) as opened:
        ns = space_of(opened)
        assert ns.match(ns.chain(text)).num_chunks == 5
        assert starts(ns, text) == [(0, 80, 0)]
        assert len(tables(opened)["indexed"]) == 5
        assert faults(opened) == []


# --- one source, the best one --------------------------------------------------------------------


def sources(store: Store) -> list[int]:
    return [len(value) // 24 for value in tables(store)["segment"].values()]


@pytest.mark.parametrize("chunk_tokens", [16, 64])
@pytest.mark.parametrize("order", ["near first", "near last"])
def test_a_text_behind_ten_prefixes_is_one_source(
    place: Place, chunk_tokens: int, order: str
) -> None:
    """The index hardly grows after the first, and the prompt gets it as one segment."""
    with place.open("16MiB", 0) as opened:
        ns = space_of(opened, chunk_tokens)
        document = words(9, 1000)
        numbers = range(10) if order == "near first" else range(9, -1, -1)
        texts = [keep(ns, words(100 + i, 64 + 37 * i) + document) for i in numbers]
        own = sum(len(text) for text in texts) - 10 * 1000
        total = sum(sources(opened))
        assert total < 1.2 * len(sources(opened)), "one source a fingerprint, or nearly"
        assert total < (own + 10 * 63 + 1000) / 18
        # Those of the text itself, behind what is near a prefix and before the part chunks.
        with opened.live.read() as txn:
            inside = [len(value) // 24 for name, value in txn.scan("segment")
                      if name in set(fingerprints(ns, document[64:-64]))]  # fmt: skip
        assert len(inside) > 30
        assert sum(inside) <= (1 if order == "near first" else 1.1) * len(inside)
        for text in texts:
            prompt = [*words(50, 77), *text[-900:-70]]
            [found] = ns.find_segments(prompt)
            assert (found.start, found.num_tokens) == (77, 830)
        check(ns, prompt, [found], texts)


def fingerprints(namespace: Namespace, tokens: list[int]) -> list[bytes]:
    seed = winnow.seed_of(namespace.identity.namespace + bytes(8))
    _, hashes = winnow.fingerprints(np.array(tokens, np.int32), seed)
    return [int(value).to_bytes(8, "big") for value in hashes]


@pytest.mark.parametrize("alone_first", [True, False])
def test_a_text_encoded_alone_is_preferred(store: Store, alone_first: bool) -> None:
    """Whichever came first, and also where a longer run goes over it."""
    ns = space_of(store)
    preamble, document, rest = words(10, 64), words(11, 640), words(12, 320)
    texts = [([*preamble, *document], True), ([*words(13, 16), *document, *rest], False)]
    for text, alone in texts if alone_first else reversed(texts):
        keep(ns, text, alone=alone)
    prompt = [*words(14, 30), *document, *rest, *words(15, 30)]
    found = ns.find_segments(prompt)
    assert [(one.start, one.num_tokens, one.source_start, one.alone) for one in found] == [
        (30, 640, 64, True),
        (670, 320, 656, False),
    ]


def test_how_it_was_encoded_is_kept_wherever_it_goes(place: Place) -> None:
    """To disk, back to memory, through a pin and a repair."""
    with place.open("4MiB", "4MiB") as opened:
        ns = space_of(opened)
        text = keep(ns, words(48, 160), alone=True)
        refs, everything = ns.chain(text).refs(), admin.Selection(everything=True)
        steps: list[Callable[[], object]] = [
            lambda: admin.empty_memory(opened),
            lambda: ns.get(refs, outputs(ns.layout, len(refs))),
            lambda: wait_for(lambda: ns.match(refs).tiers == (MEMORY,) * 10, "promotions"),
            lambda: admin.pin(opened, everything),
            lambda: admin.pin(opened, everything, pinned=False),
            lambda: admin.verify(opened, fix=True),
        ]
        for step in steps:
            step()
            [found] = ns.find_segments(text[3:])
            assert (found.num_tokens, found.alone) == (157, True)


@pytest.mark.parametrize("seed", range(12))
def test_a_better_source_hides_nothing_of_a_worse_one(store: Store, seed: int) -> None:
    """The better one ends, or goes on otherwise, a few tokens behind what they have in common."""
    ns = space_of(store, 64)
    shared = words(500 + seed, 128)
    worse = keep(ns, [*words(600 + seed, 70), *shared, *words(700 + seed, 122)])
    keep(ns, [*shared, *words(800 + seed, 64 * (seed % 2))], alone=True)
    for at in range(len(worse) - 63):
        [(start, count, _)] = starts(ns, worse[at : at + 64])
        assert (start, count) == (0, 64)


def test_the_nearer_source_is_preferred(store: Store) -> None:
    ns = space_of(store)
    document = words(16, 640)
    for count in (320, 160, 480):
        keep(ns, [*words(count, count), *document])
    [found] = ns.find_segments([*words(17, 5), *document[:600]])
    assert (found.start, found.num_tokens, found.source_start) == (5, 600, 160)


def test_a_phrase_that_all_have_in_common_hides_nothing(store: Store) -> None:
    """The same 40 tokens in many texts: as many sources as may be, and what is around is found."""
    ns = space_of(store)
    phrase = words(18, 40)
    texts = [
        keep(ns, [*words(200 + i, 50 + i), *phrase, *words(300 + i, 86 - i)])
        for i in range(3 * SOURCES_MAX)
    ]
    assert max(sources(store)) <= SOURCES_MAX
    for text in texts:
        found = ns.find_segments(text)
        check(ns, text, found, texts)
        assert missed(text, found, texts) == []


def test_what_was_left_out_is_found_after_a_repair(store: Store) -> None:
    """The source goes: the same text elsewhere is found once it is stored again, or repaired."""
    ns = space_of(store)
    document = words(19, 640)
    for repair in (True, False):
        first, second = [*words(20, 32), *document], [*words(21, 64), *document]
        keep(ns, first)
        keep(ns, second)
        assert starts(ns, document[50:600]) == [(0, 550, 82)]
        delete(ns, first)
        assert starts(ns, document[50:600]) == []
        if repair:
            assert admin.verify(store, fix=True).sound
        else:
            delete(ns, second)
            keep(ns, second)
        assert starts(ns, document[50:600]) == [(0, 550, 114)]
        delete(ns, second)


# --- verify --------------------------------------------------------------------------------------


def test_a_store_of_before_is_opened_and_indexed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made without the tables: nothing is found; `verify --fix` builds the index."""
    plain = ("meta", "chunk", "namespace", "quota")
    with monkeypatch.context() as before:
        before.setattr("prefixstore.formats.INDEX_TABLES", plain)
        before.setattr("prefixstore.disk.enter", lambda *_: None)
        with place.open("4MiB", "16MiB") as opened:
            ns = space_of(opened)
            for seed in range(30, 35):
                keep(ns, words(seed, 333))
    with place.open(None, None) as opened:
        ns = space_of(opened)
        assert starts(ns, words(31, 320)[2:]) == []
        report = admin.verify(opened)
        assert (report.sound, report.damaged, report.accounting) == (False, [], [])
        assert report.segments == {"a chunk that is not in the segment index": 100}
        keep(ns, words(35, 320))
        assert starts(ns, words(35, 320)[2:]) == [(0, 318, 2)]
        assert admin.verify(opened, fix=True).sound
        assert admin.verify(opened).sound
        assert faults(opened) == []
        for seed in range(30, 36):
            assert starts(ns, words(seed, 320)[2:]) == [(0, 318, 2)]


def a_row_is_gone(txn: Txn) -> None:
    [key, *_] = [key for key, _ in txn.scan("chunk")]
    txn.delete("chunk", key)


def a_chunk_is_not_entered(txn: Txn) -> None:
    [key, *_] = [key for key, _ in txn.scan("indexed")]
    txn.delete("indexed", key)


def a_source_is_gone(txn: Txn) -> None:
    [name, *_] = [name for name, _ in txn.scan("segment")]
    txn.delete("segment", name)


def a_source_is_of_nothing(txn: Txn) -> None:
    [(name, value), *_] = txn.scan("segment")
    txn.put("segment", name, value[:8] + b"nothing has this")


def a_source_is_of_another(txn: Txn) -> None:
    [(name, value), *_] = txn.scan("segment")
    other = next(key for key, _ in txn.scan("indexed") if key != value[8:24])
    txn.put("segment", name, value[:8] + other)


def a_child_is_gone(txn: Txn) -> None:
    [name, *_] = [name for name, _ in txn.scan("child")]
    txn.delete("child", name)


def a_child_is_of_nothing(txn: Txn) -> None:
    txn.put("child", b"p" * 16 + b"tokn" + b"k" * 16)


FAULTS = (
    a_row_is_gone, a_chunk_is_not_entered, a_source_is_gone, a_source_is_of_nothing,
    a_source_is_of_another, a_child_is_gone, a_child_is_of_nothing,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found_and_repaired(place: Place, fault: Callable[[Txn], None]) -> None:
    with place.open("4MiB", "4MiB") as opened:
        ns = space_of(opened)
        texts = [keep(ns, words(seed, 320)) for seed in range(40, 44)]
        assert check_segments(opened, fix=False) == {}
        opened.index.write(fault)
        assert sum(check_segments(opened, fix=False).values()) >= 1
        assert not admin.verify(opened).sound
        assert check_segments(opened, fix=True) == {}
        assert faults(opened) == []
        if fault is not a_row_is_gone:
            for text in texts:
                assert starts(ns, text[1:]) == [(0, 319, 1)]


def test_turning_the_disk_off_leaves_nothing_behind(place: Place) -> None:
    """Each index goes with its own rows, whatever the store was before."""
    with place.open("4MiB", 0) as opened:
        keep(space_of(opened), words(45, 160))
    with place.open(None, "4MiB") as opened:
        ns = space_of(opened)
        keep(ns, words(46, 160))
        delete(ns, words(45, 160))
        delete(ns, words(46, 160))
        for env in (opened.live, opened.index):
            with env.read() as txn:
                assert [txn.count(name) for name in ("segment", "indexed", "child")] == [0, 0, 0]
