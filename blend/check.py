"""Whether blending suits a model and texts: distributions and KV against full prefills, no labels.

    sample = blend.sample.draw(pieces, tail_tokens=32)        # or blend.sample.of_requests(...)
    result = check(model, sample)
    result.passed, result.selector, result.budget, result.reason

Each prompt is several texts and, behind them, a tail that was never cached. Each text was encoded
alone; the first of a prompt is an exact prefix. At every token of the tail the next token's
distribution after a full prefill is compared with that after a blend, for each selector and
budget. Nothing says which answer is right, so what is measured is faithfulness to the model, not
its quality.

Holds the KV of the texts that prompts are made of, and that of two prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from blend import hf
from blend.errors import BlendError
from blend.hf import Placed, Source
from blend.judge import Figures, Result, judge
from blend.sample import Prompt, Sample
from blend.select import Needs, check_budget, selector_named

BUDGETS = (0.1, 0.15, 0.2, 0.3)
SELECTORS = ("staleness", "first", "deviation", "query", "random")
FLOOR_PROMPTS = 4  # that rounding is measured on
LAST_LAYERS = 0.25  # share of the layers whose KV error is shown: what is left at the end
Progress = Callable[[int, int], object]


def check(
    model: Any,
    sample: Sample,
    *,
    budgets: Sequence[float] = BUDGETS,
    selectors: Sequence[str] = SELECTORS,
    floor: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Measure and judge.

    Combinations whose choice alone costs more than the budget are left out. With ``floor``, the
    first prompts are run in bfloat16 too (a model in 16 bits: in float32), to show what rounding
    alone does; that takes memory for a second copy of the weights. ``progress`` gets (done, total).
    Raises BlendError and UnsupportedModelError.
    """
    config = hf.check_model(model)
    limit = getattr(config, "max_position_embeddings", None)
    _check_length(sample, limit)
    wanted = _combinations(sample, int(config.num_hidden_layers), budgets, selectors)
    used = sorted({text for prompt in sample.prompts for text in prompt.texts[1:]})
    total = len(used) + 1 + len(sample.prompts) * len(wanted)  # `all` is done once
    steps = _counted(total, progress)
    sources = {}
    for text in used:
        sources[text] = _measured(model, sample, text, limit)
        next(steps)
    found: dict[tuple[str, float], list[_Seen]] = {each: [] for each in wanted}
    noise: list[_Seen] = []
    for number, prompt in enumerate(sample.prompts):
        case = _Case(model, sample, prompt, sources)
        if floor and number < FLOOR_PROMPTS and (other := _other_dtype(model)) is not None:
            with _in_dtype(model, other):
                logits, key_values = case.full_prefill()
            noise.append(case.seen(logits, key_values, 0.0))
        next(steps)
        for name, budget in wanted:
            if name == "all" and number:
                continue  # one is enough to see whether the runner computes what the model does
            found[name, budget].append(case.blend(name, budget, number))
            next(steps)
    rows = [_figures(name, budget, seen) for (name, budget), seen in found.items()]
    rounding = _figures("rounding", 0.0, noise) if noise else None
    return judge(rows, rounding, sum(len(seen.kl) for seen in found["none", 0.0]))


def _check_length(sample: Sample, limit: int | None) -> None:
    """Refuse prompts longer than the model was made for: its answers there mean nothing."""
    for prompt in sample.prompts:
        parts = [sample.preamble, *(sample.texts[text] for text in prompt.texts), prompt.tail]
        length = sum(map(len, parts)) + prompt.answer
        if limit is not None and length > limit:
            raise BlendError(
                f"a prompt of {length} tokens; the model takes {limit}",
                "give fewer or shorter texts",
            )


def _counted(total: int, progress: Progress | None) -> Iterator[None]:
    for done in range(1, total + 1):
        if progress is not None:
            progress(done, total)
        yield


def _combinations(
    sample: Sample, layers: int, budgets: Sequence[float], selectors: Sequence[str]
) -> list[tuple[str, float]]:
    """What can be paid for in every prompt; `none` and `all` first."""
    if not sample.prompts or not budgets:
        raise BlendError("no prompts or no budgets to check", "give at least one of each")
    share = max(
        prompt.question / sum(len(sample.texts[text]) for text in prompt.texts[1:])
        for prompt in sample.prompts
    )
    wanted = [("none", 0.0), ("all", 1.0)]
    for name in selectors:
        selector = selector_named(name)
        if selector.needs is Needs.TRUTH:
            raise BlendError(f"{name} needs a full prefill", "it is for benchmarks only")
        for budget in sorted(set(budgets)):
            check_budget(selector_named("none"), budget, layers)  # raises unless it is a share
            least = share if selector.needs is Needs.QUERY else selector.full_layers / layers
            if name not in ("none", "all") and least < budget:
                wanted.append((name, budget))
    return wanted


def _measured(model: Any, sample: Sample, text: int, limit: int | None) -> Source:
    front = sample.preamble if len(sample.preamble) else None
    source = hf.encode(model, sample.texts[text], front)
    contexts = sample.contexts[text]
    if limit is not None:  # a prompt has more than this text, so some room is left
        room = limit - len(sample.preamble) - len(source.ids)
        contexts = [context[:room] for context in contexts]
    return hf.measure_staleness(model, source, contexts, front)


@torch.inference_mode()
def _answered(model: Any, front: Tensor, prompt: Prompt) -> Prompt:
    """The prompt with the model's greedy answer behind its tail, if it asks for one.

    The answer ends with the model's end-of-sequence token: what would follow means nothing.
    """
    if not prompt.answer:
        return prompt
    settings = getattr(model, "generation_config", None)
    end = getattr(settings, "eos_token_id", None)
    ends = {end} if isinstance(end, int) else set(end or ())
    ids = torch.cat([front, prompt.tail]).to(model.device)[None]
    cache, found = DynamicCache(), [prompt.tail]
    for _ in range(prompt.answer):
        ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        found.append(ids[0].cpu())
        if int(ids) in ends:
            break
    tail = torch.cat(found)
    scored = torch.zeros(len(tail), dtype=torch.bool)
    scored[len(prompt.tail) - 1 : -1] = True  # where each token of the answer is predicted
    return replace(prompt, tail=tail, scored=scored, answer=0)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of one prompt: ``kl`` float64 and ``same`` bool [scored tokens]; error of KV; charge."""

    kl: Tensor
    same: Tensor
    kv_error: float
    charged: float


class _Case:
    """One prompt and its full prefill."""

    def __init__(
        self, model: Any, sample: Sample, prompt: Prompt, sources: dict[int, Source]
    ) -> None:
        first, *others = (sample.texts[text] for text in prompt.texts)
        front = torch.cat([sample.preamble, first, *others])
        prompt = _answered(model, front, prompt)
        self._model, self._prompt = model, prompt
        self._ids = torch.cat([front, prompt.tail]).to(model.device)
        self._tail_start = len(self._ids) - len(prompt.tail)
        scored = prompt.scored
        self._scored = torch.ones(len(prompt.tail), dtype=torch.bool) if scored is None else scored
        self._logits, self._key_values = self.full_prefill()
        at = self._moved_from = len(sample.preamble) + len(first)
        keys, values = (
            [tensor[:, :at].transpose(0, 1) for tensor in side]
            for side in zip(*self._key_values, strict=True)
        )
        self._placed = [Placed(Source(self._ids[:at], 0, keys, values), 0, exact=True)]
        for text in prompt.texts[1:]:
            self._placed.append(Placed(sources[text], at))
            at += len(sources[text].ids)

    @torch.inference_mode()
    def full_prefill(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """float32 logits [scored, vocabulary]; K and V of a layer, [kv heads, tokens, size]."""
        out = self._model(self._ids[None], use_cache=True, logits_to_keep=len(self._prompt.tail))
        layers = [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]
        return out.logits[0].float().cpu()[self._scored], layers

    @torch.inference_mode()
    def blend(self, name: str, budget: float, seed: int) -> _Seen:
        """Blend what stands before the tail, then run the tail through the model as it is."""
        end = min(self._tail_start + self._prompt.question + 1, len(self._ids))
        cache, report = hf.prefill(
            self._model, self._ids[:end], self._placed, name, budget, seed=seed
        )
        before = [
            (layer.keys[:, :, : self._tail_start], layer.values[:, :, : self._tail_start])
            for layer in cache.layers
        ]
        kept = DynamicCache()
        for index, (keys, values) in enumerate(before):
            kept.update(keys, values, index)
        tail = self._ids[self._tail_start :]
        logits = self._model(tail[None], past_key_values=kept, use_cache=True).logits
        layers = [(keys[0], values[0]) for keys, values in before]
        return self.seen(logits[0].float().cpu()[self._scored], layers, report.charged)

    def seen(
        self, logits: Tensor, key_values: list[tuple[Tensor, Tensor]], charged: float
    ) -> _Seen:
        """Compare with the full prefill."""
        errors = []
        here = slice(self._moved_from, self._tail_start)
        count = max(1, round(LAST_LAYERS * len(key_values)))
        pairs = zip(key_values[-count:], self._key_values[-count:], strict=True)
        for found, truth in pairs:
            for one, other in zip(found, truth, strict=True):
                expected = other[:, here].float()
                change = (one[:, here].float() - expected).norm()
                errors.append(float(change / expected.norm().clamp_min(1e-20)))
        same = logits.argmax(-1) == self._logits.argmax(-1)
        return _Seen(divergence(self._logits, logits), same, fmean(errors), charged)


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """float64: KL(full || other) in nats over the last dimension of two tensors of logits.

    In float64: of two sure answers it is smaller than float32 can tell from 0.
    """
    expected, found = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def _figures(name: str, budget: float, seen: Sequence[_Seen]) -> Figures:
    kl = torch.cat([one.kl for one in seen])
    if not bool(kl.isfinite().all()):
        raise BlendError(
            f"distributions that cannot be compared ({name}): logits are not finite",
            "try another dtype, such as float32",
        )
    return Figures(
        selector=name,
        budget=budget,
        charged=fmean(one.charged for one in seen),
        kl_mean=max(0.0, float(kl.mean())),
        kl_p95=max(0.0, float(kl.quantile(0.95))),
        agreement=float(torch.cat([one.same for one in seen]).double().mean()),
        kv_error=fmean(one.kv_error for one in seen),
    )


def _other_dtype(model: Any) -> torch.dtype | None:
    """What to compare with, to see rounding; None for weights that are not floating point."""
    if not all(weight.is_floating_point() for weight in model.parameters()):
        return None
    return torch.bfloat16 if model.dtype == torch.float32 else torch.float32


@contextmanager
def _in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The model's weights in another dtype meanwhile; buffers (RoPE's frequencies) stay.

    The weights of before are kept, so what comes back is bit for bit what was there.
    """
    before = [(weight, weight.data) for weight in model.parameters()]
    try:
        for weight, data in before:
            weight.data = data.to(dtype)
        yield
    finally:
        for weight, data in before:
            weight.data = data
