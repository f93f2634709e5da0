"""Engines that round their KV: what they store is what an exact engine stores, rounded; what comes
back is what was stored, in every life of the store; exact KV is never mixed with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.engine import Answer, Engine
from prefixstore import Store
from prefixstore.codec import INT8
from prefixstore.namespace import Namespace
from prefixstore.putting import PutState
from tests.engine.support import (
    NEVER,
    ONLY_READ,
    PROMPTS,
    Truth,
    ask,
    counting,
    hit_tokens,
    remove_memory_of,
    same,
    start,
    to_disk_only,
    wait_for_chunks,
)
from tests.rounding_by_hand import payload_by_hand

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def exact(model: Path, folder: Path, truth: Truth) -> None:
    """The folder has exact KV of "five" and "ten"."""
    with start(model, folder) as engine:
        for name in ("five", "ten"):
            assert same(ask(engine, name), truth[name])
        wait_for_chunks(folder, 5 + 10)


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, truth: Truth, exact: None) -> Iterator[Engine]:
    """An engine that rounds, on that folder, and has stored the same."""
    with start(model, folder, extra={"codec": INT8}) as engine:
        with counting(engine) as found:
            for name in ("five", "ten"):
                assert same(ask(engine, name), truth[name]), "nothing of what is exact was loaded"
        assert hit_tokens(found) == 0
        assert found["chunks_saved"] == 5 + 10
        wait_for_chunks(folder, 15, on_disk=True, codec=INT8)
        yield engine


@pytest.fixture(scope="module")
def loaded(engine: Engine) -> dict[str, Answer]:
    """Answers behind rounded prefixes."""
    with counting(engine) as found:
        answers = {name: ask(engine, name, params=ONLY_READ) for name in ("five", "ten")}
    assert hit_tokens(found, "memory") == hit_tokens(found) == 320 + 640
    return answers


def namespaces(store: Store) -> dict[str, Namespace]:
    """By codec."""
    return {
        record.identity.codec: store.namespace(record.identity, record.layout)
        for record in store.namespaces()
    }


def chunks(folder: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Of each chunk: its prompt, exact bytes, and what must be left of them, by definition. What
    is stored rounded is compared with that."""
    with Store.open(folder, create=False) as store:
        both = namespaces(store)
        exact, rounded = both[""], both[INT8]
        plain = exact.layout
        assert rounded.layout.payload_bytes < 0.3 * plain.payload_bytes  # of float32
        for name in ("five", "ten"):
            refs = exact.chain(PROMPTS[name]).refs(), rounded.chain(PROMPTS[name]).refs()
            assert not {ref.key for ref in refs[0]} & {ref.key for ref in refs[1]}
            for one, other in zip(*refs, strict=True):
                outs = [bytearray(ns.layout.payload_bytes) for ns in (exact, rounded)]
                assert all(exact.get([one], [memoryview(outs[0])]))
                assert all(rounded.get([other], [memoryview(outs[1])]))
                told, left = payload_by_hand(INT8, outs[0], plain, rounded.layout)
                assert outs[1] == told, "what is stored is not what is exact, rounded"
                yield name, bytes(outs[0]), left


@pytest.fixture(scope="module")
def left(
    model: Path, folder: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine that does not round, whose store has under exact names what rounding leaves."""
    other = tmp_path_factory.mktemp("left") / "store"
    payloads: dict[str, list[bytes]] = {"five": [], "ten": []}
    for name, exact, back in chunks(folder):
        assert exact != back
        payloads[name].append(back)
    with Store.open(folder, create=False) as store:
        exact_kv = namespaces(store)[""]
        identity, layout = exact_kv.identity, exact_kv.layout
    with Store.open(other, memory_bytes="256MiB", disk_bytes="1GiB") as store:
        for name, some in payloads.items():
            ns = store.namespace(identity, layout)
            states = ns.put(ns.chain(PROMPTS[name]).refs(), [memoryview(one) for one in some])
            assert set(states) == {PutState.STORED}
        with start(model, other) as plain:
            yield plain
    remove_memory_of(other.parent)


def test_answers_are_those_behind_what_rounding_leaves(
    loaded: dict[str, Answer], left: Engine, truth: Truth
) -> None:
    """To the bit, by an engine that knows of no rounding."""
    for name, answer in loaded.items():
        with counting(left) as found:
            assert same(ask(left, name, params=ONLY_READ), answer)
        assert hit_tokens(found) == {"five": 320, "ten": 640}[name]
        assert not same(answer, truth[name]), "rounding leaves its mark"


def test_another_prompt_goes_on_from_a_rounded_prefix(engine: Engine, left: Engine) -> None:
    with counting(engine) as found:
        answer = ask(engine, "fork", params=ONLY_READ)
    assert hit_tokens(found) == 256
    assert same(answer, ask(left, "fork", params=ONLY_READ))


def test_from_disk(engine: Engine, folder: Path, loaded: dict[str, Answer]) -> None:
    for name, answer in loaded.items():
        to_disk_only(folder)
        with counting(engine) as found:
            assert same(ask(engine, name, params=ONLY_READ), answer)
        assert hit_tokens(found, "disk") == hit_tokens(found) > 0


def test_the_engine_computes_as_before(engine: Engine, truth: Truth) -> None:
    assert same(ask(engine, "five", params=NEVER), truth["five"])
