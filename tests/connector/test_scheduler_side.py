"""The scheduler's half against a real store: what is looked up, loaded and saved, and when."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from connector.vllm import PrefixStoreConnector
from tests.connector.played_scheduler import CHUNK, Played, prompt, saved

pytestmark = pytest.mark.timeout(60)


def test_a_hit_is_loaded_into_the_blocks_of_its_chunks(played: Played) -> None:
    tokens = prompt(1, 3 * CHUNK + 5)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 3 * CHUNK
    blocks = list(range(100, 108))
    played.side.allocated(request, [blocks], 3 * CHUNK)
    [job] = played.step({}).loads
    assert job.blocks == [[100, 101], [102, 103], [104, 105]]
    assert job.skip_blocks == 0
    assert [ref.key for ref in job.refs] == played.namespace.chain(tokens).keys
    assert played.step({}).loads == []
    assert played.side.take_counts() == {"tokens_hit_1": 3 * CHUNK}


@pytest.mark.parametrize(
    ("local", "loaded", "first", "skip"),
    [(0, 24, 0, 0), (4, 20, 0, 1), (8, 16, 1, 0), (12, 12, 1, 1), (20, 4, 2, 1), (24, 0, 3, 0)],
)
def test_only_what_vllm_does_not_have(
    played: Played, local: int, loaded: int, first: int, skip: int
) -> None:
    tokens = prompt(2, 3 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request, local) == loaded
    played.side.allocated(request, [list(range(7))], loaded)
    jobs = played.step({}).loads
    if not loaded:
        assert jobs == []
        assert played.side.take_counts() == {"miss_not_needed": 1}
        return
    [job] = jobs
    assert job.blocks == [[2 * i, 2 * i + 1] for i in range(first, 3)]
    assert job.skip_blocks == skip


def test_a_hit_that_waits_for_blocks_stays_promised(played: Played) -> None:
    tokens = prompt(4, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert [played.ask(request) for _ in range(10)] == [2 * CHUNK] * 10
    played.wait_for_leases(1)


@pytest.mark.parametrize("end", ["loaded", "finished", "not_needed"])
def test_leases_end(played: Played, end: str) -> None:
    tokens = prompt(5, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 2 * CHUNK
    played.wait_for_leases(1)
    if end == "loaded":
        played.side.allocated(request, [list(range(5))], 2 * CHUNK)
        played.step({})
        played.side.worker_news(None, [request.request_id], set())
    elif end == "finished":
        played.side.finished(request)
    else:
        assert played.ask(request, 2 * CHUNK) == 0
    played.wait_for_leases(0)


def test_every_chunk_is_saved_once_when_it_is_complete(played: Played) -> None:
    request = played.new(prompt(6, 3 * CHUNK + 2))
    name = request.request_id
    played.ask(request)
    played.side.allocated(request, [[10, 11, 12]], 0)
    meta = played.step({name: 12}, new=[(name, [10, 11, 12], 0)])
    assert saved(meta) == [(name, [0], [[10, 11]])]
    assert not meta.idle
    meta = played.step({name: 4}, cached=[(name, [20], 12)])
    assert saved(meta) == [(name, [1], [[12, 20]])]
    meta = played.step({name: 10}, cached=[(name, [21, 22, 23], 16)])
    assert saved(meta) == [(name, [2], [[21, 22]])]
    for computed in range(26, 32):  # generated tokens fill the next chunk
        assert all(indices != [3] for _, indices, _ in saved(meta))
        request.all_token_ids.append(7)
        request.num_tokens += 1
        block = [24] if computed == 28 else None
        meta = played.step({name: 1}, cached=[(name, block, computed)])
    assert saved(meta) == [(name, [3], [[23, 24]])]
    chain = played.namespace.chain(request.all_token_ids)
    assert meta.saves[0].refs[0].key == chain.keys[3]


def test_a_resumed_request_has_new_blocks(played: Played) -> None:
    request = played.new(prompt(7, 2 * CHUNK))
    name = request.request_id
    played.ask(request)
    played.step({name: 8}, new=[(name, [1, 2], 0)])
    meta = played.step({name: 16}, cached=[(name, [5, 6, 7, 8], 0)], resumed=[name])
    assert saved(meta) == [(name, [1], [[7, 8]])]


def test_a_hit_is_not_saved_again_but_what_failed_to_load_is(played: Played) -> None:
    tokens = prompt(8, 4 * CHUNK + 1)
    played.put(tokens)
    for invalid, expected in ((set[int](), []), ({4, 5, 6, 7}, [2, 3])):
        request = played.new(tokens)
        name = request.request_id
        played.ask(request)
        blocks = list(range(9))
        played.side.allocated(request, [blocks], 4 * CHUNK)
        played.step({})
        played.side.worker_news(None, [name], invalid)
        played.side.take_counts()
        count = CHUNK * len(expected) + 1
        meta = played.step({name: count}, new=[(name, blocks, 33 - count)])
        assert [index for _, indices, _ in saved(meta) for index in indices] == expected


@pytest.mark.parametrize("limit", [0, 7, 8, 15, 16, 100])
def test_max_load_tokens(played: Played, limit: int) -> None:
    tokens = prompt(9, 3 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens, kv_transfer_params={"prefixstore": {"max_load_tokens": limit}})
    assert played.ask(request) == min(limit // CHUNK, 3) * CHUNK


def test_nothing_is_saved_of_a_request_that_says_so(played: Played) -> None:
    request = played.new(prompt(10, CHUNK), kv_transfer_params={"prefixstore": {"write": False}})
    assert played.step({request.request_id: 8}, new=[(request.request_id, [1, 2], 0)]).saves == []


def test_a_load_that_failed_is_not_promised_again(played: Played) -> None:
    """Or a chunk that the store lists and cannot give would be asked for for ever."""
    tokens = prompt(16, 4 * CHUNK + 1)
    played.put(tokens)
    failed, fine = played.new(tokens), played.new(tokens)
    for request, first in ((failed, 0), (fine, 20)):
        assert played.ask(request) == 4 * CHUNK
        played.side.allocated(request, [list(range(first, first + 9))], 4 * CHUNK)
    played.step({})
    played.side.worker_news(None, [], {6})  # the first rank says what, the last one when
    played.step({})
    played.side.worker_news(None, [failed.request_id, fine.request_id], set())
    assert [played.ask(failed) for _ in range(3)] == [0] * 3
    failed.all_token_ids.append(1)
    failed.num_tokens += 1  # preempted, and back with another token
    assert played.ask(failed) == 0
    assert played.ask(fine) == 4 * CHUNK  # preempted: what did not fail may be loaded again
    assert played.ask(played.new(tokens)) == 4 * CHUNK


def test_blocks_that_failed_for_another_request(played: Played) -> None:
    tokens = prompt(17, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 2 * CHUNK
    played.side.allocated(request, [list(range(5))], 2 * CHUNK)
    played.step({})
    played.side.worker_news(None, [request.request_id], {4, 7})  # 4 is not of a promised chunk
    assert played.ask(request) == 2 * CHUNK


def test_a_reset_begins_anew(played: Played) -> None:
    """As after an update of the weights: what is stored from then on is found from then on."""
    tokens = prompt(18, 2 * CHUNK + 1)
    played.put(tokens)
    blocks = [0, 1, 2, 3, 4]
    promised, running = played.new(tokens), played.new(tokens)
    assert played.ask(promised) == 2 * CHUNK
    played.side.reset()
    assert played.ask(promised) == 0
    meta = played.step({running.request_id: 17}, new=[(running.request_id, blocks, 0)])
    assert meta.saves == []  # begun with the KV of before
    seen = [played.namespace.chain(tokens).keys]
    for _ in range(2):
        jobs = []
        for _ in range(2):
            request = played.new(tokens)
            assert played.ask(request) == 0
            meta = played.step({request.request_id: 17}, new=[(request.request_id, blocks, 0)])
            jobs += meta.saves
        keys = [[ref.key for ref in job.refs] for job in jobs]
        assert keys[0] == keys[1]
        assert len(keys[0]) == 2
        assert not any(set(keys[0]) & set(before) for before in seen)
        seen.append(keys[0])
        played.side.reset()


def test_what_a_reset_leaves_is_let_go(played: Played) -> None:
    tokens = prompt(19, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 2 * CHUNK
    played.wait_for_leases(1)
    played.side.allocated(request, [list(range(5))], 2 * CHUNK)
    [job] = played.step({}).loads
    played.side.reset()
    played.side.worker_news(None, [job.req_id], {0})
    assert played.side.finished(request) is None
    played.wait_for_leases(0)


def test_vllms_reset_reaches_the_scheduler_and_only_there(played: Played) -> None:
    tokens = prompt(20, CHUNK + 1)
    played.put(tokens)
    connector = PrefixStoreConnector.__new__(PrefixStoreConnector)
    for side in (None, played.side):
        assert played.ask(played.new(tokens)) == CHUNK
        connector._scheduler = side
        assert connector.reset_cache() is True
    assert played.ask(played.new(tokens)) == 0
