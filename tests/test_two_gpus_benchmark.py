"""What `benchmarks.two_gpus` asks of two engines and makes of their answers; none starts here."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import two_gpus
from benchmarks.messages import Answer
from benchmarks.prefix_bench import BEHIND_TOKENS
from benchmarks.two_gpus import AGAIN, ANSWER_TOKENS, COLD, FIRST, PREFILL, Handover


class Shared:
    """What both engines have stored; ``drops`` saves are lost, ``lies`` changes a last token."""

    def __init__(self, *, drops: int = 0, lies: bool = False) -> None:
        self.drops, self.lies = drops, lies
        self.stored: set[tuple[int, ...]] = set()


class FakeEngine:
    """Stores what it computes, unless told not to."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.own, self.computed = shared, set[tuple[int, ...]](), 0

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_tokens: int,
        kv_transfer_params: list[dict[str, Any] | None],
        timeout_s: float,
    ) -> list[Answer]:
        prompt = tuple(prompts[0])
        told = (kv_transfer_params[0] or {}).get("prefixstore", {})
        hit = prompt in self.own or (told.get("read", True) and prompt in self.shared.stored)
        self.own.add(prompt)
        self.computed += not hit
        if told.get("write", True) and not hit:
            if self.shared.drops:
                self.shared.drops -= 1
            else:
                self.shared.stored.add(prompt)
        tokens = [sum(prompt) % 97 + at for at in range(max_tokens)]
        tokens[-1] += hit and self.shared.lies
        cached, ms = (len(prompt) - BEHIND_TOKENS, 10.0) if hit else (0, 100.0)
        return [Answer(tokens, "", None, None, cached, ms, ms, 1, 1, "length", None)]

    def settle(self) -> bool:
        return True

    def reset_prefix_cache(self) -> bool:
        self.own.clear()
        return True


def handed_over(shared: Shared) -> tuple[Handover, Any, Any]:
    prefill: Any = FakeEngine(shared)
    decode: Any = FakeEngine(shared)
    handover = Handover([128, 256], 3)
    handover.run(prefill, decode)
    return handover, prefill, decode


def test_prompts_are_computed_cold_then_elsewhere_then_not_at_all() -> None:
    handover, prefill, decode = handed_over(Shared())
    rows = handover.rows()
    assert [(row["tokens"], row["case"]) for row in rows] == [
        (count, case) for count in (128, 256) for case in (COLD, PREFILL, FIRST, AGAIN)
    ]
    assert [row["n"] for row in rows] == [3] * 8, "the first of each length is not counted"
    assert [row["of_cold"] for row in rows[:4]] == [1.0, 1.0, 0.1, 0.1]
    assert prefill.computed == decode.computed == 8
    assert all(row["other_tokens"] == 0 for row in rows)


def test_what_was_dropped_is_computed_again() -> None:
    handover, prefill, _ = handed_over(Shared(drops=2))
    assert prefill.computed == 10
    assert all(row["cached_tokens"] for row in handover.rows() if row["case"] == FIRST)


def test_what_is_never_stored_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 of 128 tokens were handed over"):
        handed_over(Shared(drops=1000))


def test_another_answer_is_counted() -> None:
    handover, _, _ = handed_over(Shared(lies=True))
    found = {str(row["case"]): row["other_tokens"] for row in handover.rows()[:4]}
    assert found == {COLD: 0, PREFILL: 0, FIRST: 3, AGAIN: 3}
    assert ANSWER_TOKENS > 1


def test_each_engine_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [two_gpus.device_of(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [two_gpus.device_of(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["5", "3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 7, 9})
    bound = [two_gpus.device_of(i)["VLLM_CPU_OMP_THREADS_BIND"] for i in (0, 1)]
    assert bound == ["4,9", "7"]


def test_one_gpu_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        two_gpus.main([])
    assert "needs two GPUs" in capsys.readouterr().err
