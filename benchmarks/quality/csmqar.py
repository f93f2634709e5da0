"""CS-MQAR, carried-subject multi-query associative recall: a task that full KV reuse must fail.

A prompt is BOS, chunks, queries.  A chunk is the pair (SEP, filler) and then `Spec.pairs` pairs:

    (SUBJECT, e)     from here on facts are about entity e, also in later chunks
    (v, a)           fact: attribute a of the current subject is v; nothing beside it names it
    (f, f')          filler
    (DEFINE_x, e)    family C only: pronoun x now means entity e; it may be redefined later
    (SUBJECT, P_x)   family C only: the subject is now what pronoun x means here

A query is (QUERY, e, a, v): the model reads e and a, and answers v.  The value of a fact stands
first, so that the attribute's position can hold all of it and the query's attribute can match it.
One attribute occurs under many subjects, so entity and attribute must match together.  A fact is
*cross* when what fixes its subject (the SUBJECT pair, or for a pronoun its DEFINE pair) lies in an
earlier chunk: whoever computed its chunk alone cannot know whose fact it is.

    A  boundary        cross facts only in the first MAX_DANGLE pairs of a chunk
    B  deep            the first SUBJECT of a chunk lies in its middle half
    C  pronoun         as B, and subjects are pronouns, mostly defined in earlier chunks
    E  self-contained  every chunk starts with a SUBJECT: no cross facts, the control

What must hold: an entity's attribute has at most one value in a prompt, and token numbers never
change, so that trained models stay usable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Family: TypeAlias = Literal["A", "B", "C", "E"]
Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Bools: TypeAlias = npt.NDArray[np.bool_]

FAMILIES: tuple[Family, ...] = ("A", "B", "C", "E")
QUERY_TOKENS = 4
NO_SUBJECT = -1  # in Batch.subjects: nothing to predict at this position

# How many there are of each, and the token of the first; together they are the vocabulary.
ENTITIES, ATTRIBUTES, VALUES, FILLERS, PRONOUNS = 64, 16, 64, 32, 4
PAD, BOS, SEP, QUERY, SUBJECT, FIRST_ENTITY = range(6)
FIRST_ATTRIBUTE = FIRST_ENTITY + ENTITIES
FIRST_VALUE = FIRST_ATTRIBUTE + ATTRIBUTES
FIRST_FILLER = FIRST_VALUE + VALUES
FIRST_DEFINE = FIRST_FILLER + FILLERS
FIRST_PRONOUN = FIRST_DEFINE + PRONOUNS
VOCABULARY = FIRST_PRONOUN + PRONOUNS

MAX_DANGLE = 7  # family A: pairs of a chunk before its first SUBJECT
SWITCH_RATE = 0.06  # of the pairs after a chunk's first SUBJECT: another SUBJECT
DEFINE_RATE = 0.08  # of the other pairs, family C: DEFINE
FILLER_RATE = 0.25  # of the pairs left: filler; all others are facts
MIN_PAIRS = max(MAX_DANGLE + 1, PRONOUNS + 2)


@dataclass(frozen=True, slots=True)
class Spec:
    """What a prompt is made of.  Raises ValueError for sizes that no prompt can have."""

    family: Family = "B"
    chunks: int = 8
    pairs: int = 63  # a chunk has 2 + 2 * pairs tokens
    used_attributes: int = ATTRIBUTES  # with 1, only the entity must match: an easier task
    hold_rate: float = 0.5  # of chunks: its last subject gets its facts in the next chunk only

    def __post_init__(self) -> None:
        sizes_fit = self.chunks >= 1 and self.pairs >= MIN_PAIRS
        attributes_fit = 1 <= self.used_attributes <= ATTRIBUTES
        if self.family not in FAMILIES or not sizes_fit or not attributes_fit:
            wanted = f"a family of {FAMILIES}, chunks >= 1, pairs >= {MIN_PAIRS}"
            raise ValueError(f"{self}; expected {wanted}, 1 <= used_attributes <= {ATTRIBUTES}")

    @property
    def chunk_tokens(self) -> int:
        return 2 + 2 * self.pairs

    @property
    def context_tokens(self) -> int:
        """BOS and all chunks: the position of the first query."""
        return 1 + self.chunks * self.chunk_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts with T = context + 4 * queries tokens, and what is known about their Q queries.

    A slot without a query (the context has fewer facts than slots) is PAD and not `asked`.
    """

    spec: Spec
    tokens: Ints  # [size, T] int16
    answer_positions: Ints  # [Q]: the logits here predict the answer, the token at the next one
    asked: Bools  # [size, Q]
    cross: Bools  # [size, Q]
    fact_positions: Ints  # [size, Q]: the attribute token of the fact that answers
    subjects: Ints  # [size, T] int16: subject at the attribute tokens of facts and queries, or -1


@dataclass(frozen=True, slots=True)
class Fact:
    entity: int
    attribute: int
    value: int
    position: int  # of its attribute token
    cross: bool


@dataclass(slots=True)
class _Pairs:
    """Every array is [size, chunks * pairs]; a pair that is neither fact nor marker is filler."""

    is_fact: Bools
    is_marker: Bools  # SUBJECT or DEFINE
    markers: Ints  # the tokens of a marker: the first,
    named: Ints  # and the second
    entity: Ints  # number of the subject in force
    fixed_by: Ints  # the pair that fixes the subject in force


def training_rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([0, seed, number])


def held_out_rng(seed: int) -> np.random.Generator:
    """For evaluation: no arguments of `training_rng` give the same stream."""
    return np.random.default_rng([1, seed])


def make_batch(rng: np.random.Generator, size: int, spec: Spec, num_queries: int = 16) -> Batch:
    """Draw ``size`` prompts with ``num_queries`` queries each, half of them cross if there are.

    Queries are drawn without replacement, since a repeated one could be answered by copying the
    earlier answer, and rather of attributes that occur twice, since else the entity need not match.
    """
    pairs = _draw_pairs(rng, size, spec)
    attribute = _draw_attributes(rng, pairs, spec)
    value = rng.integers(0, VALUES, attribute.shape, dtype=np.int16)
    number = np.arange(spec.chunks * spec.pairs)
    position = 2 * (number + number // spec.pairs) + 4  # of a pair's second token
    cross = pairs.is_fact & (pairs.fixed_by < number - number % spec.pairs)
    bins = np.arange(size)[:, None] * ATTRIBUTES + attribute
    repeated = np.bincount(bins[pairs.is_fact], minlength=size * ATTRIBUTES)[bins] >= 2
    picked = _pick_queries(rng, pairs.is_fact, cross, repeated, num_queries)

    def of_query(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.take_along_axis(array, picked, 1)

    asked, entity = of_query(pairs.is_fact), of_query(pairs.entity)
    columns = [np.full_like(entity, QUERY), FIRST_ENTITY + entity]
    columns += [FIRST_ATTRIBUTE + of_query(attribute), FIRST_VALUE + of_query(value)]
    queries = np.where(asked[..., None], np.stack(columns, 2), PAD).astype(np.int16)
    context = _context(rng, pairs, attribute, value, spec)
    tokens = np.concatenate([context, queries.reshape(size, -1)], 1)
    answer_positions = spec.context_tokens + QUERY_TOKENS * np.arange(num_queries) + 2
    subjects = np.full(tokens.shape, NO_SUBJECT, np.int16)
    subjects[:, position] = np.where(pairs.is_fact, pairs.entity, NO_SUBJECT)
    subjects[:, answer_positions] = np.where(asked, entity, NO_SUBJECT)
    return Batch(spec, tokens, answer_positions, asked, of_query(cross), position[picked], subjects)


def _draw_pairs(rng: np.random.Generator, size: int, spec: Spec) -> _Pairs:
    """Say what each pair is, and for each pair which entity is the subject and what fixes it."""
    shape = (size, spec.chunks, spec.pairs)
    offset = np.arange(spec.pairs)
    low, high = {
        "A": (1, MAX_DANGLE + 1),
        "B": (spec.pairs // 4, 3 * spec.pairs // 4),
        "C": (spec.pairs // 8, spec.pairs // 2),
        "E": (0, 1),
    }[spec.family]
    first = rng.integers(low, high, (size, spec.chunks, 1))
    first[:, 0] = PRONOUNS if spec.family == "C" else 0

    def chance(rate: float) -> Bools:
        return rng.random(shape, dtype=np.float32) < rate

    is_subject = (offset == first) | ((offset > first) & chance(SWITCH_RATE))
    is_define = np.zeros(shape, bool)
    if spec.family == "C":
        is_define = ~is_subject & chance(DEFINE_RATE)
        is_define[:, 0, :PRONOUNS] = True  # every pronoun means something from the start
    last = np.where(is_subject, offset, -1).max(2, keepdims=True)
    held = rng.random((size, spec.chunks, 1)) < spec.hold_rate
    held[:, -1] = False
    is_fact = ~(is_subject | is_define | chance(FILLER_RATE) | (held & (offset > last)))
    kinds = np.stack([is_subject, is_define, is_fact])
    is_subject, is_define, is_fact = kinds.reshape(3, size, -1)
    if spec.family == "C":
        return _bind_pronouns(rng, is_subject, is_define, is_fact)
    entity = _next_entities(rng, is_subject)
    markers = np.full_like(entity, SUBJECT)
    return _Pairs(is_fact, is_subject, markers, FIRST_ENTITY + entity, entity, _latest(is_subject))


def _bind_pronouns(
    rng: np.random.Generator, is_subject: Bools, is_define: Bools, is_fact: Bools
) -> _Pairs:
    # At a SUBJECT pair the pronoun it names, at a DEFINE pair the one it defines.
    pronoun = rng.integers(0, PRONOUNS, is_define.shape, dtype=np.int16)
    pronoun[:, :PRONOUNS] = np.arange(PRONOUNS)
    definition = np.zeros(is_define.shape, np.int32)  # the DEFINE pair in force for `pronoun`
    for number in range(PRONOUNS):
        is_number = pronoun == number
        np.copyto(definition, _latest(is_define & is_number), where=is_number)
    defined = _next_entities(rng, is_define)
    fixed_by = np.take_along_axis(definition, _latest(is_subject), 1)
    entity = np.take_along_axis(defined, fixed_by, 1)
    markers = np.where(is_define, FIRST_DEFINE + pronoun, SUBJECT)
    named = np.where(is_define, FIRST_ENTITY + defined, FIRST_PRONOUN + pronoun)
    return _Pairs(is_fact, is_subject | is_define, markers, named, entity, fixed_by)


def _next_entities(rng: np.random.Generator, is_change: Bools) -> Ints:
    """The entity that the latest marked pair brings in; they repeat only after all were used."""
    order = np.argsort(rng.random((len(is_change), ENTITIES), dtype=np.float32), 1)
    nth = np.maximum(np.cumsum(is_change, 1) - 1, 0)
    return np.take_along_axis(order, nth % ENTITIES, 1).astype(np.int16)


def _latest(marked: Bools) -> Ints:
    """For each pair the number of the latest marked one up to it; 0 if there is none."""
    number = np.arange(marked.shape[1], dtype=np.int32)
    latest: Ints = np.maximum.accumulate(marked * number, 1)
    return latest


def _draw_attributes(rng: np.random.Generator, pairs: _Pairs, spec: Spec) -> Ints:
    """Give each fact of an entity another attribute; facts beyond the last one become filler."""
    # A stable sort by entity puts an entity's facts side by side in their order, so that the rank
    # of a fact is its distance from the first; comparing all pairs with all would be quadratic.
    key = np.where(pairs.is_fact, pairs.entity, ENTITIES).astype(np.uint8)
    order = np.argsort(key, 1, kind="stable")
    key = np.take_along_axis(key, order, 1)
    start = _latest(np.diff(key, axis=1, prepend=key[:, :1]) != 0)
    rank = np.empty_like(start)
    np.put_along_axis(rank, order, np.arange(key.shape[1], dtype=start.dtype) - start, 1)
    pairs.is_fact &= rank < spec.used_attributes
    chance = rng.random((len(key) * ENTITIES, spec.used_attributes), dtype=np.float32)
    row = np.arange(len(key))[:, None] * ENTITIES + pairs.entity
    drawn: Ints = np.argsort(chance, 1)[row, np.minimum(rank, spec.used_attributes - 1)]
    return drawn


def _pick_queries(
    rng: np.random.Generator, is_fact: Bools, cross: Bools, repeated: Bools, num_queries: int
) -> Ints:
    """[size, num_queries] pair numbers, mixed: half rather cross, half rather not."""
    score = rng.random(is_fact.shape, dtype=np.float32)
    score += 4 * repeated
    score[~is_fact] = -9
    num_cross = num_queries // 2
    first = np.argsort(-score - 2 * cross, 1)[:, :num_cross]
    np.put_along_axis(score, first, -99, 1)
    rest = np.argsort(-score + 2 * cross, 1)[:, : num_queries - num_cross]
    return rng.permuted(np.concatenate([first, rest], 1), axis=1)


def _context(
    rng: np.random.Generator, pairs: _Pairs, attribute: Ints, value: Ints, spec: Spec
) -> Ints:
    """[size, context_tokens] int16: BOS and the chunks."""
    shape = (len(value), spec.chunks, 1 + spec.pairs, 2)
    chunks = rng.integers(FIRST_FILLER, FIRST_DEFINE, shape, dtype=np.int16)
    chunks[:, :, 0, 0] = SEP
    fact = (FIRST_VALUE + value, FIRST_ATTRIBUTE + attribute)
    for column, marker in enumerate((pairs.markers, pairs.named)):
        tokens = np.where(pairs.is_fact, fact[column], marker).reshape(*shape[:2], -1)
        filled = (pairs.is_fact | pairs.is_marker).reshape(tokens.shape)
        np.copyto(chunks[:, :, 1:, column], tokens, where=filled, casting="same_kind")
    return np.insert(chunks.reshape(len(value), -1), 0, BOS, axis=1)


def read_facts(tokens: Ints, spec: Spec) -> list[Fact]:
    """Read one prompt's context [T] from left to right, knowing the tokens and nothing else."""
    facts: list[Fact] = []
    meanings: dict[int, tuple[int, int]] = {}  # pronoun: (entity, chunk of its definition)
    subject, chunk = (NO_SUBJECT, -1), -1
    for position in range(1, spec.context_tokens, 2):
        head, tail = int(tokens[position]), int(tokens[position + 1])
        if head == SEP:
            chunk += 1
        elif head == SUBJECT and tail >= FIRST_PRONOUN:
            subject = meanings[tail - FIRST_PRONOUN]
        elif head == SUBJECT:
            subject = (tail - FIRST_ENTITY, chunk)
        elif FIRST_DEFINE <= head < FIRST_PRONOUN:
            meanings[head - FIRST_DEFINE] = (tail - FIRST_ENTITY, chunk)
        elif FIRST_ATTRIBUTE <= tail < FIRST_VALUE:
            value, attribute = head - FIRST_VALUE, tail - FIRST_ATTRIBUTE
            facts.append(Fact(subject[0], attribute, value, position + 1, subject[1] != chunk))
    return facts


def solve(tokens: Ints, spec: Spec, entity: int, attribute: int) -> list[Fact]:
    """The facts of one prompt that answer the query; one if the prompt is right."""
    asked = (entity, attribute)
    return [fact for fact in read_facts(tokens, spec) if (fact.entity, fact.attribute) == asked]


def guessed_share(batch: Batch) -> float | None:
    """What a guess among the cross facts of the asked attribute gets; None without cross queries.

    Whoever knows every chunk alone can tell these facts, but not whose they are.
    """
    chances: list[float] = []
    for row, tokens in enumerate(batch.tokens):
        facts = [fact for fact in read_facts(tokens, batch.spec) if fact.cross]
        asked = batch.fact_positions[row, batch.cross[row]]
        for answer in (fact for fact in facts if fact.position in asked):
            values = [fact.value for fact in facts if fact.attribute == answer.attribute]
            chances.append(values.count(answer.value) / len(values))
    return sum(chances) / len(chances) if chances else None
