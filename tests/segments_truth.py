"""The truth about segments, found the slow way: every run of one text in another, by comparing.

Uses no fingerprint and no row of the index: only token ids, and the keys that `KeyChain` gives,
to tell which stored text a segment says it comes from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from prefixstore import Layout, Namespace, PutState, Store
from prefixstore.rows import Row
from prefixstore.segment_index import SOURCES_MAX
from prefixstore.segments import Segment
from prefixstore.testing_data import content_of, identity_for

MIN_TOKENS = 64


def layout_of(chunk_tokens: int) -> Layout:
    """Chunks of so many tokens in slots of 4 KiB."""
    return Layout(num_layers=1, num_planes=1, num_heads=1, chunk_tokens=chunk_tokens, head_bytes=4)


def space_of(store: Store, chunk_tokens: int = 16, label: str = "a") -> Namespace:
    layout = layout_of(chunk_tokens)
    return store.namespace(identity_for(label, layout), layout)


def words(seed: int, count: int, vocabulary: int = 1_000_000) -> list[int]:
    """Random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


def keep(
    namespace: Namespace, tokens: Sequence[int], salt: bytes = b"", **options: object
) -> list[int]:
    """Store a text and wait until it is searched; returns what of it is stored: whole chunks."""
    refs = namespace.chain(tokens, salt=salt).refs()
    data = [content_of(ref.key, namespace.layout.payload_bytes) for ref in refs]
    states = namespace.put(refs, data, **options)  # type: ignore[arg-type]
    assert set(states) <= {PutState.STORED, PutState.EXISTS}
    if namespace.store.has_disk:
        assert namespace.store.flush(30)
    return list(tokens[: len(refs) * namespace.layout.chunk_tokens])


def check(
    namespace: Namespace,
    prompt: Sequence[int],
    segments: Sequence[Segment],
    texts: Sequence[Sequence[int]],
    start: int = 0,
    salt: bytes = b"",
) -> None:
    """Each segment is a run of a stored text, as long as it can be; they are in order."""
    size = namespace.layout.chunk_tokens
    chains = [namespace.chain(text, salt=salt).refs() for text in texts]
    stops = [segment.stop for segment in segments]
    starts = [segment.start for segment in segments]
    for segment, low, high in zip(
        segments, [start, *stops], [*starts[1:], len(prompt)], strict=False
    ):
        assert low <= segment.start < segment.stop <= high
        assert segment.num_tokens >= MIN_TOKENS
        assert [tier in (1, 2) for tier in segment.tiers] == [True] * len(segment.refs)
        depth, place = segment.refs[0].depth, segment.source_start
        sources = [
            text
            for text, chain in zip(texts, chains, strict=True)
            if chain[depth : depth + len(segment.refs)] == list(segment.refs)
        ]
        assert sources, "it comes from no stored text"
        assert depth == place // size
        assert segment.refs[-1].depth == (place + segment.num_tokens - 1) // size
        for text in sources:
            part = text[place : place + segment.num_tokens]
            assert list(part) == list(prompt[segment.start : segment.stop])
            at, behind = segment.start, place + segment.num_tokens
            assert at == low or place == 0 or text[place - 1] != prompt[at - 1]
            assert segment.stop == high or text[behind : behind + 1] != [prompt[segment.stop]]
        check_pieces(segment, size)


def check_pieces(segment: Segment, chunk_tokens: int) -> None:
    """The pieces are the tokens of the segment, one after the other."""
    places = [
        piece.ref.depth * chunk_tokens + piece.offset + i
        for piece in segment.pieces
        for i in range(piece.num_tokens)
    ]
    assert places == list(range(segment.source_start, segment.source_start + segment.num_tokens))
    assert [piece.ref for piece in segment.pieces] == list(segment.refs)
    assert [piece.tier for piece in segment.pieces] == list(segment.tiers)


def missed(
    prompt: Sequence[int],
    segments: Sequence[Segment],
    texts: Sequence[Sequence[int]],
    start: int = 0,
) -> list[int]:
    """Where in the prompt MIN_TOKENS tokens begin that stand in a text and touch no segment."""
    known = {
        tuple(text[at : at + MIN_TOKENS])
        for text in texts
        for at in range(len(text) - MIN_TOKENS + 1)
    }
    taken = [False] * len(prompt)
    for segment in segments:
        taken[segment.start : segment.stop] = [True] * segment.num_tokens
    return [
        at
        for at in range(start, len(prompt) - MIN_TOKENS + 1)
        if not any(taken[at : at + MIN_TOKENS]) and tuple(prompt[at : at + MIN_TOKENS]) in known
    ]


def tables(store: Store) -> dict[str, dict[bytes, bytes]]:
    """The rows and the segment index of the tier that is searched."""
    with (store.index if store.has_disk else store.live).read() as txn:
        return {name: dict(txn.scan(name)) for name in ("chunk", "indexed", "child", "segment")}


def faults(store: Store) -> list[str]:
    """What is inconsistent, by the words of docs/format.md: nothing points to what is not there."""
    found = tables(store)
    wrong = []
    named: dict[bytes, list[bytes]] = {key: [] for key in found["indexed"]}
    for name, value in found["segment"].items():
        sources = [value[at : at + 24] for at in range(0, len(value), 24)]
        if not 1 <= len(sources) <= SOURCES_MAX or sources != sorted(set(sources)):
            wrong.append(f"sources of {name.hex()}: {len(sources)}")
        for key in {source[8:] for source in sources}:
            named.setdefault(key, []).append(name)
    for key, value in found["indexed"].items():
        if key not in found["chunk"]:
            wrong.append(f"{key.hex()} is gone")
        elif Row.unpack(found["chunk"][key]).preimage[:20] != value[:20]:
            wrong.append(f"{key.hex()} has another parent")
        if sorted(value[at : at + 8] for at in range(20, len(value), 8)) != sorted(named[key]):
            wrong.append(f"{key.hex()} is named by others than it lists")
    if named.keys() != found["indexed"].keys():
        wrong.append("sources that are not indexed")
    if {value[:20] + key for key, value in found["indexed"].items()} != found["child"].keys():
        wrong.append("children are others than those indexed")
    return wrong
