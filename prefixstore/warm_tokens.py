"""Token ids of what is warmed: each document by itself, special tokens once, before the preamble.

Tokenised apart, because a text has the same ids then wherever it is put. That is what makes it
findable in other prompts, and what prompts that use it must do too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixstore.errors import ConfigError
from prefixstore.warm_documents import check_unicode, read_text


class Tokens:
    """The tokenizer of a model. Raises ConfigError when there is none."""

    def __init__(self, model: str, engine: Mapping[str, Any] | None = None) -> None:
        given = engine or {}
        name = str(given.get("tokenizer") or model)
        try:
            from transformers import AutoTokenizer  # comes with vLLM
        except ImportError as error:
            raise ConfigError(f"no tokenizer: {error}", "install transformers") from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                name,
                revision=given.get("tokenizer_revision") or given.get("revision"),
                trust_remote_code=bool(given.get("trust_remote_code", False)),
            )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{name} has no tokenizer: {reason}", "give the model's folder, or its hub name"
            ) from error

    def preamble(self, text: str = "") -> list[int]:
        """What stands before every document: the model's first token, if it has one, and a text."""
        begin = self._tokenizer.bos_token_id
        wanted = self._tokenizer.encode("", add_special_tokens=True)[:1] == [begin]
        ids = self.document(text) if text else []
        return [begin, *ids] if wanted and ids[:1] != [begin] else ids

    def document(self, text: str) -> list[int]:
        """A text by itself, without special tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return [int(token) for token in ids]

    def prompt(self, path: str | os.PathLike[str]) -> list[int]:
        """A prompt file: text; or ``.json``: token ids, or texts that are tokenised apart."""
        text = read_text(path)
        if Path(path).suffix != ".json":
            return self.preamble(text)
        try:
            parts: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        ids = _as_ids(parts)
        if ids is not None:
            return ids
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            check_unicode(str(path), parts)
            ids = self.preamble(parts[0])
            return ids + [token for part in parts[1:] for token in self.document(part)]
        raise ConfigError(
            f"{path} holds neither token ids nor texts",
            "write a list of whole numbers, or a list of strings",
        )


def _as_ids(parts: object) -> list[int] | None:
    """A list of token ids, not empty; None for anything else."""
    is_ids = isinstance(parts, list) and all(
        isinstance(part, int) and not isinstance(part, bool) and 0 <= part < 2**31 for part in parts
    )
    return list(parts) if is_ids and isinstance(parts, Sequence) and parts else None
