"""What a blend's attention metadata is built with."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from connector import blend_engine


def settings() -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL, layers={"a": 1}),
    )


def test_a_slice_may_have_as_many_runs_as_rows() -> None:
    """Builders have buffers for max_num_seqs sequences; a scattered row is one by itself."""
    given = settings()
    before = deepcopy(given)
    ours = blend_engine._for_slices(given, 512)
    assert ours.scheduler_config.max_num_seqs == 512
    assert ours.compilation_config.cudagraph_mode is CUDAGraphMode.NONE
    assert ours.compilation_config.layers is given.compilation_config.layers
    assert given == before, "the engine's own settings stay"
    assert blend_engine._for_slices(given, 2).scheduler_config.max_num_seqs == 4


def test_a_plan_is_made_when_the_one_before_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's host memory for it would be written again before it has been read."""
    done: list[str] = []

    class Builder:
        def build(self, prefix: int, common: str) -> str:
            assert prefix == 0
            done.append(f"build {common}")
            return f"metadata of {common}"

    def marked(device: torch.device) -> Any:
        name = f"sent {sum(one.startswith('build') for one in done)}"
        return SimpleNamespace(synchronize=lambda: done.append(name))

    monkeypatch.setattr(blend_engine, "mark", marked)
    one = blend_engine.InTurn(Builder(), torch.device("cpu"))
    assert [one.build(0, name) for name in ("a", "b", "c")] == [
        "metadata of a", "metadata of b", "metadata of c",
    ]  # fmt: skip
    assert done == ["build a", "sent 1", "build b", "sent 2", "build c"]
