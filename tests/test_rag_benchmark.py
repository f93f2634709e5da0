"""What `benchmarks.rag` asks of engines and makes of their answers; no engine starts here."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks import rag
from benchmarks.messages import Answer, Request
from benchmarks.rag_trace import QUESTION_TOKENS, SYSTEM_TOKENS, Trace, highest_rate, percentile

TOKENS, FEWEST, MOST = 32, 2, 4


def made(documents: int = 8, zipf: float = 1.0) -> Trace:
    return Trace(documents, TOKENS, zipf, FEWEST, MOST)


def documents_of(trace: Trace, prompt: list[int]) -> list[int]:
    """Which documents a prompt has, in their order; -1 for what is none."""
    inner = prompt[SYSTEM_TOKENS:-QUESTION_TOKENS]
    parts = [inner[at : at + TOKENS] for at in range(0, len(inner), TOKENS)]
    return [trace.documents.index(part) if part in trace.documents else -1 for part in parts]


def test_prompts_are_documents_in_any_order_and_a_new_question() -> None:
    trace = made()
    arrivals = trace.arrivals(1, 300, 5.0)
    drawn = Counter[int]()
    for one in arrivals:
        found = documents_of(trace, one.prompt)
        assert FEWEST <= len(found) == len(set(found)) <= MOST
        assert -1 not in found
        assert one.prompt[:SYSTEM_TOKENS] == trace.system
        assert len(one.prompt) <= trace.longest
        drawn.update(found)
    assert len({tuple(one.prompt[-QUESTION_TOKENS:]) for one in arrivals}) == 300
    assert drawn[0] > 2 * drawn[7] > 0, "the first are popular"
    assert any(documents_of(trace, one.prompt)[0] > 3 for one in arrivals)


def test_arrivals_are_poisson_and_prompts_do_not_depend_on_the_rate() -> None:
    slow, fast = made().arrivals(1, 2000, 2.0), made().arrivals(1, 2000, 8.0)
    assert [one.prompt for one in slow] == [one.prompt for one in fast]
    assert [one.seconds for one in slow] == pytest.approx([4 * one.seconds for one in fast])
    gaps = [after.seconds - before.seconds for before, after in pairwise(slow)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.1)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.25, rel=0.2)
    assert [one.prompt for one in made().arrivals(2, 5, 2.0)] != [one.prompt for one in slow[:5]]


def test_a_trace_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="2 to 9 of 8 documents"):
        Trace(8, TOKENS, 1.0, 2, 9)


@pytest.mark.parametrize(
    ("limit", "best", "tried"),
    [
        (0.0, None, [1, 0.5, 0.25]),
        (0.6, 0.5, [1, 0.5, 0.75]),
        (3.2, 3.0, [1, 2, 4, 3, 3.5]),
        (9.0, 4.0, [1, 2, 4]),
    ],
)
def test_the_highest_rate_is_found(limit: float, best: float | None, tried: list[float]) -> None:
    rates, numbers = [], []

    def keeps(number: int, rate: float) -> bool:
        numbers.append(number)
        rates.append(rate)
        return rate <= limit

    assert highest_rate([1, 2, 4], 2, keeps) == best
    assert rates == tried
    assert len(set(numbers)) == len(numbers)
    assert all(
        numbers[rates.index(rate)] == at for at, rate in enumerate([1, 2, 4]) if rate in rates
    )


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 201)]
    assert (percentile(values, 50), percentile(values, 99)) == (100.0, 198.0)
    assert percentile([3.0, 1.0], 99) == 3.0


class FakeEngine:
    """Serves one request after the other, ``busy_s`` each; the first documents it is asked for
    are only stored the second time. ``lies``: says another token."""

    def __init__(self, busy_s: float, *, lies: bool = False, forgets: bool = False) -> None:
        self.busy_s, self.lies, self.forgets = busy_s, lies, forgets
        self.asked = Counter[tuple[int, ...]]()

    def generate(self, prompts: list[list[int]], **_: Any) -> list[Answer]:
        key = tuple(prompts[0])
        self.asked[key] += 1
        cached = len(key) - 1 if self.asked[key] > 1 and not self.forgets else 0
        return [self.answer(cached, 0.0)]

    def submit(self, requests: list[Request], **_: Any) -> list[Answer]:
        answers, free = [], 0.0
        for request in requests:
            assert request.arrival_s is not None
            free = max(free, request.arrival_s) + self.busy_s
            answers.append(self.answer(SYSTEM_TOKENS, free - request.arrival_s))
        return answers

    def answer(self, cached: int, seconds: float) -> Answer:
        ms = 1000 * seconds
        token = 7 if self.lies else 5
        return Answer([token], "", None, None, cached, ms, ms, 1, 1, "length", None)

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(rag, "share_quickest", lambda engines: {})


def bench_of(in_time: str = "0.99", **engines: Any) -> rag.Bench:
    given = ["--requests", "60", "--in-prompt", "2", "4", "--slo-factor", "2", "--in-time", in_time]
    args = rag.parse(["--variants", *engines, *given])
    bench = rag.Bench(made(), args)
    for name, engine in engines.items():
        bench.run(engine, rag.VARIANTS[name])
    return bench


def test_some_may_come_late() -> None:
    best = [float(str(bench_of(share, none=FakeEngine(0.1)).rows()[0]["best_per_s"]))
            for share in ("0.99", "0.8")]  # fmt: skip
    assert best[1] > best[0]


def test_a_faster_variant_keeps_a_higher_rate() -> None:
    bench = bench_of(
        none=FakeEngine(0.1), exact=FakeEngine(0.02), blend=FakeEngine(0.02, lies=True)
    )
    assert (bench.alone_ms, bench.slo_ms) == pytest.approx((100.0, 200.0))
    rows = bench.rows()
    best = {str(row["variant"]): float(str(row["best_per_s"])) for row in rows}
    assert best[rag.EXACT] > 2 * best[rag.NONE]
    for row in rows:
        assert row["in_time"] == (float(str(row["p99_ms"])) <= 200.0)
        if row["rate_per_s"] == row["best_per_s"]:
            assert row["in_time"]
    first = {row["variant"]: row for row in reversed(rows)}
    grid = {row["rate_per_s"] for row in rows if row["variant"] == rag.NONE}
    assert all(first[name]["rate_per_s"] in grid for name in (rag.EXACT, rag.BLEND))
    compared = {name: [0, 0] for name in (rag.NONE, rag.EXACT, rag.BLEND)}
    for row in rows:
        compared[str(row["variant"])][0] += int(str(row["compared"]))
        compared[str(row["variant"])][1] += int(str(row["other_first"]))
    assert compared[rag.EXACT][0] >= 60
    assert compared[rag.EXACT][1] == compared[rag.NONE][1] == 0
    assert compared[rag.BLEND][1] == compared[rag.BLEND][0] > 0


def test_documents_that_are_never_stored_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rag, "DEADLINE_S", 0.05)
    with pytest.raises(RuntimeError, match="8 documents were not stored"):
        bench_of(exact=FakeEngine(0.1, forgets=True))


def test_no_cache_comes_first_and_the_peer_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rag.parse(["--variants", "blend", "none"]).variants == ["none", "blend"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "native" not in rag.parse([]).variants
    with pytest.raises(SystemExit):
        rag.parse(["--variants", "native"])
    assert "needs a GPU" in capsys.readouterr().err
