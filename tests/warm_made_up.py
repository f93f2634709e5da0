"""What the tests of warming share: a made-up model whose KV depends on what stands before, put by a
made-up engine that drops chunks and dies; and the truth about it, computed outside of any store.

`python -m tests.warm_made_up OPTIONS DIES_AT` warms in a process that kills itself with SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blend.rope import Rope
from blend.staleness import Encoded, staleness
from prefixstore import Layout, ModelIdentity, Store, admin, warm_run
from prefixstore import warm as warm_module
from prefixstore.client.token import read_token
from prefixstore.errors import StoreError
from prefixstore.interface import NamespaceLike, StoreLike, open_store
from prefixstore.warm import Document, warm
from prefixstore.warm_contexts import Contexts
from prefixstore.warm_plan import Engine

SIZE, HEADS, HEAD, LAYERS = 16, 2, 8, 3
LAYOUT = Layout(
    num_layers=LAYERS, num_planes=2, num_heads=HEADS, chunk_tokens=SIZE, head_bytes=4 * HEAD
)
IDENTITY = ModelIdentity(
    architecture="LlamaForCausalLM", num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD,
    rope="{}", attention="{}", weights="w", model_dtype="float32", kv_dtype="float32",
    chunk_tokens=SIZE,
)  # fmt: skip
CONFIG = {"model_type": "llama", "head_dim": HEAD, "rope_theta": 10000.0}
FACTS = Engine("made-up", IDENTITY, LAYOUT, 2000, CONFIG)
PREAMBLE = list(range(5000, 5021))  # a chunk and five tokens


def document(number: int, length: int) -> Document:
    return Document(f"d{number}", ids=[10_000 * number + at for at in range(length)])


DOCUMENTS = [document(number, 150 + 37 * number) for number in range(1, 8)]
OWN_CHUNKS = [(len(PREAMBLE) + len(d.ids or ())) // SIZE - 1 for d in DOCUMENTS]


@cache
def _embedding(token: int) -> npt.NDArray[np.float32]:
    shape = LAYERS, 2, HEADS, HEAD
    return np.random.default_rng(token).standard_normal(shape, np.float32)


def kv_of(ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """[layers, 2, heads, tokens, head size]; each token's hangs on the 40 before it."""
    return _kv_of(tuple(ids))


@cache
def _kv_of(ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
    own = np.stack([_embedding(token) for token in ids])
    mixed = own.copy()
    for at in range(1, len(ids)):
        mixed[at] += (at % 5) * own[max(0, at - 40) : at].mean(0)
    kv = torch.from_numpy(mixed).permute(1, 2, 0, 3, 4)  # layers, 2, tokens, heads, size
    keys = Rope.from_config(CONFIG).rotate(kv[:, 0], torch.arange(len(ids)))
    kv = torch.stack([keys, kv[:, 1]], 1).transpose(2, 3)
    return np.ascontiguousarray(kv.numpy())


def chunks_of(ids: Sequence[int]) -> list[bytes]:
    kv = kv_of(ids)
    whole = range(0, len(ids) // SIZE * SIZE, SIZE)
    return [np.ascontiguousarray(kv[..., at : at + SIZE, :]).tobytes() for at in whole]


def opened(options: dict[str, str]) -> StoreLike:
    """The store that a connector with these options has."""
    if "url" not in options:
        return Store.open(options["dir"], create=False)
    token = read_token(options["token_file"]) if "token_file" in options else ""
    return open_store(options["url"], token=token, ca_file=options.get("ca_file"))


class MadeUp:
    """An engine, as `Computer` wants it. ``drop``: of the n-th prompt, which chunks are lost;
    ``die_at``: the prompt that raises KeyboardInterrupt."""

    drop: Callable[[int, int], bool] = staticmethod(lambda prompt, chunk: False)
    die_at = -1
    facts, start_s = FACTS, 1.5

    def __init__(self, model: str, store: dict[str, str], engine: Any, chunk_tokens: int) -> None:
        self.prompts: list[tuple[list[int], dict[str, Any]]] = []
        self._store = opened(store)
        type(self).last = self  # type: ignore[attr-defined]

    def __enter__(self) -> MadeUp:
        return self

    def __exit__(self, *_: object) -> None:
        if self.die_at >= 0:  # what was staged when it was interrupted
            self._put(*self.prompts[-1], lambda chunk: True)
        self._store.close()

    def salt(self, text: str) -> bytes:
        return text.encode()

    def compute(self, prompts: Sequence[tuple[list[int], dict[str, Any]]]) -> Iterator[int]:
        for index, (ids, options) in enumerate(prompts):
            number = len(self.prompts)
            self.prompts.append((ids, options))
            if number == self.die_at:
                self.die()
            self._put(ids, options, partial(self._keeps, number))
            yield index

    def die(self) -> None:
        raise KeyboardInterrupt

    def _keeps(self, prompt: int, chunk: int) -> bool:
        return not self.drop(prompt, chunk)

    def _put(self, ids: list[int], options: dict[str, Any], keep: Callable[[int], bool]) -> None:
        labels = {k: v for k, v in options.items() if k not in ("read", "salt")}
        data = chunks_of(ids)
        kept = [at for at in range(len(data)) if keep(at)]
        with suppress(StoreError):  # as an engine: what cannot be stored is dropped
            namespace = self._store.namespace(IDENTITY, LAYOUT)
            refs = namespace.chain(ids, self.salt(options.get("salt", ""))).refs()
            namespace.put([refs[at] for at in kept], [data[at] for at in kept], **labels)


def host_of(engine: type[MadeUp]) -> SimpleNamespace:
    """What `connector.warming` is to the library."""
    return SimpleNamespace(facts=lambda *of_engine: FACTS, WarmingEngine=engine)


def check_chunks(
    namespace: NamespaceLike, documents: Sequence[Document] = DOCUMENTS
) -> dict[str, list[bytes]]:
    """That it has all, with the right bytes and staleness. Returns the keys of each document, and
    as "" those of the preamble."""
    contexts = Contexts([list(d.ids or ()) for d in documents], SIZE)
    rope = Rope.from_config(CONFIG)
    kept = {"": [ref.key for ref in namespace.chain(PREAMBLE).refs()]}
    for index, one in enumerate(documents):
        prompt = PREAMBLE + list(one.ids or ())
        refs = namespace.chain(prompt).refs()
        kept[one.name] = [ref.key for ref in refs[1:]]
        outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in refs]
        assert 0 not in namespace.get(refs, outs)
        assert [bytes(out) for out in outs] == chunks_of(prompt)
        own = len(refs) * SIZE - len(PREAMBLE)

        def encoded(front: list[int], own: int = own, one: Document = one) -> Encoded:
            ids = front + list(one.ids or ())[:own]
            kv = torch.from_numpy(kv_of(ids)).transpose(2, 3)[:, :, len(front) :]
            return Encoded(len(front), [(layer[0], layer[1]) for layer in kv])

        others = [encoded(PREAMBLE + context) for context in contexts.of(index)]
        assert len(others) == 2
        truth = staleness(rope, encoded(PREAMBLE), others)
        assert float(truth.max()) > 0.1
        noted = [value for value in namespace.staleness_of(refs) if value is not None]
        assert len(noted) == len(refs) - 1  # not of the chunk that is all preamble
        found = np.concatenate(noted).astype(np.float32)
        assert np.isnan(found[:5]).all()  # the preamble's
        assert np.allclose(found[5:], truth.numpy(), rtol=2e-3, atol=1e-4)
    return kept


def check_store(store: Store, kept: dict[str, list[bytes]]) -> None:
    """That it has those keys, on disk if there is one, and nothing else."""
    listed = list(admin.list_chunks(store))
    assert {chunk.key for chunk in listed} == {key for keys in kept.values() for key in keys}
    assert all((2 if store.has_disk else 1) in chunk.tiers for chunk in listed)
    assert admin.verify(store).sound


if __name__ == "__main__":

    class Killed(MadeUp):
        die_at = int(sys.argv[2])

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    warm_module._host = lambda: host_of(Killed)
    warm_run.BATCH_PIECES = 3
    options: dict[str, Any] = json.loads(sys.argv[1])
    warm(options.pop("store"), "made-up", DOCUMENTS, preamble=PREAMBLE, **options)
