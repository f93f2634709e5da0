"""What ranks tell the scheduler, put together."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm")

from connector.messages import StepMetadata, WorkerReport


def test_the_slower_rank_counts_and_any_trouble() -> None:
    one = WorkerReport(bandwidth={1: 10.0, 2: 5.0})
    two = WorkerReport(stalled=True, bandwidth={1: 7.0})
    three = WorkerReport(disabled="pages", bandwidth={2: 9.0})
    expected = WorkerReport(disabled="pages", stalled=True, bandwidth={1: 7.0, 2: 5.0})
    for a, b, c in itertools.permutations((one, two, three)):
        assert a.aggregate(b).aggregate(c) == expected
        assert a.aggregate(b.aggregate(c)) == expected


def test_aggregating_leaves_the_parts_alone() -> None:
    one, two = WorkerReport(bandwidth={1: 10.0}), WorkerReport(bandwidth={1: 7.0})
    one.aggregate(two)
    assert (one.bandwidth, two.bandwidth) == ({1: 10.0}, {1: 7.0})


def test_a_step_without_jobs() -> None:
    one, two = StepMetadata(), StepMetadata()
    assert one.idle
    assert one.loads is not two.loads
    assert one.saves is not two.saves
