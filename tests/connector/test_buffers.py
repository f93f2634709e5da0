"""The host memory of a thread that loads: on a GPU nothing is used again too early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from connector.buffers import BYTES, Buffers

UNIT = 1000


class FakeEvent:
    """Notes in ``waited`` when somebody waits for it."""

    waited: list[FakeEvent]

    def record(self, stream: Any) -> None:
        assert stream == "own"

    def synchronize(self) -> None:
        self.waited.append(self)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A device that is not there; returns the events that were waited for."""
    real, FakeEvent.waited = torch.empty, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "own")

    def empty(size: tuple[int, int], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    return FakeEvent.waited


def test_a_buffer_is_filled_again_once_the_pages_have_it(gpu: list[Any]) -> None:
    buffers = Buffers(torch.device("cuda"), UNIT)
    buffers.prepare()
    first, one = buffers.take(3), buffers.enqueued()
    second, two = buffers.take(3), buffers.enqueued()
    assert first.data_ptr() != second.data_ptr()
    assert gpu == [], "nothing had to be waited for"
    third = buffers.take(2)
    assert (third.data_ptr(), third.shape) == (first.data_ptr(), (2, UNIT))
    assert gpu == [one]
    buffers.drain()
    assert gpu[1:] == [one, two] or gpu[1:] == [two, one]


def test_a_cpu_has_one_and_waits_for_nothing() -> None:
    buffers = Buffers(torch.device("cpu"), UNIT)
    first = buffers.take(4)
    assert buffers.enqueued() is None
    assert buffers.take(4).data_ptr() == first.data_ptr()
    buffers.drain()


@pytest.mark.parametrize(("unit", "fits"), [(UNIT, 64), (BYTES // 4, 4), (BYTES * 2, 1)])
def test_what_fits(unit: int, fits: int) -> None:
    buffers = Buffers(torch.device("cpu"), unit)
    assert buffers.chunks == fits
    assert buffers.take(fits).shape == (fits, unit)


def test_one_of_two_is_enough(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    made: list[torch.Tensor] = []

    def scarce(size: tuple[int, int], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        if made:
            raise RuntimeError("no memory")
        made.append(real(size, dtype=dtype, pin_memory=pin_memory))
        return made[0]

    monkeypatch.setattr(torch, "empty", scarce)
    buffers = Buffers(torch.device("cuda"), UNIT)
    buffers.prepare()
    for _ in range(3):
        buffers.take(1)
        buffers.enqueued()
    assert len(gpu) == 2
