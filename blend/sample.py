"""Prompts for `blend.check`: a user's texts in a new order, or whole requests as they were made.

`draw` puts behind the texts what follows the last of them where it comes from; `of_requests` puts
the question there, to which the model's own answer is added. That tail was never cached. Staleness
is measured behind contexts of warming's recipe. Token ids in, token ids out; the same seed gives
the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blend.errors import BlendError
from prefixstore.warm_contexts import CONTEXTS, Contexts

_EMPTY = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``texts`` by number, then ``tail`` (int64 [tokens]).

    ``question`` leading tokens of the tail are seen by selectors that look at it. ``scored``, bool
    [tokens], says after which of its tokens distributions are compared; None: after all. With
    ``answer``, so many tokens of the model's own greedy answer go behind the tail, and those alone
    are compared.
    """

    texts: tuple[int, ...]
    tail: Tensor
    question: int
    scored: Tensor | None = None
    answer: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """``texts`` int64 [tokens] each; ``contexts`` of a text: what its staleness is measured behind.

    ``shared_contexts``: there were too few texts to keep prompts and contexts apart, which makes
    `staleness` look better than it is.
    """

    texts: list[Tensor]
    prompts: list[Prompt]
    contexts: list[list[Tensor]]
    preamble: Tensor = _EMPTY
    shared_contexts: bool = False


def draw(
    pieces: Sequence[Tensor],
    *,
    tail_tokens: int,
    prompts: int = 8,
    texts_per_prompt: int = 4,
    preamble: Tensor | None = None,
    seed: int = 0,
) -> Sample:
    """Make prompts of pieces of text, int64 [tokens]; each ends with its own tail.

    A text is reused in several prompts, so that there are never many to encode. Raises BlendError.
    """
    if texts_per_prompt < 2 or prompts < 1 or tail_tokens < 2:
        raise BlendError(
            f"{prompts} prompts of {texts_per_prompt} texts and {tail_tokens} tokens to compare",
            "give at least one prompt, two texts and two tokens",
        )
    if len(pieces) < texts_per_prompt + 1:
        raise BlendError(
            f"{len(pieces)} texts that are long enough; {texts_per_prompt + 1} are needed",
            "give more or longer texts, or ask for fewer or shorter texts in a prompt",
        )
    rng = random.Random(seed)
    order = rng.sample(range(len(pieces)), len(pieces))
    pool = order[: max(2 * texts_per_prompt, prompts)]
    made = []
    for number in range(prompts):
        last = pool[number % len(pool)]
        others = rng.sample([one for one in pool if one != last], texts_per_prompt - 1)
        tail = pieces[last][-tail_tokens:]
        made.append(Prompt((*others, last), tail, question=max(1, tail_tokens // 4)))
    texts = [piece[:-tail_tokens] for piece in pieces]
    apart = order[len(pool) :]
    shared = len(apart) < CONTEXTS
    contexts: list[list[Tensor]] = [[] for _ in texts]
    for text in sorted({one for prompt in made for one in prompt.texts[1:]}):
        others = [one for one in (order if shared else apart) if one != text]
        contexts[text] = _contexts(texts, text, others)
    return Sample(texts, made, contexts, _EMPTY if preamble is None else preamble, shared)


def of_requests(
    requests: Sequence[tuple[Sequence[Tensor], Tensor]],
    *,
    answer: int,
    preamble: Tensor | None = None,
) -> Sample:
    """Prompts of requests, each texts (int64 [tokens]) and a question. Raises BlendError.

    What stands before a text when its staleness is measured comes from other requests.
    """
    numbers: dict[tuple[int, ...], int] = {}
    made = []
    for texts, question in requests:
        names = [numbers.setdefault(tuple(text.tolist()), len(numbers)) for text in texts]
        if len(set(names)) < 2 or len(set(names)) != len(names) or not len(question):
            raise BlendError(
                f"a request of {len(texts)} texts and {len(question)} tokens of a question",
                "each needs two texts or more, all different and none empty, and a question",
            )
        made.append(Prompt(tuple(names), question, len(question), answer=answer))
    if not made or answer < 1:
        raise BlendError("no requests, or no answer to compare", "give at least one of each")
    found = [torch.tensor(text, dtype=torch.int64) for text in numbers]
    if any(not len(text) for text in found):
        raise BlendError("a request has an empty text", "leave it out")
    shared = False
    contexts: list[list[Tensor]] = [[] for _ in found]
    for text in sorted({one for prompt in made for one in prompt.texts[1:]}):
        beside = {one for prompt in made if text in prompt.texts for one in prompt.texts}
        others = [one for one in range(len(found)) if one not in beside]
        if not others:
            shared, others = True, sorted(beside - {text})
        contexts[text] = _contexts(found, text, others)
    return Sample(found, made, contexts, _EMPTY if preamble is None else preamble, shared)


def _contexts(texts: Sequence[Tensor], own: int, others: Sequence[int]) -> list[Tensor]:
    """What the text ``own`` is measured behind, made of ``others`` as warming makes it."""
    contexts = Contexts([texts[text].tolist() for text in (own, *others)], chunk_tokens=1)
    found = contexts.of(0)
    if not found:
        raise BlendError(contexts.why, "give more or longer texts")
    return [torch.tensor(ids, dtype=torch.int64) for ids in found]
