"""Fuzzing targets: files and settings that people write: store, engine, tokens, warming, models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from benchmarks.fuzz_records import LAYOUT, scratch
from benchmarks.fuzz_target import Target
from connector import kept_speed
from connector.blend_options import BlendOptions
from connector.options import EngineOptions, RequestOptions, full_salt
from prefixstore import verdict
from prefixstore.client.token import read_token
from prefixstore.config import GIB, Settings, load_settings, parse_bytes, save_settings
from prefixstore.errors import ConfigError, StoreError
from prefixstore.fingerprint import weights_fingerprint
from prefixstore.identity import IdentityError, ModelIdentity
from prefixstore.serve.auth import read_tokens
from prefixstore.store import Store
from prefixstore.testing_data import identity_for
from prefixstore.warm_documents import read_documents
from prefixstore.warm_manifest import Manifest

IDENTITY = identity_for("fuzz", LAYOUT)
SECRET_CHARS = 16  # as many in a row of a line would be a token


def _file(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    path.chmod(0o600)
    return path


# ---------------------------------------------------------------------- the store's
def parse_settings(data: bytes) -> None:
    """``store.json``."""
    folder = _file("store.json", data).parent
    settings = load_settings(folder)
    assert settings is not None
    save_settings(folder, settings)
    assert load_settings(folder) == settings
    assert settings.live_dir(folder).is_absolute() or not settings.memory_dir.startswith("/")


def settings_seeds() -> list[bytes]:
    """A good one."""
    settings = Settings("0123abcd", GIB, 4 * GIB, "/dev/shm")
    fields = {name: getattr(settings, name) for name in Settings.__slots__}
    return [json.dumps(fields).encode()]


def parse_size(data: bytes) -> None:
    """A size, as a setting or an option gives it."""
    assert parse_bytes(data.decode("utf-8", "replace")) >= 0


def parse_tokens(data: bytes) -> None:
    """The server's tokens file. What is refused is told without what may be a token."""
    settings = SimpleNamespace(disk_bytes=4 * GIB, memory_bytes=GIB)
    store = cast(Store, SimpleNamespace(folder=scratch(), settings=settings))
    try:
        tenants = read_tokens(_file("tokens", data), store)
    except ConfigError as error:
        lines = data.decode("utf-8", "replace").splitlines()
        parts = [part.strip() for line in lines for part in line.split(":")[1:]]
        shown = [part for part in parts if len(part) >= SECRET_CHARS and part in str(error)]
        assert not shown, "a token is shown"
        raise
    assert tenants.authenticate("Bearer x") is None
    assert len({tenant.mark for tenant in tenants.tenants}) == len(tenants.tenants)


def parse_token(data: bytes) -> None:
    """A client's token file."""
    token = read_token(_file("token", data))
    assert token == token.strip()
    assert not {":", "\n"} & set(token)


def parse_verdict(data: bytes) -> None:
    """A verdict on blending; whoever reads it takes these errors for none."""
    found = verdict.Verdict.from_json(data.decode(), verdict.digest_of(IDENTITY))
    if found.passed:
        assert found.selector
        assert 0 <= found.budget <= 1
        assert not isinstance(found.budget, bool)


def verdict_seeds() -> list[bytes]:
    """A good one."""
    fields = {
        "format_version": 1, "model_digest": verdict.digest_of(IDENTITY), "passed": True,
        "selector": "query", "budget": 0.2, "reason": "", "model": "m", "date": "2026-01-01",
        "texts": {"tokens": 5}, "figures": [{"budget": 0.2}], "versions": {"torch": "2"},
    }  # fmt: skip
    return [json.dumps(fields).encode()]


def parse_speeds(data: bytes) -> None:
    """Speeds of computing; whoever reads them takes these errors for none."""
    for speed in kept_speed.parse(data).values():
        assert isinstance(speed, float)
        assert 0 < speed < math.inf


def speeds_seeds() -> list[bytes]:
    """A good one."""
    fields = {"format_version": 1, "speeds": {"ab12 cpu of 2 cores, TP 1, PP 1": 1234.5, "b": 7}}
    return [json.dumps(fields).encode()]


# ---------------------------------------------------------------------- the engine's
def parse_engine(data: bytes) -> None:
    """``kv_connector_extra_config``, as an engine that has read its JSON gives it."""
    given = _object(data)
    options = EngineOptions.parse(given)
    assert options.staging_bytes(1) > 0
    assert options.where
    assert options.bypass_s > 0
    assert options.device_bytes >= 0
    BlendOptions.parse(options.blend, 32)


def engine_seeds() -> list[bytes]:
    """Good ones."""
    full = {
        "dir": "/var/kv", "memory": "8GiB", "disk": 0, "memory_dir": "/dev/shm", "load": "auto",
        "chunk_tokens": 64, "save": True, "staging": "1GiB", "load_threads": 2, "stall_ms": 50,
        "bypass_s": 1.5, "blend": True, "url": "http://h:1", "token_file": "t", "ca_file": "c",
        "device": "2GiB",
    }  # fmt: skip
    return [json.dumps(full).encode(), b'{"url": "unix:/run/kv"}']


def parse_params(data: bytes) -> None:
    """``kv_transfer_params`` of a request."""
    options = RequestOptions.parse({"prefixstore": _object(data)})
    assert options.ttl_s is None or 0 < options.ttl_s < math.inf
    assert len(full_salt("a", options.salt)) == 32


def params_seeds() -> list[bytes]:
    """A good one."""
    full = {
        "read": True, "write": False, "salt": "s", "pin": True, "alone": True, "ttl_s": 5,
        "tag": "t", "max_load_tokens": 9, "blend": {"budget": 0.1}, "wait_ms": 10,
    }  # fmt: skip
    return [json.dumps(full).encode(), b"{}"]


def _object(data: bytes) -> dict[str, object]:
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no JSON: {error}") from error  # by whoever reads it for us
    if not isinstance(given, dict):
        raise ConfigError("no object")
    return given


# ---------------------------------------------------------------------- of warming, of models
def parse_manifest(data: bytes) -> None:
    """A manifest of a warmed store: what is not an entry is passed over."""
    for entry in Manifest(_file("warm.jsonl", data)).read():
        assert all(isinstance(key, str) for key in entry.keys)
        assert entry.key


def manifest_seeds() -> list[bytes]:
    """A good one."""
    entry = {
        "name": "n", "tag": "t", "digest": "d", "start": 0, "tokens": 4, "preamble": "p",
        "preamble_tokens": 1, "keys": ["00ff", "11"], "time_s": 5,
    }  # fmt: skip
    line = json.dumps(entry).encode()
    return [line, line + b"\n" + line[:-9] + b"\n{}"]


def parse_documents(data: bytes) -> None:
    """Texts to be warmed, an object a line."""
    for document in read_documents([str(_file("texts.jsonl", data))]):
        assert document.name
        document.text.encode()


def parse_identity(data: bytes) -> None:
    """An identity, as a client or a record gives it."""
    identity = ModelIdentity.from_json(data)
    assert ModelIdentity.from_json(identity.to_json()) == identity
    assert len(identity.namespace) == 16
    assert not identity.explain_mismatch(identity)
    identity.explain_mismatch(IDENTITY)


def parse_model(data: bytes) -> None:
    """The ``config.json`` of a model."""
    folder = scratch() / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.write_bytes(weights_seeds()[0])
    identity = ModelIdentity.from_folder(folder, kv_dtype="bfloat16")
    assert ModelIdentity.from_json(identity.to_json()) == identity


def model_seeds() -> list[bytes]:
    """Good ones."""
    plain = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "torch_dtype": "f",
        "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}, "vocab_size": 9,
        "max_position_embeddings": 99, "quantization_config": {"bits": 4}, "sliding_window": 4,
    }  # fmt: skip
    nested = {"model_type": "x", "text_config": {**plain, "kv_lora_rank": 8, "qk_rope_head_dim": 4}}
    return [json.dumps(plain).encode(), json.dumps(nested).encode()]


def parse_weights(data: bytes) -> None:
    """The header of a file of weights, which is sampled by it."""
    folder = scratch() / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    assert weights_fingerprint(folder)


def weights_seeds() -> list[bytes]:
    """A good one."""
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor}).encode()
    return [len(header).to_bytes(8, "little") + header + bytes(range(16))]


TARGETS = [
    Target("settings", parse_settings, (StoreError,), settings_seeds, "json"),
    Target("size", parse_size, (ConfigError,), lambda: [b"8GiB", b"500M", b"1.5 k", b"7"]),
    Target(
        "tokens_file", parse_tokens, (ConfigError,),
        lambda: [b"a:" + b"x" * 16 + b"\nb:" + b"y" * 32 + b":1GiB\n# c\nlocal:" + b"z" * 20],
    ),
    Target("token", parse_token, (ConfigError,), lambda: [b"x" * 20 + b"\n"]),
    Target("verdict", parse_verdict, (ValueError, RecursionError), verdict_seeds, "json"),
    Target("speeds", parse_speeds, (ValueError, RecursionError), speeds_seeds, "json"),
    Target("engine_options", parse_engine, (ConfigError,), engine_seeds, "json"),
    Target("request_options", parse_params, (ConfigError,), params_seeds, "json"),
    Target("manifest", parse_manifest, (ConfigError,), manifest_seeds, "json"),
    Target("documents", parse_documents, (ConfigError,), lambda: [b'{"text": "a", "id": 1}\n']),
    Target(
        "identity", parse_identity, (IdentityError,), lambda: [IDENTITY.to_json().encode()], "json"
    ),
    Target("model_config", parse_model, (IdentityError,), model_seeds, "json"),
    Target("weights_header", parse_weights, (IdentityError,), weights_seeds),
]  # fmt: skip
