"""Spans of requests, with OpenTelemetry's own exporter in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from prefixstore import Store
from prefixstore.errors import ConfigError
from prefixstore.serve import tracing
from prefixstore.serve.eyes import EYES, EyesOptions
from prefixstore.serve.run import ServeOptions
from prefixstore.serve.tracing import Tracing
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for, tokens_of
from tests.serve.raw import ask
from tests.serve.support import running
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("4MiB", 0) as store:
        yield store


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_request_is_a_span_of_its_callers_trace(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter = InMemorySpanExporter()
    with running(store, json_log=True) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        server.server.app[EYES].tracing = Tracing(None, SimpleSpanProcessor(exporter))
        body = json.dumps({"namespace": ns.name.hex(), "tokens": tokens_of(1, 3)}).encode()
        parent = f"00-{TRACE}-{PARENT}-01"
        ask(server.address, "POST", "/v1/match", body, traceparent=parent, X_Request_Id="cmpl-7",
            Content_Type="application/json")  # fmt: skip
        ask(server.address, "GET", "/v1/nothing")
        ask(server.address, "GET", "/healthz")
        ask(server.address, "POST", "/v1/match", b"{", traceparent="no trace")
        wait_for(lambda: len(exporter.get_finished_spans()) >= 2, "the spans")
    match, broken = exporter.get_finished_spans()
    assert match.name == "POST /v1/match"
    assert match.context is not None
    assert f"{match.context.trace_id:032x}" == TRACE
    assert match.parent is not None
    assert f"{match.parent.span_id:016x}" == PARENT
    told = dict(match.attributes or {})
    assert told["http.response.status_code"] == 200
    assert told["http.request.body.size"] == len(body)
    assert told["prefixstore.request_id"] == "cmpl-7"
    assert told["prefixstore.tenant"] == "local"
    assert (told["prefixstore.asked_chunks"], told["prefixstore.found_chunks"]) == (3, 0)
    assert broken.parent is None
    assert dict(broken.attributes or {})["http.response.status_code"] == 400
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    [line] = [line for line in lines if line["request_id"] == "cmpl-7"]
    assert line["traceparent"] == parent


def test_nothing_is_made_unless_an_endpoint_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tracing(None).begin("POST", "/v1/match", {}) is None
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLES[1], "http://127.0.0.1:1")
    spans = Tracing(None)
    assert spans.begin("POST", "/v1/match", {}) is not None  # not ended: it is never sent
    assert spans.begin("GET", "/metrics", {}) is None
    spans.close()


@pytest.mark.parametrize("given", ["foo", "host:4318", "http://", "http://host:0", "grpc://host"])
def test_an_endpoint_that_is_none_is_told_before_anything_is_opened(given: str) -> None:
    with pytest.raises(ConfigError, match=f"--otlp '{given}' is no URL .give http://host:4318."):
        ServeOptions(eyes=EyesOptions(otlp=given)).check()
    ServeOptions(eyes=EyesOptions(otlp="https://host/v1/traces")).check()


def test_without_the_package_an_option_is_refused_and_the_environment_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="OpenTelemetry"):
        Tracing("http://127.0.0.1:1")
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLES[1], "http://127.0.0.1:1")
    assert Tracing(None).begin("POST", "/v1/match", {}) is None
    assert "no spans" in caplog.text
