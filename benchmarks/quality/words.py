"""CS-MQAR in words: a tokenizer in which each token is a word, so that prompts can be read.

``about entity3`` names the subject, ``value9 attribute2`` is a fact, ``ask entity3 attribute2`` a
query. What must hold: the words are the token numbers of `benchmarks.quality.csmqar`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks.quality import csmqar

BEGIN = "<begin>"
_MARKS = {
    csmqar.PAD: "<pad>",
    csmqar.BOS: BEGIN,
    csmqar.SEP: "<chunk>",
    csmqar.QUERY: "ask",
    csmqar.SUBJECT: "about",
}
_KINDS = (
    ("entity", csmqar.FIRST_ENTITY, csmqar.ENTITIES),
    ("attribute", csmqar.FIRST_ATTRIBUTE, csmqar.ATTRIBUTES),
    ("value", csmqar.FIRST_VALUE, csmqar.VALUES),
    ("filler", csmqar.FIRST_FILLER, csmqar.FILLERS),
    ("define", csmqar.FIRST_DEFINE, csmqar.PRONOUNS),
    ("pronoun", csmqar.FIRST_PRONOUN, csmqar.PRONOUNS),
)
WORDS = [_MARKS[token] for token in sorted(_MARKS)] + [
    f"{kind}{number}" for kind, _, count in _KINDS for number in range(count)
]


def in_words(ids: Sequence[int]) -> str:
    """Token ids as text."""
    return " ".join(WORDS[token] for token in ids)


def write_tokenizer(folder: Path) -> None:
    """Add the tokenizer to a model's folder; it puts BOS before a text, as models expect."""
    vocabulary = {word: token for token, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, csmqar.BOS)]
    )
    tokenizer.add_special_tokens([BEGIN, "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
