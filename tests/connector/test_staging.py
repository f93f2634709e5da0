"""The staging ring against a model of it: a list of what is out."""

from __future__ import annotations

import random
import threading
from collections import deque

import pytest
import torch

from connector.staging import StagingRing

UNIT_BYTES = 16


CPU = torch.device("cpu")

Parts = list[torch.Tensor]


def stamp(parts: Parts, value: int) -> None:
    for part in parts:
        part.fill_(value)


def stamped(parts: Parts, value: int) -> bool:
    return all(bool((part == value).all()) for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_like_a_queue_of_buffers(seed: int) -> None:
    """Units out never share memory: what was written to each is there when it comes back."""
    rng = random.Random(seed)
    units = rng.randrange(1, 12)
    ring = StagingRing(UNIT_BYTES, units, CPU)
    out: deque[tuple[int, Parts, int]] = deque()
    taken = refused = partial = 0
    for turn in range(400):
        if rng.random() < 0.55:
            count = rng.randrange(1, units + 3)
            free = units - sum(n for n, _, _ in out)
            parts = ring.take(count)
            count, fewer = min(count, free), count > free
            partial += fewer and count > 0
            refused += count == 0
            if count == 0:
                assert parts == []
                continue
            taken += 1
            assert sum(len(part) for part in parts) == count
            assert len(parts) <= 2
            assert all(one.shape[1] == UNIT_BYTES and one.is_contiguous() for one in parts)
            stamp(parts, turn % 251)
            out.append((count, parts, turn % 251))
        elif out:
            _, parts, value = out.popleft()
            assert stamped(parts, value)
            ring.give_back(parts)
    assert taken
    assert refused
    assert partial or units == 1


def sizes(parts: Parts) -> list[int]:
    return [len(part) for part in parts]


def test_as_many_as_are_free() -> None:
    ring = StagingRing(UNIT_BYTES, 3, CPU)
    assert ring.take(0) == []
    first = ring.take(2)
    assert sizes(first) == [2]
    second = ring.take(5)
    assert sizes(second) == [1]
    assert ring.take(1) == []
    ring.give_back(first)
    third = ring.take(5)
    assert sizes(third) == [2]
    ring.give_back(second)
    assert sizes(ring.take(1)) == [1]
    ring.give_back(third)
    assert sizes(ring.take(2)) == [2]


def test_around_the_end_there_are_two_parts() -> None:
    ring = StagingRing(UNIT_BYTES, 3, CPU)
    ring.give_back(ring.take(2))
    assert sizes(ring.take(3)) == [1, 2]


def test_a_taker_and_a_giver() -> None:
    """One thread takes and writes, another checks and gives back, as the connector does."""
    ring = StagingRing(UNIT_BYTES, 5, CPU)
    queue: deque[tuple[int, Parts]] = deque()
    wrong: list[int] = []
    done = threading.Event()

    def give() -> None:
        while not done.is_set() or queue:
            if queue:
                value, parts = queue.popleft()
                if not stamped(parts, value):
                    wrong.append(value)
                ring.give_back(parts)

    giver = threading.Thread(target=give)
    giver.start()
    rng, taken = random.Random(1), 0
    while taken < 100:
        parts = ring.take(rng.randrange(1, 5))
        if parts:
            taken += 1
            stamp(parts, taken % 251)
            queue.append((taken % 251, parts))
    done.set()
    giver.join(10)
    assert not giver.is_alive()
    assert not wrong
    assert sum(sizes(ring.take(5))) == 5
