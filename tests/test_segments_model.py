"""Random operations on a small store, against a dict: what each key holds, and what follows it.

What a search finds must be so, whatever happened; once the index is repaired it must be all. Which
chunks are there is asked of the store's rows, never of the segment index.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from prefixstore import admin
from prefixstore.keys import KeyChain
from prefixstore.ledger import DISK, MEMORY
from prefixstore.segment_check import check_segments
from prefixstore.testing_data import content_of
from tests.segments_truth import check_pieces, faults, layout_of, missed, space_of, words
from tests.store_helpers import Place, on_keeper

pytest_plugins = ["tests.store_fixtures"]
STEPS = 80


class Model:
    """The store, and a dict that knows each chunk's tokens and the chunk before it."""

    def __init__(self, place: Place, seed: int, disk: bool, chunk_tokens: int) -> None:
        self.place, self.rng, self.chunk_tokens = place, random.Random(seed), chunk_tokens
        self.tokens: dict[bytes, list[int]] = {}
        self.parent: dict[bytes, bytes] = {}
        self.done: Counter[str] = Counter()
        # Without a disk the indexes of segments and changes take their room from the chunks'.
        self.store = place.open("1MiB" if disk else "1536KiB", "2MiB" if disk else 0)
        self.ns = space_of(self.store, chunk_tokens)
        documents = [words(i, self.rng.randint(64, 400)) for i in range(8)]
        documents += [[7] * 200, [1, 2] * 90, documents[0][20:150] + documents[1][:90]]
        self.texts = [
            [token for part in range(self.rng.randint(1, 3)) for token in
             (*words(50 * i + part, self.rng.randint(0, 70)), *self.rng.choice(documents))]
            for i in range(25)
        ]  # fmt: skip
        self.chains: list[KeyChain] = [self.ns.chain(text) for text in self.texts]
        for text, chain in zip(self.texts, self.chains, strict=True):
            for i, ref in enumerate(chain.refs()):
                self.tokens[ref.key] = text[i * chunk_tokens : (i + 1) * chunk_tokens]
                self.parent[ref.key] = ref.preimage[:16]

    # ------------------------------------------------------------------ operations
    def put(self) -> None:
        rng, chain = self.rng, self.rng.choice(self.chains)
        refs = chain.refs(rng.choice([0, 0, 0, rng.randrange(len(chain))]))
        if rng.random() < 0.2:
            rng.shuffle(refs)
        data = [content_of(ref.key, self.ns.layout.payload_bytes) for ref in refs]
        ttl_s = rng.choice([None, None, None, 0.5])
        for state in self.ns.put(refs, data, alone=rng.random() < 0.3, ttl_s=ttl_s):
            self.done[f"put {state.value}"] += 1

    def delete(self) -> None:
        chain = self.rng.choice(self.chains)
        for key in self.rng.sample(chain.keys, min(3, len(chain))):
            self.done["deleted"] += admin.remove(self.store, admin.Selection(key=key))

    def evict(self) -> None:
        self.store.flush(30)
        if self.store.has_disk:
            on_keeper(self.store, lambda: self.store.disk.evict(6 * 4096))
        else:
            victims = self.store.live.write(
                lambda txn: [self.store.ledger.drop_memory(txn, key)
                             for key, _ in self.store.ledger.victims(txn, MEMORY, 6 * 4096)]
            )  # fmt: skip
            self.done["evicted"] += len(victims)

    def empty_memory(self) -> None:
        if self.store.has_disk:
            self.store.flush(30)
            on_keeper(self.store, lambda: None)

    def wait(self) -> None:
        time.sleep(0.2)

    def reopen(self) -> None:
        self.store.close()
        self.store = self.place.open(None, None)
        self.ns = space_of(self.store, self.chunk_tokens)
        self.done["reopened"] += 1

    def search(self) -> None:
        prompt = self.prompt()
        start = self.rng.choice([0, self.rng.randrange(len(prompt))])
        found = self.ns.find_segments(prompt, start=start)
        end = start
        for segment in found:
            assert end <= segment.start
            assert segment.num_tokens >= 64
            end = segment.stop
            text = []
            for ref, offset, count, _ in segment.pieces:
                text += self.tokens[ref.key][offset : offset + count]
            assert text == prompt[segment.start : segment.stop]
            for before, after in zip(segment.refs, segment.refs[1:], strict=False):
                assert self.parent[after.key] == before.key
            check_pieces(segment, self.chunk_tokens)
            self.done["found"] += 1
        self.done["searched"] += 1

    def prompt(self) -> list[int]:
        prompt: list[int] = []
        for _ in range(4):
            text = self.rng.choice(self.texts)
            at = self.rng.randrange(len(text))
            prompt += text[at : at + self.rng.randint(1, 300)]
            prompt += words(self.rng.randrange(10**6), self.rng.choice([0, 5, 30]))
        return prompt

    # ------------------------------------------------------------------ the end
    def there(self) -> list[list[int]]:
        """The texts that are stored: runs of chunks whose rows are there."""
        tier = DISK if self.store.has_disk else MEMORY
        keys = {
            one.key
            for one in admin.list_chunks(self.store)
            if tier in one.tiers and not 0 < one.row.expires_s <= time.time()
        }
        texts: list[list[int]] = []
        for chain in self.chains:
            texts.append([])
            for key in chain.keys:
                if key in keys:
                    texts[-1] += self.tokens[key]
                else:
                    texts.append([])
        return texts

    def close(self) -> None:
        """Sound; and complete once it is repaired."""
        for chain in self.chains[:6]:
            refs = chain.refs()
            self.ns.put(refs, [content_of(r.key, self.ns.layout.payload_bytes) for r in refs])
        assert self.store.flush(30)
        time.sleep(1.6)  # until what has a time to live is over
        assert faults(self.store) == []
        report = admin.verify(self.store, fix=True)
        assert report.sound, report
        on_keeper(self.store, self.check_all_is_found)
        self.store.close()

    def check_all_is_found(self) -> None:
        """On the keeper's thread: an eviction now might leave a text without its source."""
        assert check_segments(self.store, fix=True) == {}
        texts = self.there()
        assert sum(map(len, texts)) > 500
        for _ in range(10):
            prompt = self.prompt()
            assert missed(prompt, self.ns.find_segments(prompt), texts) == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_random_operations(place: Place, seed: int, disk: bool, chunk_tokens: int) -> None:
    model = Model(place, seed, disk, chunk_tokens)
    weights: dict[Callable[[], None], int] = {
        model.put: 20, model.search: 20, model.delete: 6, model.evict: 3, model.wait: 1,
        model.empty_memory: 2, model.reopen: 4,
    }  # fmt: skip
    for _ in range(STEPS):
        [operation] = model.rng.choices(list(weights), list(weights.values()))
        operation()
        assert faults(model.store) == [], operation.__name__
    model.close()
    for what in ("put stored", "put exists", "deleted", "found", "reopened"):
        assert model.done[what] > 0, model.done
    assert layout_of(chunk_tokens) == model.ns.layout
