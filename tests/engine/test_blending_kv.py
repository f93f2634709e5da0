"""The KV of blends in vLLM's pages is the reference's, for every selector: all layers, all tokens.

The reference (`blend.reference`) blends the same prompt on the Hugging Face model with the same
weights, in plain PyTorch. The K and V it starts from were never in a cache of ours: that model
encodes each text behind the system prompt, and K is turned here, in complex numbers of float64.
Both sides share the rule that picks tokens from scores, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.engine import Engine
from blend import reference
from prefixstore import Store
from prefixstore.staleness import note_staleness
from tests.engine import odd_connectors
from tests.engine.support import CHUNK_TOKENS, ask, remove_memory_of, start, tiny_model
from tests.engine.test_blending import BLEND, DOCUMENTS, GAP, MIXED, SYSTEM, warm

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

LAYERS = 4
CLOSE = 1e-4
# Of MIXED: system prompt, document 2 (exact), gap, documents 0 and 1, question. Whole chunks of the
# documents are stored; place in the prompt, tokens and document of what is reused elsewhere.
EXACT = len(SYSTEM) + 128
_FIRST = len(SYSTEM) + len(DOCUMENTS[2]) + len(GAP)
MOVED = [(_FIRST, 128, 0), (_FIRST + len(DOCUMENTS[0]), 192, 1)]
CASES = [
    ("none", 0.0, 1), ("all", 1.0, 1), ("random", 0.2, 1), ("random", 0.5, 4), ("first", 0.2, 1),
    ("first", 0.5, 1), ("deviation", 0.6, 1), ("deviation", 0.75, 4), ("query", 0.5, 1),
    ("query", 0.7, 4), ("staleness", 0.2, 1), ("staleness", 0.5, 1), ("staleness", 0.5, 4),
    ("staleness-query", 0.5, 1), ("staleness-query", 0.7, 1),
]  # fmt: skip


class Side:
    """One model, served by vLLM and run by Hugging Face."""

    def __init__(self, model: Path, folder: Path, engine: Engine) -> None:
        self.model, self.folder, self.engine = model, folder, engine
        generator = np.random.default_rng(3)
        self.staleness = [
            generator.random(len(document), np.float32).astype(np.float16) for document in DOCUMENTS
        ]

    def measure(self) -> None:
        """Put numbers beside all stored chunks of the documents."""
        with Store.open(self.folder, create=False) as store:
            assert store.flush()
            [record] = store.namespaces()
            namespace = store.namespace(record.identity, record.layout)
            for document, values in zip(DOCUMENTS, self.staleness, strict=True):
                count = len(document) // CHUNK_TOKENS
                refs = namespace.chain(SYSTEM + document).refs(1, 1 + count)
                rows = values[: count * CHUNK_TOKENS].reshape(count, CHUNK_TOKENS)
                assert note_staleness(namespace, refs, rows) == count

    def told(self, selector: str, budget: float, span: int) -> Any:
        """What is in vLLM's pages when it has blended MIXED, see `odd_connectors.Telling`."""
        asked = {"selector": selector, "budget": budget, "span": span}
        ask(self.engine, MIXED, params={"prefixstore": {"write": False, "blend": asked}})
        return np.load(self.folder.parent / f"{selector}-{budget}-{span}.npz")

    @cached_property
    def hf(self) -> Any:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model.eval()

    def encoded(self, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        """K and V of every layer, [1, heads, tokens, size]."""
        with torch.inference_mode():
            cache = self.hf(torch.tensor([ids]), use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def reused(self, end: int) -> reference.Reused:
        """What a blend of ``[0, end)`` starts from."""
        candidates = torch.zeros(end, dtype=torch.bool)
        offsets, staleness = torch.zeros(end, dtype=torch.int64), torch.zeros(1, end)
        cached = [(key.clone(), value.clone()) for key, value in self.encoded(MIXED[:end])]
        for key, value in cached:
            key[:, :, EXACT:] = value[:, :, EXACT:] = torch.nan  # must not be looked at
        for start_, count, number in MOVED:
            here, there = slice(start_, start_ + count), slice(len(SYSTEM), len(SYSTEM) + count)
            candidates[here] = True
            offsets[here] = torch.arange(count)
            staleness[0, here] = torch.from_numpy(self.staleness[number][:count]).float()
            source = self.encoded(SYSTEM + DOCUMENTS[number])
            for (key, value), (from_key, from_value) in zip(cached, source, strict=True):
                key[:, :, here] = turned(from_key[:, :, there], start_ - len(SYSTEM))
                value[:, :, here] = from_value[:, :, there]
        fresh = ~candidates
        fresh[:EXACT] = False
        ids = torch.tensor([MIXED[:end]])
        return reference.Reused(ids, cached, candidates, fresh, offsets, staleness)


def turned(keys: Tensor, delta: int) -> Tensor:
    """K for positions ``delta`` further on, by the definition of RoPE."""
    half = keys.shape[-1] // 2
    angles = delta * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    pairs = torch.complex(keys[..., :half].double(), keys[..., half:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1).float()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def side(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp(request.param) / "store"
    model = tiny_model(layers=LAYERS, arch=request.param)
    told = odd_connectors.named("Telling", folder, blend=BLEND)
    with start(model, folder, kv_transfer_config=told) as engine:
        warm(engine, folder)
        side = Side(model, folder, engine)
        side.measure()
        yield side
    remove_memory_of(folder.parent)


@pytest.mark.parametrize(("selector", "budget", "span"), CASES)
def test_key_values_are_the_references(side: Side, selector: str, budget: float, span: int) -> None:
    told = side.told(selector, budget, span)
    assert int(told["computed"]) == EXACT
    shifts = {(at - source, number) for (at, _, source), number in _by_document(told["pieces"])}
    assert shifts == {(at - len(SYSTEM), number) for at, _, number in MOVED}
    covered = sorted(at + i for at, count, _ in told["pieces"] for i in range(count))
    assert covered == [at + i for at, count, _ in MOVED for i in range(count)]

    found = torch.from_numpy(told["kv"])  # [layers, 2, heads, tokens, size]
    end = found.shape[3]
    expected = reference.blend(side.hf, side.reused(end), selector, budget, span=span)
    assert int(told["recomputed"]) == int(expected.chosen.sum())
    if selector not in ("none", "all"):
        assert 0 < int(told["recomputed"]) < len(covered)
    wanted = torch.stack([torch.cat(layer) for layer in expected.trace.key_values])
    assert len(found) == LAYERS
    error = float((found - wanted).abs().max())
    print(f"largest difference {error:.2g}")
    assert error < CLOSE


def _by_document(pieces: Any) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Each piece, and which document it is of by where it stands."""
    for piece in pieces.tolist():
        yield tuple(piece), next(n for at, count, n in MOVED if at <= piece[0] < at + count)


def test_numbers_decide(side: Side) -> None:
    """What was put beside the chunks is used: the reference with other numbers is far away."""
    told = torch.from_numpy(side.told("staleness", 0.5, 1)["kv"])
    reused = side.reused(told.shape[3])
    other = torch.rand(reused.staleness.shape, generator=torch.Generator().manual_seed(1))
    unlike = reference.Reused(**{**_fields(reused), "staleness": other})
    found = reference.blend(side.hf, unlike, "staleness", 0.5).trace.key_values
    wanted = torch.stack([torch.cat(layer) for layer in found])
    assert float((told - wanted).abs().max()) > 100 * CLOSE


def _fields(reused: reference.Reused) -> dict[str, Any]:
    return {name: getattr(reused, name) for name in reused.__slots__}
