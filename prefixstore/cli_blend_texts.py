"""What ``prefixstore blend-check`` reads: texts, or requests; and the prompts made of them.

Bounded: of more than can be read or tokenised in good time, some are drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixstore.config import parse_bytes
from prefixstore.errors import ConfigError
from prefixstore.segments import MIN_SEGMENT_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from blend.sample import Sample

MAX_TEXT_BYTES = parse_bytes("8MiB")  # read of one file; the rest is left out
MAX_ALL_BYTES = parse_bytes("64MiB")
MAX_TEXTS = 256  # that are tokenised
MAX_PIECES = 64  # of all texts; enough for any number of prompts worth waiting for
_TOKEN_CHARS = 16  # more than a token has on average in any language
_NOT_TEXT = (".bin", ".safetensors", ".pdf", ".zip", ".gz", ".png", ".jpg")


class Request(NamedTuple):
    """Texts and the question asked of them."""

    texts: list[str]
    question: str


class Given(NamedTuple):
    """What the user gave: one of the two is empty."""

    texts: list[str]
    requests: list[Request]


def read(args: argparse.Namespace) -> Given:
    """Read ``--texts`` or ``--requests``. Raises ConfigError, OSError."""
    if bool(args.texts) == bool(args.requests):
        raise ConfigError("give either --texts or --requests")
    if args.texts:
        texts = list(_texts(args.texts, args.seed))
        if not texts:
            raise ConfigError("no text in what --texts names", "give plain text or JSON lines")
        return Given(texts, [])
    file = Path(args.requests).expanduser()
    with open(file, "rb") as opened:
        data = opened.read(MAX_ALL_BYTES)
    requests = [_request(file, *line) for line in _json_lines(file, data)]
    if not requests:
        raise ConfigError(f"{file} holds no request", 'write {"texts": [..], "question": ".."}')
    chosen = random.Random(args.seed).sample(requests, min(len(requests), args.prompts))
    return Given([], chosen)


def _request(file: Path, number: int, value: Any) -> Request:
    texts = value.get("texts") if isinstance(value, dict) else None
    question = value.get("question") if isinstance(value, dict) else None
    fits = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not fits or not isinstance(question, str):
        raise ConfigError(
            f"{file}, line {number}, is no request",
            'write {"texts": [..], "question": ".."} a line',
        )
    assert isinstance(texts, list)
    return Request(texts, question)


def _texts(names: Sequence[str], seed: int) -> Iterator[str]:
    """The text of each file; of each line of a ``.jsonl`` file. Raises ConfigError.

    Of more than can be read, files drawn at random.
    """
    left = MAX_ALL_BYTES
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(
                each for each in path.rglob("*") if each.is_file() and not _is_left_out(each, path)
            )
            random.Random(seed).shuffle(files)
        elif path.is_file():
            files = [path]
        else:
            raise ConfigError(f"--texts {name}: there is no such file or folder")
        for file in files:
            with open(file, "rb") as opened:
                data = opened.read(min(left, MAX_TEXT_BYTES))
            left -= len(data)
            if file.suffix == ".jsonl":
                yield from _lines(file, data)
            elif b"\0" not in data:
                yield data.decode(errors="replace")
            elif file == path:
                raise ConfigError(f"{file} is not text", "give plain text, or JSON lines (.jsonl)")


def _is_left_out(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return hidden or file.suffix.lower() in _NOT_TEXT


def _lines(file: Path, data: bytes) -> Iterator[str]:
    for number, value in _json_lines(file, data):
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ConfigError(
                f"{file}, line {number}, holds no text", 'write "..." or {"text": "..."} a line'
            )
        yield text


def _json_lines(file: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbered; without the last line if the file goes on behind ``data``."""
    lines = data.decode(errors="replace").split("\n")
    if len(data) < file.stat().st_size:
        del lines[-1:]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}, is not JSON: {error}") from error


def sample(args: argparse.Namespace, tokenizer: Any, given: Given) -> Sample:
    """Tokenise; texts are cut into what is reused, and a tail that is not. Raises BlendError."""
    import torch

    from blend import sample as prompts

    def ids(text: str) -> Tensor:
        # A longer text than the model takes is meant here: it is cut.
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(found, dtype=torch.int64)

    preamble = ids(args.preamble)
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and tokenizer("a")["input_ids"][:1] == [first]:
        preamble = torch.cat([torch.tensor([first]), preamble])
    if given.requests:
        asked = [([ids(text) for text in one.texts], ids(one.question)) for one in given.requests]
        return prompts.of_requests(asked, answer=args.compared, preamble=preamble, seed=args.seed)
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
