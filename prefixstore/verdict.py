"""What `prefixstore blend-check` found out about a model, kept in the store's folder.

One small JSON file a model, ``blend-verdict-<32 hex digits>.json``, named by what of the model's
identity decides how its KV depends on what stands before it (`digest_of`). The KV's dtype, the
size of chunks and LoRA adapters do not count, so one verdict serves all engines of a model. It is
written whole or not at all: a temporary file, fsync, rename. A file that cannot be read as a
verdict is one that is not there, and said in the log: it must never stop an engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from prefixstore.config import load_settings
from prefixstore.errors import ConfigError
from prefixstore.folders import write_whole
from prefixstore.identity import ModelIdentity
from prefixstore.model_config import canonical_json

logger = logging.getLogger("prefixstore")
FORMAT_VERSION = 1
MAX_FILE_BYTES = 1 << 20
_COUNTED = (
    "architecture", "num_layers", "num_kv_heads", "head_size", "rope", "attention", "weights",
    "forward",
)  # fmt: skip


def digest_of(identity: ModelIdentity) -> str:
    """32 hex digits: of all that decides how texts depend on each other in this model.

    The checkpoint's quantisation counts; the name of the engine's method for it does not, for only
    the engine knows that.
    """
    counted: dict[str, Any] = {name: getattr(identity, name) for name in _COUNTED}
    _, json_begins, rest = identity.quantization.partition("{")
    counted["quantization"] = json_begins + rest
    data = b"prefixstore-verdict\0" + canonical_json(counted).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """``selector`` and ``budget`` are recommended; "" and 0 when it failed.

    ``figures``: a row of numbers by name for each selector and budget. ``date`` is UTC, ISO 8601.
    """

    passed: bool
    selector: str
    budget: float
    reason: str
    model: str
    date: str
    texts: dict[str, Any]
    figures: list[dict[str, Any]]
    versions: dict[str, str]

    @classmethod
    def from_json(cls, text: str, digest: str) -> Verdict:
        """Read what `write` wrote for the model ``digest``. Raises ValueError."""
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        if (version := value.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(f"it has version {version!r}, this prefixstore reads {FORMAT_VERSION}")
        if value.pop("model_digest", None) != digest:
            raise ValueError("it is of another model")
        names = {field.name for field in fields(cls)}
        if value.keys() != names:
            raise ValueError(f"its entries are not {', '.join(sorted(names))}")
        kinds = {
            "passed": bool, "selector": str, "budget": (int, float), "reason": str, "model": str,
            "date": str, "texts": dict, "figures": list, "versions": dict,
        }  # fmt: skip
        for name, kind in kinds.items():
            is_flag = isinstance(value[name], bool)  # which Python takes for a number
            if not isinstance(value[name], kind) or is_flag != (kind is bool):  # type: ignore[arg-type]
                raise ValueError(f"{name} is {value[name]!r:.60}")
        if value["passed"] and not (value["selector"] and 0 <= value["budget"] <= 1):
            raise ValueError("it passed without a recommendation")
        return cls(**value)


def path_of(folder: str | os.PathLike[str], identity: ModelIdentity) -> Path:
    """Where the verdict of a model lies in a store's folder."""
    return Path(folder).expanduser() / f"blend-verdict-{digest_of(identity)}.json"


def require_store(folder: str | os.PathLike[str]) -> Path:
    """The folder, if it holds a store. Raises ConfigError, FormatError."""
    path = Path(folder).expanduser()
    if not path.is_dir() or load_settings(path) is None:
        raise ConfigError(
            f"{path} holds no store",
            "give the folder that an engine uses, or none to only see the verdict",
        )
    return path


def write(folder: str | os.PathLike[str], identity: ModelIdentity, verdict: Verdict) -> Path:
    """Keep it, in place of an earlier one. Raises ConfigError (no store there), OSError."""
    path = path_of(require_store(folder), identity)
    value: Mapping[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model_digest": digest_of(identity),
        **asdict(verdict),
    }
    write_whole(path, json.dumps(value, indent=1, allow_nan=False).encode())
    return path


def read(folder: str | os.PathLike[str], identity: ModelIdentity) -> Verdict | None:
    """The verdict of a model; None when there is none, or none that can be read (logged)."""
    path = path_of(folder, identity)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        return Verdict.from_json(data.decode(), digest_of(identity))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(
            "prefixstore: the blending verdict %s is ignored: %s (run prefixstore blend-check "
            "again, or delete the file)",
            path, error,
        )  # fmt: skip
        return None
