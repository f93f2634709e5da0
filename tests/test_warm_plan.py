"""What is to be computed: contexts never hold the text they measure, pieces cover each document."""

from __future__ import annotations

import random

import pytest

from prefixstore import Layout
from prefixstore.errors import ConfigError
from prefixstore.testing_data import identity_for
from prefixstore.warm_contexts import CONTEXT_TOKENS, CONTEXTS, EXCERPTS, Contexts
from prefixstore.warm_plan import Engine, Text, make_plan

SIZE = 16
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=SIZE, head_bytes=32)


def engine(max_prompt: int = 4000, unmeasurable: str = "") -> Engine:
    return Engine("m", identity_for("a", LAYOUT), LAYOUT, max_prompt, {}, unmeasurable)


def documents(*lengths: int) -> list[list[int]]:
    """Texts that share no token: each token says whose it is."""
    return [[100_000 * number + at for at in range(n)] for number, n in enumerate(lengths)]


def texts(*lengths: int) -> list[Text]:
    return [Text(f"d{i}", f"d{i}", ids) for i, ids in enumerate(documents(*lengths))]


@pytest.mark.parametrize("seed", range(30))
def test_contexts_are_of_others_and_of_whole_chunks(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 5, 20, 100, 400, 900]) for _ in range(rng.randint(1, 40))]
    ids = documents(*lengths)
    contexts = Contexts(ids, SIZE)
    for own in range(len(ids)):
        found = contexts.of(own)
        assert len(found) <= CONTEXTS
        others = sum(max(0, n - 1) for number, n in enumerate(lengths) if number != own)
        assert bool(found) == (others >= SIZE)
        for context in found:
            assert 0 < len(context) <= CONTEXT_TOKENS
            assert len(context) % SIZE == 0
            assert own not in {token // 100_000 for token in context}
            assert context[0] % 100_000 != 0  # no prompt that stores a text begins like it
        if len(found) == 2:
            assert found[0] != found[1]


def test_many_documents_share_few_contexts_of_several() -> None:
    ids = documents(*[300] * 200)
    contexts = Contexts(ids, SIZE)
    found = [tuple(context) for own in range(len(ids)) for context in contexts.of(own)]
    assert len(found) == CONTEXTS * len(ids)
    assert len(set(found)) == CONTEXTS + 1
    for context in set(found):
        assert len(context) == CONTEXT_TOKENS
        assert len({token // 100_000 for token in context}) == 4


def test_two_documents_are_measured_behind_each_other() -> None:
    contexts = Contexts(documents(2000, 2000), SIZE)
    for own in (0, 1):
        starts = sorted(context[0] % 100_000 for context in contexts.of(own))
        assert 0 < starts[0] < starts[1] <= 2000 - CONTEXT_TOKENS
        assert starts[1] - starts[0] in (743, 744, 745)  # half of the places there are
    barely = Contexts(documents(CONTEXT_TOKENS + 1, 600), SIZE)
    assert [context[0] for context in barely.of(1)] == [1]


def test_excerpts_are_from_anywhere_in_a_document() -> None:
    """And from the same place again: nothing else could be measured twice alike."""
    ids = documents(*[2000] * 40)
    contexts = Contexts(ids, SIZE)
    share = CONTEXT_TOKENS // EXCERPTS
    starts = [c[at] % 100_000 for c in contexts.of(0) for at in range(0, CONTEXT_TOKENS, share)]
    assert len(set(starts)) == CONTEXTS * EXCERPTS
    assert all(0 < start <= 2000 - share for start in starts)
    assert max(starts) > 1000  # one of eight lies in the second half
    shuffled = random.Random(1).sample(ids, len(ids))
    assert Contexts(shuffled, SIZE).of(shuffled.index(ids[0])) == contexts.of(0)


def test_copies_of_a_document_are_one() -> None:
    ids = documents(300, 300)
    contexts = Contexts([ids[0], ids[1], list(ids[0])], SIZE)
    assert contexts.first == [0, 1, 0]
    assert {token // 100_000 for context in contexts.of(2) for token in context} == {1}
    alone = Contexts([ids[0], list(ids[0])], SIZE)
    assert alone.of(0) == []
    assert "no other document" in alone.why


@pytest.mark.parametrize("preamble", [0, 5, 16, 40])
@pytest.mark.parametrize("length", [0, 3, 200, 1999, 2000, 2001, 9000])
@pytest.mark.parametrize("staleness", [True, False])
def test_pieces_cover_the_document_and_fit(preamble: int, length: int, staleness: bool) -> None:
    before = list(range(10**6, 10**6 + preamble))
    given, most = texts(length, 800, 800), 2000 + preamble
    pieces = make_plan(given, before, engine(most), 1 << 30, staleness=staleness)
    own = [piece for piece in pieces if piece.document == 0]
    assert [token for piece in own for token in piece.ids] == given[0].ids
    assert (len(own) > 1) == (length > 2000)
    lost = length - sum(piece.stored_tokens for piece in own)
    if length >= SIZE:
        # Only the last piece may end inside a chunk.
        last = own[-1]
        assert lost == min(len(last.ids), (len(before) + len(last.ids)) % SIZE)
    for piece in own:
        assert len(piece.prompt) <= most
        assert bool(piece.contexts) != bool(piece.unmeasured)
        assert not piece.contexts or piece.own_chunks
        for context in piece.contexts:
            behind = piece.behind(context)
            assert len(behind) <= most
            assert len(behind) % SIZE == 0
            # The text stands in the same places of its chunks.
            assert (behind.index(piece.ids[0]) - preamble) % SIZE == 0
            assert behind[-piece.stored_tokens :] == piece.ids[: piece.stored_tokens]
    if not staleness:
        assert {piece.unmeasured for piece in pieces} == {"not asked for"}
    elif length > 2000:
        assert all(len(piece.contexts) == CONTEXTS for piece in own if piece.own_chunks)


def test_why_a_piece_is_not_measured() -> None:
    def why(lengths: tuple[int, ...], memory: int = 1 << 30, most: int = 4000) -> str:
        return make_plan(texts(*lengths), [1], engine(most), memory)[0].unmeasured

    assert why((500,)) == "there is no other document to measure it behind"
    assert why((500, 5)) == "there is too little other text to measure it behind"
    assert why((10, 500)) == "shorter than a chunk"
    assert "fills the model's length" in why((3999, 500))
    assert why((3980, 500)) == ""
    slot = LAYOUT.slot_bytes
    chunks = (500 + 1) // SIZE + 496 // SIZE
    assert why((500, 500), memory=4 * chunks * slot) == ""
    assert "memory tier is too small" in why((500, 500), memory=4 * chunks * slot - 1)
    assert make_plan(texts(50, 50), [], engine(unmeasurable="MLA"), 1)[0].unmeasured == "MLA"


def test_a_preamble_that_leaves_no_room() -> None:
    with pytest.raises(ConfigError, match="a preamble of 90 tokens leaves 10 of 100"):
        make_plan(texts(50), list(range(90)), engine(100), 1 << 30)
