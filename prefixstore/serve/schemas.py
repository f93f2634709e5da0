"""What requests and answers hold, as JSON schemas: for the OpenAPI document, and for its tests."""

from __future__ import annotations

from typing import Any

from prefixstore.ledger import TIER_NAMES
from prefixstore.namespace import MISS
from prefixstore.putting import PutState

Properties = dict[str, Any]
HEX = {"type": "string", "pattern": "^([0-9a-f]{2})*$"}
NAMESPACE = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
INTEGER, NUMBER = {"type": "integer", "minimum": 0}, {"type": "number"}
OPTIONAL = ("lease", "missing")  # of answers; the rest is always there
LAYOUT_NAMES = ("num_layers", "num_planes", "num_heads", "chunk_tokens", "head_bytes")


def closed(properties: Properties) -> Properties:
    """An object that has these, and nothing else."""
    required = [name for name in properties if name not in OPTIONAL]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


# ---------------------------------------------------------------------- requests
CHUNKS: Properties = {
    "namespace": NAMESPACE,
    "tokens": {
        "type": "array",
        "items": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    },
    "salt": HEX,
    "items": {
        "type": "array",
        "items": {
            "type": "array",
            "prefixItems": [
                {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                HEX,
            ],
            "minItems": 3,
            "maxItems": 3,
        },
    },
}
LAYOUT = closed({name: {"type": "integer", "minimum": 1} for name in LAYOUT_NAMES})
MATCH: Properties = {
    "each": {"type": "boolean"},
    "prompts": {"type": "array", "items": INTEGER},
    "lease_s": {"type": "number", "minimum": 0, "maximum": 60},
}
DURATION: Properties = {"duration_s": {"type": "number", "minimum": 0.001, "maximum": 60}}

# ---------------------------------------------------------------------- answers
COUNT: Properties = {"chunks": INTEGER}
KNOWN: Properties = {"namespace": NAMESPACE, "identity": {"type": "object"}}
SPACES: Properties = {
    "namespaces": {"type": "array", "items": closed({**KNOWN, "layout": LAYOUT})},
}
FOUND: Properties = {
    "tiers": {"type": "array", "items": {"type": "array", "items": {"enum": [MISS, *TIER_NAMES]}}},
    "lease": closed({"id": HEX, "end_s": NUMBER}),
}
STATES: Properties = {
    "states": {
        "type": "array",
        "items": {"enum": [one.value for one in PutState if one is not PutState.WRITING]},
    }
}
LEASE: Properties = {"id": HEX, "end_s": NUMBER, "held": INTEGER}
RENEWED: Properties = {"end_s": NUMBER, "held": INTEGER}
EXPLAINED: Properties = {
    **dict.fromkeys(("chunks", "found_chunks", "found_tokens"), INTEGER),
    "missing": closed(
        {
            **dict.fromkeys(("chunk", "token", "stored_behind"), INTEGER),
            "why": {"enum": ["absent", "expired", "being_stored", "other_content", "stored"]},
        }
    ),
}
FLUSHED: Properties = {"flushed": {"type": "boolean"}}
DRAINED: Properties = {**FLUSHED, "transfers": INTEGER}
HEALTH: Properties = {"status": {"const": "ok"}}
READY: Properties = {"status": {"const": "ready"}, "read_only": {"type": "boolean"}}
