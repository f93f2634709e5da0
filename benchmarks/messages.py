"""What goes to an engine child and what comes back: plain data, as JSON both ways.

Owns no state and imports no engine, so that both sides of the pipe can use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """One prompt and what to do with it; sampling is greedy and ignores the end token.

    ``prompt`` is text or token ids.  ``logprobs``: how many of the best per generated token.
    ``lora`` is (name, id, path), ``image`` the path of an image that the prompt has one token for.
    The step numbers count the engine steps of the batch from 0 and
    are exact only where the engine core runs in the child (the default, see `Engine`): the request
    is added just before step ``arrival_step`` and, if it is not finished, aborted just before step
    ``abort_at_step``.  With ``arrival_s`` it is added before the first step that begins so many
    seconds after the batch was submitted.  ``sampling`` overrides any field of vLLM's
    SamplingParams.
    """

    prompt: str | list[int]
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    lora: tuple[str, int, str] | None = None
    image: str | None = None
    arrival_step: int = 0
    arrival_s: float | None = None
    abort_at_step: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What came back for one request.

    ``logprobs[i]`` maps token id to log probability for generated token i, as vLLM gave it
    (float32 values, unrounded); None if not asked for.  ``ttft_ms`` is from just before the request
    entered the engine, or from its ``arrival_s`` if it has one, to the end of the step that gave
    its first token, ``total_ms`` to its last; ``token_ms`` has that time for each step that gave it
    tokens.
    ``first_token_step`` and ``last_step`` are step numbers as in `Request`.  ``finish_reason`` is
    length, stop or abort.  ``params`` is the response's kv_transfer_params.
    """

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]] | None
    prompt_logprobs: list[dict[int, float] | None] | None
    cached_tokens: int | None
    ttft_ms: float | None
    total_ms: float
    first_token_step: int | None
    last_step: int
    finish_reason: str
    params: dict[str, Any] | None
    token_ms: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Answer:
        """Undo what JSON does to the keys of the log probabilities (int to str)."""
        for name in ("logprobs", "prompt_logprobs"):
            if value[name] is not None:
                value[name] = [
                    None if row is None else {int(token): lp for token, lp in row.items()}
                    for row in value[name]
                ]
        return cls(**value)
