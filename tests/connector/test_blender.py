"""Blends under way on a rank: one that fails while its load goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("vllm")

from connector.blending import Blender
from connector.messages import WHOLE, BlendCommand, BlendJob, BlendPiece
from connector.tally import Tally
from prefixstore.keys import ChunkRef

BLOCKS = [5, 6, 7, 8]
PIECE = BlendPiece(ChunkRef(b"k", b"", 0, b""), 0, 4, 4, 0)
JOB = BlendJob(list(range(16)), 4, BLOCKS, [PIECE], "all", 1.0, 1, 16)


def command(until: int = WHOLE, *, abort: bool = False) -> list[BlendCommand]:
    return [BlendCommand("r", 1, frozenset(), abort, until)]


@pytest.mark.parametrize("end", [WHOLE, 0], ids=["loaded", "gone"])
def test_one_that_fails_early_ends_with_its_load(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """Until then its blocks are written to, and nobody else may have them."""
    counts = Tally()
    loads: Any = SimpleNamespace(stop=lambda req_id: True)
    blender = Blender(cast(Any, SimpleNamespace(num_ranks=1)), 4, counts, 1, loads)
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
