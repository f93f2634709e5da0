"""The staging ring against a model of it: a list of what is out."""

from __future__ import annotations

import random
import threading
from collections import deque

import pytest
import torch

from connector.staging import StagingRing

UNIT_BYTES = 16


def stamp(parts: list[torch.Tensor], value: int) -> None:
    for part in parts:
        part.fill_(value)


@pytest.mark.parametrize("seed", range(20))
def test_like_a_queue_of_buffers(seed: int) -> None:
    """Units out never share memory: what was written to each is there when it comes back."""
    rng = random.Random(seed)
    units = rng.randrange(1, 12)
    ring = StagingRing(UNIT_BYTES, units, pinned=False)
    out: deque[tuple[int, list[torch.Tensor]]] = deque()
    taken = refused = 0
    for turn in range(400):
        if rng.random() < 0.55:
            count = rng.randrange(1, units + 3)
            free = units - sum(n for n, _ in out)
            parts = ring.take(count)
            assert (parts is None) == (count > free)
            if parts is None:
                refused += 1
                continue
            taken += 1
            assert sum(len(part) for part in parts) == count
            assert len(parts) <= 2
            assert all(part.shape[1] == UNIT_BYTES and part.is_contiguous() for part in parts)
            stamp(parts, turn % 251)
            out.append((count, parts))
            parts.append(torch.tensor([turn % 251]))
        elif out:
            _, held = out.popleft()
            *parts, value = held
            assert all(bool((part == value).all()) for part in parts)
            ring.give_back(parts)
    assert taken
    assert refused


def test_a_request_for_more_than_there_is() -> None:
    ring = StagingRing(UNIT_BYTES, 3, pinned=False)
    assert ring.take(4) is None
    whole = ring.take(3)
    assert whole is not None
    assert ring.take(1) is None
    ring.give_back(whole)
    assert ring.take(3) is not None


def test_a_taker_and_a_giver() -> None:
    """One thread takes and writes, another checks and gives back, as the connector does."""
    ring = StagingRing(UNIT_BYTES, 5, pinned=False)
    queue: deque[tuple[int, list[torch.Tensor]]] = deque()
    wrong: list[int] = []
    done = threading.Event()

    def give() -> None:
        while not done.is_set() or queue:
            if queue:
                value, parts = queue.popleft()
                if not all(bool((part == value).all()) for part in parts):
                    wrong.append(value)
                ring.give_back(parts)

    giver = threading.Thread(target=give)
    giver.start()
    rng, taken = random.Random(1), 0
    while taken < 500:
        parts = ring.take(rng.randrange(1, 5))
        if parts is not None:
            taken += 1
            stamp(parts, taken % 251)
            queue.append((taken % 251, parts))
    done.set()
    giver.join(10)
    assert not giver.is_alive()
    assert not wrong
    assert ring.take(5) is not None
