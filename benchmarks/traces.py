"""Synthetic traces of prompts as chains of chunks, for the eviction benchmark.

Owns: the workload families, their parameters, and the most that any policy could serve of them.
A prompt is a path in a tree of chunks: equal prefixes share chunk numbers, and a chunk's number
stands for its whole prefix, as a chained prefix key does. What must hold: the same (family, seed,
scale) gives the same trace, on every machine.

Families: `chat` (multi-turn sessions behind Zipf system prompts), `rag` (Zipf documents right
behind one shared preamble), `scan10/30/50` (both mixed, with 10/30/50 % of the prompt chunks in
long one-off prompts), `loop` (a batch job that goes over the same documents in the same order),
`drift` (rag whose popular documents change, at once and bit by bit) and, for `benchmarks.scale`
alone, `documents`: several Zipf documents in any order behind a tenant's system prompt, which only
blending serves.
"""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its answer.

    path: chunk numbers from the root; prompt_chunks: how many of them are looked up. The rest is
    the generated answer: stored when it is done, but never part of this request's prompt.
    session: what a conversation's requests have in common, 0 for those of none. texts: where parts
    of the prompt stand that were stored by themselves too: (first chunk, its own path's chunks).
    """

    path: tuple[int, ...]
    prompt_chunks: int
    session: int = 0
    texts: tuple[tuple[int, tuple[int, ...]], ...] = ()


class _Tree:
    """Numbers chunks by (parent, content), so that only equal prefixes share a number."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._fresh = itertools.count(1)

    def fresh(self) -> int:
        """Return a content that nothing else has."""
        return -next(self._fresh)

    def path(self, contents: list[int], parent: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return `parent` extended by `contents`."""
        out = list(parent)
        last = out[-1] if out else -1
        for content in contents:
            last = self._numbers.setdefault((last, content), len(self._numbers))
            out.append(last)
        return tuple(out)


class _Zipf:
    """Draws 0..n-1 with probability proportional to 1 / (rank + 1) ** s."""

    def __init__(self, n: int, s: float) -> None:
        self._cumulative = list(itertools.accumulate((i + 1) ** -s for i in range(n)))

    def draw(self, rng: random.Random) -> int:
        """Return one rank; 0 is the most popular."""
        return bisect_right(self._cumulative, rng.random() * self._cumulative[-1])


def _texts(tree: _Tree, rng: random.Random, count: int, low: int, high: int) -> list[list[int]]:
    return [[tree.fresh() for _ in range(rng.randint(low, high))] for _ in range(count)]


def _one_off(tree: _Tree, rng: random.Random, low: int, high: int) -> list[int]:
    return [tree.fresh() for _ in range(rng.randint(low, high))]


def _chat(tree: _Tree, rng: random.Random, scale: int) -> Iterator[Request]:
    """Sessions of about 5 turns behind a Zipf(1) system prompt; 24 * scale are open at a time."""
    systems = _texts(tree, rng, 24 * scale, 3, 16)
    popularity = _Zipf(len(systems), 1.0)
    sessions: list[tuple[int, tuple[int, ...]]] = []
    names = itertools.count(1)
    while True:
        if len(sessions) < 24 * scale:
            sessions.append((next(names), tree.path(systems[popularity.draw(rng)])))
        turn = rng.randrange(len(sessions))
        name, said = sessions[turn]
        prompt = tree.path(_one_off(tree, rng, 1, 4), said)
        path = tree.path(_one_off(tree, rng, 0, 4), prompt)
        yield Request(path, len(prompt), name)
        if rng.random() < 0.2:
            sessions.pop(turn)
        else:
            sessions[turn] = name, path


def _rag(
    tree: _Tree, rng: random.Random, scale: int, hot_moves_every: int = 0
) -> Iterator[Request]:
    """One or two Zipf(0.9) documents behind a preamble, then a question nobody asked before.

    hot_moves_every: requests after which a quarter of the popularity order moves on (0: never);
    every fourth time all of it does.
    """
    preamble = tree.path(_one_off(tree, rng, 6, 6))
    documents = _texts(tree, rng, 150 * scale, 4, 24)
    popularity = _Zipf(len(documents), 0.9)
    for number in itertools.count(1):
        if hot_moves_every and number % hot_moves_every == 0:
            if number % (4 * hot_moves_every) == 0:
                rng.shuffle(documents)
            else:
                half = len(documents) // 2
                for rank in rng.sample(range(half), half // 2):
                    other = rng.randrange(len(documents))
                    documents[rank], documents[other] = documents[other], documents[rank]
        contents = list(documents[popularity.draw(rng)])
        if rng.random() < 0.25:
            contents += documents[popularity.draw(rng)]
        prompt = tree.path(contents + _one_off(tree, rng, 1, 2), preamble)
        yield Request(tree.path(_one_off(tree, rng, 0, 3), prompt), len(prompt))


def _mixed(tree: _Tree, rng: random.Random, scale: int, scan_share: float) -> Iterator[Request]:
    """Half chat and half rag requests; `scan_share` of all prompt chunks in one-off prompts."""
    chat, rag = _chat(tree, rng, scale), _rag(tree, rng, scale)
    scanned, seen = 0, 1
    while True:
        if scanned < scan_share * seen:
            path = tree.path(_one_off(tree, rng, 40, 160))
            scanned += len(path)
            request = Request(path, len(path))
        else:
            request = next(chat if rng.random() < 0.5 else rag)
        seen += request.prompt_chunks
        yield request


def _loop(tree: _Tree, rng: random.Random, scale: int) -> Iterator[Request]:
    """The same documents in the same order behind one instruction, again and again."""
    preamble = tree.path(_one_off(tree, rng, 6, 6))
    paths = [tree.path(text, preamble) for text in _texts(tree, rng, 150 * scale, 4, 24)]
    for path in itertools.cycle(paths):
        yield Request(path, len(path))


def _documents(tree: _Tree, rng: random.Random, scale: int) -> Iterator[Request]:
    """4 to 8 Zipf(0.9) documents in any order behind one of many system prompts, then a question.

    Each document was also stored by itself, behind a preamble that nothing else has.
    """
    systems = _texts(tree, rng, 24 * scale, 1, 3)
    documents = _texts(tree, rng, 150 * scale, 1, 4)
    preamble = tree.path([tree.fresh()])
    alone = [tree.path(text, preamble)[1:] for text in documents]
    tenants, popularity = _Zipf(len(systems), 1.0), _Zipf(len(documents), 0.9)
    while True:
        contents, texts = list(systems[tenants.draw(rng)]), []
        for rank in dict.fromkeys(popularity.draw(rng) for _ in range(rng.randint(4, 8))):
            texts.append((len(contents), alone[rank]))
            contents += documents[rank]
        path = tree.path([*contents, tree.fresh()])
        yield Request(path, len(path), 0, tuple(texts))


_FAMILIES: dict[str, Callable[[_Tree, random.Random, int], Iterator[Request]]] = {
    "chat": _chat,
    "rag": _rag,
    "scan10": lambda tree, rng, scale: _mixed(tree, rng, scale, 0.10),
    "scan30": lambda tree, rng, scale: _mixed(tree, rng, scale, 0.30),
    "scan50": lambda tree, rng, scale: _mixed(tree, rng, scale, 0.50),
    "loop": _loop,
    "drift": lambda tree, rng, scale: _rag(tree, rng, scale, hot_moves_every=100 * scale),
}
FAMILIES = tuple(_FAMILIES)


def make_trace(family: str, seed: int, chunks: int, scale: int = 1) -> list[Request]:
    """Return requests of `family` with about `chunks` * `scale` prompt chunks in all.

    scale also multiplies the number of documents, system prompts and open sessions, so that a
    larger trace is the same workload on a larger site. Raises ValueError for an unknown family.
    """
    families = {**_FAMILIES, "documents": _documents}
    if family not in families:
        raise ValueError(f"unknown trace family {family!r}: expected one of {', '.join(families)}")
    rng = random.Random(f"{family}/{seed}")
    out: list[Request] = []
    left = chunks * scale
    for request in families[family](_Tree(), rng, scale):
        out.append(request)
        left -= request.prompt_chunks
        if left <= 0:
            break
    return out


def footprint(trace: list[Request]) -> int:
    """Return the number of different chunks in `trace`: the slots that would hold all of it."""
    return len({chunk for request in trace for chunk in request.path})


def served_by_min(trace: list[Request], slots: int) -> float:
    """Return the share of the prompt chunks that the offline optimum serves with `slots` slots.

    Belady's MIN with bypass. It is exact here: a parent's next use is never later than its
    child's, so what it evicts is always a leaf, and its hits are always whole prefixes.
    """
    next_use: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for number in range(len(trace) - 1, -1, -1):
        path = trace[number].path
        next_uses.append([next_use.get(chunk, len(trace)) for chunk in path])
        next_use.update(zip(path, itertools.repeat(number)))
    cached: dict[int, tuple[int, int]] = {}
    order: list[tuple[tuple[int, int], int]] = []
    hits = 0
    for request, uses in zip(trace, reversed(next_uses), strict=True):
        for depth, (chunk, use) in enumerate(zip(request.path, uses, strict=True)):
            hits += chunk in cached and depth < request.prompt_chunks
            cached[chunk] = (-use, -depth)
            heapq.heappush(order, (cached[chunk], chunk))
            while len(cached) > slots:
                key, victim = heapq.heappop(order)
                if cached.get(victim) == key:
                    del cached[victim]
    return hits / sum(request.prompt_chunks for request in trace)
