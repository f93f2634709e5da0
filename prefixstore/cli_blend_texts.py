"""What ``prefixstore blend-check`` reads: texts, or requests; and the prompts made of them.

Bounded: of more than can be read or tokenised in good time, some are drawn at random.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixstore.config import parse_bytes
from prefixstore.errors import ConfigError
from prefixstore.segments import MIN_SEGMENT_TOKENS
from prefixstore.warm_documents import (
    JsonObject,
    check_unicode,
    read_documents,
    read_objects,
    read_text,
)

if TYPE_CHECKING:
    from torch import Tensor

    from blend.sample import Sample
    from prefixstore.warm_tokens import Tokens

MAX_BYTES = parse_bytes("64MiB")  # that are read
MAX_TEXTS = 256  # that are tokenised
MAX_PIECES = 64  # of all texts; enough for any number of prompts worth waiting for
_TOKEN_CHARS = 16  # more than a token has on average in any language


class Request(NamedTuple):
    """Texts and the question asked of them."""

    texts: list[str]
    question: str


class Given(NamedTuple):
    """What the user gave: texts or requests, one of the two is empty."""

    texts: list[str]
    requests: list[Request]
    preamble: str


def read(args: argparse.Namespace) -> Given:
    """Read ``--texts`` or ``--requests``, and ``--preamble``. Raises ConfigError."""
    if bool(args.texts) == bool(args.requests):
        raise ConfigError("give either --texts or --requests")
    preamble = "" if args.preamble is None else read_text(args.preamble)
    rng = random.Random(args.seed)
    if args.texts:
        found = read_documents(args.texts, args.field, limit_bytes=MAX_BYTES, order=rng)
        texts = [document.text for document in found if document.text.strip()]
        if not texts:
            raise ConfigError("no text in what --texts names", "give files that are not empty")
        return Given(texts, [], preamble)
    file = Path(args.requests).expanduser()
    requests = [_request(file, *line) for line in read_objects(file, MAX_BYTES)]
    if not requests:
        raise ConfigError(f"{file} holds no request", 'write {"texts": [..], "question": ".."}')
    return Given([], rng.sample(requests, min(len(requests), args.prompts)), preamble)


def _request(file: Path, number: int, value: JsonObject) -> Request:
    where = f"{file} line {number}"
    texts, question = value.get("texts"), value.get("question")
    fits = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not fits or not isinstance(question, str):
        raise ConfigError(
            f"{where} is no request", 'write {"texts": [..], "question": ".."} a line'
        )
    assert isinstance(texts, list)
    check_unicode(where, (*texts, question))
    return Request(texts, question)


def sample(args: argparse.Namespace, tokens: Tokens, given: Given) -> Sample:
    """Tokenise; texts are cut into what is reused, and a tail that is not. Raises BlendError."""
    import torch

    from blend import sample as prompts

    def ids(text: str) -> Tensor:
        return torch.tensor(tokens.document(text), dtype=torch.int64)

    preamble = torch.tensor(tokens.preamble(given.preamble), dtype=torch.int64)
    if given.requests:
        asked = [([ids(text) for text in one.texts], ids(one.question)) for one in given.requests]
        return prompts.of_requests(asked, answer=args.compared, preamble=preamble)
    return prompts.draw(
        _all_pieces(args, ids, given.texts),
        tail_tokens=args.compared,
        prompts=args.prompts,
        texts_per_prompt=args.texts_per_prompt,
        preamble=preamble,
        seed=args.seed,
    )


def _all_pieces(args: argparse.Namespace, ids: Any, texts: Sequence[str]) -> list[Tensor]:
    """One piece of each text first, so that many texts have a say."""
    chars = MAX_PIECES * (args.tokens + args.compared) * _TOKEN_CHARS
    chosen = random.Random(args.seed).sample(texts, min(len(texts), MAX_TEXTS))
    by_text = [_pieces(ids(text[:chars]), args.tokens, args.compared) for text in chosen]
    pieces: list[Tensor] = []
    for turn in range(MAX_PIECES):
        pieces += [found[turn] for found in by_text if turn < len(found)]
    return pieces[:MAX_PIECES]


def _pieces(ids: Tensor, tokens: int, tail: int) -> list[Tensor]:
    """Pieces of ``tokens`` + ``tail``; a text that is shorter is one, if there is enough to reuse.

    They do not overlap, or a tail could be read off another text of its prompt.
    """
    size = tokens + tail
    if len(ids) < size:
        return [ids] if len(ids) >= MIN_SEGMENT_TOKENS + tail else []
    return [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
