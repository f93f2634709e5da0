"""What of a prompt is claimed for blending, and when all ranks are told to run it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from connector.blend_claims import IDLE_ROWS, QUERY_TOKENS_MAX, BlendClaims
from connector.blend_options import BlendOptions, step_rows
from connector.blending import plan_of
from connector.messages import WHOLE, BlendCommand, BlendLoaded, BlendPiece
from prefixstore.errors import ConfigError
from prefixstore.keys import ChunkRef
from prefixstore.segment_choice import PART_TOKENS_MIN
from prefixstore.segments import Segment

CHUNK = 64


def segment(start: int, num_tokens: int, source_start: int) -> Segment:
    first, last = source_start // CHUNK, (source_start + num_tokens - 1) // CHUNK
    refs = tuple(
        ChunkRef(bytes([n]) * 16, b"preimage", n, bytes(8)) for n in range(first, last + 1)
    )
    return Segment(start, num_tokens, source_start, False, refs, (1,) * len(refs), CHUNK)


SLICES = IDLE_ROWS // BlendOptions().step_rows  # of an idle step


def claims(ranks: int = 1) -> BlendClaims:
    return BlendClaims(BlendOptions(), num_layers=8, num_ranks=ranks)


def covered(pieces: list[BlendPiece]) -> list[int]:
    return [piece.start + i for piece in pieces for i in range(piece.num_tokens)]


@pytest.mark.parametrize("exact", [0, 64, 100, 130, 260])
@pytest.mark.parametrize("source", [0, 1, 63, 64, 200])
def test_pieces_are_the_tokens_claimed(exact: int, source: int) -> None:
    """Each prompt token of the segments once, from the chunk and the place it was computed at."""
    segments = [segment(90, 150, source), segment(250, 80, source + 7)]
    claim = claims().claim(BlendOptions(), segments, exact, 1000, {})
    assert claim is not None
    wanted = [at for s in segments for at in range(max(s.start, exact), s.stop)]
    assert covered(claim.pieces) == wanted
    assert (claim.exact, claim.end) == (exact, 330)
    for piece in claim.pieces:
        [home] = [s for s in segments if s.start <= piece.start < s.stop]
        assert piece.source_start - piece.start == home.source_start - home.start
        assert piece.source_start % CHUNK == piece.offset
        assert piece.offset + piece.num_tokens <= CHUNK
        assert piece.ref.key == bytes([piece.source_start // CHUNK]) * 16
        assert piece.ref.preimage == b""


def test_the_engine_is_left_a_token_to_compute() -> None:
    claim = claims().claim(BlendOptions(), [segment(0, 200, 0)], 0, 200, {})
    assert claim is not None
    assert claim.end == 199


def test_what_was_measured_goes_with_the_tokens_it_belongs_to() -> None:
    """Chunk 1 was measured, chunks 0 and 2 were not: there it falls with the place in the text."""
    moves = torch.arange(CHUNK, dtype=torch.float16) + 1
    staleness = {bytes([1]) * 16: moves.numpy().tobytes()}
    claim = claims().claim(BlendOptions(), [segment(10, 3 * CHUNK - 5, 5)], 0, 1000, staleness)
    assert claim is not None
    assert [len(piece.staleness) for piece in claim.pieces] == [0, 2 * CHUNK, 0]
    plan = plan_of(claim.job(list(range(1000)), []), frozenset())
    [found] = plan.segments
    assert found.num_tokens == 3 * CHUNK - 5
    measured = plan.staleness[CHUNK - 5 : 2 * CHUNK - 5]
    assert measured.tolist() == moves.tolist()
    others = torch.cat([plan.staleness[: CHUNK - 5], plan.staleness[2 * CHUNK - 5 :]])
    places = torch.cat([plan.offsets[: CHUNK - 5], plan.offsets[2 * CHUNK - 5 :]])
    torch.testing.assert_close(others, CHUNK / (1.0 + places))


def test_a_claim_ends_where_too_much_lies_between() -> None:
    near, far = segment(10, 100, 0), segment(400, 100, 300)
    claim = claims().claim(BlendOptions(), [near, far], 0, 1000, {})
    assert claim is not None
    assert claim.end == near.stop  # 290 tokens between for 100 more
    assert claims().claim(BlendOptions(), [segment(200, 100, 0)], 0, 1000, {}) is None
    assert claims().claim(BlendOptions(), [segment(0, PART_TOKENS_MIN - 1, 0)], 0, 1000, {}) is None
    assert claims().claim(BlendOptions(), [], 0, 1000, {}) is None


def test_scoring_with_the_question_claims_it_too() -> None:
    options = BlendOptions(selector="query")
    claim = claims().claim(options, [segment(0, 100, 0)], 0, 1000, {})
    assert claim is not None
    assert claim.end == 100 + QUERY_TOKENS_MAX
    claim = claims().claim(options, [segment(0, 100, 0)], 0, 120, {})
    assert claim is not None
    assert claim.end == 119


def test_commands_wait_for_all_ranks() -> None:
    blends = claims(ranks=2)
    blends.loaded({"a": BlendLoaded(1, frozenset({3}), False)})
    assert blends.commands(idle=True) == []
    blends.loaded({"a": BlendLoaded(1, frozenset({5}), False)})
    [command] = blends.commands(idle=False)
    assert (command.slices, command.failed, command.abort) == (1, frozenset({3, 5}), False)
    assert blends.commands(idle=True)[0].slices == SLICES
    blends.cancel("a")
    assert blends.commands(idle=True)[0].abort
    blends.ended("a")
    assert blends.commands(idle=True) == []


def test_slices_whose_kv_is_there_run_while_the_rest_is_loaded() -> None:
    """As far as the slowest rank is."""
    blends = claims(ranks=2)
    blends.placed({"a": {0: 100}})
    assert blends.commands(idle=True) == []
    blends.placed({"a": {1: 60}})
    [command] = blends.commands(idle=True)
    assert (command.until, command.failed, command.abort) == (60, frozenset(), False)
    blends.placed({"a": {0: 300}})
    blends.placed({"a": {1: 200}})
    assert blends.commands(idle=False) == [BlendCommand("a", 1, frozenset(), False, 200)]
    blends.loaded({"a": BlendLoaded(1, frozenset(), False)})
    assert blends.commands(idle=True)[0].until == 200
    blends.loaded({"a": BlendLoaded(1, frozenset(), False)})
    assert blends.commands(idle=True)[0].until == WHOLE
    blends.ended("a")
    assert blends.commands(idle=True) == []


def test_a_piece_that_fails_behind_what_has_run_ends_it() -> None:
    for begun in (False, True):
        blends = claims(ranks=1)
        blends.placed({"a": {0: 100}})
        assert not begun or not blends.commands(idle=True)[0].abort
        blends.loaded({"a": BlendLoaded(1, frozenset({7}), False)})
        assert blends.commands(idle=True)[0].abort is begun


def test_one_that_is_loaded_comes_before_one_that_is_loading() -> None:
    """Which has not begun then, so a piece it loses is a gap."""
    blends = claims(ranks=1)
    blends.placed({"a": {0: 100}})
    blends.loaded({"b": BlendLoaded(1, frozenset(), False)})
    assert [command.req_id for command in blends.commands(idle=True)] == ["b"]
    blends.loaded({"a": BlendLoaded(1, frozenset({7}), False)})
    assert [command.abort for command in blends.commands(idle=True)] == [False]
    blends.ended("b")
    assert [(c.req_id, c.abort) for c in blends.commands(idle=True)] == [("a", False)]


def test_one_that_has_run_what_is_there_waits_for_more() -> None:
    blends = claims(ranks=1)
    blends.placed({"a": {0: 100}})
    assert len(blends.commands(idle=True)) == 1
    assert blends.commands(idle=True) == []
    blends.placed({"a": {0: 101}})
    for _ in range(SLICES):
        assert [command.until for command in blends.commands(idle=False)] == [101]
    assert blends.commands(idle=False) == []


def test_one_that_a_rank_has_lost_a_piece_of_does_not_begin() -> None:
    blends = claims(ranks=2)
    blends.placed({"a": {0: 100, 1: 50}})
    blends.loaded({"a": BlendLoaded(1, frozenset({3}), False)})
    assert blends.commands(idle=True) == []
    blends.loaded({"a": BlendLoaded(1, frozenset(), False)})
    assert [command.abort for command in blends.commands(idle=True)] == [False]


def test_a_request_that_is_gone_runs_no_further() -> None:
    blends = claims(ranks=1)
    blends.placed({"a": {0: 100}, "b": {0: 50}})
    blends.cancel("a")
    assert [command.req_id for command in blends.commands(idle=True)] == ["b"]
    blends.loaded({"a": BlendLoaded(1, frozenset(), False)})
    blends.placed({"b": {0: 60}})
    assert [(c.req_id, c.abort) for c in blends.commands(idle=True)] == [("a", True), ("b", False)]


def test_one_rank_that_cannot_load_ends_it_for_all() -> None:
    blends = claims(ranks=2)
    one = BlendLoaded(1, frozenset(), True)
    blends.loaded({"a": one.and_(BlendLoaded(1, frozenset(), False))})
    assert blends.commands(idle=False)[0].abort


def test_a_failed_piece_becomes_a_gap() -> None:
    claim = claims().claim(
        BlendOptions(), [segment(70, 200, 5), segment(270, 64, 640)], 64, 400, {}
    )
    assert claim is not None
    job = claim.job(list(range(400)), list(range(7)))
    whole = plan_of(job, frozenset())
    assert [(s.start, s.num_tokens, s.source_start) for s in whole.segments] == [
        (70, 200, 5), (270, 64, 640),
    ]  # fmt: skip
    assert whole.fresh.tolist() == list(range(64, 70))
    lost = job.pieces[1]
    plan = plan_of(job, frozenset({1}))
    gone = list(range(lost.start, lost.start + lost.num_tokens))
    assert plan.fresh.tolist() == sorted([*range(64, 70), *gone])
    assert set(plan.candidates.tolist()).isdisjoint(gone)
    assert len(plan.candidates) == 264 - lost.num_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selector": "best"}, "no selector 'best'"),
        ({"selector": "oracle"}, "benchmarks only"),
        ({"budget": "much"}, "budget is 'much'"),
        ({"budget": 1.5}, "budget of 1.5"),
        ({"budget": True}, "budget is True"),
        ({"selector": "deviation", "budget": 0.2}, "25 % is more"),
        ({"span": 0}, "span is 0"),
        ({"min_segment_tokens": 10}, "min_segment_tokens is 10"),
        ({"step_rows": 2.5}, "step_rows is 2.5"),
        ({"speed": 1}, "unknown entries"),
        ("yes", "blend is 'yes'"),
    ],
)
def test_mistakes_are_named(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendOptions.parse(given, num_layers=8)


def test_a_request_changes_what_it_names() -> None:
    engine = BlendOptions.parse({"budget": 0.3, "step_rows": 64}, num_layers=8)
    assert engine is not None
    assert engine.of_request({"selector": "first"}, 8) == BlendOptions("first", 0.3, step_rows=64)
    assert engine.of_request(None, 8) == engine.of_request(True, 8) == engine
    assert engine.of_request(False, 8) is None
    with pytest.raises(ConfigError, match="unknown entries"):
        engine.of_request({"step_rows": 1}, 8)
    assert BlendOptions.parse(None, 8) is None is BlendOptions.parse(False, 8)
    assert BlendOptions.parse(True, 8) == BlendOptions()


def test_an_engine_without_blending_says_so() -> None:
    off = BlendClaims(None, 8, 1)
    assert off.options_of(None) is None is off.options_of(False)
    with pytest.raises(ConfigError, match="blend is off"):
        off.options_of(True)


# ---------------------------------------------------------------------- splits
SPLIT_ROWS = 512


def splits(ranks: int = 1) -> BlendClaims:
    return BlendClaims(None, 8, ranks, SPLIT_ROWS)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_computed_meets_what_is_loaded(seed: int) -> None:
    """On every rank each token is there when it is over, and none is computed twice."""
    rng = random.Random(seed)
    ranks, chunks = rng.choice((1, 2)), rng.randrange(1, 60)
    start, end = rng.randrange(100), 100 + chunks * CHUNK
    blends, backs, front = splits(ranks), [end] * ranks, start
    chunks_a_step = rng.choice((0.0, 0.1, 1.0, 8.0))
    blends.split("a", start, rng.choice((0.1, 0.5, 0.9)))
    for _ in range(1000):
        blends.placed({"a": dict(enumerate(backs))})
        known = max(backs)
        commands = blends.commands(idle=rng.random() < 0.5)
        [command] = commands
        assert not command.abort
        assert front <= command.until <= max(front, known)
        assert command.until - front <= SPLIT_ROWS
        assert command.slices == (command.until > front)
        front = command.until
        if command.ends:
            assert front >= known
            assert blends.commands(idle=True) == []
            return
        for rank, back in enumerate(backs):
            come = int(chunks_a_step + rng.random()) * CHUNK
            backs[rank] = max(start, back - come)
    pytest.fail("it does not end")


def test_a_split_begins_when_all_ranks_have_told() -> None:
    blends = splits(ranks=2)
    blends.split("a", 0, 0.5)
    assert blends.commands(idle=True) == []
    blends.placed({"a": {0: 1000}})
    assert blends.commands(idle=True) == []
    blends.placed({"a": {1: 900}})
    assert blends.commands(idle=False) == [BlendCommand("a", 1, frozenset(), False, 250)]
    blends.placed({"a": {0: 200, 1: 200}})  # it is loaded further than it needs to be
    assert blends.commands(idle=True) == [BlendCommand("a", 0, frozenset(), False, 250, ends=True)]


def test_one_split_at_a_time() -> None:
    """The oldest; one that is over takes nobody's turn."""
    blends = splits()
    blends.split("a", 0, 0.5)
    blends.split("b", 0, 0.5)
    blends.placed({"a": {0: 1000}, "b": {0: 1000}})
    assert [command.req_id for command in blends.commands(idle=True)] == ["a"]
    blends.placed({"a": {0: 0}})
    found = blends.commands(idle=False)
    assert [(c.req_id, c.slices, c.ends) for c in found] == [("a", 0, True), ("b", 1, False)]
    blends.ended("a")
    assert [command.req_id for command in blends.commands(idle=True)] == ["b"]


def test_splits_are_given_up_for_all_ranks() -> None:
    """The request is gone, or a rank cannot compute."""
    blends = splits(ranks=2)
    for name in ("gone", "lost"):
        blends.split(name, 64, 0.5)
    blends.placed({"gone": {0: 1000, 1: 1000}, "lost": {0: 1000}})
    blends.loaded({"lost": BlendLoaded(1, frozenset(), True)})
    blends.cancel("gone")
    found = blends.commands(idle=True)
    assert [(c.req_id, c.abort, c.until) for c in found] == [("gone", True, 64), ("lost", True, 64)]
    assert blends.commands(idle=True) == found, "a rank that did not know of it yet is told again"
    for name in ("gone", "lost"):
        blends.ended(name)
    assert blends.commands(idle=True) == []


def test_an_engine_that_cannot_split_blends_as_little() -> None:
    blends = splits()
    for _ in range(2):
        blends.refuse("it serves LoRA adapters")
    assert blends.split_rows == 0
    assert not blends.refused  # it was not asked to blend


@pytest.mark.parametrize(
    ("given", "step_tokens", "splits", "rows"),
    [
        (None, 8192, False, 0),
        (None, 8192, True, 2048),
        (True, 8192, False, 2048),
        (True, 256, False, 256),
        ({"budget": 0.2}, 256, True, 256),
        ({"step_rows": 512}, 256, False, 512),
    ],
)
def test_a_slice_has_no_more_rows_than_a_step_unless_it_is_told_to(
    given: Any, step_tokens: int, splits: bool, rows: int
) -> None:
    """vLLM has memory for no more."""
    blend = BlendOptions.parse(given, 8, step_tokens)
    assert step_rows(blend, step_tokens, splits=splits) == rows


@pytest.mark.parametrize(("step_rows", "slices"), [(64, 128), (2048, 4), (8193, 1)])
def test_an_idle_step_has_so_many_rows(step_rows: int, slices: int) -> None:
    blends = BlendClaims(BlendOptions(step_rows=step_rows), 8, 1)
    blends.loaded({"a": BlendLoaded(1, frozenset(), False)})
    assert [one.slices for one in blends.commands(idle=True)] == [slices]
