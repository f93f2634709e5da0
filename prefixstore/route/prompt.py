"""A request's prompt as an engine sees it: token ids, and the keys of its blocks.

Token ids because engines' KV events and stores speak of nothing else; text is tokenized by a worker
(``/tokenize``), which knows its chat template. A prompt nobody can tokenize, or with images, has no
keys: then load alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from prefixstore.errors import ConfigError
from prefixstore.keys import token_bytes

TOKENIZED_PATHS = ("/v1/completions", "/v1/chat/completions")
_CHAT_FIELDS = (
    "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs", "tools",
)  # fmt: skip
ROOT = b""


def next_key(parent: bytes, tokens: bytes, extra: Sequence[Any] | None) -> bytes:
    """The key of a block (16 bytes) behind ``parent``: the same for what an engine tells of and
    for what is asked. ``extra``: what else an engine's block depends on, or None."""
    told = repr(tuple(extra)).encode(errors="surrogatepass") if extra else b""
    return xxhash.xxh3_128_digest(parent + tokens + told)


@dataclass(slots=True)
class Prompt:
    """Token ids as int32 little-endian, and the LoRA adapter and salt that its blocks depend on."""

    tokens: bytes = b""
    lora: str = ""
    salt: str = ""
    _keys: dict[int, list[bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens) // 4

    def keys(self, block_tokens: int) -> list[bytes]:
        """Keys of its whole blocks of that size."""
        if block_tokens not in self._keys:
            found, key = [], ROOT
            lora, step = ([self.lora] if self.lora else []), 4 * block_tokens
            for at in range(0, len(self.tokens) - step + 1, step):
                extra = lora + ([self.salt] if self.salt and at == 0 else [])
                key = next_key(key, self.tokens[at : at + step], extra)
                found.append(key)
            self._keys[block_tokens] = found
        return self._keys[block_tokens]

    @classmethod
    def of(cls, ids: Iterable[int], body: dict[str, Any], lora: str) -> Prompt:
        """A prompt of token ids. Raises ConfigError."""
        salt = body.get("cache_salt")
        return cls(token_bytes(list(ids)), lora, salt if isinstance(salt, str) else "")


def ids_in(path: str, body: dict[str, Any]) -> list[int] | None:
    """The token ids a request gives itself; of several prompts those of the first."""
    given = body.get("prompt") if path == "/v1/completions" else None
    if isinstance(given, list) and given and isinstance(given[0], list):
        given = given[0]
    if isinstance(given, list) and given and type(given[0]) is int:
        return given
    return None


def question_for(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """What to ask ``/tokenize``; None for what it cannot tell."""
    asked: dict[str, Any] = {"model": body["model"]} if "model" in body else {}
    if path == "/v1/completions":
        text = body.get("prompt")
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str):
            return None
        special = body.get("add_special_tokens", True)
        return {**asked, "prompt": text, "add_special_tokens": special}
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(map(_is_text, messages)):
        return None
    given = {name: body[name] for name in _CHAT_FIELDS if body.get(name) is not None}
    return {**asked, "messages": messages, **given}


def _is_text(message: Any) -> bool:
    """Whether it has no parts but text: others are fetched and expanded when they are tokenized."""
    content = message.get("content") if isinstance(message, dict) else 0
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    return content is None or isinstance(content, str)


def tokens_in(answer: Any) -> list[int]:
    """The token ids of an answer of ``/tokenize``. Raises ConfigError."""
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise ConfigError("an answer of /tokenize without tokens")
    return found
