"""Two engines at once on one folder: one stores while the other loads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.engine import Answer, Engine
from prefixstore import Store, admin
from tests.engine.support import (
    ONLY_READ,
    PROMPTS,
    Truth,
    ask,
    counted,
    same,
    start,
    totals,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

NAMES = [name for name in PROMPTS if name.startswith("batch")]
ROUNDS = 4


@pytest.fixture(scope="module")
def pair(model: Path, folder: Path, truth: Truth) -> Iterator[tuple[Engine, Engine]]:
    with start(model, folder) as one, start(model, folder) as other:
        yield one, other


def test_one_stores_while_the_other_loads(
    pair: tuple[Engine, Engine], folder: Path, truth: Truth
) -> None:
    writer, reader = pair

    def write() -> list[tuple[str, Answer]]:
        return [(name, ask(writer, name)) for name in NAMES]

    def read() -> list[tuple[str, Answer]]:
        return [(name, ask(reader, name, params=ONLY_READ)) for name in NAMES * ROUNDS]

    with ThreadPoolExecutor(2) as pool:
        written, found = pool.submit(write), pool.submit(read)
        for name, answer in written.result(120) + found.result(120):
            assert same(answer, truth[name]), name
    wait_for_chunks(folder, sum(len(PROMPTS[name]) // 64 for name in NAMES))
    for name in NAMES:  # whatever the order was: now everything is there
        answer = ask(reader, name, params=ONLY_READ)
        assert answer.cached_tokens == len(PROMPTS[name]) // 64 * 64
        assert same(answer, truth[name])


def test_both_store_the_same_at_once(
    pair: tuple[Engine, Engine], folder: Path, truth: Truth
) -> None:
    with Store.open(folder, create=False) as store:
        before = len(list(admin.list_chunks(store)))
    names = ["five", "ten", "fork"]
    with ThreadPoolExecutor(2) as pool:
        for name in names:
            for answer in pool.map(lambda engine, name=name: ask(engine, name), pair):
                assert same(answer, truth[name]), name
    for engine in pair:
        assert "save_errors" not in totals(engine)
        for name in names:
            assert same(ask(engine, name), truth[name])
    with Store.open(folder, create=False) as store:
        store.flush()
        assert len(list(admin.list_chunks(store))) == before + 5 + 10 + 3
        assert admin.verify(store).sound


def test_one_dies_and_the_other_loads_what_it_stored(
    pair: tuple[Engine, Engine], folder: Path, truth: Truth
) -> None:
    first, second = pair
    salt = {"prefixstore": {"salt": "dying"}}
    assert same(ask(first, "ten", params=salt), truth["ten"])
    counted(first)
    first.kill()
    answer = ask(second, "ten", params=salt)
    assert answer.cached_tokens == 640
    assert same(answer, truth["ten"])
