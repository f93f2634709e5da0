"""What no well-behaved client sends: answered with an error of its own, never with a 500."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web

from prefixstore import Layout, Store, wire
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.errors import ConfigError
from prefixstore.keys import ChunkRef, key_of
from prefixstore.layout import checksum
from prefixstore.namespace import MISS
from prefixstore.serve import limits, metrics
from prefixstore.serve.app import routes
from prefixstore.serve.openapi import document
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.run import ServeOptions
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask, connect, read_answer
from tests.serve.support import Running, running
from tests.store_helpers import wait_for

pytest_plugins = ["tests.store_fixtures"]
BINARY = {"Content_Type": wire.CONTENT_TYPE}
SIZE = CONTRACT_LAYOUT.payload_bytes


def put_body(ns: RemoteNamespace, refs: list[ChunkRef], **fields: object) -> bytes:
    payloads = [content_of(ref.key, SIZE) for ref in refs]
    rest = b"".join(checksum(one) + one for one in payloads)
    return wire.pack_request({"namespace": ns.name.hex(), **fields}, wire.pack_refs(refs), rest)


def code(answer: tuple[int, dict[str, dict[str, str]]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def test_every_route_is_in_the_document(server: Running) -> None:
    told = ask(server.address, "GET", "/openapi.json")[1]
    assert told == json.loads(json.dumps(document()))
    listed = {(method.upper(), path) for path, methods in told["paths"].items()
              for method in methods if method != "parameters"}  # fmt: skip
    assert listed == {(route.method, route.path) for route in routes()}
    written = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    assert {path for _, path in listed if f"{path}`" not in written} == set()


def test_malformed_requests_are_the_clients_fault(server: Running, ns: RemoteNamespace) -> None:
    refs = ns.chain(tokens_of(1, 3)).refs()
    ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    good = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
    paths = ["/v1/match", "/v1/get", "/v1/leases", "/v1/pin", "/v1/delete", "/v1/explain",
             "/v1/staleness", "/v1/segments", "/v1/prefetch", "/v1/put",
             "/v1/namespaces"]  # fmt: skip
    rng = random.Random(1)
    bodies = [b"", b"\xff" * 8, b"\0\0\0\0", good[:-1], good + b"x", good[: len(good) // 2],
              wire.pack_request({}), wire.pack_request({"namespace": 7}),
              wire.pack_request({"namespace": "zz"}), b"\x02\0\0\0[]", b"\x04\0\0\0" + b"[" * 4,
              wire.pack_request({"namespace": ns.name.hex()}, b"\xff\xff\xff\xff")]  # fmt: skip
    for _ in range(40):
        noisy = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        bodies.append(bytes(noisy))
    statuses = set()
    for body in bodies:
        for path in paths:
            status, _ = ask(server.address, "POST", path, body, **BINARY)
            statuses.add(status)
    assert statuses <= {200, 202, 400, 404}
    for text in (b"{", b"[]", b"7", b'{"namespace": null}', b"\xff", b'{"tokens": ' + b"[" * 5000):
        for path in paths[:-2]:
            assert (
                ask(server.address, "POST", path, text, Content_Type="application/json")[0] == 400
            )


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": ["a"]}, {"tokens": [2**40]}, {"tokens": [1.5]}, {"tokens": [True]},
        {"tokens": {}}, {"tokens": [1], "salt": "xx"}, {"tokens": [1], "salt": "00" * 2000},
        {"tokens": [1], "items": 7}, {"tokens": [1], "items": [[0, 1, "zz"]]},
        {"tokens": [1], "items": [[2**40, 1, "00"]]},
        {"tokens": [1] * 4, "items": [[0, 1, "00" * 70000]]},
        {"tokens": [], "prompts": [1]}, {"tokens": [], "prompts": "x"},
        {"tokens": [1] * 4, "prompts": [-1, 2]}, {"tokens": [], "lease_s": "x"},
        {"tokens": [], "lease_s": 1e9}, {"tokens": [], "lease_s": -1},
    ],
)  # fmt: skip
def test_bad_fields_are_refused(
    server: Running, ns: RemoteNamespace, fields: dict[str, object]
) -> None:
    body = json.dumps({"namespace": ns.name.hex(), **fields}).encode()
    assert code(ask(server.address, "POST", "/v1/match", body)) == (400, "config")


@pytest.mark.parametrize(
    "fields",
    [{}, {"token_ids": [1] * 4}, {"keys": ["00" * 16]}, {"keys": True}, {"tokens": True},
     {"tokens": None}],
)  # fmt: skip
def test_a_request_about_no_chunks_says_what_is_expected(
    server: Running, ns: RemoteNamespace, fields: dict[str, object]
) -> None:
    """It would be answered as if nothing was stored."""
    extra = {"namespace": ns.name.hex(), "tiers": [], "ttl_s": None, "each": True, **fields}
    body = json.dumps(extra).encode()
    for one in ("match", "get", "leases", "prefetch", "pin", "delete", "ttl", "explain",
                "staleness", "segments"):  # fmt: skip
        answer = ask(server.address, "POST", f"/v1/{one}", body)
        assert code(answer) == (400, "config"), one
        assert "tokens" in answer[1]["error"]["message"], one
    binary = wire.pack_request({"namespace": ns.name.hex()})
    assert code(ask(server.address, "POST", "/v1/match", binary, **BINARY)) == (400, "config")
    nothing = wire.pack_request({"namespace": ns.name.hex(), "tokens": True})  # of a short prompt
    assert ask(server.address, "POST", "/v1/match", nothing, **BINARY) == (200, {"tiers": [[]]})


@pytest.mark.parametrize(
    "query",
    ["layers=1", "layers=:", "layers=2:1", "layers=0:99", "heads=-1:1", "heads=a:b", "part=x",
     "layers=0:" + "9" * 50, "layers=%00:1", "part="],
)  # fmt: skip
def test_bad_regions_are_refused(server: Running, ns: RemoteNamespace, query: str) -> None:
    body = json.dumps({"namespace": ns.name.hex(), "tokens": [1, 2, 3, 4]}).encode()
    for path in ("/v1/get", "/v1/put"):
        status, answer = ask(server.address, "POST", f"{path}?{query}", body)
        assert (status, answer["error"]["code"]) in ((400, "config"), (400, "layout"))


@pytest.mark.parametrize(
    "fields",
    [{"group": -1}, {"group": "x"}, {"tag": 7}, {"tag": "x" * 65}, {"pin": 1}, {"ttl_s": "x"},
     {"ttl_s": -1}, {"ttl_s": 0}, {"wait": None}, {"deadline_s": 0}, {"deadline_s": 1e9}],
)  # fmt: skip
def test_bad_labels_are_refused(
    server: Running, ns: RemoteNamespace, fields: dict[str, object]
) -> None:
    body = put_body(ns, ns.chain(tokens_of(2, 1)).refs(), **fields)
    assert code(ask(server.address, "POST", "/v1/put", body, **BINARY)) == (400, "config")


def test_a_put_must_be_what_it_says(server: Running, ns: RemoteNamespace) -> None:
    """Wrong checksum, key that is no hash of its preimage, lengths that do not add up."""
    refs = ns.chain(tokens_of(3, 2)).refs()
    body = put_body(ns, refs)
    flipped = body[:-1] + bytes([body[-1] ^ 1])
    assert code(ask(server.address, "POST", "/v1/put", flipped, **BINARY)) == (400, "checksum")
    forged = [refs[0]._replace(key=refs[1].key)]
    answer = ask(server.address, "POST", "/v1/put", put_body(ns, forged), **BINARY)
    assert code(answer) == (400, "config")
    for wrong in (body[:-1], body + b"x"):
        assert code(ask(server.address, "POST", "/v1/put", wrong, **BINARY)) == (400, "config")
    assert ns.match(refs).num_chunks == 0
    lies = str(len(body) + 10**6)
    with connect(server.address) as sock:
        head = f"POST /v1/put HTTP/1.1\r\nHost: x\r\nContent-Length: {lies}\r\n\r\n"
        sock.sendall(head.encode() + body)
        assert read_answer(sock)[0] == 400
    assert ask(server.address, "POST", "/v1/put", body, **BINARY)[1] == {"states": ["stored"] * 2}
    assert ask(server.address, "POST", "/v1/put", body, **BINARY)[1] == {"states": ["exists"] * 2}


def test_a_preimage_has_a_bound(server: Running, ns: RemoteNamespace) -> None:
    """It is kept in the index, which no quota counts."""
    [ref] = ns.chain(tokens_of(3, 1)).refs()
    for more, status in ((limits.ITEMS_BYTES_MAX, 200), (limits.ITEMS_BYTES_MAX + 1, 400)):
        preimage = ref.preimage + bytes(more)
        long = ref._replace(preimage=preimage, key=key_of(preimage))
        answer = ask(server.address, "POST", "/v1/put", put_body(ns, [long]), **BINARY)
        assert answer[0] == status


def test_bodies_over_a_bound_are_not_read(server: Running) -> None:
    for path, most in (("/v1/put", limits.PUT_BODY_BYTES_MAX),
                       ("/v1/match", limits.CONTROL_BODY_BYTES_MAX)):  # fmt: skip
        answer = ask(server.address, "POST", path, Content_Length=str(most + 1))
        assert code(answer) == (413, "too_large")
    answer = ask(server.address, "POST", "/v1/put", Content_Length="", Transfer_Encoding="chunked")
    assert answer[0] in (400, 411)
    answer = ask(server.address, "POST", "/v1/match", b"{}", Content_Encoding="gzip")
    assert answer[0] in (400, 415)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", {404}),
        (b"GET /v1/leases/../../store.json HTTP/1.1\r\nHost: x\r\n\r\n", {404, 405}),
        (b"GET /v1/match HTTP/1.1\r\nHost: x\r\n\r\n", {405}),
        (b"nonsense\r\n\r\n", {400}),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: nonsense\r\n\r\n", {417}),
        (b"GET / HTTP/9.9\r\n\r\n", {400, 404}),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", {400, 431}),
        (b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", {400}),
        (b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n", {400}),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(server: Running, text: bytes, expected: set[int]) -> None:
    with connect(server.address) as sock:
        sock.sendall(text)
        assert read_answer(sock)[0] in expected


def test_late_senders_are_cut_off(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers that never end, and bodies that dribble; others are served meanwhile."""
    monkeypatch.setattr(limits, "HEADER_S", 0.2)
    monkeypatch.setattr(limits, "STALL_S", 0.2)
    monkeypatch.setattr(limits, "SWEEP_S", 0.05)
    head = b"POST /v1/put HTTP/1.1\r\nHost: x\r\n"
    with connect(server.address) as header, connect(server.address) as body:
        header.sendall(head)
        body.sendall(head + b"Content-Length: 1000\r\n\r\nx")
        assert ns.match(ns.chain(tokens_of(4, 2))).num_chunks == 0
        assert read_answer(body)[0] == 408
        with suppress(ConnectionResetError):
            assert header.recv(1) == b""
    guards = server.server.state
    wait_for(lambda: sum(guards.transfers.values()) == 0, "the end of the transfers")


def test_too_many_connections_are_turned_away(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_MAX", 3)
    held = [connect(server.address) for _ in range(3)]
    for sock in held:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(sock)[0] == 200
    assert ask(server.address, "GET", "/healthz")[0] in (0, 503)
    held.pop().close()
    wait_for(lambda: ask(server.address, "GET", "/healthz")[0] == 200, "a free place")
    for sock in held:
        sock.close()


def test_over_a_bound_the_answer_is_try_again(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = ns.chain(tokens_of(5, 2)).refs()
    body = put_body(ns, refs)
    for name, value, status in (("TRANSFERS_MAX", 0, 503), ("TENANT_TRANSFERS_MAX", 0, 429),
                                ("TENANT_BYTES_MAX", 10, 429)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, value)
            answer = ask(server.address, "POST", "/v1/put", body, **BINARY)
            assert code(answer) == (status, "busy")
            with connect(server.address) as sock:
                sock.sendall(b"POST /v1/put HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n")
                assert b"Retry-After: 1" in sock.recv(65536)
    with monkeypatch.context() as patch:
        patch.setattr(limits, "CONTROL_MAX", 0)
        match = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
        assert code(ask(server.address, "POST", "/v1/match", match, **BINARY)) == (503, "busy")
    assert ask(server.address, "POST", "/v1/put", body, **BINARY)[0] == 200
    with monkeypatch.context() as patch:
        patch.setattr(limits, "GET_BYTES_MAX", 10)
        assert ask(server.address, "POST", "/v1/get", match, **BINARY)[0] == 413


def test_read_only_changes_nothing(store: Store, server: Running, ns: RemoteNamespace) -> None:
    refs = ns.chain(tokens_of(6, 2)).refs()
    ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    with running(store, read_only=True) as other, other.open() as client:
        same = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        outs = outputs(CONTRACT_LAYOUT, 2)
        assert MISS not in same.get(refs, outs)
        for change in (lambda: same.put(refs, outs), lambda: same.delete(refs),
                       lambda: same.pin(refs),
                       lambda: client.namespace(identity_for("b"), CONTRACT_LAYOUT)):  # fmt: skip
            with pytest.raises(Exception, match=r"only reads|no new namespaces"):
                change()
    assert ns.match(refs).num_chunks == 2


def test_the_parts_of_a_chunk_by_query(server: Running) -> None:
    """k, v, layers and heads, as a tool would ask: against an array made of the payload."""
    import numpy as np

    layout = Layout(num_layers=4, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=8192)
    with server.open() as client:
        ns = client.namespace(identity_for("big", layout), layout)
        [ref] = ns.chain([1, 2, 3, 4]).refs()
        payload = content_of(ref.key, layout.payload_bytes)
        ns.put([ref], [payload])
        whole = np.frombuffer(payload, np.uint8).reshape(4, 2, 2, -1)
        body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs([ref]))
        for query, expected in (
            ("part=k", whole[:, 0]),
            ("part=v&layers=1:3", whole[1:3, 1]),
            ("layers=2:4&heads=1:2", whole[2:4, :, 1:2]),
            ("part=k&heads=0:1&checked=1", whole[:, 0, 0:1]),
        ):
            status, answer = ask(server.address, "POST", f"/v1/get?{query}", body, **BINARY)
            tier, kind, _, sum_bytes, num_bytes = wire.RECORD.unpack_from(answer)
            at = wire.RECORD.size + sum_bytes
            assert (status, tier, num_bytes) == (200, 1, expected.size)
            assert answer[at:] == expected.tobytes()
            record = wire.Record(tier, kind, answer[wire.RECORD.size : at], num_bytes)
            assert wire.payload_is(record, memoryview(answer)[at:])


def test_it_listens_elsewhere_only_with_tokens() -> None:
    ServeOptions(host="0.0.0.0", insecure=True).check()
    ServeOptions(host="::1").check()
    for options in (ServeOptions(host="0.0.0.0"), ServeOptions(host="example.org"),
                    ServeOptions(tls_cert="x"), ServeOptions(port=70000)):  # fmt: skip
        with pytest.raises(ConfigError):
            options.check()


def test_operators_see_what_happened(server: Running, ns: RemoteNamespace) -> None:
    refs = ns.chain(tokens_of(7, 2)).refs()
    ns.put(refs[:1], [content_of(refs[0].key, SIZE)])
    ns.get(refs, outputs(CONTRACT_LAYOUT, 2))
    assert ns.explain(refs) == {
        "chunks": 2, "found_chunks": 1, "found_tokens": 4,
        "missing": {"chunk": 1, "token": 4, "why": "absent", "stored_behind": 0},
    }  # fmt: skip
    with connect(server.address) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc-1\r\n\r\n")
        status, page = read_answer(sock)
    text = page.decode()
    assert status == 200
    assert 'prefixstore_chunks_total{tier="memory"} 1\n' in text
    assert 'prefixstore_chunks_total{tier="miss"} 1\n' in text
    assert 'prefixstore_puts_total{state="stored"} 1\n' in text
    assert 'prefixstore_requests_total{route="/v1/put",status="200"} 1\n' in text
    told = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert [name for name in metrics._HELP if f"`prefixstore_{name}" not in told] == []
    names = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert all(name.startswith("prefixstore_") for name in names)
    assert ask(server.address, "GET", "/readyz")[0] == 200
    began = time.monotonic()
    assert ask(server.address, "POST", "/v1/drain")[1]["flushed"] is True
    assert time.monotonic() - began < 30
    assert code(ask(server.address, "GET", "/readyz")) == (503, "draining")
    body = put_body(ns, refs)
    assert code(ask(server.address, "POST", "/v1/put", body, **BINARY)) == (503, "draining")


def test_refusals_carry_what_clients_need() -> None:
    assert RefusedError(429, "busy", "x").headers == {"Retry-After": "1"}
    assert RefusedError(401, "token", "x").headers == {"WWW-Authenticate": "Bearer"}
    assert isinstance(routes()[0], web.RouteDef)
