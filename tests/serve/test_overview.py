"""The numbers of the page against counts of the test's own, and the bounds of what is kept."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Store, admin
from prefixstore.keys import ChunkRef
from prefixstore.serve import follower
from prefixstore.serve import recorder as recorders
from prefixstore.serve.eyes import EYES
from prefixstore.serve.overview import overview
from prefixstore.serve.recorder import Recorder
from prefixstore.serve.sketches import BUCKETS, Latencies, Top, bucket_of, percentile
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask
from tests.serve.support import ADMIN, ALICE, Running, running, tokens_file
from tests.store_helpers import wait_for

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes


@pytest.fixture(autouse=True)
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SAMPLE_S", 0.2)


def told_by(server: Running, token: str = "", query: str = "") -> dict[str, Any]:
    status, told = ask(server.address, "GET", f"/v1/overview{query}",
                       Authorization=f"Bearer {token}" if token else "")  # fmt: skip
    assert status == 200, told
    assert isinstance(told, dict)
    return told


def test_the_numbers_are_those_of_what_was_done(store: Store) -> None:
    with running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        chain = ns.chain(tokens_of(1, 4))
        refs = chain.refs()
        ns.put(refs, [content_of(ref.key, SIZE) for ref in refs], tag="handbook")
        assert client.flush()
        for _ in range(3):
            ns.match(chain)
        ns.get(refs, outputs(CONTRACT_LAYOUT, 4))
        ns.match(ns.chain([*tokens_of(1, 2), *tokens_of(5, 3)]))
        admin.empty_memory(store)
        assert set(ns.match(chain).tiers) == {2}
        wait_for(lambda: told_by(server)["texts"][0]["tag"] == "handbook", "a sample")
        told = told_by(server)
        text = ask(server.address, "GET", "/metrics")[1]
    assert told["found"] == told["found_lately"] == {"memory": 3 * 4 + 2, "disk": 4, "missing": 3}
    for tier, count in (("memory", 14), ("disk", 4), ("miss", 3)):
        assert f'prefixstore_matched_chunks_total{{tier="{tier}"}} {count}\n' in text.decode()
    [one] = told["texts"]
    assert one["key"] == refs[0].key.hex()
    assert (one["prompts"], one["longest_tokens"]) == (5, 4 * CONTRACT_LAYOUT.chunk_tokens)
    assert one["found_tokens"] == (3 * 4 + 2 + 4) * CONTRACT_LAYOUT.chunk_tokens
    [miss] = told["misses"]
    assert (miss["found_chunks"], miss["asked_chunks"], miss["why"]) == (2, 5, "absent")
    [space] = told["namespaces"]
    assert (space["tenant"], space["chunks"]["disk"]) == ("local", 4)
    [one] = told["clients"]
    assert (one["tenant"], one["way"], one["refused"]) == ("local", "loopback", 0)
    assert one["received_bytes"] > 4 * SIZE < one["sent_bytes"]
    routes = {one["route"]: one for one in told["routes"]}
    assert (routes["/v1/match"]["requests"], routes["/v1/get"]["requests"]) == (5, 1)
    assert 0 < routes["/v1/match"]["p50_ms"] <= routes["/v1/match"]["p99_ms"]
    kinds = Counter[str]()
    for event in told["activity"]:
        kinds[f"{event['kind']} {event['tier']}"] += event["chunks"]
    assert kinds == {"stored memory": 4, "written disk": 4, "removed memory": 4}


def test_history_has_columns_of_one_length_and_may_be_asked_for_in_parts(store: Store) -> None:
    with running(store) as server:
        wait_for(lambda: len(told_by(server)["history"]["time_s"]) >= 2, "two samples")
        told = told_by(server)["history"]
        columns = {name: len(column) for name, column in told.items() if name != "interval_s"}
        assert set(columns.values()) == {columns["time_s"]}
        rest = told_by(server, query=f"?since_s={told['time_s'][0]}")["history"]["time_s"]
        assert rest[: columns["time_s"] - 1] == told["time_s"][1:]
        assert ask(server.address, "GET", "/v1/overview?since_s=x")[0] == 400


def test_only_local_sees_it_and_no_tenants_tags_are_in_it(store: Store, tmp_path: Path) -> None:
    with running(store, tokens=tokens_file(tmp_path)) as server, server.open(ALICE) as client:
        assert ask(server.address, "GET", "/v1/overview")[0] == 401
        status, told = ask(
            server.address, "GET", "/v1/overview", Authorization=f"Bearer {ALICE}"
        )  # fmt: skip
        assert (status, told["error"]["code"]) == (403, "forbidden")
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        chain = ns.chain(tokens_of(1, 2))
        ns.put(chain.refs(), [content_of(ref.key, SIZE) for ref in chain.refs()], tag="private")
        ns.match(chain)
        wait_for(lambda: told_by(server, ADMIN)["namespaces"], "a sample")
        seen = told_by(server, ADMIN)
        assert seen["texts"][0]["tenant"] == seen["namespaces"][0]["tenant"] == "alice"
        eyes = server.server.app[EYES]
        wait_for(lambda: eyes.follower is not None and eyes.follower.hottest, "tags are looked for")
        wait_for(lambda: len(told_by(server, ADMIN)["history"]["time_s"]) >= 2, "a sample")
        assert told_by(server, ADMIN)["texts"][0]["tag"] is None
        assert "private" not in json.dumps(told_by(server, ADMIN))


def test_a_request_id_goes_from_the_header_to_the_miss_and_back(store: Store) -> None:
    with running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        body = json.dumps({"namespace": ns.name.hex(), "tokens": tokens_of(3, 2)}).encode()
        name = "chatcmpl-0123.4:5_6"
        ask(server.address, "POST", "/v1/match", body, X_Request_Id=name,
            Content_Type="application/json")  # fmt: skip
        wait_for(lambda: told_by(server)["misses"], "the miss")
        assert told_by(server)["misses"][0]["request_id"] == name


def test_what_is_kept_does_not_grow(store: Store) -> None:
    """Thousands of tenants, texts and misses later the object has the size it is bounded to."""
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    seen = Recorder()
    for i in range(5000):
        key = i.to_bytes(16, "big")
        seen.matched(key, ChunkRef(key, b"", 0, b""), 2, [1], 64)
        seen.asked_by(f"tenant{i}", "unix", 200, 1, 1)
        seen.answered(f"/v1/route{i % 20}", 200, 0.001)
        seen.misses.append(recorders.Miss(0.0, "t", ns, ChunkRef(key, b"", 0, b""), 0, 1, ""))
    assert len(seen.texts) == recorders.TEXTS_MAX
    assert len(seen.clients) == recorders.CLIENTS_MAX + 1
    assert sum(one.requests for one in seen.clients.values()) == 5000
    assert len(seen.misses) == recorders.MISSES_MAX
    told = overview(seen, {})
    assert len(json.dumps(told)) < 40_000


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_near_those_of_the_durations_themselves(seed: int) -> None:
    rng = random.Random(seed)
    latencies = Latencies(5.0, 60)
    durations = sorted(rng.lognormvariate(-6, 1.5) for _ in range(4000))
    for i, seconds in enumerate(durations):
        latencies.add(100.0 + i / 80, seconds)
    counts = latencies.over(150.0, 60.0)
    assert counts.total() == len(durations)
    for percent in (50, 90, 99):
        true = durations[int(percent / 100 * len(durations)) - 1]
        assert percentile(counts, percent) == pytest.approx(true, rel=0.08)
    assert percentile(latencies.over(900.0, 60.0), 50) is None


def test_every_duration_has_a_bucket() -> None:
    assert [bucket_of(seconds) for seconds in (0.0, 50e-6, 1e9)] == [0, 0, BUCKETS - 1]
    assert bucket_of(51e-6) == 1


@pytest.mark.parametrize("seed", range(3))
def test_what_occurs_most_is_found_among_much_else(seed: int) -> None:
    """Space-Saving's promise: more than 1/size of all is in it, counted at most 1/size too high."""
    rng, top, true = random.Random(seed), Top[int](32), Counter[int]()
    for _ in range(20_000):
        item = int(rng.paretovariate(0.6)) % 10_000
        top.add(item)
        true[item] += 1
    counted = dict(top.most(32))
    assert len(counted) == 32
    for item, count in true.items():
        if count > 20_000 / 32:
            assert count <= counted[item] <= count + 20_000 / 32
    assert sorted(top.fade(0.0)) == sorted(counted)
