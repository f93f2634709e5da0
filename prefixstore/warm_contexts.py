"""What stands before a text when its staleness is measured: excerpts of several other texts.

One recipe for all who measure it, `prefixstore warm` and `prefixstore blend-check`: a verdict holds
for what is served only if both measured alike. Pure, and the same again for the same texts: nothing
is drawn at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from prefixstore.keys import token_bytes

CONTEXTS = 2  # that a text is measured behind
CONTEXT_TOKENS = 512
EXCERPTS = 4  # of other documents, in a context


def digest(ids: Sequence[int]) -> str:
    """Sixteen hex digits that name a list of token ids."""
    return hashlib.blake2b(token_bytes(ids), digest_size=8).hexdigest()


def first_of_each(texts: Sequence[Sequence[int]]) -> list[int]:
    """For each text the first one with the same token ids."""
    known: dict[str, int] = {}
    return [known.setdefault(digest(ids), index) for index, ids in enumerate(texts)]


class Contexts:
    """What documents are measured behind. Few contexts for many documents: the engine's own prefix
    cache then computes each once."""

    def __init__(self, texts: Sequence[list[int]], chunk_tokens: int) -> None:
        self._texts = texts
        self._tokens = max(1, CONTEXT_TOKENS // chunk_tokens) * chunk_tokens
        self._size = chunk_tokens
        self.first = first_of_each(texts)
        # In the order of their digests: as good as a random one, and the same in the next run.
        self._order = sorted({i for i in self.first if texts[i]}, key=lambda i: digest(texts[i]))
        self.why = "there is too little other text to measure it behind"
        if len(self._order) < 2:
            self.why = "there is no other document to measure it behind"
        self._shared = self._shared_contexts()

    def _shared_contexts(self) -> list[tuple[set[int], list[int]]]:
        """CONTEXTS and one more, of different documents, if there are enough: (documents, ids)."""
        found: list[tuple[set[int], list[int]]] = []
        members: list[int] = []
        share = -(-self._tokens // EXCERPTS)
        have = 0
        for index in self._order:
            members.append(index)
            have += min(share, len(self._texts[index]) - 1)
            if have >= self._tokens:
                found.append((set(members), self._context(members)))
                members, have = [], 0
            if len(found) > CONTEXTS:
                break
        return found

    def of(self, document: int) -> list[list[int]]:
        """Up to CONTEXTS contexts without any part of that document."""
        own = self.first[document]
        shared = [ids for members, ids in self._shared if own not in members]
        if len(shared) >= CONTEXTS:
            return shared[:CONTEXTS]
        others = [index for index in self._order if index != own]
        # Each other document in one of the contexts, unless there is but one.
        parts = [others[at::CONTEXTS] for at in range(CONTEXTS)]
        found = [self._context(part or others, turn) for turn, part in enumerate(parts)]
        if not all(found):
            found = [self._context(others)]
        unique = {tuple(ids): ids for ids in found if ids}
        return list(unique.values())

    def _context(self, members: Sequence[int], turn: int = 0) -> list[int]:
        """Excerpts of EXCERPTS documents, or of more if those are short; whole chunks."""
        share = -(-self._tokens // max(1, min(EXCERPTS, len(members))))
        found: list[int] = []
        for member in members:
            found += _excerpt(self._texts[member], share, turn)
            if len(found) >= self._tokens:
                break
        return found[: min(len(found), self._tokens) // self._size * self._size]


def _excerpt(ids: Sequence[int], count: int, turn: int) -> Sequence[int]:
    """``count`` of the ids from a place that their digest chooses; another in each ``turn``.

    Not from the beginning: documents of one collection often begin alike, which says little of what
    else may stand before a text. And never with the first token: a prompt that begins with the
    whole text would begin like this one, take that part from the engine's prefix cache, and round
    differently.
    """
    places = max(1, len(ids) - count)
    start = 1 + (int(digest(ids), 16) + turn * places // CONTEXTS) % places
    return ids[start : start + count]
