"""Every parser against its corpus and seeded changes of it; the long runs are `benchmarks.fuzz`."""

from __future__ import annotations

import importlib.util
import os
import random

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_target import CORPORA, KEPT_BYTES_MAX, Finding, Target, smallest_cover
from benchmarks.fuzz_targets import TARGETS
from prefixstore import reading, registry, wire

SEED = int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))
CHANGES = 400  # of each target; of those that open an index for each, fewer
SLOW = {"index_pages": 40, "live_index": 150}
CORPORA_BYTES_MAX = 96 << 10


def findings_of(target: Target, changes: int) -> list[Finding]:
    """What the corpus and its changes find, the same each time."""
    rng, corpus = random.Random(SEED), target.corpus()
    inputs = corpus + [target.changed(rng.choice(corpus), rng) for _ in range(changes)]
    return [found for data in inputs if (found := target.check(data)) is not None]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_whatever_a_parser_is_given_it_keeps_its_contract(name: str) -> None:
    found = findings_of(TARGETS[name], SLOW.get(name, CHANGES))
    assert not found, f"{found[0].where}\n{found[0].text}\n{found[0].data!r}"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_is_good_is_taken(name: str) -> None:
    """Else a target would only ever look at how its parser refuses."""
    target = TARGETS[name]
    good = 0
    for seed in target.seeds():
        try:
            target.parse(seed)
            good += 1
        except target.contract:
            assert name in ("live_index", "index_pages"), "whose seeds are damage"
    assert good


def planted(target: str) -> set[str]:
    """Kinds of exceptions that are found."""
    return {found.where.split()[0] for found in findings_of(TARGETS[target], CHANGES)}


def test_an_exception_outside_of_the_contract_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_DAMAGE", (KeyError,))
    assert {"TypeError", "JSONDecodeError"} <= planted("namespace_record")


def test_a_checksum_that_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wire, "payload_is", lambda record, payload: True)
        assert planted("get") == {"AssertionError"}
    monkeypatch.setattr(reading, "checksum", lambda data: TARGETS["slot"].seeds()[0][:0])
    assert planted("slot") == set(), "no sum fits: nothing is served"
    real = reading.pieces_match
    monkeypatch.setattr("benchmarks.fuzz_records.pieces_match", lambda *a: not real(*a))
    assert planted("slot") == {"AssertionError"}


def test_the_corpora_are_small_and_named_for_targets() -> None:
    files = list(CORPORA.glob("*.txt"))
    assert {path.stem for path in files} <= set(TARGETS)
    assert sum(path.stat().st_size for path in files) <= CORPORA_BYTES_MAX


def test_a_corpus_is_cut_down_to_what_takes_new_ways() -> None:
    target = TARGETS["records"]
    inputs = [b"\0" + bytes(n) for n in range(40)] + [b"\2" + bytes(9), b"\2" + bytes(30)]
    kept = smallest_cover(target, inputs)
    assert len(kept) <= 2
    assert sum(map(len, kept)) <= KEPT_BYTES_MAX


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.timeout(60 * 60)
def test_ten_minutes_of_each_target() -> None:
    """``PREFIXSTORE_FUZZ_SECONDS`` makes it longer or shorter."""
    seconds = os.environ.get("PREFIXSTORE_FUZZ_SECONDS", "600")
    assert fuzz.main(["--seconds", seconds, "--jobs", str(os.cpu_count() or 1)]) == 0
