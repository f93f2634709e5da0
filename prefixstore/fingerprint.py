"""Fingerprints of weight files: what tells one set of weights from another, and what it costs.

Owns: which files of a model folder count as weights, and how they are read. Must hold: the result
depends on file names inside the folder and on their bytes, never on the folder's own name, on
times or on the order of a directory listing; and two sets of weights that differ where they are
read never share a fingerprint. Reads only, so a crash leaves nothing behind.

Hashing all of a 16 GB model takes tens of seconds; a server starts more often than its weights
change. So ``sampled`` reads each safetensors header whole, one page of every tensor (up to
MAX_TENSOR_SAMPLES a file), evenly spread pages, and both ends. Evenly spread pages alone were
rejected: an edit of one 8 MiB tensor lies between pages that are 80 MB apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from prefixstore.errors import ConfigError

WeightsCheck = Literal["sampled", "full"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".tensors")
# Small files that decide which tensors are loaded, or what the model computes with them.
COMPANION_SUFFIXES = (".index.json", ".py")
MAX_FILES = 8192
MAX_SMALL_FILE_BYTES = 256 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
WHOLE_FILE_BYTES = 1 << 20  # files below this are hashed whole
EDGE_BYTES = 64 << 10
SAMPLE_BYTES = 4 << 10
SPREAD_SAMPLES = 64
MAX_TENSOR_SAMPLES = 512
_READ_BYTES = 4 << 20
_LFS_POINTER = b"version https://git-lfs"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class IdentityError(ConfigError, ValueError):
    """A model's identity cannot be established; says what was wrong and what to do about it."""


def weights_fingerprint(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    check: WeightsCheck = "sampled",
) -> str:
    """Fingerprint the weight files of ``folder``, subfolders included.

    Returns one of:

    * ``commit:<40 hex>``: ``revision`` is a full commit hash, or the folder is a snapshot in a
      Hugging Face hub cache (``models--*/snapshots/<commit>``). Nothing is read; the hash stands
      for the files the hub serves. Files edited by hand inside the cache are not noticed.
    * ``sampled:<64 hex>``: BLAKE2b over names, sizes and samples. A change that touches only
      bytes between the samples (a few values inside a tensor; a tensor beyond the first 512 that
      are sampled in its file; in files other than safetensors, any run shorter than the spacing
      of 64 pages) goes unseen. Training, merging, quantising or replacing tensors does not.
    * ``full:<64 hex>``: with ``check="full"``, BLAKE2b over every byte, 0.5 to 1 GB/s; sees
      everything and trusts no commit hash.

    The three never equal each other, so replicas that are to share KV must use the same way.

    Raises IdentityError when the folder or its weights are missing or broken.
    """
    if check not in get_args(WeightsCheck):
        raise IdentityError(f"weights check {check!r} is unknown; use 'sampled' or 'full'")
    root = require_folder(folder)
    commit = _commit_of(root, revision)
    if commit is not None and check == "sampled":
        return f"commit:{commit}"
    digest = hashlib.blake2b(b"prefixstore-weights\0", digest_size=32)
    _hash_files(digest, root, check)
    return f"{check}:{digest.hexdigest()}"


def lora_fingerprint(folder: str | os.PathLike[str], *, check: WeightsCheck = "sampled") -> str:
    """Fingerprint a LoRA adapter: ``adapter_config.json`` and the adapter's weight files.

    Same forms, costs and limits as `weights_fingerprint`. Where the adapter says its base model
    lies (``base_model_name_or_path``) does not count. Raises IdentityError.
    """
    root = require_folder(folder)
    config = read_json_object(root / "adapter_config.json", what="LoRA adapter folder")
    weights = weights_fingerprint(root, check=check)
    if weights.startswith("commit:"):
        return weights
    config.pop("base_model_name_or_path", None)
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(b"prefixstore-lora\0", digest_size=32)
    digest.update(f"{weights}\0{text}".encode())
    return f"{check}:{digest.hexdigest()}"


def require_folder(folder: str | os.PathLike[str]) -> Path:
    """Return ``folder`` resolved; raises IdentityError unless it is a folder that exists."""
    try:
        root = Path(folder).resolve(strict=True)
    except OSError as error:
        raise IdentityError(
            f"model folder {os.fspath(folder)!r} cannot be opened ({error.strerror}); "
            "give the path of a local folder that holds config.json and the weight files"
        ) from error
    if not root.is_dir():
        raise IdentityError(f"{os.fspath(folder)!r} is a file; give the folder that holds it")
    return root


def read_json_object(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON file whose top level is an object. Raises IdentityError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SMALL_FILE_BYTES + 1)
    except OSError as error:
        raise IdentityError(
            f"cannot read {path} ({error.strerror}); a {what} must hold {path.name}"
        ) from error
    if len(data) > MAX_SMALL_FILE_BYTES:
        raise IdentityError(f"{path} is larger than {MAX_SMALL_FILE_BYTES} bytes; is it JSON?")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise IdentityError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _commit_of(root: Path, revision: str | None) -> str | None:
    if revision is not None and _COMMIT.fullmatch(revision.lower()):
        return revision.lower()
    # Only the hub's own cache is trusted: elsewhere, "snapshots/<40 hex>" may name a commit of
    # somebody's training code, the same for many different weights.
    in_hub_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith(
        "models--"
    )
    return root.name if in_hub_cache and _COMMIT.fullmatch(root.name) else None


def _hash_files(digest: hashlib.blake2b, root: Path, check: WeightsCheck) -> None:
    files = list(_files(root))
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in files):
        raise IdentityError(
            f"no weight files ({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)}) in {root}; "
            "give the folder that holds them, or pass the model's full commit hash as revision"
        )
    for name in sorted(files):
        path = root / name
        try:
            with path.open("rb") as file:
                _hash_file(digest, name, file, check)
        except OSError as error:
            raise IdentityError(
                f"cannot read {path} ({error.strerror}); the file must be there, whole and readable"
            ) from error


def _files(root: Path) -> Iterator[str]:
    """Relative names of all files that count, following links to folders, each folder once."""
    seen: set[tuple[int, int]] = set()
    count = 0
    for here, folders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.endswith(WEIGHT_SUFFIXES + COMPANION_SUFFIXES):
                count += 1
                if count > MAX_FILES:
                    raise IdentityError(
                        f"{root} holds more than {MAX_FILES} weight files; give one model's folder"
                    )
                yield Path(here, name).relative_to(root).as_posix()


def _refuse_folder(error: OSError) -> None:
    # os.walk would pass over it in silence, and with it over the weights inside.
    raise IdentityError(
        f"cannot list {error.filename} ({error.strerror}); make the model folder readable"
    ) from error


def _hash_file(digest: hashlib.blake2b, name: str, file: BinaryIO, check: WeightsCheck) -> None:
    size = os.fstat(file.fileno()).st_size
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        raise IdentityError(f"{file.name} is a Git LFS pointer, not weights; run `git lfs pull`")
    digest.update(json.dumps([name, size]).encode() + b"\0")
    header: dict[str, Any] = {}
    data_start = 0
    if name.endswith(".safetensors"):
        header, data_start = _read_safetensors_header(file, size)
    if check == "full" or size < WHOLE_FILE_BYTES or name.endswith(COMPANION_SUFFIXES):
        ranges: Iterable[tuple[int, int]] = [(0, size)]
    else:
        ranges = _sample_ranges(size, data_start, _tensor_middles(header, data_start))
    for begin, end in ranges:
        _hash_range(digest, file, begin, end)


def _hash_range(digest: hashlib.blake2b, file: BinaryIO, begin: int, end: int) -> None:
    file.seek(begin)
    left = end - begin
    while left:
        data = file.read(min(left, _READ_BYTES))
        if not data:
            raise IdentityError(f"{file.name} became shorter while it was read; try again")
        digest.update(data)
        left -= len(data)


def _read_safetensors_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return the header's JSON object and the offset in bytes where tensor data starts."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    problem = f"{file.name} is not a whole safetensors file ({{}}); download it again"
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise IdentityError(problem.format(f"{size} bytes, its header claims {length}"))
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise IdentityError(problem.format(f"its header is not JSON: {error}")) from error
    if not isinstance(header, dict):
        raise IdentityError(problem.format("its header is not a JSON object"))
    return header, 8 + length


def _tensor_middles(header: dict[str, Any], data_start: int) -> list[int]:
    """File offset of the middle of each tensor, thinned evenly to MAX_TENSOR_SAMPLES."""
    middles = []
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int]:
            middles.append(data_start + sum(offsets) // 2)
    middles.sort()
    return _thin(middles, MAX_TENSOR_SAMPLES)


def _thin(values: Sequence[int], limit: int) -> list[int]:
    if len(values) <= limit:
        return list(values)
    return [values[i * (len(values) - 1) // (limit - 1)] for i in range(limit)]


def _sample_ranges(size: int, data_start: int, middles: Sequence[int]) -> list[tuple[int, int]]:
    """Byte ranges to hash of a file of at least WHOLE_FILE_BYTES: ascending, disjoint."""
    last = size - SAMPLE_BYTES
    spread = (i * last // (SPREAD_SAMPLES - 1) for i in range(SPREAD_SAMPLES))
    starts = sorted({*spread, *(min(max(0, m - SAMPLE_BYTES // 2), last) for m in middles)})
    wanted = [(0, max(EDGE_BYTES, data_start)), *((s, s + SAMPLE_BYTES) for s in starts)]
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted([*wanted, (size - EDGE_BYTES, size)]):
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges
