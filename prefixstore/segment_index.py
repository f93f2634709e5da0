"""The segment index: where in the stored texts each fingerprint stands.

Tables beside the rows of the chunks, written and deleted in the same transaction as the row they
belong to, so a crash leaves both or neither. They are in the durable index if the store has a
disk, beside the rows of the disk tier: so they outlive a reboot without being computed again, and
their cost (0.2 ms a chunk) falls on the thread that spills, never on a put. A chunk can be found
once it has been spilled, and as long as it is on disk. A store without a disk has them in the live
index, beside the rows of the memory tier.

  segment  fingerprint -> sources, best first         indexed  key -> parent key, first token,
  child    parent key, first token, key -> empty               fingerprints that name this chunk
  staleness  key -> what was measured of its tokens (`prefixstore.staleness`), if anything was

What must hold:

- Of each window of each indexed text the fingerprint has a source whose text agrees with the whole
  window, unless SOURCES_MAX better ones that do not have taken its place. So a text that stands
  behind ten prefixes is one source, not ten, and a phrase that many texts have in common does not
  hide what stands around it.
- Of two sources with the same text, one encoded alone (FLAG_ALONE) is better than one from the
  middle of another prompt, whose KV has the other text mixed in; then the one nearer to the start
  of its prompt.
- A fingerprint belongs to the chunk its gram ends in, also when only a window that ends in the next
  chunk chose it.

When a source goes, texts that were not entered because it was there stay out until they are stored
again or ``verify --fix`` is run: finding them would take a list of what each source stands for.
Chunks that hold part of a multimodal item are not entered.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from prefixstore.index import Txn
from prefixstore.keys import KEY_BYTES
from prefixstore.rows import FLAG_ALONE, SCOPE
from prefixstore.segment_text import ChildrenOf, Prompt, Run, Texts
from prefixstore.winnow import (
    GRAM_TOKENS,
    SPAN_TOKENS,
    WINDOW_GRAMS,
    gram_hashes,
    seed_of,
    window_minima,
)

TABLES = ("segment", "indexed", "child", "staleness")
SOURCES_MAX = 8  # of a fingerprint; also grams with the same one entered for a chunk
FOLLOWERS_MAX = 64  # chunks behind a chunk that are looked at again when it comes back
_ROWS_MAX = 64  # looked at to compare one source
_CONTEXT = SPAN_TOKENS + WINDOW_GRAMS - 2  # tokens before a chunk that all windows of a gram are in
_FINGERPRINT_BYTES = 8
_PLACE_BYTES = KEY_BYTES + 4  # parent key and first token
_LATER = 1 << 31  # added to the rank of what was not encoded alone
_SOURCE = struct.Struct(">II16s")


class Source(NamedTuple):
    """One place of a fingerprint. They sort best first, encoded as well."""

    rank: int  # depth of the chunk; those not encoded alone after all others
    offset: int  # of the gram's last token in the chunk
    key: bytes

    @property
    def alone(self) -> bool:
        """Whether the chunk was encoded alone."""
        return self.rank < _LATER


def unpack_sources(data: bytes) -> list[Source]:
    """Decode the value of a fingerprint."""
    whole = len(data) // _SOURCE.size * _SOURCE.size
    return [Source(*fields) for fields in _SOURCE.iter_unpack(data[:whole])]


def enter(txn: Txn, key: bytes, chunk_tokens: int) -> None:
    """Index a chunk whose row was put in this transaction; before those that follow it."""
    leave(txn, key)
    texts = _texts(txn, key, chunk_tokens)
    row = None if texts is None else texts.row(key)
    if texts is None or row is None:
        return
    place = texts.parent(row) + texts.token_bytes(row)[:4]
    txn.put("indexed", key, place)
    txn.put("child", child_name(key, place))
    _cover(txn, texts, key)
    for follower in _followers(txn, key, chunk_tokens):
        _cover(txn, texts, follower)


def refresh(txn: Txn, key: bytes, chunk_tokens: int) -> None:
    """Look again at a chunk that is indexed: sources it was left out for may have gone."""
    if (texts := _texts(txn, key, chunk_tokens)) is not None:
        _cover(txn, texts, key)


def leave(txn: Txn, key: bytes, also: Iterable[bytes] = ()) -> None:
    """Take a chunk out of the index; ``also`` are fingerprints that wrongly name it."""
    data = txn.get("indexed", key)
    names = set(also)
    if data is not None:
        txn.delete("indexed", key)
        txn.delete("child", child_name(key, data))
        names.update(fingerprints_of(data))
    for name in names:
        there = _sources(txn, name)
        _put_sources(txn, name, there, [source for source in there if source.key != key])


def forget(txn: Txn, key: bytes) -> None:
    """The row of a chunk is gone: take out all that belonged to it."""
    leave(txn, key)
    txn.delete("staleness", key)


def child_name(key: bytes, data: bytes) -> bytes:
    """The key in table ``child`` of a chunk with this value in ``indexed``."""
    return data[:_PLACE_BYTES] + key


def fingerprints_of(data: bytes) -> list[bytes]:
    """The fingerprints in a value of table ``indexed``."""
    return [
        data[at : at + _FINGERPRINT_BYTES]
        for at in range(_PLACE_BYTES, len(data), _FINGERPRINT_BYTES)
    ]


def children_of(txn: Txn) -> ChildrenOf:
    """A function that gives the keys of the chunks behind a chunk that begin with a token."""
    return lambda place: (name[_PLACE_BYTES:] for name, _ in txn.scan("child", place))


def _texts(txn: Txn, key: bytes, chunk_tokens: int) -> Texts | None:
    row_of = partial(txn.get, "chunk")
    row = row_of(key)
    if row is None:
        return None
    scope = row[SCOPE]
    return Texts(row_of, children_of(txn), scope, chunk_tokens, time.time(), _ROWS_MAX)


def _followers(txn: Txn, key: bytes, chunk_tokens: int) -> list[bytes]:
    """Chunks that were there before the one they follow, and whose windows begin in it."""
    found = [key]
    start = 0
    for _ in range(-(-(SPAN_TOKENS - 1) // chunk_tokens)):
        level, start = found[start:], len(found)
        behind = (name[_PLACE_BYTES:] for one in level for name, _ in txn.scan("child", one))
        found += islice(behind, FOLLOWERS_MAX + 1 - len(found))
    return found[1:]


def _cover(txn: Txn, texts: Texts, key: bytes) -> None:
    """See to it that each window that ends in a chunk has a source."""
    chunks = _back(txn, texts, key)
    if not chunks:
        return
    size = texts.chunk_tokens
    data = b"".join(texts.token_bytes(row) for _, row in reversed(chunks))
    tokens = np.frombuffer(data, "<i4")[-(_CONTEXT + size) :]
    hashes = gram_hashes(tokens, seed_of(texts.scope)).tolist()
    first = max(0, len(tokens) - size - SPAN_TOKENS + 1)  # where the first window begins
    minima = window_minima(hashes[first:])
    end = dict(zip(minima, range(len(minima)), strict=True))  # last window that chose a gram
    begin = dict(zip(minima[::-1], range(len(minima))[::-1], strict=True))
    prompt = Prompt(tokens, texts)
    entered: Counter[int] = Counter()
    for chosen in end:
        gram = first + chosen
        entered[hashes[gram]] += 1
        if entered[hashes[gram]] > SOURCES_MAX:
            continue  # a text of a short period: its windows repeat as well
        last = gram + GRAM_TOKENS - 1
        back = (len(tokens) - 1 - last) // size
        owner, row = chunks[back]
        offset = last - (len(tokens) - (back + 1) * size)
        rank = min(int.from_bytes(row[4:8], "little"), _LATER - 1)
        source = Source(rank if row[1] & FLAG_ALONE else rank + _LATER, offset, owner)
        needed = first + begin[chosen], first + end[chosen] + SPAN_TOKENS
        _offer(txn, prompt, hashes, gram, needed, source)


def _back(txn: Txn, texts: Texts, key: bytes) -> list[tuple[bytes, bytes]]:
    """A chunk and those before it that its windows begin in, or nearly, last one first."""
    chunks: list[tuple[bytes, bytes]] = []
    for _ in range(1 + -(-_CONTEXT // texts.chunk_tokens)):
        row = texts.row(key)
        if row is None or txn.get("indexed", key) is None:
            break
        chunks.append((key, row))
        key = texts.parent(row)
    return chunks


def _offer(
    txn: Txn,
    prompt: Prompt,
    hashes: list[int],
    gram: int,
    needed: tuple[int, int],
    offered: Source,
) -> None:
    """Enter a source of a gram, unless one as good has the ``needed`` tokens around it.

    What it makes superfluous goes: worse sources whose windows are all windows of this text too.
    """
    fingerprint = hashes[gram].to_bytes(_FINGERPRINT_BYTES, "big")
    last = gram + GRAM_TOKENS - 1
    there = _sources(txn, fingerprint)
    known = any(source[1:] == offered[1:] for source in there)
    kept = [] if known else [offered]
    for source in there:
        if source[1:] != offered[1:]:
            prompt.texts.rows_left = _ROWS_MAX
            run = prompt.run(source.key, last - source.offset, last)
            if run is not None and run.start <= needed[0] and needed[1] <= run.stop:
                if source.rank > offered.rank and _has_all_windows(run, hashes, gram):
                    continue
                if source.rank <= offered.rank and not known:
                    return
        kept.append(source)
    if kept != there:
        _put_sources(txn, fingerprint, there, sorted(kept)[:SOURCES_MAX])


def _has_all_windows(run: Run, hashes: list[int], gram: int) -> bool:
    """Whether all windows in which a source's gram is the first minimum are in the run.

    They are if the run goes on, to either side, to a gram that is smaller, or as far as a window.
    """
    first, last = gram - WINDOW_GRAMS + 1, gram + WINDOW_GRAMS - 1
    before = hashes[max(run.start, first, 0) : gram]
    after = hashes[gram + 1 : min(run.stop - GRAM_TOKENS, last) + 1]
    left = run.start <= first or any(value <= hashes[gram] for value in before)
    right = last <= run.stop - GRAM_TOKENS or any(value < hashes[gram] for value in after)
    return left and right


def _sources(txn: Txn, fingerprint: bytes) -> list[Source]:
    return unpack_sources(txn.get("segment", fingerprint) or b"")


def _put_sources(
    txn: Txn, fingerprint: bytes, before: Sequence[Source], after: Sequence[Source]
) -> None:
    """Replace the sources of a fingerprint, in its own row and in those of their chunks."""
    if after:
        txn.put("segment", fingerprint, b"".join(_SOURCE.pack(*source) for source in after))
    else:
        txn.delete("segment", fingerprint)
    entered = {source.key for source in after}
    for key in entered ^ {source.key for source in before}:
        data = txn.get("indexed", key)
        if data is None:
            continue  # it is leaving
        names = [name for name in fingerprints_of(data) if name != fingerprint]
        if key in entered:
            names.append(fingerprint)
        txn.put("indexed", key, data[:_PLACE_BYTES] + b"".join(names))
