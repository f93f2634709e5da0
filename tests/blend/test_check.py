"""The label-free check, against the slow reference and models whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import kl_div

from blend import hf, reference
from blend.check import _answered, check, divergence
from blend.errors import BlendError, UnsupportedModelError
from blend.judge import Figures, Result, faithful, judge
from blend.sample import Prompt, Sample, draw, of_requests
from prefixstore.warm_contexts import CONTEXT_TOKENS, CONTEXTS, Contexts
from tests.blend.test_prefill import draw as tokens
from tests.blend.test_prefill import make_model

CSMQAR = Path(__file__).resolve().parents[2] / "models" / "csmqar-5m"
TAIL = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def pieces(count: int, length: int = 30) -> list[Tensor]:
    return [tokens(length + number, 40 + number) for number in range(count)]


def sample(prompts: int = 3) -> Sample:
    return draw(
        pieces(9), tail_tokens=TAIL, prompts=prompts, texts_per_prompt=3, preamble=tokens(2, 1)
    )


# ------------------------------------------------------------------ the figures
@torch.inference_mode()
def one_by_reference(model: Any, given: Sample, selector: str, budget: float) -> dict[str, float]:
    """KL, agreement, KV error of one prompt, from `blend.reference` and torch's own KL."""
    [prompt] = given.prompts
    parts = [given.preamble, *(given.texts[text] for text in prompt.texts), prompt.tail]
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
    ids = torch.cat(parts)[None]
    length, front = ids.shape[1], len(given.preamble)
    trace = reference.forward(model, ids)
    cached = [(key.clone(), value.clone()) for key, value in trace.key_values]
    candidates, fresh = (torch.zeros(length, dtype=torch.bool) for _ in range(2))
    fresh[starts[-2] :] = True
    offsets, staleness = torch.zeros(length, dtype=torch.int64), torch.zeros(1, length)
    for number, text in list(enumerate(prompt.texts))[1:]:
        here = slice(starts[number + 1], starts[number + 2])
        candidates[here] = True
        offsets[here] = torch.arange(len(given.texts[text]))
        alone = torch.cat([given.preamble, given.texts[text]])
        positions = torch.arange(len(alone))[None] + here.start - front
        # At its place at once, so that nothing is rotated.
        moved = model(alone[None], position_ids=positions, use_cache=True).past_key_values
        for (key, value), layer in zip(cached, moved.layers, strict=True):
            key[:, :, here], value[:, :, here] = (
                layer.keys[:, :, front:],
                layer.values[:, :, front:],
            )
        source = hf.encode(model, given.texts[text], given.preamble)
        source = hf.measure_staleness(model, source, given.contexts[text], given.preamble)
        assert source.staleness is not None
        staleness[0, here] = source.staleness
    reused = reference.Reused(ids, cached, candidates, fresh, offsets, staleness)
    found = reference.blend(model, reused, selector, budget).trace
    full, other = (each.logits[0, starts[-2] :].double() for each in (trace, found))
    errors = [
        float((one[:, :, candidates] - two[:, :, candidates]).norm() / two[:, :, candidates].norm())
        for one, two in zip(found.key_values[-1], trace.key_values[-1], strict=True)
    ]
    kl = kl_div(other.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none")
    return {
        "kl_mean": float(kl.sum(-1).mean()),
        "agreement": float((full.argmax(-1) == other.argmax(-1)).double().mean()),
        "kv_error": sum(errors) / 2,
    }


@pytest.mark.parametrize(
    ("selector", "budget"),
    [("none", 0.0), ("staleness", 0.3), ("first", 0.3), ("deviation", 0.6), ("all", 1.0)],
)
def test_figures_are_the_references(model: Any, selector: str, budget: float) -> None:
    given = sample(prompts=1)
    selectors = [] if selector in ("none", "all") else [selector]
    result = check(model, given, budgets=[budget or 0.5], selectors=selectors, floor=False)
    found = result.row(selector, budget)
    expected = one_by_reference(model, given, selector, budget)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert found.charged <= budget
    assert result.positions == TAIL


def test_recomputing_all_is_a_full_prefill_and_reuse_is_not(model: Any) -> None:
    result = check(model, sample(), budgets=[0.2], selectors=["random"])
    assert result.row("all", 1.0).kl_mean < 1e-6
    assert result.row("all", 1.0).agreement == 1.0
    assert result.row("none", 0.0).kl_mean > 0.05
    assert result.positions == 3 * TAIL
    assert result.floor is not None
    assert 1e-7 < result.floor.kl_mean < result.row("none", 0.0).kl_mean


def test_texts_that_cannot_see_each_other_are_independent() -> None:
    """Without attention's output nothing of another text reaches a token."""
    model = make_model("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    result = check(model, sample(), budgets=[0.3, 0.1])
    assert result.row("none", 0.0).kl_mean < 1e-6
    assert (result.passed, result.independent) == (True, True)
    assert (result.selector, result.budget) == ("staleness", 0.1)
    assert "hardly depend on each other" in result.reason


def test_a_model_that_mixes_all_texts_fails(model: Any) -> None:
    result = check(model, sample(), budgets=[0.1], selectors=["staleness", "random"])
    assert (result.passed, result.selector, result.budget) == (False, "", 0.0)
    assert not result.independent
    assert "no selector stays close" in result.reason


def test_what_cannot_be_paid_is_left_out(model: Any) -> None:
    """`deviation` computes 2 of 5 layers; the question is 2 tokens to about 50."""
    result = check(model, sample(), budgets=[0.03, 0.3, 0.5], floor=False)
    rows = {(row.selector, row.budget) for row in result.rows}
    assert {budget for name, budget in rows if name == "deviation"} == {0.5}
    assert {budget for name, budget in rows if name == "query"} == {0.3, 0.5}
    assert {budget for name, budget in rows if name == "first"} == {0.03, 0.3, 0.5}
    assert all(row.charged <= row.budget for row in result.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_left_as_they_were(dtype: torch.dtype) -> None:
    model = make_model("qwen3").to(dtype)
    before = [weight.detach().clone() for weight in model.parameters()]
    check(model, sample(prompts=1), budgets=[0.2], selectors=["first"])
    assert model.dtype == dtype
    for weight, kept in zip(model.parameters(), before, strict=True):
        assert weight.dtype == dtype
        assert torch.equal(weight, kept)


def test_progress_ends_at_its_total(model: Any) -> None:
    told: list[tuple[int, int]] = []
    check(model, sample(), budgets=[0.2], selectors=["first"], progress=lambda *at: told.append(at))
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))
    assert len({total for _, total in told}) == 1


def test_only_scored_positions_count(model: Any) -> None:
    given = sample(prompts=1)
    one = torch.zeros(TAIL, dtype=torch.bool)
    one[3] = True
    some = replace(given, prompts=[replace(given.prompts[0], scored=one)])
    rest = replace(given, prompts=[replace(given.prompts[0], scored=~one)])
    kl = [
        check(model, each, budgets=[0.2], selectors=[], floor=False).row("none", 0.0).kl_mean
        for each in (given, some, rest)
    ]
    assert kl[0] == pytest.approx((kl[1] + (TAIL - 1) * kl[2]) / TAIL)
    assert kl[1] != pytest.approx(kl[2])


def test_divergence_of_known_distributions() -> None:
    full = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log() + 3.0
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    torch.testing.assert_close(
        divergence(full, other), torch.stack([expected, torch.tensor(0.0)]).double(),
        rtol=0, atol=1e-6,
    )  # fmt: skip


def test_errors_say_what_is_wrong(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="'gpt_neox'"):
        check(make_model("gpt_neox"), sample())
    with pytest.raises(BlendError, match="for benchmarks only"):
        check(model, sample(), selectors=["oracle"])
    with pytest.raises(BlendError, match="no selector 'best'"):
        check(model, sample(), selectors=["best"])
    with pytest.raises(BlendError, match=r"budget of 1\.5"):
        check(model, sample(), budgets=[1.5])
    with pytest.raises(BlendError, match="no prompts or no budgets"):
        check(model, sample(), budgets=[])
    short = make_model("llama")
    short.config.max_position_embeddings = 40
    with pytest.raises(BlendError, match=r"a prompt of \d+ tokens; the model takes 40"):
        check(short, sample())
    broken = make_model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(BlendError, match="not finite"):
        check(broken, sample(), budgets=[0.2])


# ------------------------------------------------------------------ the sample
def test_a_prompt_ends_with_what_follows_its_last_text() -> None:
    texts = pieces(9)
    made = draw(texts, tail_tokens=TAIL, prompts=7, texts_per_prompt=3)
    assert len(made.prompts) == 7
    for prompt in made.prompts:
        assert len(set(prompt.texts)) == 3
        last = prompt.texts[-1]
        assert torch.equal(torch.cat([made.texts[last], prompt.tail]), texts[last])
        assert 1 <= prompt.question < TAIL
    assert len({prompt.texts[-1] for prompt in made.prompts}) == 7
    again = draw(texts, tail_tokens=TAIL, prompts=7, texts_per_prompt=3)
    other = draw(texts, tail_tokens=TAIL, prompts=7, texts_per_prompt=3, seed=1)
    assert [p.texts for p in again.prompts] == [p.texts for p in made.prompts]
    assert [p.texts for p in other.prompts] != [p.texts for p in made.prompts]


def test_contexts_are_texts_of_no_prompt_if_there_are_enough() -> None:
    """All tokens of a text are its own here, so that it is found wherever it is."""
    texts = [torch.full((20,), number) for number in range(12)]
    for count, shared in ((12, False), (6, True)):
        made = draw(texts[:count], tail_tokens=TAIL, prompts=4, texts_per_prompt=3)
        assert made.shared_contexts is shared
        used = {text for prompt in made.prompts for text in prompt.texts}
        for text in {text for prompt in made.prompts for text in prompt.texts[1:]}:
            assert len(made.contexts[text]) == CONTEXTS
            for context in made.contexts[text]:
                behind = set(context.tolist())
                assert text not in behind
                assert shared or not behind & used


def test_contexts_are_those_that_warming_measures_behind() -> None:
    texts = [tokens(700 + number, number) for number in range(6)]
    made = draw(texts, tail_tokens=TAIL, prompts=4, texts_per_prompt=3)
    assert made.shared_contexts  # so that all other texts may be in them, as when warming
    warming = Contexts([text.tolist() for text in made.texts], 64)
    for text in {text for prompt in made.prompts for text in prompt.texts[1:]}:
        assert [context.tolist() for context in made.contexts[text]] == warming.of(text)
        assert {len(context) for context in made.contexts[text]} == {CONTEXT_TOKENS}
    pairs = [(texts[at : at + 2], tokens(3, 1)) for at in (0, 2, 4)]
    asked = of_requests(pairs, answer=2)
    others = [text.tolist() for text in (texts[0], *texts[2:])]  # all but the one beside it
    warming = Contexts([texts[1].tolist(), *others[1:]], 64)
    assert [context.tolist() for context in asked.contexts[1]] == warming.of(0)


def test_contexts_are_cut_to_what_the_model_takes() -> None:
    model = make_model("llama")
    texts = [tokens(100 + number, number) for number in range(12)]
    given = draw(texts, tail_tokens=TAIL, prompts=2, texts_per_prompt=3, preamble=tokens(2, 1))
    model.config.max_position_embeddings = 340
    lengths: list[int] = []
    encode = hf.encode

    def counted(model: Any, ids: Tensor, front: Tensor | None = None) -> Any:
        lengths.append(len(ids) + (0 if front is None else len(front)))
        return encode(model, ids, front)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hf, "encode", counted)
        check(model, given, budgets=[0.3], selectors=["staleness"], floor=False)
    assert max(lengths) == 340


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(BlendError, match="no other document"):
        draw([tokens(30, 1)] * 9, tail_tokens=TAIL, texts_per_prompt=3)
    with pytest.raises(BlendError, match="3 texts that are long enough; 4 are needed"):
        draw(pieces(3), tail_tokens=TAIL, texts_per_prompt=3)
    with pytest.raises(BlendError, match="at least one prompt"):
        draw(pieces(9), tail_tokens=TAIL, texts_per_prompt=1)


def test_requests_are_compared_over_the_models_own_answer(model: Any) -> None:
    texts, question = pieces(4), tokens(5, 2)
    given = of_requests([(texts[:3], question), (texts[1:], question)], answer=6)
    assert [prompt.texts for prompt in given.prompts] == [(0, 1, 2), (1, 2, 3)]
    answered = _answered(model, torch.cat(texts[:3]), given.prompts[0])
    ids = torch.cat([*texts[:3], question])[None]
    more: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    truth = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **more)
    assert torch.equal(answered.tail, truth[0, -11:])
    assert answered.scored is not None
    assert answered.scored.tolist() == [False] * 4 + [True] * 6 + [False]
    result = check(model, given, budgets=[0.3], selectors=["query"], floor=False)
    assert result.positions == 12
    assert result.row("all", 1.0).agreement == 1.0
    by_hand = replace(given, prompts=[answered])
    one = replace(given, prompts=given.prompts[:1])
    assert check(model, one, budgets=[0.3], floor=False).rows == (
        check(model, by_hand, budgets=[0.3], floor=False).rows
    )


@pytest.mark.parametrize("number", [0, 2, 5])
@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_where_the_model_ends_it(number: int, several: bool) -> None:
    model = make_model("llama")
    texts, question = pieces(3), tokens(5, 2)
    given = of_requests([(texts, question)], answer=6)
    model.generation_config = None  # as of a model that was made by hand
    whole = _answered(model, torch.cat(texts), given.prompts[0]).tail[5:].tolist()
    model.generation_config = transformers.GenerationConfig()
    assert _answered(model, torch.cat(texts), given.prompts[0]).tail[5:].tolist() == whole
    end = whole[number]
    length = whole.index(end) + 1
    model.generation_config.eos_token_id = [-1, end] if several else end
    answered = _answered(model, torch.cat(texts), given.prompts[0])
    assert answered.tail[5:].tolist() == whole[:length]
    assert answered.scored is not None
    assert answered.scored.tolist() == [False] * 4 + [True] * length + [False]
    result = check(model, given, budgets=[0.5], selectors=[], floor=False)
    assert result.positions == length


def test_contexts_of_requests_come_from_other_requests() -> None:
    texts = [torch.full((20,), number) for number in range(6)]
    question = tokens(3, 1)
    given = of_requests([(texts[:3], question), (texts[2:], question)], answer=2)
    assert given.shared_contexts  # text 2 stands beside all others
    assert set(torch.cat(given.contexts[1]).tolist()) <= {3, 4, 5}
    assert set(torch.cat(given.contexts[4]).tolist()) <= {0, 1}
    assert given.contexts[0] == []  # an exact prefix wherever it stands
    given = of_requests([(texts[:3], question), (texts[3:], question)], answer=2)
    assert not given.shared_contexts
    for texts_of, message in (
        ([texts[0]], "1 texts and 3"), ([texts[0], texts[0]], "2 texts and 3"),
        ([texts[0], texts[0][:0]], "empty text"),
    ):  # fmt: skip
        with pytest.raises(BlendError, match=message):
            of_requests([(texts_of, question)], answer=2)
    with pytest.raises(BlendError, match="0 tokens of a question"):
        of_requests([(texts, question[:0])], answer=2)
    with pytest.raises(BlendError, match="no requests"):
        of_requests([], answer=2)


# ------------------------------------------------------------------ the verdict
def row(selector: str, budget: float, kl: float, agreement: float) -> Figures:
    return Figures(selector, budget, budget, kl, kl, agreement, 0.1)


ALL = row("all", 1.0, 0.0, 1.0)
NONE = row("none", 0.0, 1.0, 0.6)
FLOOR = row("rounding", 0.0, 1e-4, 0.995)


def judged(*rows: Figures, none: Figures = NONE, floor: Figures | None = FLOOR) -> Result:
    return judge([none, ALL, *rows], floor, 100)


@pytest.mark.parametrize(
    ("kl", "agreement", "floor", "close"),
    [
        (0.009, 0.97, FLOOR, True),  # small
        (0.2, 0.97, FLOOR, True),  # four fifths of what reuse does is gone
        (0.21, 0.99, FLOOR, False),
        (0.009, 0.969, FLOOR, False),
        (0.009, 0.969, None, False),
        (0.009, 0.93, row("rounding", 0.0, 0.0, 0.96), True),  # twice what rounding changes
        (0.009, 0.91, row("rounding", 0.0, 0.0, 0.96), False),
        (0.5, 0.99, row("rounding", 0.0, 0.3, 1.0), True),
    ],
)
def test_what_is_close(kl: float, agreement: float, floor: Figures | None, close: bool) -> None:
    assert faithful(row("first", 0.2, kl, agreement), NONE, floor) is close


def test_the_smallest_budget_that_passes_is_recommended() -> None:
    good = {"kl": 0.005, "agreement": 0.99}
    result = judged(
        row("staleness", 0.1, 0.5, 0.8), row("staleness", 0.2, **good),
        row("first", 0.1, **good), row("random", 0.05, **good),
    )  # fmt: skip
    assert (result.passed, result.selector, result.budget) == (True, "first", 0.1)
    assert not result.independent
    result = judged(row("first", 0.2, 0.0, 1.0), row("staleness", 0.2, **good))
    assert result.selector == "staleness"  # the default, where budgets are the same
    result = judged(row("query", 0.2, 0.004, 0.99), row("first", 0.2, **good))
    assert result.selector == "query"  # the closest, where the default does not pass


def test_the_control_is_never_recommended() -> None:
    result = judged(row("random", 0.1, 0.0, 1.0), row("staleness", 0.1, 0.9, 0.6))
    assert not result.passed
    assert "best is staleness at 10 % (KL 0.9 nats, same next token at 60.0 %)" in result.reason


def test_a_runner_that_is_not_the_model_fails() -> None:
    off = row("all", 1.0, 0.02, 0.99)
    result = judge([NONE, off, row("staleness", 0.1, 0.0, 1.0)], FLOOR, 100)
    assert not result.passed
    assert "cannot be blended" in result.reason


def test_reuse_that_is_as_good_as_it_gets_passes_whatever_the_others_do() -> None:
    fine = row("none", 0.0, 0.001, 0.971)
    result = judged(row("staleness", 0.1, 0.001, 0.969), none=fine)
    assert (result.passed, result.selector, result.budget) == (True, "none", 0.0)
    result = judged(row("staleness", 0.1, 0.001, 0.98), none=fine)
    assert (result.selector, result.budget, result.independent) == ("staleness", 0.1, True)


# ------------------------------------------------------------------ a trained model
def csmqar_sample(family: Any, chunks: int, size: int, queries: int) -> Sample:
    """Prompts of the task whose texts depend on each other; the answers' positions count."""
    from benchmarks.quality import cases
    from benchmarks.quality.csmqar import Spec, held_out_rng, make_batch

    spec = Spec(family=family, chunks=chunks)
    batch = make_batch(held_out_rng(0), size, spec, queries)
    ids = torch.from_numpy(batch.tokens.astype("int64"))
    behind = cases.make_contexts(spec, size, 0)
    texts: list[Tensor] = []
    prompts, contexts = [], []
    for number in range(size):
        body = ids[number, 1 : spec.context_tokens].split(spec.chunk_tokens)
        tail = ids[number, spec.context_tokens :]
        scored = torch.zeros(len(tail), dtype=torch.bool)
        answers = torch.from_numpy(batch.answer_positions.astype("int64")) - spec.context_tokens
        scored[answers[torch.from_numpy(batch.asked[number])]] = True
        names = tuple(range(len(texts), len(texts) + chunks))
        prompts.append(Prompt(names, tail, len(tail), scored))
        texts += body
        contexts += [[context[number] for context in behind]] * chunks
    return Sample(texts, prompts, contexts, ids[0, :1])


@pytest.mark.slow
@pytest.mark.skipif(not CSMQAR.exists(), reason="the model is not in this checkout")
def test_a_model_trained_to_need_other_texts() -> None:
    from benchmarks.quality import cases

    model = cases.load(CSMQAR, "cpu")
    wanted: dict[str, Any] = {"budgets": [0.2, 0.36], "selectors": ["staleness", "random"]}
    result = check(model, csmqar_sample("B", 5, 3, 12), **wanted)
    none = result.row("none", 0.0)
    assert none.agreement < 0.85
    assert none.kl_mean > 0.5
    assert not result.passes(none)
    assert not any(result.passes(result.row("random", budget)) for budget in (0.2, 0.36))
    assert (result.passed, result.selector, result.budget) == (True, "staleness", 0.2)
    assert result.row("staleness", 0.36).kl_mean < 1e-3
    control = check(model, csmqar_sample("E", 3, 2, 8), budgets=[0.2], selectors=["staleness"])
    assert (control.passed, control.independent) == (True, True)
