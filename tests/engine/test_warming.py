"""Warming with real vLLM: killed and resumed, against what serving stores, and blended afterwards.

One store for all: the first run is killed with SIGKILL, the second completes it, a third finds
nothing to do; then an engine serves from it. Truths: bytes that a served request stores, and
staleness computed with Hugging Face. And the same documents into a server, as one of its tenants.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.engine import Engine
from benchmarks.model import demo_text
from benchmarks.server_process import ServerProcess
from blend.hf import encode, measure_staleness
from connector.options import full_salt
from prefixstore import Namespace, Store, admin
from prefixstore import open as open_store
from prefixstore.interface import NamespaceLike
from prefixstore.staleness import staleness_of
from prefixstore.warm_contexts import Contexts
from prefixstore.warm_run import MEASURING_TAG
from prefixstore.warm_tokens import Tokens
from tests.engine.support import (
    CHUNK_TOKENS,
    ask,
    counted,
    distance,
    remove_memory_of,
    since,
    start,
    tiny_model,
)
from tests.rounding_by_hand import payload_by_hand

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from prefixstore.cli import main; sys.exit(main())"]
DOCUMENTS, PREAMBLE = 12, "Answer from these documents only. "
# One prompt a step, whole: prompts are then computed in one go here and when they are served.
STEPS = {"max_num_batched_tokens": 2048, "max_num_seqs": 1, "block_size": 32}
ENGINE = {
    **STEPS, "dtype": "float32", "max_model_len": 2048, "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 27,
}  # fmt: skip
WAIT_S = 150.0
TOKEN = "tenant-" + "t" * 32


class Warmed:
    """A store, what was warmed in it, and what the runs said."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.killed_at, self.first = 0, dict[str, Any]()  # lines of the manifest; the next report
        self.model = tiny_model(layers=4)
        text = demo_text()
        self.texts = [
            text[at * 1900 : at * 1900 + 900 + 60 * at] for at in range(DOCUMENTS)
        ]  # fmt: skip
        self.source, self.preamble = folder / "documents.jsonl", folder / "preamble.txt"
        lines = [json.dumps({"id": f"doc{i}", "text": t}) for i, t in enumerate(self.texts)]
        self.source.write_text("\n".join(lines))
        self.preamble.write_text(PREAMBLE)
        tokens = Tokens(str(self.model))
        self.before = tokens.preamble(PREAMBLE)
        self.ids = [tokens.document(text) for text in self.texts]

    def command(self, *where: object) -> list[str]:
        # A batch takes a quarter of the memory tier: a few documents, so there is a middle.
        folder = self.store, "--memory", "48MiB", "--disk", "256MiB"
        return [
            *COMMAND, "warm", *map(str, where or folder), "--model", str(self.model),
            "--preamble", str(self.preamble), "--engine", json.dumps(ENGINE), "--json",
            "--", str(self.source),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TORCH_COMPILE_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}

    def run(self, *where: object) -> dict[str, Any]:
        done = subprocess.run(
            self.command(*where), cwd=ROOT, env=self.environment(), capture_output=True, text=True,
            timeout=WAIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def run_and_kill(self) -> int:
        """SIGKILL as soon as the manifest has a line; returns how many it has then."""
        with subprocess.Popen(
            self.command(), cwd=ROOT, env=self.environment(), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,
        ) as process:  # fmt: skip
            end = time.monotonic() + WAIT_S
            while not (found := list(self.store.glob("warm-*.jsonl"))):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(WAIT_S)
        return len(found[0].read_bytes().splitlines())

    def namespace(self, store: Store) -> Namespace:
        [record] = store.namespaces()
        return store.namespace_of(record.identity.namespace)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warmed]:
    folder = tmp_path_factory.mktemp("warming")
    it = Warmed(folder)
    it.killed_at = it.run_and_kill()
    it.first = it.run()
    yield it
    remove_memory_of(folder)


def test_a_killed_run_is_completed_by_the_next(warmed: Warmed) -> None:
    assert 0 < warmed.killed_at < DOCUMENTS
    documents = warmed.first["documents"]
    assert [d["name"] for d in documents] == [f"doc{i}" for i in range(DOCUMENTS)]
    states = [d["status"] for d in documents]
    assert set(states) == {"skipped", "stored"}
    assert warmed.killed_at <= states.count("skipped") < DOCUMENTS
    assert all(d["staleness"] in ("known", "measured") for d in documents)
    for document, ids in zip(documents, warmed.ids, strict=True):
        whole = (len(warmed.before) + len(ids)) // CHUNK_TOKENS
        assert document["chunks"] == whole
        assert document["tail_tokens"] == (len(warmed.before) + len(ids)) % CHUNK_TOKENS
    with Store.open(warmed.store, create=False) as store:
        # What measured is gone, but for what the killed run left, which expires.
        namespace = warmed.namespace(store)
        kept = [c for c in admin.list_chunks(store) if c.row.tag != MEASURING_TAG.encode()]
        assert len(kept) == sum(d["chunks"] for d in documents)
        left = [c for c in admin.list_chunks(store) if c.row.tag == MEASURING_TAG.encode()]
        assert all(c.row.expires_s for c in left)
        assert all(2 in c.tiers for c in kept)
        for index, ids in enumerate(warmed.ids):
            chain = namespace.chain(warmed.before + ids)
            assert namespace.match(chain).num_chunks == len(chain)
            tags = {c.row.tag for c in kept if c.key in chain.keys}
            assert tags == {f"doc{index}".encode()}
        assert admin.verify(store).sound
    lines = (warmed.store / f"warm-{warmed.first['namespace']}.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {d["name"] for d in documents}


def test_a_second_run_computes_nothing(warmed: Warmed) -> None:
    again = warmed.run()
    assert {d["status"] for d in again["documents"]} == {"skipped"}
    assert {d["staleness"] for d in again["documents"]} == {"known"}
    assert (again["computed_tokens"], again["engine_start_s"]) == (0, None)
    assert again["totals"]["stored_chunks"] == 0


def test_staleness_is_that_of_hugging_face(warmed: Warmed) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(warmed.model, dtype=torch.float32)
    contexts = Contexts(warmed.ids, CHUNK_TOKENS)
    before = torch.tensor(warmed.before)
    with Store.open(warmed.store, create=False) as store:
        namespace = warmed.namespace(store)
        for index in (0, 3, 11):
            refs = namespace.chain(warmed.before + warmed.ids[index]).refs()
            noted = [value for value in staleness_of(namespace, refs) if value is not None]
            found = np.concatenate(noted).astype(np.float32)
            assert np.isnan(found[: len(before)]).all()  # the preamble's
            whole = len(refs) * CHUNK_TOKENS - len(before)
            source = encode(model, torch.tensor(warmed.ids[index][:whole]), before)
            others = [torch.tensor(ids) for ids in contexts.of(index)]
            assert len(others) == 2
            truth = measure_staleness(model, source, others, before).staleness
            assert truth is not None
            error = np.abs(found[len(before) :] - truth.numpy())
            assert (error <= 0.01 * truth.numpy() + 1e-3).all(), error.max()
            assert float(truth.max()) > 0.1  # there is something to get wrong


def test_rounded_documents(warmed: Warmed) -> None:
    """What is stored is what is exact, rounded; how stale it becomes is measured on that."""
    folder = warmed.store.with_name("rounded")
    report = warmed.run(folder, "--memory", "48MiB", "--disk", "256MiB", "--codec", "int8")
    states = {(d["status"], d["staleness"]) for d in report["documents"]}
    assert states == {("stored", "measured")}
    with (
        Store.open(warmed.store, create=False) as store,
        Store.open(folder, create=False) as other,
    ):
        exact, rounded = warmed.namespace(store), warmed.namespace(other)
        layouts = exact.layout, rounded.layout
        for own in warmed.ids:
            ids = warmed.before + own
            for one, two in zip(read(exact, ids, b""), read(rounded, ids, b""), strict=True):
                assert two == payload_by_hand("int8", one, *layouts)[0]
            noted = [ns.staleness_of(ns.chain(ids).refs()) for ns in (exact, rounded)]
            for true, found in zip(*noted, strict=True):
                assert true is not None
                assert found is not None
                assert np.array_equal(np.isnan(found), np.isnan(true))
                near = np.abs(found.astype(np.float32) - true.astype(np.float32))
                assert (near <= 0.05 * true.astype(np.float32) + 0.02)[~np.isnan(true)].all()


# ---------------------------------------------------------------------- into a server
@dataclass(frozen=True)
class Served:
    """A server that runs, and its files."""

    folder: Path
    url: str

    @property
    def where(self) -> tuple[object, ...]:
        """What `prefixstore warm` is told of it."""
        return self.url, "--token-file", self.folder / "token"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for name, text in (("tokens", f"team:{TOKEN}"), ("token", TOKEN)):
        (folder / name).write_text(text + "\n")
        (folder / name).chmod(0o600)
    options = [f"--tokens={folder / 'tokens'}", "--memory=48MiB", "--disk=256MiB"]
    with ServerProcess(folder / "store", *options, log=folder / "log") as server:
        yield Served(folder, server.url)
    remove_memory_of(folder)


def test_a_server_gets_what_a_folder_does(warmed: Warmed, served: Served) -> None:
    report = warmed.run(*served.where)
    states = {(d["status"], d["staleness"]) for d in report["documents"]}
    assert states == {("stored", "measured")}
    with (
        Store.open(warmed.store, create=False) as store,
        open_store(served.url, token=TOKEN) as client,
    ):
        near = warmed.namespace(store)
        far = client.namespace(near.identity, near.layout)
        assert far.name != near.name
        assert report["namespace"] == far.name.hex()
        kept: set[bytes] = set()
        for own in warmed.ids:
            ids = warmed.before + own
            assert read(far, ids, b"") == read(near, ids, b"")
            refs = far.chain(ids).refs()
            kept.update(ref.key for ref in refs)
            noted = near.staleness_of(near.chain(ids).refs()), far.staleness_of(refs)
            for one, other in zip(*noted, strict=True):
                assert one is not None
                assert other is not None
                assert np.array_equal(one, other, equal_nan=True)
    with Store.open(served.folder / "store", create=False) as store:
        assert {chunk.key for chunk in admin.list_chunks(store)} == kept


def test_a_second_run_into_a_server_computes_nothing(warmed: Warmed, served: Served) -> None:
    again = warmed.run(*served.where)
    assert {d["status"] for d in again["documents"]} == {"skipped"}
    assert (again["computed_tokens"], again["engine_start_s"]) == (0, None)


# ---------------------------------------------------------------------- serving from it
@pytest.fixture(scope="module")
def engine(warmed: Warmed) -> Iterator[Engine]:
    extra = {"memory": None, "disk": None, "blend": {"selector": "staleness", "budget": 0.2}}
    with start(warmed.model, warmed.store, extra=extra, **STEPS) as engine:
        yield engine


def read(namespace: NamespaceLike, ids: list[int], salt: bytes) -> list[bytes]:
    refs = namespace.chain(ids, salt).refs()
    outs = [memoryview(bytearray(namespace.layout.payload_bytes)) for _ in refs]
    assert 0 not in namespace.get(refs, outs)
    return [bytes(out) for out in outs]


def test_bytes_are_those_that_serving_stores(engine: Engine, warmed: Warmed) -> None:
    options = {"salt": "served", "read": False, "blend": False}
    for own in warmed.ids:
        ids = warmed.before + own
        ask(engine, ids, 1, params={"prefixstore": options})
        with Store.open(warmed.store, create=False) as store:
            namespace = warmed.namespace(store)
            chain = namespace.chain(ids, full_salt(None, "served"))
            end = time.monotonic() + WAIT_S
            while namespace.match(chain).num_chunks < len(chain):
                assert time.monotonic() < end
                time.sleep(0.02)
            assert read(namespace, ids, b"") == read(namespace, ids, chain.salt)


def test_a_blend_reuses_warmed_documents_by_their_staleness(engine: Engine, warmed: Warmed) -> None:
    prompt = [*warmed.before, *warmed.ids[5], *warmed.ids[1], *warmed.ids[9][:300], 7, 8, 9]
    with Store.open(warmed.store, create=False) as store:
        namespace = warmed.namespace(store)
        exact = namespace.match(namespace.chain(prompt)).num_tokens
        segments = namespace.find_segments(prompt, start=exact)
        assert len(segments) == 2
        for segment in segments:
            assert segment.alone
            assert all(value is not None for value in staleness_of(namespace, segment.refs))
    only_read = {"write": False}
    before = counted(engine)
    measured = ask(engine, prompt, params={"prefixstore": only_read})
    found = since(before, counted(engine))
    reusable = sum(segment.num_tokens for segment in segments)
    assert found["blend_reused_tokens"] == reusable
    assert 0 < found["blend_recomputed_tokens"] <= 0.2 * reusable
    first = {**only_read, "blend": {"selector": "first"}}
    unmeasured = ask(engine, prompt, params={"prefixstore": first})
    assert distance(measured, unmeasured) > 1e-3, "it did not heed what was measured"
    exact_only = {**only_read, "blend": False}
    assert distance(ask(engine, prompt, params={"prefixstore": exact_only}), measured) > 0
