"""Requests made from the OpenAPI document, good and bad: no fault of the server's, and answers as
the document says. The same requests each time."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from prefixstore import wire
from prefixstore.keys import ChunkRef
from prefixstore.layout import checksum
from prefixstore.serve.openapi import document
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
from tests.serve.support import ADMIN, Running, running, tokens_file
from tests.store_helpers import Place

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
not_a_server_error = pytest.importorskip("schemathesis.checks").not_a_server_error

pytest_plugins = ["tests.store_fixtures"]
NAME = "0" * 32  # stands for a namespace that is there
LEASE = "1" * 32
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
REQUESTS: list[str] = []  # that were made
KEYS = [bytes([i]) * 16 for i in range(3)]


# ---------------------------------------------------------------------- binary bodies
def refs() -> Any:
    """References of any kind: keys that hash, and keys that do not."""
    one = st.builds(
        ChunkRef, st.sampled_from(KEYS) | st.binary(min_size=16, max_size=16),
        st.binary(max_size=100), st.integers(0, 2**32 - 1), st.binary(min_size=8, max_size=8),
    )  # fmt: skip
    return st.lists(one, max_size=4)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "namespace": st.just(NAME) | st.none() | st.text(max_size=40),
        "keys": st.booleans(),
        "tokens": st.just(True) | st.lists(st.integers(-(2**33), 2**33), max_size=20),
        "tiers": st.lists(st.integers(0, 3), max_size=4),
        "lease_s": st.floats(),
        "pinned": st.booleans() | st.none(),
        "ttl_s": st.floats() | st.none(),
        "group": st.integers(-1, 2**65),
        "tag": st.text(max_size=70),
        "prompts": st.lists(st.integers(-1, 5), max_size=4),
    },
)


def packed(fields: dict[str, Any], some: list[ChunkRef], rest: bytes, cut: int) -> bytes:
    body = wire.pack_request(fields, wire.pack_refs(some), rest)
    return body[: len(body) - cut] if cut < len(body) else body


BODIES = st.one_of(
    st.builds(packed, FIELDS, refs(), st.binary(max_size=200), st.just(0)),
    st.builds(packed, FIELDS, refs(), st.binary(max_size=200), st.integers(0, 300)),
    st.binary(max_size=100),
    st.builds(lambda length, data: struct.pack("<I", length) + data, st.integers(0, 2**32 - 1),
              st.binary(max_size=50)),
)  # fmt: skip

schemathesis.openapi.media_type(wire.CONTENT_TYPE, BODIES)
# Not: /v1/events, which has no end.
schema = schemathesis.openapi.from_dict(document()).exclude(path="/v1/events")


# ---------------------------------------------------------------------- the server
@pytest.fixture(scope="module")
def place_of_module(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("schema")
    (folder / "memory").mkdir()
    return Place(folder, folder / "memory")


@pytest.fixture(scope="module")
def server(place_of_module: Place) -> Iterator[Running]:
    tokens = tokens_file(place_of_module.folder)
    with place_of_module.open("4MiB", "4MiB") as store, running(store, tokens=tokens) as server:
        yield server


@pytest.fixture
def names(server: Running) -> dict[str, str]:
    """What stands for a namespace with chunks, and for a lease, in requests."""
    server.server.state.draining = False
    with server.open(ADMIN) as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        chain = ns.chain(tokens_of(1, 3)).refs()
        ns.put(chain, [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in chain])
        lease, _ = ns.lease(chain, ns.match(chain).tiers)
        return {NAME: ns.name.hex(), LEASE: lease.lease_id.decode()}


@schema.parametrize()
@hypothesis.settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.seed(7)
def test_the_server_does_as_its_document_says(
    case: Any, server: Running, names: dict[str, str]
) -> None:
    known = names[NAME]
    if isinstance(case.body, dict) and isinstance(case.body.get("namespace"), str):
        case.body["namespace"] = known
    elif isinstance(case.body, bytes):
        case.body = case.body.replace(NAME.encode(), known.encode())
    REQUESTS.append(case.method)
    if case.path_parameters and zlib.crc32(str(case.path_parameters).encode()) % 2:
        case.path_parameters["id"] = names[LEASE] if "leases" in case.path else known
    case.headers["Authorization"] = f"Bearer {ADMIN}"
    case.call_and_validate(base_url=server.address, checks=CHECKS, timeout=30)


def test_a_put_of_the_document_is_one_the_server_takes(
    server: Running, names: dict[str, str]
) -> None:
    """The strategy of binary bodies reaches beyond refusals: so may the requests above."""
    from tests.serve.raw import ask

    with server.open(ADMIN) as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
    assert len(REQUESTS) > 200
    [ref] = ns.chain([5, 6, 7, 8]).refs()
    payload = content_of(ref.key, CONTRACT_LAYOUT.payload_bytes)
    body = packed({"namespace": NAME}, [ref], checksum(payload) + payload, 0)
    body = body.replace(NAME.encode(), ns.name.hex().encode())
    answer = ask(server.address, "POST", "/v1/put", body, Content_Type=wire.CONTENT_TYPE,
                 Authorization=f"Bearer {ADMIN}")  # fmt: skip
    assert answer == (200, {"states": ["stored"]})
