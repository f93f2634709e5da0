"""CS-MQAR in words: the tokenizer that goes with the trained models."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.quality import csmqar
from benchmarks.quality.__main__ import MODELS
from benchmarks.quality.words import WORDS, in_words, write_tokenizer


def test_each_token_has_a_word_of_its_own() -> None:
    assert len(WORDS) == len(set(WORDS)) == csmqar.VOCABULARY
    assert WORDS[csmqar.FIRST_VALUE + 3] == "value3"
    assert WORDS[csmqar.FIRST_PRONOUN + csmqar.PRONOUNS - 1] == f"pronoun{csmqar.PRONOUNS - 1}"


def test_words_are_the_tokens_of_a_prompt(tmp_path: Path) -> None:
    spec = csmqar.Spec(family="C", chunks=4)
    ids = csmqar.make_batch(csmqar.held_out_rng(5), 1, spec).tokens[0].tolist()
    assert set(range(csmqar.FIRST_DEFINE, csmqar.VOCABULARY)) & set(ids)
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(in_words(ids), add_special_tokens=False) == ids
    assert tokenizer.encode(in_words(ids[1:])) == ids, "BOS is put before a text"


def test_the_model_in_the_repository_has_this_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for made in tmp_path.iterdir():
        assert (MODELS / "csmqar-5m" / made.name).read_text() == made.read_text()
