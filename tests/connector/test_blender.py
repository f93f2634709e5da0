"""Blends under way on a rank: one that fails while its load goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from blend import recompute
from connector import blending
from connector.blending import Blender
from connector.messages import WHOLE, BlendCommand, BlendJob, BlendPiece, LoadJob
from connector.tally import Tally
from prefixstore.keys import ChunkRef

BLOCKS = [5, 6, 7, 8]
PIECE = BlendPiece(ChunkRef(b"k", b"", 0, b""), 0, 4, 4, 0)
JOB = BlendJob(list(range(16)), 4, BLOCKS, [PIECE], "all", 1.0, 1, 16)


def command(until: int = WHOLE, *, abort: bool = False) -> list[BlendCommand]:
    return [BlendCommand("r", 1, frozenset(), abort, until)]


class Loads:
    """Loads that can be stopped at any time, and what was awaited of them."""

    def __init__(self) -> None:
        self.awaited: list[int] = []

    def awaits(self, req_id: str, position: int) -> None:
        self.awaited.append(position)

    def reached(self, req_id: str, position: int) -> None:
        raise AssertionError("none of them is a split's")

    def stop(self, req_id: str) -> bool:
        return True


def blender_of(counts: Tally | None = None, loads: Loads | None = None) -> Blender:
    """On an engine of one rank."""
    engine: Any = SimpleNamespace(num_ranks=1)
    return Blender(engine, 4, counts or Tally(), 1, loads or Loads())


@pytest.mark.parametrize("end", [WHOLE, 0], ids=["loaded", "gone"])
def test_one_that_fails_early_ends_with_its_load(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """Until then its blocks are written to, and nobody else may have them."""
    counts = Tally()
    blender = blender_of(counts)
    calls = []

    def broken(*args: Any) -> bool:
        calls.append(args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(blender, "_advance", broken)
    blender.loaded("r", JOB)
    for _ in range(2):
        blender.run(command(until=8))
        assert blender.take_finished() == set()
        assert blender.take_failed_blocks() == set()
    blender.loaded("r", JOB)  # now as a whole
    blender.run(command(end) if end else command(abort=True))
    assert blender.take_finished() == {"r"}
    assert blender.take_failed_blocks() == set(BLOCKS[1:])
    assert len(calls) == 1
    assert counts.take() == {"blends_failed": 1}
    blender.run(command())
    assert blender.take_finished() == set()


class Host:
    """Of two layers, that notes which rows they compute."""

    num_layers, device = 2, torch.device("cpu")

    def __init__(self, *_: Any) -> None:
        self.made.append(self)
        self.rows: list[list[int]] = []

    made: list[Host]

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        return positions

    def layer(self, index: int, rows: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        self.rows.append(rows.tolist())
        return state


@pytest.fixture
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "made", [], raising=False)
    monkeypatch.setattr(blending, "VllmHost", Host)


@pytest.mark.usefixtures("_hosts")
@pytest.mark.parametrize("selector", ["staleness", "all"])
def test_one_that_was_prepared_is_as_any_other(selector: str) -> None:
    """Nothing is computed before its KV is there, and what it lacks is left out of its plan."""
    pieces = [PIECE, BlendPiece(ChunkRef(b"l", b"", 0, b""), 0, 4, 8, 0)]
    job = BlendJob(list(range(16)), 4, BLOCKS, pieces, selector, 0.5, 1, 16)

    def rows_of(*, prepared: bool, failed: frozenset[int]) -> list[list[int]]:
        blender = blender_of()
        Host.made.clear()
        if prepared:
            blender.prepare([LoadJob("r", b"", [], [], 0, 1.0, job)])
            assert [host.rows for host in Host.made] == [[]]
        blender.loaded("r", job)
        blender.run([BlendCommand("r", 16, failed, abort=False)])
        assert len(Host.made) == 1 + (prepared and bool(failed))
        assert blender.take_finished() == {"r"}
        assert blender.take_failed_blocks() == set()
        assert not blender._prepared
        return Host.made[-1].rows

    for failed in (frozenset[int](), frozenset({1})):
        found = [rows_of(prepared=prepared, failed=failed) for prepared in (False, True)]
        assert found[0] == found[1] != []


@pytest.mark.usefixtures("_hosts")
@pytest.mark.parametrize("selector", ["deviation", "staleness-query"])
def test_one_that_chooses_by_what_is_loaded_waits_for_it(selector: str) -> None:
    blender = blender_of()
    job = BlendJob(list(range(16)), 4, BLOCKS, [PIECE], selector, 1.0, 1, 16)
    blender.prepare([LoadJob(name, b"", [], [], 0, 1.0, job) for name in "rs"])
    [host] = Host.made  # the second is planned when its turn comes
    assert host.rows == []
    blender.loaded("r", job)
    blender.run([BlendCommand("r", 1, frozenset(), abort=False, until=8)])
    assert host.rows == []


@pytest.mark.usefixtures("_hosts")
@pytest.mark.parametrize("prepared", [False, True])
def test_the_first_slices_are_small(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    monkeypatch.setattr(recompute, "FIRST_ROWS", 2)
    loads = Loads()

    def slices_of(*until: int) -> list[list[list[int]]]:
        """What was computed after each command, in the first layer."""
        loads.awaited.clear()
        blender = blender_of(loads=loads)
        Host.made.clear()
        if prepared:
            blender.prepare([LoadJob("r", b"", [], [], 0, 1.0, JOB)])
        blender.loaded("r", JOB)
        found = []
        for position in until:
            blender.run([BlendCommand("r", 16, frozenset(), False, position)])
            found.append(Host.made[-1].rows[:: Host.num_layers])
        assert blender.take_finished() == {"r"}
        return found

    every = list(range(4, 16))
    small = [every[:2], every[2:6], every[6:]]
    assert slices_of(WHOLE) == [small], "the same bits, however fast it arrives"
    assert loads.awaited == [6] * prepared
    assert slices_of(5, 8, 11, WHOLE) == [[], small[:1], small[:2], small]
    assert loads.awaited == [6] * prepared + [6, 10, 16], "what the next slice reads"


@pytest.mark.usefixtures("_hosts")
def test_one_that_has_more_slices_than_it_was_given_goes_on_with_any_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "FIRST_ROWS", 2)
    loads = Loads()
    blender = blender_of(loads=loads)
    blender.loaded("r", JOB)
    for _ in range(2):
        blender.run([BlendCommand("r", 1, frozenset(), abort=False, until=12)])
    assert loads.awaited == [0, 16], "of two slices there, then of the last, which is not"


def test_one_that_cannot_be_prepared_fails_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(blending, "VllmHost", broken)
    blender = blender_of()
    blender.prepare([LoadJob("r", b"", [], [], 0, 1.0, JOB)])
    blender.loaded("r", JOB)
    blender.run(command())
    assert blender.take_finished() == {"r"}
    assert blender.take_failed_blocks() == set(BLOCKS[1:])
