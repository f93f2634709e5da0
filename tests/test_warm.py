"""Warming without vLLM: a made-up model whose KV depends on what stands before, put by a made-up
engine that drops chunks, dies and is killed. Staleness must be what the same KV gives outside of
any store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from prefixstore import Namespace, Store, admin, warm_run
from prefixstore import warm as warm_module
from prefixstore.errors import ConfigError
from prefixstore.rows import FLAG_ALONE
from prefixstore.warm import Document, Progress, WarmReport, warm
from prefixstore.warm_manifest import Manifest
from prefixstore.warm_run import MEASURING_TAG
from tests.store_helpers import Place
from tests.warm_made_up import (
    DOCUMENTS,
    IDENTITY,
    LAYOUT,
    OWN_CHUNKS,
    PREAMBLE,
    SIZE,
    MadeUp,
    check_chunks,
    check_store,
    document,
    host_of,
)

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> type[MadeUp]:
    class Fresh(MadeUp):
        pass

    monkeypatch.setattr(warm_module, "_host", lambda: host_of(Fresh))
    monkeypatch.setattr(warm_run, "SETTLE_S", 0.2)
    return Fresh


def run(place: Place, documents: Sequence[Document] = DOCUMENTS, **options: Any) -> WarmReport:
    sizes = {"memory": "4MiB", "disk": "16MiB", "memory_dir": str(place.memory_dir)}
    return warm(
        place.folder / "store", "made-up", documents, **{"preamble": PREAMBLE, **sizes, **options}
    )


def namespace_in(store: Store) -> Namespace:
    return store.namespace(IDENTITY, LAYOUT)


def check(place: Place, documents: Sequence[Document] = DOCUMENTS) -> None:
    """That the store has all, with the right bytes and staleness, and nothing else."""
    with place.open() as store:
        namespace = namespace_in(store)
        kept = check_chunks(namespace, documents)
        check_store(store, kept)
        entries = Manifest.of(store.folder, namespace.name).read()
        assert {e.name: e.keys for e in entries} == {
            name: [key.hex() for key in keys] for name, keys in kept.items() if name
        }


def test_documents_are_stored_and_measured(place: Place, made_up: type[MadeUp]) -> None:
    shown: list[Progress] = []
    report = run(place, progress=shown.append)
    check(place)
    assert [(d.name, d.status, d.staleness) for d in report.documents] == [
        (d.name, "stored", "measured") for d in DOCUMENTS
    ]
    assert [d.chunks for d in report.documents] == OWN_CHUNKS
    assert [d.stored_chunks for d in report.documents] == OWN_CHUNKS
    assert [d.tail_tokens for d in report.documents] == [
        (21 + len(d.ids or ())) % SIZE for d in DOCUMENTS
    ]
    assert report.notes == []
    assert report.lost_chunks == 0
    done = [progress.done_tokens for progress in shown]
    assert done == sorted(done)
    assert done[-1] == shown[-1].total_tokens == report.computed_tokens
    assert shown[-1].left_s == 0
    options = made_up.last.prompts[0][1]  # type: ignore[attr-defined]
    assert options == {"alone": True, "tag": "d1", "pin": False, "read": True}


def test_a_second_run_starts_no_engine(place: Place, made_up: type[MadeUp]) -> None:
    first = run(place)
    manifest = place.folder / "store" / f"warm-{first.namespace}.jsonl"
    before = manifest.read_bytes()
    made_up.__init__ = None  # type: ignore[method-assign,assignment]
    again = run(place)
    assert [(d.status, d.staleness) for d in again.documents] == [("skipped", "known")] * 7
    assert (again.engine_start_s, again.computed_tokens) == (None, 0)
    assert manifest.read_bytes() == before
    manifest.unlink()
    run(place)
    check(place)


def test_a_text_of_two_names_is_noted_once(place: Place, made_up: type[MadeUp]) -> None:
    first = run(place)
    manifest = place.folder / "store" / f"warm-{first.namespace}.jsonl"
    before = manifest.read_bytes()
    renamed = [replace(document, name=f"other {document.name}") for document in DOCUMENTS]
    for documents in (renamed, DOCUMENTS, renamed):
        run(place, documents)
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("dies_at", [0, 3, 7, 9, 20])
def test_an_interrupted_run_is_completed(
    place: Place, made_up: type[MadeUp], dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_run, "BATCH_PIECES", 3)
    made_up.die_at = dies_at
    made_up.drop = staticmethod(lambda prompt, chunk: prompt == dies_at - 1 and chunk > 4)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    with place.open() as store:
        tags = {chunk.row.tag for chunk in admin.list_chunks(store)}
        assert MEASURING_TAG.encode() not in tags
    made_up.die_at, made_up.drop = -1, staticmethod(MadeUp.drop)
    run(place)
    check(place)


def test_what_was_dropped_is_computed_again(place: Place, made_up: type[MadeUp]) -> None:
    made_up.drop = staticmethod(lambda prompt, chunk: prompt % 2 == 0 and chunk % 3 == 2)
    report = run(place)
    check(place)
    assert {d.status for d in report.documents} == {"stored"}


def test_an_engine_that_stores_nothing(place: Place, made_up: type[MadeUp]) -> None:
    made_up.drop = staticmethod(lambda prompt, chunk: True)
    with pytest.raises(ConfigError, match="the engine stored nothing"):
        run(place)


def test_what_can_never_be_stored_is_told(place: Place, made_up: type[MadeUp]) -> None:
    lost = DOCUMENTS[2].ids
    made_up.drop = staticmethod(
        lambda prompt, chunk: chunk > 5 and made_up.last.prompts[prompt][0][21:] == lost  # type: ignore[attr-defined]
    )
    report = run(place)
    statuses = [d.status for d in report.documents]
    assert statuses == ["stored"] * 2 + ["incomplete"] + ["stored"] * 4
    assert report.documents[2].staleness == "its KV was evicted before it was compared"
    assert report.lost_chunks == OWN_CHUNKS[2] - 5
    made_up.drop = staticmethod(MadeUp.drop)
    assert run(place).documents[2].status == "stored"
    check(place)


def test_staleness_can_be_made_up_for(place: Place, made_up: type[MadeUp]) -> None:
    report = run(place, staleness=False)
    assert {d.staleness for d in report.documents} == {"not asked for"}
    stored = report.computed_tokens
    assert stored == sum(len(PREAMBLE) + len(d.ids or ()) for d in DOCUMENTS)
    planned = run(place, dry_run=True).computed_tokens
    report = run(place)
    assert [(d.status, d.staleness) for d in report.documents] == [("skipped", "measured")] * 7
    assert report.computed_tokens == planned
    check(place)


def test_a_document_that_was_removed_comes_back_alone(place: Place, made_up: type[MadeUp]) -> None:
    run(place)
    with place.open() as store:
        admin.remove(store, admin.Selection(tag=b"d4"))
    report = run(place)
    assert [d.name for d in report.documents if d.status == "stored"] == ["d4"]
    alone = [ids for ids, options in made_up.last.prompts if options.get("alone")]  # type: ignore[attr-defined]
    assert alone == [PREAMBLE + list(DOCUMENTS[3].ids or ())]
    check(place)


def test_labels_reach_the_chunks(place: Place, made_up: type[MadeUp]) -> None:
    run(place, DOCUMENTS[:2], tag="all", ttl_s=1000, pin=True)
    with place.open() as store:
        rows = [chunk.row for chunk in admin.list_chunks(store)]
    assert len(rows) == 1 + sum(OWN_CHUNKS[:2])
    for row in rows:
        assert row.tag == b"all"
        assert row.pinned
        assert row.flags & FLAG_ALONE
        assert 0 < row.expires_s - row.created_s <= 1002


def test_a_dry_run_makes_nothing_and_tells_the_sizes(place: Place, made_up: type[MadeUp]) -> None:
    plan = run(place, dry_run=True)
    assert not (place.folder / "store").exists()
    assert plan.dry_run
    assert {(d.status, d.staleness) for d in plan.documents} == {("to store", "to measure")}
    done = run(place)
    assert plan.computed_tokens == done.computed_tokens
    for name in ("chunks", "stored_chunks", "bytes", "tokens", "tail_tokens"):
        assert plan.to_json()["totals"][name] == done.to_json()["totals"][name]
    assert plan.to_json()["totals"]["bytes"] == sum(OWN_CHUNKS) * LAYOUT.payload_bytes
    again = run(place, dry_run=True)
    assert {d.status for d in again.documents} == {"skipped"}
    assert again.computed_tokens == 0


def test_what_cannot_be_measured_or_stored_is_told(place: Place, made_up: type[MadeUp]) -> None:
    report = run(place, [document(1, 100), document(2, 5), document(1, 100), document(3, 0)])
    assert [d.status for d in report.documents] == [
        "stored",
        "too short",
        "same as d1",
        "too short",
    ]
    assert report.documents[0].staleness == "there is too little other text to measure it behind"
    notes = run(place, [document(4, 5000), document(5, 300)], dry_run=True).notes
    assert len(notes) == 1
    assert "1 document is longer than the model takes (2000 tokens)" in notes[0]
    huge = run(place, [document(n, 1900) for n in range(90)], dry_run=True)
    assert "what is stored first will be evicted" in huge.notes[-1]


def test_long_documents_are_stored_in_pieces(place: Place, made_up: type[MadeUp]) -> None:
    report = run(place, [document(1, 5000), document(2, 700)])
    assert report.documents[0].pieces == 4
    assert (report.documents[0].status, report.documents[0].staleness) == ("stored", "measured")
    assert report.documents[0].tail_tokens < SIZE
    with place.open() as store:
        entries = [
            e
            for e in Manifest.of(store.folder, bytes.fromhex(report.namespace)).read()
            if e.name == "d1"
        ]
        ids = list(document(1, 5000).ids or ())
        namespace = namespace_in(store)
        for at in range(0, 4900, 61):
            [segment] = namespace.find_segments([*range(100), *ids[at : at + 200]])[:1]
            assert segment.num_tokens >= 64
    assert sum(e.tokens for e in entries) == 5000 - report.documents[0].tail_tokens
    assert run(place, [document(1, 5000), document(2, 700)]).engine_start_s is None


def test_mistakes(place: Place, made_up: type[MadeUp]) -> None:
    with pytest.raises(ConfigError, match="no documents"):
        run(place, [])
    with pytest.raises(ConfigError, match="a tag of 65 bytes"):
        run(place, tag="x" * 65)
    with pytest.raises(ConfigError, match="ttl_s=0"):
        run(place, ttl_s=0)
    with pytest.raises(ConfigError, match="a preamble of 1990 tokens leaves 10"):
        run(place, preamble=list(range(1990)))
    assert not list((place.folder / "store").glob("warm-*"))
