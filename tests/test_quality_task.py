"""CS-MQAR: labels against a reader that knows the tokens alone, and training end to end, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.quality import csmqar, train
from benchmarks.quality.csmqar import FAMILIES, Batch, Family, Spec

ROOT = Path(__file__).resolve().parent.parent
QUERIES = 16
SIZES = [(chunks, pairs, used) for chunks in (1, 4, 8, 16) for pairs, used in ((15, 1), (63, 16))]
SPECS = [Spec(family, *size) for family in FAMILIES for size in SIZES]


def batch_of(spec: Spec, size: int = 6, seed: int = 0) -> Batch:
    return csmqar.make_batch(csmqar.held_out_rng(seed), size, spec, QUERIES)


def name_of(spec: Spec) -> str:
    return f"{spec.family}-{spec.chunks}x{spec.pairs}-{spec.used_attributes}"


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_label_is_what_the_reader_finds(spec: Spec) -> None:
    batch = batch_of(spec)
    assert batch.tokens.shape == (6, spec.context_tokens + csmqar.QUERY_TOKENS * QUERIES)
    assert batch.asked.any()
    for row, tokens in enumerate(batch.tokens):
        for slot, position in enumerate(batch.answer_positions):
            query = tokens[position - 2 : position + 2]
            if not batch.asked[row, slot]:
                assert query.tolist() == [csmqar.PAD] * csmqar.QUERY_TOKENS
                assert not batch.cross[row, slot]
                continue
            assert query[0] == csmqar.QUERY
            entity = int(query[1]) - csmqar.FIRST_ENTITY
            attribute = int(query[2]) - csmqar.FIRST_ATTRIBUTE
            (fact,) = csmqar.solve(tokens, spec, entity, attribute)
            assert csmqar.FIRST_VALUE + fact.value == query[3]
            assert fact.cross == batch.cross[row, slot]
            assert fact.position == batch.fact_positions[row, slot]
            assert batch.subjects[row, position] == entity


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_facts_are_unique_and_subjects_known_at_them(spec: Spec) -> None:
    batch = batch_of(spec)
    context = batch.subjects[:, : spec.context_tokens]
    for row, tokens in enumerate(batch.tokens):
        facts = csmqar.read_facts(tokens, spec)
        named = [(fact.entity, fact.attribute) for fact in facts]
        assert len(set(named)) == len(named)
        assert all(fact.attribute < spec.used_attributes for fact in facts)
        known = {int(place): int(context[row, place]) for place in np.flatnonzero(context[row] + 1)}
        assert known == {fact.position: fact.entity for fact in facts}


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_distinct_and_half_of_them_cross(family: Family) -> None:
    batch = batch_of(Spec(family), size=24)
    assert batch.asked.all()
    for row in batch.fact_positions:
        assert len(set(row.tolist())) == QUERIES
    assert batch.cross.mean() == (0.0 if family == "E" else 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_facts_lie_where_the_family_says(family: Family) -> None:
    spec = Spec(family)
    pairs_before = [
        (fact.position - 1) % spec.chunk_tokens // 2 - 1
        for tokens in batch_of(spec, size=16).tokens
        for fact in csmqar.read_facts(tokens, spec)
        if fact.cross
    ]
    if family == "E":
        assert pairs_before == []
    else:
        last = max(pairs_before)
        assert last < csmqar.MAX_DANGLE if family == "A" else last > spec.pairs // 4


def test_entities_come_back_when_all_were_used() -> None:
    """In 16 chunks, some entities are introduced twice; their facts still have one answer each."""
    spec = Spec("E", chunks=16)
    tokens = batch_of(spec, size=4).tokens
    introduced = (tokens[:, :-1] == csmqar.SUBJECT).sum(1)
    assert introduced.max() > csmqar.ENTITIES
    for row in tokens:
        facts = csmqar.read_facts(row, spec)
        assert max(fact.position for fact in facts) > spec.context_tokens - spec.chunk_tokens


def test_token_numbers_are_those_of_trained_models() -> None:
    firsts = (csmqar.FIRST_ENTITY, csmqar.FIRST_ATTRIBUTE, csmqar.FIRST_VALUE)
    assert firsts == (5, 69, 85)
    firsts = (csmqar.FIRST_FILLER, csmqar.FIRST_DEFINE, csmqar.FIRST_PRONOUN)
    assert firsts == (149, 181, 185)
    marks = (csmqar.PAD, csmqar.BOS, csmqar.SEP, csmqar.QUERY, csmqar.SUBJECT)
    assert (marks, csmqar.VOCABULARY) == ((0, 1, 2, 3, 4), 189)


def test_a_seed_gives_the_same_batch_and_another_seed_another() -> None:
    spec = Spec("C")
    first, again, other = batch_of(spec), batch_of(spec), batch_of(spec, seed=1)
    for field in fields(Batch):
        if field.name != "spec":
            np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert not np.array_equal(first.tokens, other.tokens)
    trained = csmqar.make_batch(csmqar.training_rng(0, 0), 6, spec, QUERIES)
    assert not np.array_equal(first.tokens, trained.tokens)


def test_guessed_share_counts_what_the_cross_facts_leave_open() -> None:
    """Chunk 1 starts with two facts of one attribute: a guess among them is right half the time."""
    spec = Spec("B", chunks=2, pairs=csmqar.MIN_PAIRS)
    subject, attribute = csmqar.SUBJECT, csmqar.FIRST_ATTRIBUTE + 3
    filler = [csmqar.FIRST_FILLER] * 2
    head = [csmqar.SEP, csmqar.FIRST_FILLER]
    first = [subject, csmqar.FIRST_ENTITY + 1] + filler * (spec.pairs - 1)
    facts = [csmqar.FIRST_VALUE + 10, attribute, csmqar.FIRST_VALUE + 20, attribute]
    second = facts + filler * (spec.pairs - 2)
    tokens = np.array([[csmqar.BOS, *head, *first, *head, *second]], np.int16)
    position = 1 + spec.chunk_tokens + 2 + 1
    batch = replace(
        batch_of(spec, size=1),
        tokens=tokens,
        cross=np.array([[True, False]]),
        fact_positions=np.array([[position, 0]]),
    )
    assert csmqar.guessed_share(batch) == 0.5
    assert csmqar.guessed_share(replace(batch, cross=np.array([[False, False]]))) is None


@pytest.mark.parametrize(
    "wrong", [{"family": "D"}, {"chunks": 0}, {"pairs": 7}, {"used_attributes": 17}]
)
def test_sizes_that_no_prompt_can_have_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a family of"):
        Spec(**wrong)


TINY = train.Shape(hidden=32, layers=2, heads=2, kv_heads=1)
STEP_TOKENS = 600


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_saved_folder_gives_the_logits_of_the_trained_weights(tmp_path: Path) -> None:
    weights, history = train.train(TINY, 2.0, 0, "cpu", workers=1, step_tokens=STEP_TOKENS)
    assert history["steps"] > 0
    torch.manual_seed(0)
    start = train.initial_weights(TINY, "cpu")
    assert [name for name in start if torch.equal(start[name], weights[name])] == []
    rounded = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    train.save(rounded, TINY, tmp_path)
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.from_numpy(batch_of(Spec("C", chunks=4), size=2).tokens).long()
    with torch.no_grad():
        expected = loaded(tokens).logits
        exact = {name: weight.float() for name, weight in rounded.items()}
        logits, _ = train.forward(exact, TINY, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_command_writes_a_model_and_says_that_it_missed_the_gate(tmp_path: Path) -> None:
    """Seconds of training cannot clear the gate, so the command must fail, and say by how much."""
    sizes = "--hidden 32 --layers 2 --heads 2 --kv-heads 1 --judge-chunks 2 --judge-prompts 4"
    recipe = f"--seconds 2 --workers 1 --device cpu --step-tokens {STEP_TOKENS}"
    command = [sys.executable, "-m", "benchmarks.quality.train", "--out", str(tmp_path / "model")]
    done = subprocess.run(
        [*command, *sizes.split(), *recipe.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert "gate missed: A, 2 chunks: full_cross" in done.stderr
    written = json.loads((tmp_path / "model" / "training.json").read_text())
    assert [(score["family"], score["chunks"]) for score in written["gate"]] == [
        (family, 2) for family in FAMILIES
    ]
    assert written["steps"] > 0
    assert written["arguments"]["hidden"] == 32
    assert written["torch"] == torch.__version__
    assert written["stages_began_s"][0] == 0.0
    assert str(tmp_path) not in json.dumps(written)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 2


def test_reuse_shows_a_chunk_itself_and_bos_and_a_query_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = Spec("B", chunks=3, pairs=csmqar.MIN_PAIRS)
    masks: list[torch.Tensor | None] = []
    true_forward = train.forward

    def spy(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        masks.append(arguments[3])
        return true_forward(*arguments)

    monkeypatch.setattr(train, "forward", spy)
    train.evaluate(train.initial_weights(TINY, "cpu"), TINY, spec, prompts=2)
    full, reuse = masks
    assert full is None
    assert reuse is not None
    places = range(spec.context_tokens + csmqar.QUERY_TOKENS * QUERIES)
    chunk_of = [None, *(n // spec.chunk_tokens for n in range(spec.context_tokens - 1))]
    for row in places:
        seen = [
            column
            for column in range(row + 1)
            if row >= spec.context_tokens or column == 0 or chunk_of[row] == chunk_of[column]
        ]
        assert reuse[row].nonzero().flatten().tolist() == seen


def test_loss_is_of_asked_answers_next_tokens_and_known_subjects() -> None:
    torch.manual_seed(2)
    weights = train.initial_weights(TINY, "cpu")
    batch = batch_of(Spec("A", chunks=1, pairs=csmqar.MIN_PAIRS), size=3)
    assert not batch.asked.all()
    loss, right = train.losses(weights, TINY, batch)
    tokens, subjects = (torch.from_numpy(x).long() for x in (batch.tokens, batch.subjects))
    with torch.no_grad():
        logits, probed = train.forward(weights, TINY, tokens)
        scale = (probed.square().mean(-1, keepdim=True) + train.NORM_EPS).rsqrt()
        named = (probed * scale @ weights[train.PROBE].T).log_softmax(-1)
    surprise = -logits.log_softmax(-1)
    rows, slots = np.nonzero(batch.asked)
    at = batch.answer_positions[slots]
    answer = surprise[rows, at, tokens[rows, at + 1]].mean()
    following = surprise[:, :-1].gather(2, tokens[:, 1:, None]).mean()
    known_rows, known_at = torch.nonzero(subjects >= 0, as_tuple=True)
    subject = -named[known_rows, known_at, subjects[known_rows, known_at]].mean()
    torch.testing.assert_close(loss.detach(), answer + 0.01 * following + 0.3 * subject)
    said = logits.argmax(-1)[:, batch.answer_positions]
    assert torch.equal(right, said == tokens[:, batch.answer_positions + 1])


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"full_cross": 0.98}, ["full_cross"]),
        ({"full_intra": 0.98}, ["full_intra"]),
        ({"reuse_intra": 0.97}, ["reuse_intra"]),
        ({"reuse_cross": 0.26}, ["reuse_cross"]),
        ({"reuse_cross": 0.51, "guess_cross": 0.9}, ["reuse_cross"]),
        ({"full_cross": None, "reuse_cross": None, "guess_cross": None}, []),
    ],
)
def test_gate_names_what_missed_it(change: dict[str, float | None], missed: list[str]) -> None:
    good = {"full_cross": 0.99, "full_intra": 0.99, "reuse_intra": 0.98, "reuse_cross": 0.25}
    score = {"family": "A", "chunks": 8, **good, "guess_cross": 0.2, **change}
    found = train.misses(score)
    assert [miss.split(": ")[1].split()[0] for miss in found] == missed


def test_upper_layers_start_with_keys_equal_to_queries() -> None:
    shape = train.Shape(hidden=32, layers=4, heads=4, kv_heads=2)
    weights = train.initial_weights(shape, "cpu")
    for layer in range(shape.layers):
        q, k = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qk")
        same = [torch.equal(q[8 * head :][:8], k[8 * (head // 2) :][:8]) for head in range(4)]
        assert same == [layer >= 2] * 4


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"kv_heads": 3}, {"layers": 1}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected even head widths"):
        train.Shape(**wrong)
