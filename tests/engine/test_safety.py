"""A short run of `benchmarks.engine_safety`, and that it would notice what it is there for."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from benchmarks import engine_safety
from benchmarks.engine_safety import Run, judge
from benchmarks.messages import Answer, Request

SEED = int(os.environ.get("PREFIXSTORE_TEST_SEED", "3"))
REQUESTS = 20
ROUNDING = 1e-4


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_a_short_run() -> None:
    """Whether any is preempted, or blended, depends on when the faults come: not asked here."""
    names = ["alone", "blended"]
    runs, faults = engine_safety.run(REQUESTS, SEED, names)
    assert [line for one in runs for line in one.failures] == []
    bars = engine_safety.bars_of(runs, names)
    never = {"preemptions", "tokens reused elsewhere"}
    assert [bar.shortfall() for bar in bars if not bar.ok and bar.name not in never] == []
    assert faults.done.total() + faults.failed.total() > 0


def answer(token_ids: list[int], first: float = -1.0, second: float = -2.0) -> Answer:
    """One in which token 7 has the second log probability."""
    logprobs = [{token: first, 7: second} for token in token_ids]
    return Answer(token_ids, "", logprobs, None, 0, None, 0.0, None, 0, "length", None)


@pytest.mark.parametrize(
    ("given", "exact", "expected"),
    [
        (answer([1, 2]), True, "bits"),
        (answer([1]), True, "bits"),  # aborted
        (answer([]), True, "bits"),
        (answer([1, 2], -1.0 - ROUNDING / 2), False, "rounding"),
        (answer([1, 2], -1.0 - ROUNDING / 2), True, "wrong"),
        (answer([1, 2], -1.0 - 2 * ROUNDING), False, "wrong"),
        (answer([1, 7]), False, "wrong"),
        (answer([1, 9]), False, "wrong"),
    ],
)
def test_answers_are_judged(given: Answer, exact: bool, expected: str) -> None:
    assert judge(given, answer([1, 2, 3]), exact, ROUNDING).partition(":")[0] == expected


def test_a_token_as_good_as_the_best_is_a_tie() -> None:
    truth = answer([1, 2], -1.0, -1.0 - ROUNDING / 2)
    assert judge(answer([1, 7], -1.0, -1.0 - ROUNDING / 2), truth, False, ROUNDING) == "tie"


class Leaky:
    """An engine that keeps a block of each batch."""

    def __init__(self) -> None:
        self.free = 31

    def submit(self, requests: list[Request], **_: object) -> list[Answer]:
        self.free -= 1
        return [answer([1]) for _ in requests]

    def metrics(self, *_: str) -> dict[str, float]:
        return {"block_pool:free": self.free}

    def settle(self, _: float) -> bool:
        return False


def test_a_leaked_block_is_noticed() -> None:
    nobody: Any = None
    engine: Any = Leaky()
    run = Run("mixed", engine, nobody, {(5,): answer([1])}, ROUNDING)
    run.wave([Request([5])])
    assert run.counts == Counter(requests=1, finished=1, bits=1, leaked=1)
    assert "is left" in run.failures[0]
