"""The identity of a model: everything that makes its KV different from another model's.

Owns: which facts count (`ModelIdentity`), how they are read from a model folder, and their digest,
the namespace. Must hold: two models whose KV may differ have different namespaces. The reverse is
not promised: every setting not known to be harmless counts, for a needless difference costs a
cache miss and a missed one gives one model's KV to another. Needs no torch, vLLM or transformers.
Pure but for reading the folder, so a crash leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefixstore.codec import LOSSY_NAMES
from prefixstore.errors import ConfigError
from prefixstore.fingerprint import (
    IdentityError,
    WeightsCheck,
    lora_fingerprint,
    read_json_object,
    require_folder,
    weights_fingerprint,
)
from prefixstore.model_config import ConfigFacts, canonical_json, normal_dtype, override_config

__all__ = [
    "FieldDifference",
    "IdentityError",
    "ModelIdentity",
    "canonical_json",
    "lora_fingerprint",
    "model_folder",
]

NAMESPACE_BYTES = 16
FORMAT_VERSION = 1
_PREFIX = b"prefixstore-identity\0"
_NAMESPACES_KNOWN = 1024
_SHOWN_CHARS = 60
_SHOWN_DIFFERENCES = 12
_JSON_FIELDS = ("rope", "attention", "forward")
_CODEC = "prefixstore_rounded"  # in ``attention``: what is kept of its KV, and in what form
_NAME = re.compile(r"[a-z0-9][a-z0-9_.\-]*")


@lru_cache(maxsize=_NAMESPACES_KNOWN)
def _rounded(identity: ModelIdentity, codec: str) -> ModelIdentity:
    """Kept, since each request asks for it."""
    attention = {**json.loads(identity.attention), _CODEC: codec}
    return replace(identity, attention=canonical_json(attention))


@lru_cache(maxsize=_NAMESPACES_KNOWN)
def _namespace_of(identity: ModelIdentity) -> bytes:
    """Kept, since each request and each save asks for it and making it takes 50 us."""
    data = _PREFIX + identity.to_json().encode()
    return hashlib.blake2b(data, digest_size=NAMESPACE_BYTES).digest()


def model_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, given as one or by its hub name. Raises ConfigError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download  # comes with vLLM and with transformers

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"cannot find the files of model {model!r}: {error}", "give its local folder"
        ) from error


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """One field in which two identities differ."""

    name: str
    ours: str | int
    theirs: str | int


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What two engines must have in common to read each other's KV.

    ``rope``, ``attention`` and ``forward`` are canonical JSON objects (see `canonical_json`):
    RoPE settings; what else decides which KV there is and of what form; all other settings that
    may change hidden states, such as ``rms_norm_eps`` or the number of experts per token.
    ``kv_scales`` says where KV quantisation scales come from ("" for none, or those of the
    checkpoint, which ``weights`` covers). ``lora`` is a fingerprint, "" for none. For MLA,
    ``num_kv_heads`` is 1 and ``head_size`` the latent's: kv_lora_rank + qk_rope_head_dim.

    Raises IdentityError for values of the wrong type or form.
    """

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    rope: str
    attention: str
    weights: str
    model_dtype: str
    kv_dtype: str
    chunk_tokens: int
    kv_scales: str = ""
    quantization: str = ""
    lora: str = ""
    forward: str = "{}"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check types and forms, so that equal identities always have equal namespaces."""
        for field in fields(self):
            value, expected = getattr(self, field.name), int if field.type == "int" else str
            if type(value) is not expected:
                raise IdentityError(
                    f"identity field {field.name} is {value!r}; expected {expected.__name__}"
                )
            if isinstance(value, int) and not 1 <= value < 1 << 31:
                raise IdentityError(
                    f"identity field {field.name} is {value}; expected 1 to 2**31-1"
                )
        for name in ("architecture", "weights"):
            if not getattr(self, name):
                raise IdentityError(f"identity field {name} is empty; it must name the model's own")
        for name in ("model_dtype", "kv_dtype"):
            value = getattr(self, name)
            if value == "auto" or not _NAME.fullmatch(value):
                raise IdentityError(
                    f"identity field {name} is {value!r}; expected a resolved dtype like 'bfloat16'"
                )
        for name in _JSON_FIELDS:
            _check_canonical_object(name, getattr(self, name))

    @property
    def namespace(self) -> bytes:
        """16 bytes: BLAKE2b of all fields as canonical JSON. Scopes every key and row."""
        return _namespace_of(self)

    @property
    def namespace_hex(self) -> str:
        """`namespace` as 32 hex digits."""
        return self.namespace.hex()

    @property
    def codec(self) -> str:
        """The codec that its KV was rounded by; "" for exact KV, and for states beside KV."""
        attention = json.loads(self.attention)
        return "" if "states" in attention else str(attention.get(_CODEC, ""))

    @property
    def stored_as(self) -> str:
        """The dtype of its KV, and the codec that it was rounded by, for people."""
        return ", ".join(filter(None, (self.kv_dtype, self.codec)))

    def with_codec(self, codec: str) -> ModelIdentity:
        """The same model with KV that an engine has rounded (`codec.rounded`): another namespace,
        so that exact KV is never mixed with it. Any other choice (`codec.CHOICES`) changes
        nothing."""
        return _rounded(self, codec) if codec in LOSSY_NAMES else self

    def to_json(self) -> str:
        """All fields as canonical JSON; `from_json` gives an equal identity."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelIdentity:
        """Read what `to_json` wrote. Raises IdentityError when it is anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise IdentityError(f"identity is not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise IdentityError(f"identity is a JSON {type(values).__name__}; expected an object")
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise IdentityError(
                f"identity of version {values.get('format_version')!r} (this prefixstore writes "
                f"{FORMAT_VERSION}) lacks fields {sorted(names - values.keys())} and has unknown "
                f"fields {sorted(values.keys() - names)}"
            )
        return cls(**values)

    def difference(self, other: ModelIdentity) -> list[FieldDifference]:
        """The fields in which ``other`` differs, in the order of the fields; empty when equal."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [FieldDifference(*pair) for pair in pairs if pair[1] != pair[2]]

    def explain_mismatch(self, other: ModelIdentity) -> str:
        """One line naming the fields that differ and both sides' values, shortened; "" if equal."""
        found = [text for d in self.difference(other) for text in _leaf_differences(d)]
        if len(found) > _SHOWN_DIFFERENCES:
            found[_SHOWN_DIFFERENCES:] = [f"and {len(found) - _SHOWN_DIFFERENCES} more"]
        return "; ".join(found)

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        *,
        kv_dtype: str = "auto",
        model_dtype: str = "auto",
        chunk_tokens: int = 64,
        quantization: str | None = None,
        kv_scales: str = "",
        lora: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
        weights_check: WeightsCheck = "sampled",
    ) -> ModelIdentity:
        """Identity of the model in a local folder with ``config.json`` and weight files.

        ``model_dtype="auto"`` is what the config says and ``kv_dtype="auto"`` the model's dtype;
        an engine that runs in another dtype must say so. ``quantization`` is the engine's own name
        for its method, if it was given one; the config's entry counts in any case. ``lora`` is a
        `lora_fingerprint`. ``config_overrides`` replace entries of the config, as the engine's
        own overrides do; a nested config is merged, not replaced.
        ``revision`` and ``weights_check``: see `prefixstore.fingerprint.weights_fingerprint`,
        also for what sampling does not see.

        Raises IdentityError: folder, config or weights missing or malformed.
        """
        root = require_folder(path)
        config = read_json_object(root / "config.json", what="model folder")
        facts = ConfigFacts.read(override_config(config, config_overrides or {}))
        dtype = normal_dtype(model_dtype, when_auto=facts.dtype)
        return cls(
            architecture=facts.architecture,
            num_layers=facts.num_layers,
            num_kv_heads=facts.num_kv_heads,
            head_size=facts.head_size,
            rope=canonical_json(facts.rope),
            attention=canonical_json(facts.attention),
            weights=weights_fingerprint(root, revision=revision, check=weights_check),
            model_dtype=dtype,
            kv_dtype=normal_dtype(kv_dtype, when_auto=dtype),
            chunk_tokens=chunk_tokens,
            kv_scales=kv_scales,
            quantization=" ".join(part for part in (quantization, facts.quantization) if part),
            lora=lora or "",
            forward=canonical_json(facts.forward),
        )


def _check_canonical_object(name: str, text: str) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"identity field {name} is not JSON: {error}") from error
    if not isinstance(value, dict) or canonical_json(value) != text:
        raise IdentityError(
            f"identity field {name} is not a canonical JSON object; make it with canonical_json()"
        )


def _leaves(name: str, value: object) -> dict[str, object]:
    """Entries of a nested JSON object by dotted name."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {n: leaf for k, v in value.items() for n, leaf in _leaves(f"{name}.{k}", v).items()}


def _leaf_differences(d: FieldDifference) -> Iterator[str]:
    """Describe a difference; that of a JSON field by entry, for a long object tells little."""
    if d.name not in _JSON_FIELDS:
        yield f"{d.name}: ours {_shorten(d.ours)}, theirs {_shorten(d.theirs)}"
        return
    ours, theirs = (
        {
            n: canonical_json(v)
            for k, top in json.loads(str(text)).items()
            for n, v in _leaves(f"{d.name}.{k}", top).items()
        }
        for text in (d.ours, d.theirs)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, "(absent)"), theirs.get(name, "(absent)")
        if mine != other:
            yield f"{name}: ours {_shorten(mine)}, theirs {_shorten(other)}"


def _shorten(value: str | int) -> str:
    text = " ".join(str(value).split()) or "(none)"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
