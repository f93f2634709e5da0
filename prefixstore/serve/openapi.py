"""The OpenAPI 3.1 document of the API, served at ``/openapi.json``; docs/http.md says more."""

from __future__ import annotations

from typing import Any

import prefixstore
from prefixstore.serve import schemas
from prefixstore.serve.events import KINDS
from prefixstore.wire import CONTENT_TYPE

_REGION = [
    {"name": name, "in": "query", "schema": {"type": "string"}, "description": text}
    for name, text in (
        ("layers", "half-open range a:b"),
        ("heads", "half-open range c:d"),
        ("part", "k or v"),
        ("checked", "read and check here, instead of sending checksums of unread bytes"),
    )
]

_EVENTS = [
    {"name": name, "in": "query", "schema": schema, "description": text}
    for name, schema, text in (
        ("kinds", {"type": "string"}, f"some of {','.join(KINDS)}"),
        ("namespace", schemas.NAMESPACE, "of this one only"),
    )
]
_OVERVIEW = {
    **{name: {"type": "number"} for name in ("time_s", "started_s", "window_s")},
    **{name: {"type": "integer"} for name in ("leases", "being_stored", "transfers", "listeners")},
    **{name: {"type": "boolean"} for name in ("draining", "read_only")},
    **{
        name: {"type": "object"}
        for name in ("tiers", "found", "found_lately", "rates", "counters", "history")
    },
    **{
        name: {"type": "array", "items": {"type": "object"}}
        for name in ("routes", "namespaces", "texts", "clients", "misses", "activity")
    },
    "namespaces_more": {"type": "integer"},
    "version": {"type": "string"},
}


def _since() -> dict[str, Any]:
    text = "Unix seconds: leave out what of the history is older"
    return {"name": "since_s", "in": "query", "schema": {"type": "number"}, "description": text}


def document() -> dict[str, Any]:
    """The document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prefixstore",
            "version": prefixstore.__version__,
            "description": "KV of prompt prefixes over the network. Binary bodies: docs/http.md.",
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["code", "message", "hint"],
                            "properties": {
                                name: {"type": "string"} for name in ("code", "message", "hint")
                            },
                        }
                    },
                }
            },
        },
        "security": [{"token": []}, {}],
        "paths": {**_paths(), **_operator_paths()},
    }


def _paths() -> dict[str, Any]:
    lease = {"name": "id", "in": "path", "required": True, "schema": schemas.HEX}
    space = {"name": "id", "in": "path", "required": True, "schema": schemas.NAMESPACE}
    identity = {"identity": {"type": "object"}, "layout": schemas.LAYOUT}
    return {
        "/v1/namespaces": {
            "post": _operation("Enter a model, or find it", identity, schemas.KNOWN),
            "get": _operation("Your namespaces", None, schemas.SPACES),
        },
        "/v1/match": {
            "post": _chunks(
                "Leading chunks that are there, leased if asked for",
                schemas.MATCH,
                schemas.FOUND,
            )
        },
        "/v1/segments": {
            "post": _binary_answer(
                _chunks(
                    "Runs of tokens that stand in stored texts",
                    {"start": {"type": "integer"}, "min_tokens": {"type": "integer"}},
                )
            )
        },
        "/v1/get": {"post": {**_binary_answer(_chunks("KV of chunks")), "parameters": _REGION}},
        "/v1/put": {
            "post": {
                **_operation("Store chunks", None, schemas.STATES),
                "parameters": _REGION[:2],
                "requestBody": {"required": True, "content": {CONTENT_TYPE: {}}},
            }
        },
        "/v1/leases": {
            "post": _chunks(
                "Hold chunks",
                {"tiers": {"type": "array"}, **schemas.DURATION},
                schemas.LEASE,
            )
        },
        "/v1/leases/{id}": {
            "parameters": [lease],
            "post": _operation("Hold for longer", schemas.DURATION, schemas.RENEWED),
            "delete": _operation("Release", None, {}),
        },
        "/v1/prefetch": {"post": _chunks("Copy from disk to memory soon", {}, status="202")},
        "/v1/pin": {"post": _chunks("Exempt from eviction", {"pinned": {"type": "boolean"}})},
        "/v1/delete": {"post": _chunks("Remove")},
        "/v1/ttl": {
            "post": _chunks("Change when chunks expire", {"ttl_s": {"type": ["number", "null"]}})
        },
        "/v1/namespaces/{id}/retire": {
            "parameters": [space],
            "post": _operation("Drop a model's chunks and its name", None, schemas.COUNT),
        },
        "/v1/namespaces/{id}/bump": {
            "parameters": [space],
            "post": _operation("New weights: a new name, no chunks", None, schemas.KNOWN),
        },
        "/v1/explain": {"post": _chunks("The first missing chunk, and why", {}, schemas.EXPLAINED)},
        "/v1/staleness": {
            "post": _binary_answer(_chunks("What was noted of chunks"), "application/octet-stream"),
            "put": {
                **_operation("Note", None, schemas.COUNT),
                "requestBody": {"required": True, "content": {CONTENT_TYPE: {}}},
            },
        },
        "/v1/flush": {"post": _operation("Wait until all is on disk", {}, schemas.FLUSHED)},
        "/v1/drain": {"post": _operation("Prepare to be stopped", None, schemas.DRAINED)},
    }


def _operator_paths() -> dict[str, Any]:
    """What people and their tools look at."""
    return {
        "/v1/events": {
            "get": {
                **_text("What happens to your chunks, as it happens", "text/event-stream"),
                "parameters": _EVENTS,
            }
        },
        "/v1/overview": {
            "get": {
                **_operation("What the page shows", None, _OVERVIEW),
                "parameters": [_since()],
            }
        },
        "/metrics": {"get": _text("Numbers for Prometheus", "text/plain")},
        "/healthz": {"get": _operation("The process answers", None, schemas.HEALTH)},
        "/readyz": {"get": _operation("Whether to send requests here", None, schemas.READY)},
        "/openapi.json": {"get": _operation("This document", None, {})},
        "/": {"get": _text("The page for operators", "text/html")},
        "/page.css": {"get": _text("Its style", "text/css")},
        "/page.js": {"get": _text("Its script", "text/javascript")},
        "/page.svg": {"get": _text("Its icon", "image/svg+xml")},
    }


def _operation(
    summary: str, fields: dict[str, Any] | None, answer: Any, status: str = "200"
) -> dict[str, Any]:
    refused = {
        "description": "Refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    required = [name for name in answer if name not in schemas.OPTIONAL]
    schema = {"type": "object", "properties": answer, "required": required}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            status: {"description": "Done", "content": {"application/json": {"schema": schema}}},
            "4XX": refused,
            "503": refused,
        },
    }
    if fields is not None:
        schema = {"type": "object", "properties": fields}
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return operation


def _chunks(
    summary: str, fields: dict[str, Any] | None = None, answer: Any = None, status: str = "200"
) -> dict[str, Any]:
    """An operation on chunks: by tokens in JSON, or by references in binary."""
    answer = schemas.COUNT if answer is None else answer
    operation = _operation(summary, {**schemas.CHUNKS, **(fields or {})}, answer, status)
    content = operation["requestBody"]["content"]
    content["application/json"]["schema"]["required"] = ["namespace", "tokens"]
    content[CONTENT_TYPE] = {}
    operation["requestBody"]["required"] = True
    return operation


def _binary_answer(operation: dict[str, Any], kind: str = CONTENT_TYPE) -> dict[str, Any]:
    operation["responses"]["200"]["content"] = {kind: {}}
    return operation


def _text(summary: str, kind: str) -> dict[str, Any]:
    operation = _operation(summary, None, {})
    operation["responses"]["200"]["content"] = {kind: {"schema": {"type": "string"}}}
    return operation
