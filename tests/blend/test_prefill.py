"""Blending a Hugging Face model, compared with its own full prefill and with the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from blend import hf, recompute, reference
from blend.errors import BlendError, UnsupportedModelError
from blend.hf import Placed, Source
from blend.plan import Plan, Segment
from blend.recompute import Blend, Report
from blend.rope import Rope
from blend.select import SELECTORS, Needs, selector_named

transformers = pytest.importorskip("transformers")

SIZES: dict[str, int] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
}
PREAMBLE, GAP, TAIL = 3, 5, 6
LENGTHS = (20, 17, 23)


def make_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **{**TYPES.get(kind, {}), **more})
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # large enough that what a token attends to matters
            torch.nn.init.normal_(
                weight, 0, 0.5 if "embed" in name else 1.5 * weight.shape[1] ** -0.5
            )
    return model


def draw(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (count,), generator=generator)


class Case:
    """preamble + document 0 (exact) + document 1 + a gap + document 2 + a question."""

    def __init__(self, kind: str = "llama", *, measured: bool = True, **more: Any) -> None:
        self.model = make_model(kind, **more)
        self.preamble = draw(PREAMBLE, 1)
        self.sources: list[Source] = []
        for number, length in enumerate(LENGTHS):
            source = hf.encode(self.model, draw(length, 10 + number), self.preamble)
            if measured:
                source = hf.measure_staleness(self.model, source, [draw(31, 99)], self.preamble)
            self.sources.append(source)
        zero, one, two = self.sources
        gap, tail = draw(GAP, 2), draw(TAIL, 3)
        parts = [self.preamble, zero.ids, one.ids, gap, two.ids, tail]
        self.ids = torch.cat(parts)
        starts = torch.tensor([0] + [len(part) for part in parts]).cumsum(0).tolist()
        front = hf.encode(self.model, torch.cat([self.preamble, zero.ids]))
        self.placed = [
            Placed(front, 0, exact=True),
            Placed(one, starts[2]),
            Placed(two, starts[4]),
        ]

    def full(self) -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            cache = self.model(self.ids[None], use_cache=True).past_key_values
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def reused(self) -> reference.Reused:
        """The same prompt for the reference, its cached K rotated by the model's own tables."""
        tokens = len(self.ids) - 1
        candidates = torch.zeros(tokens, dtype=torch.bool)
        fresh = torch.ones(tokens, dtype=torch.bool)
        offsets = torch.zeros(tokens, dtype=torch.int64)
        staleness = torch.zeros(1, tokens)
        heads, size = SIZES["num_key_value_heads"], SIZES["head_dim"]
        empty = torch.zeros(1, heads, tokens, size)
        cached = [(empty.clone(), empty.clone()) for _ in range(SIZES["num_hidden_layers"])]
        for placed in self.placed:
            source, here = placed.source, slice(placed.start, placed.start + len(placed.source.ids))
            fresh[here] = False
            candidates[here] = not placed.exact
            offsets[here] = torch.arange(len(source.ids))
            if source.staleness is not None:
                staleness[0, here] = source.staleness
            alone = torch.cat([self.preamble, source.ids])[-(len(source.ids) + source.start) :]
            moved = self.encoded_at(
                alone if source.start else source.ids, source.start, placed.start
            )
            for index, (key, value) in enumerate(moved):
                cached[index][0][0, :, here], cached[index][1][0, :, here] = key, value
        return reference.Reused(self.ids[None, :-1], cached, candidates, fresh, offsets, staleness)

    def encoded_at(self, ids: Tensor, start: int, at: int) -> list[tuple[Tensor, Tensor]]:
        """K and V of ``ids[start:]`` computed with all positions shifted, so none is rotated."""
        with torch.inference_mode():
            positions = torch.arange(len(ids))[None] + (at - start)
            cache = self.model(ids[None], position_ids=positions, use_cache=True).past_key_values
        return [(layer.keys[0][:, start:], layer.values[0][:, start:]) for layer in cache.layers]


@lru_cache
def case_of(kind: str) -> Case:
    return Case(kind)


@pytest.fixture
def llama() -> Case:
    return case_of("llama")


def run(case: Case, selector: str, budget: float, **more: Any) -> tuple[Any, Report]:
    return hf.prefill(case.model, case.ids, case.placed, selector, budget, **more)


SOME = ("staleness", "first", "none", "all", "deviation", "query", "staleness-query")


@pytest.mark.parametrize("arrives", ["just in time", "sooner", "at once"])
@pytest.mark.parametrize("selector", SOME)
def test_a_step_needs_nothing_behind_what_it_says(
    llama: Case, selector: str, arrives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of KV that is to come there is garbage; when it comes makes no difference."""
    monkeypatch.setattr(recompute, "FIRST_ROWS", 2)
    at_once = selector_named(selector).needs is Needs.NOTHING
    budget = 1.0 if selector == "all" else 0.5
    plan, host, expected = plan_of(llama), host_of(llama), host_of(llama)
    with torch.inference_mode():
        blend = Blend(expected, plan, selector_named(selector), budget, slice_rows=8)
        for _ in blend.steps():
            pass
    places = torch.cat([torch.arange(p.start, p.start + len(p.source.ids)) for p in llama.placed])
    keys, values = host.keys.clone(), host.values.clone()
    host.keys[:, :, places] = host.values[:, :, places] = 1e3
    needs, rows, upto = [], [], 0
    with torch.inference_mode():
        blend = Blend(host, plan, selector_named(selector), budget, slice_rows=8)
        steps = blend.steps()
        while True:
            needs.append(blend.needed)
            sooner = plan.end if arrives == "at once" else 7 * (arrives == "sooner")
            before, upto = upto, max(upto, min(blend.needed + sooner, plan.end))
            now = places[(places >= before) & (places < upto)]
            host.keys[:, :, now], host.values[:, :, now] = keys[:, :, now], values[:, :, now]
            if (count := next(steps, None)) is None:
                break
            rows.append(count)
    report, slices = blend.report, rows[rows.index(0) + 1 :]
    assert report is not None
    assert sum(slices) == report.num_recomputed + report.num_fresh
    sizes = [2, 4, *[8] * len(slices)]
    assert slices[:-1] == sizes[: len(slices) - 1]
    assert not at_once or needs == sorted(needs)
    assert needs[-1] == plan.end
    assert (needs[0] == 0) is at_once
    assert torch.equal(host.keys, expected.keys)
    assert torch.equal(host.values, expected.values)


def plan_of(case: Case) -> Plan:
    parts = [
        Segment(p.start, len(p.source.ids), p.source.start, p.exact, p.source.staleness)
        for p in case.placed
    ]
    return Plan(len(case.ids) - 1, tuple(parts))


def host_of(case: Case) -> hf.HuggingFaceHost:
    """With the KV of all segments in place."""
    host = hf.HuggingFaceHost(case.model, case.ids[:-1])
    rope = Rope.from_config(case.model.config.to_dict())
    for placed in case.placed:
        host.place(rope, placed)
    return host


def truth(case: Case) -> Tensor:
    """Change of each candidate over all layers, from full prefills alone."""
    reused = case.reused()
    full = [(key[None, :, :-1], value[None, :, :-1]) for key, value in case.full()]
    layers = range(SIZES["num_hidden_layers"])
    changes = [reference.change(reused.cached, full, layer, reused.candidates) for layer in layers]
    return torch.stack(changes).sum(0)[0, reused.candidates]


@pytest.mark.parametrize("kind", TYPES)
def test_recomputing_all_is_a_full_prefill(kind: str) -> None:
    case = case_of(kind)
    cache, report = run(case, "all", 1.0)
    for layer, (key, value) in zip(cache.layers, case.full(), strict=True):
        torch.testing.assert_close(layer.keys[0], key[:, :-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.values[0], value[:, :-1], rtol=0, atol=2e-5)
    assert report.charged == 1.0
    assert report.num_recomputed == LENGTHS[1] + LENGTHS[2]
    assert report.num_fresh == GAP + TAIL - 1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("budget", "span"), [(0.6, 1), (0.75, 4)])
def test_key_values_are_the_references(kind: str, selector: str, budget: float, span: int) -> None:
    case = case_of(kind)
    more = {"true_deviation": truth(case)} if selector == "oracle" else {}
    cache, report = run(case, selector, budget, span=span, **more)
    expected = reference.blend(case.model, case.reused(), selector, budget, span=span)
    for layer, (key, value) in zip(cache.layers, expected.trace.key_values, strict=True):
        torch.testing.assert_close(layer.keys, key, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values, value, rtol=0, atol=1e-4)
    assert report.num_recomputed == int(expected.chosen.sum())
    assert report.charged == pytest.approx(expected.charged)


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"all"}))
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.45, 0.8, 1.0])
def test_a_budget_is_kept_and_used(llama: Case, selector: str, budget: float) -> None:
    rule = selector_named(selector)
    layers = SIZES["num_hidden_layers"]
    if rule.full_layers / layers > budget:
        with pytest.raises(BlendError, match=rf"{selector} computes 2 of 5 layers"):
            run(llama, selector, budget)
        return
    more = {"true_deviation": truth(llama)} if selector == "oracle" else {}
    _, report = run(llama, selector, budget, **more)
    query = (GAP + TAIL - 1) / (LENGTHS[1] + LENGTHS[2]) if rule.needs.value == "query" else 0.0
    assert report.charged <= max(budget, query) + 1e-9
    if selector != "none":  # one more token would have been too much
        assert max(budget, query) - report.charged < 1 / (LENGTHS[1] + LENGTHS[2]) + 1e-9


def test_slices_change_nothing(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Blend.__init__

    def small(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **{**more, "slice_rows": 7})

    for selector in ("staleness", "deviation", "query", "all"):
        whole, _ = run(llama, selector, 0.6)
        with monkeypatch.context() as patch:
            patch.setattr(Blend, "__init__", small)
            sliced, _ = run(llama, selector, 0.6)
        for one, other in zip(whole.layers, sliced.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=2e-5)


def test_generate_goes_on_from_a_blend(llama: Case) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cold = llama.model.generate(llama.ids[None], **options)
    cache, _ = run(llama, "all", 1.0)
    warm = llama.model.generate(llama.ids[None], past_key_values=cache, **options)
    assert torch.equal(cold, warm)
    assert llama.model.config._attn_implementation == "sdpa"


def test_an_exact_prefix_is_left_alone(llama: Case) -> None:
    cache, _ = run(llama, "all", 1.0)
    front = llama.placed[0].source
    for index, layer in enumerate(cache.layers):
        kept = layer.keys[0, :, : len(front.ids)].transpose(0, 1)
        assert torch.equal(kept, front.keys[index])


def test_unmeasured_sources_start_with_their_first_tokens() -> None:
    case = Case(measured=False)
    same, _ = run(case, "staleness", 0.3)
    first, _ = run(case, "first", 0.3)
    for one, other in zip(same.layers, first.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_a_text_encoded_behind_another_is_stale(llama: Case) -> None:
    """Zero at layer 0 (K and V depend on the token alone), above it at every token."""
    source = llama.sources[1]
    assert source.staleness is not None
    assert bool((source.staleness > 0).all())
    behind = hf.encode(llama.model, source.ids, torch.cat([llama.preamble, draw(31, 99)]))
    assert torch.equal(behind.values[0], source.values[0])
    again = hf.measure_staleness(llama.model, source, [source.ids[:0]], llama.preamble)
    assert again.staleness is not None
    assert float(again.staleness.max()) < 1e-8


def test_errors_say_what_is_wrong(llama: Case) -> None:
    with pytest.raises(BlendError, match="other tokens at 1 than"):
        hf.prefill(llama.model, llama.ids, [Placed(llama.sources[1], 1)])
    with pytest.raises(BlendError, match=r"no selector 'best'.* random, none, all\)$"):
        run(llama, "best", 0.2)
    with pytest.raises(BlendError, match=r"budget of 1\.5"):
        run(llama, "staleness", 1.5)
    with pytest.raises(BlendError, match="does not fit"):
        hf.prefill(llama.model, llama.ids, [llama.placed[1], llama.placed[1]])
    with pytest.raises(BlendError, match="needs a full prefill"):
        run(llama, "oracle", 0.2)
    with pytest.raises(BlendError, match="at least two"):
        hf.prefill(llama.model, llama.ids[:1], [])
    with pytest.raises(UnsupportedModelError, match="sliding-window"):
        hf.check_model(make_model("mistral", sliding_window=8))
    with pytest.raises(UnsupportedModelError, match="'gpt_neox'"):
        hf.check_model(make_model("gpt_neox"))
