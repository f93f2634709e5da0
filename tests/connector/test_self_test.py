"""The self-test of blending: it passes, it finds what is broken, and then nobody blends."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from benchmarks.engine import Engine
from connector import blend_compat
from connector.messages import BlendCommand, BlendJob, BlendPiece, LoadJob, StepMetadata
from connector.tracked import Tracked
from tests.engine import odd_connectors
from tests.engine.support import (
    NEVER,
    ask,
    counting,
    distance,
    remove_memory_of,
    tiny_model,
)
from tests.engine.support import (
    start as start_engine,
)
from tests.engine.test_blending import ALL, BLEND, MIXED, ROUNDING, warm

HASHED = 32
PASSED = re.compile(r"the self-test of blending passed in (\d+) ms")
REFUSED = "no blending, only exact prefixes: "

WORKS = "nothing", "rows_by_torch"  # of `odd_connectors.BREAKS`
# What the self-test must say to each thing that is broken: which part, and by how much.
_MISPLACED = r"\d+ of \d+ elements of K and V of layer 0 are not where they were written to"
_FAR_OFF = r"on \d+ scattered rows it is off by [\d.]+ of the largest V from torch's"
SAID = {
    "pages_swapped": f"the KV pages: {_MISPLACED}",
    "chunks_swapped": f"the KV pages: {_MISPLACED}",
    "other_theta": r"moving K: K moved from position \d+ to \d+ is off by [\d.]+ of its size, ",
    "double_scale": f"a layer's attention: {_FAR_OFF}",
    "one_row_early": f"a layer's attention: {_FAR_OFF}",
    "one_slot_off": f"a layer's attention: {_MISPLACED}",
    "pieces_shifted": f"pieces that move: {_MISPLACED}",
    "block_left_out": f"a layer's attention: {_FAR_OFF}",
    "other_vllm": r"moving K cannot run: AttributeError: 'object' object has no attribute",
}


# ---------------------------------------------------------------------- in real engines
@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model(layers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("self-test") / "store"
    yield folder
    remove_memory_of(folder.parent)


def begin(model: Path, folder: Path, name: str) -> Engine:
    told = odd_connectors.named(name, folder, blend=BLEND)
    return start_engine(model, folder, kv_transfer_config=told, enable_prefix_caching=True)


def answers_exactly(engine: Engine) -> str:
    """Ask for a blend and do not get one; returns why, as the log says it."""
    engine.reset_prefix_cache()
    with counting(engine) as found:
        answer = ask(engine, MIXED, params=ALL)
    assert "blend_recomputed_tokens" not in found
    engine.reset_prefix_cache()
    assert distance(answer, ask(engine, MIXED, params=NEVER)) < ROUNDING
    [line] = [line for line in engine.log.read_text().splitlines() if REFUSED in line]
    return line.partition(REFUSED)[2]


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_what_is_broken_is_found_and_nobody_blends(model: Path, folder: Path) -> None:
    with begin(model, folder, "SharedNames") as engine:
        warm(engine, folder)
        assert PASSED.search(engine.log.read_text())  # this rank's part
        said = answers_exactly(engine)
    assert said.startswith("self-test of what keeps blended KV apart: of a prompt of 5.5 blocks")

    with begin(model, folder, "Tried") as engine:
        found = json.loads((folder.parent / "tried.json").read_text())
        # The scheduler's half may not know yet when this one asks for a blend.
        first = ask(engine, MIXED, params=ALL)
        said = answers_exactly(engine)
        assert distance(first, ask(engine, MIXED, params=NEVER)) < ROUNDING
    assert [found.pop(name) for name in WORKS] == ["", ""]
    assert found.keys() == SAID.keys() == odd_connectors.BREAKS.keys() - set(WORKS)
    for name, text in found.items():
        assert re.match(f"self-test of {SAID[name]}", text), (name, text)
    assert said == found["other_theta"]


# ---------------------------------------------------------------------- a rank that failed it
def test_a_rank_that_cannot_blend_gives_up_what_it_was_promised(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its blocks behind the exact part are computed by the engine, on all ranks."""
    from tests.connector.played_worker import BLOCK, CHUNK, IDENTITY, STALL_S, refs_of, stored

    worker = start()
    assert worker.rank.engine is None
    refs = refs_of(worker, 2)
    worker.save(refs, [[1, 2], [3, 4]])
    stored(worker, refs)
    piece = BlendPiece(refs[1], 0, CHUNK, CHUNK + BLOCK, CHUNK, b"")
    span = 2 * CHUNK + BLOCK
    blocks = [5, 6, 7, 8, 9]
    job = BlendJob(list(range(span)), CHUNK, blocks, [piece], "none", 0.0, 1, 16)
    load = LoadJob("r", IDENTITY.namespace, refs[:1], [blocks[:2]], 0, STALL_S, job)
    worker.side.start_loads(StepMetadata(loads=[load]))
    end = time.monotonic() + 10
    while (report := worker.side.report()) is None or not report.blends:
        assert time.monotonic() < end
        assert worker.side.finished(idle=True) == set()
    assert report.blends["r"].aborted
    command = BlendCommand("r", 1, frozenset(), abort=True)
    worker.side.start_loads(StepMetadata(blends=[command]))
    assert worker.side.finished(idle=True) == {"r"}
    assert worker.side.failed_blocks() == set(blocks[2:])
    assert worker.canonical(blocks[:2]) == worker.canonical([1, 2])
    assert not caplog.records


# ---------------------------------------------------------------------- the scheduler's part
Isolate = Callable[[Any, Any, int], None]


def fault(hash_block: int | None = None) -> str:
    cache = SimpleNamespace(
        hash_block_size=hash_block, block_size=HASHED, prefix_caching_hash_algo="sha256"
    )
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=HASHED))
    return blend_compat.isolation_fault(
        SimpleNamespace(cache_config=cache), SimpleNamespace(kv_cache_groups=[group])
    )


def test_it_passes_and_leaves_vllm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    before = dict(vars(kv_cache_utils))
    assert fault() == ""
    assert vars(kv_cache_utils) == before
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", bytes(range(32)), raising=False)
    assert fault() == ""
    assert bytes(range(32)) == kv_cache_utils.NONE_HASH


def keeps_names(config: Any, request: Any, exact: int) -> None:
    pass


def begins_late(isolate: Isolate, config: Any, request: Any, exact: int) -> None:
    isolate(config, request, exact + HASHED)


def begins_early(isolate: Isolate, config: Any, request: Any, exact: int) -> None:
    isolate(config, request, max(0, exact - HASHED))


def same_for_all(isolate: Isolate, config: Any, request: Any, exact: int) -> None:
    own, request.request_id = request.request_id, "blended"
    isolate(config, request, exact)
    request.request_id = own


def only_long_prompts(isolate: Isolate, config: Any, request: Any, exact: int) -> None:
    if request.block_hashes:
        isolate(config, request, exact)


def only_the_first(isolate: Isolate, config: Any, request: Any, exact: int) -> None:
    """The names behind it do not follow from it."""
    later = list(request.block_hashes)[exact // HASHED + 1 :]
    isolate(config, request, exact)
    request.block_hashes[exact // HASHED + 1 :] = later


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (keeps_names, "of a prompt of 5.5 blocks, 2.5 of them exact, 5 later blocks of 7 have"),
        (begins_late, "of a prompt of 5.5 blocks, 2.5 of them exact, 1 later blocks of 7 have"),
        (begins_early, "of 2 exact blocks 1 keep their name"),
        (same_for_all, "of a prompt of 5.5 blocks, 2.5 of them exact, 5 later blocks of 7 have"),
        (only_long_prompts, "of a prompt of 0.5 blocks, 0 of them exact, 2 later blocks of 2 have"),
        (only_the_first, "of a prompt of 5.5 blocks, 2.5 of them exact, 4 later blocks of 7 have"),
    ],
)
def test_names_that_others_know_are_found(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None], said: str
) -> None:
    wraps = () if broken is keeps_names else (blend_compat.isolate,)
    monkeypatch.setattr(blend_compat, "isolate", partial(broken, *wraps))
    assert fault().startswith(f"self-test of what keeps blended KV apart: {said}")


def test_other_blocks_than_vllms_are_found() -> None:
    assert "of 2 exact blocks 1 keep their name" in fault(hash_block=2 * HASHED)


def test_saving_what_is_blended_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    save_job = Tracked.save_job

    def heedless(self: Tracked, computed_tokens: int, step_start: int = 0) -> Any:
        self.blended = False
        return save_job(self, computed_tokens, step_start)

    monkeypatch.setattr(Tracked, "save_job", heedless)
    assert fault().endswith("apart: a blended request would be saved")


def test_a_vllm_that_names_blocks_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1 import request

    class Nameless(request.Request):
        @property
        def block_hashes(self) -> Any:
            raise AttributeError("no block_hashes")

        @block_hashes.setter
        def block_hashes(self, names: Any) -> None:
            pass

    monkeypatch.setattr(request, "Request", Nameless)
    assert "apart cannot run: AttributeError: no block_hashes" in fault()
