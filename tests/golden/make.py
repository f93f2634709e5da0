"""Makes a golden store: one of each thing that outlives a reboot, and what must be found in it.

``python -m tests.golden.make NAME`` writes ``tests/golden/NAME.tar.gz`` and ``NAME.json``. Run it
once for each format version, with the code that is released with it, and never again: the files are
what later versions must read. To make one with older code, run this file by its path with that
code's folder in ``PYTHONPATH``.

What is expected is written down, payload digests and keys included, so that a change of how keys or
contents are made shows as well.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefixstore import Layout, Namespace, Store
from prefixstore.identity import canonical_json
from prefixstore.keys import ChunkRef, MultimodalItem, salt_digest
from prefixstore.ledger import DISK
from prefixstore.staleness import note_staleness
from prefixstore.testing_data import content_of, identity_for, tokens_of

HERE = Path(__file__).resolve().parent
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=32, head_bytes=2)
STATES = Layout(num_layers=3, num_planes=1, num_heads=1, chunk_tokens=32, head_bytes=64)
FOREVER_S = 60.0 * 365 * 86400
SALT = b"tenant-a"
ITEM = MultimodalItem(3, 40, bytes(range(8)))
# name: (seed of the tokens, chunks, salt, items, options of put)
PROMPTS: dict[str, tuple[int, int, bytes, tuple[MultimodalItem, ...], dict[str, Any]]] = {
    "plain": (1, 3, b"", (), {}),
    "pinned": (2, 1, b"", (), {"pin": True}),
    "ttl": (3, 1, b"", (), {"ttl_s": FOREVER_S}),
    "tagged": (4, 2, b"", (), {"tag": "h\u00e9llo"}),
    "alone": (5, 4, b"", (), {"alone": True}),
    "salted": (6, 2, SALT, (), {}),
    "image": (7, 2, b"", (ITEM,), {}),
}
SIZES: dict[str, Any] = {"memory_bytes": "1MiB", "disk_bytes": "1MiB"}


def refs_of(ns: Namespace, name: str) -> list[ChunkRef]:
    """The chunks of a prompt."""
    seed, count, salt, items, _ = PROMPTS[name]
    return ns.chain(tokens_of(seed, count, LAYOUT), salt=salt, items=items).refs()


def states_of(store: Store, ns: Namespace) -> Namespace:
    """States beside the KV, in a namespace of their own, as the connector makes it."""
    beside = {
        "states": {
            "backend": "cpu 1",
            "ranks": 1,
            "tensors": {},
            "beside": ns.identity.namespace_hex,
        }
    }
    identity = replace(ns.identity, attention=canonical_json(beside))
    return store.namespace(identity, STATES)


def staleness() -> Any:
    """Of the chunks that were encoded alone."""
    values = np.arange(4 * 32, dtype=np.float32).reshape(4, 32) / 64
    values[1, 5] = np.nan
    return values


def fill(store: Store, *, named: bool = True) -> dict[str, Namespace]:
    """Everything a store can hold; ``named``: also what is named by a time or a random key."""
    ns = store.namespace(identity_for("golden", LAYOUT), LAYOUT)
    spaces = {"kv": ns, "states": states_of(store, ns)}
    for name, (*_, options) in PROMPTS.items():
        refs = refs_of(ns, name)
        ns.put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs], **options)
    states = refs_of(spaces["states"], "plain")
    spaces["states"].put(states, [content_of(ref.key, STATES.payload_bytes) for ref in states])
    assert store.flush()
    note_staleness(ns, refs_of(ns, "alone"), staleness())
    store.quotas.set(DISK, 900_000, namespace=ns.identity.namespace)
    store.quotas.set(DISK, 800_000, salt=salt_digest(SALT))
    if named and hasattr(ns, "bump"):  # since the server
        bumped = store.namespace(identity_for("bumped", LAYOUT), LAYOUT).bump()
        refs = refs_of(bumped, "plain")
        bumped.put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs])
        store.quotas.set_groups([(DISK, 700_000, bytes(range(16)), bumped.name)])
        spaces["bumped"] = bumped
        spaces["tenant"] = tenant_of(store)
        refs = refs_of(spaces["tenant"], "plain")
        spaces["tenant"].put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs])
        write_manifest(store, ns)
        assert store.flush()
    return spaces


def tenant_of(store: Store) -> Namespace:
    """A tenant's namespace, as the server makes it."""
    from prefixstore.serve.auth import read_tokens

    with tempfile.NamedTemporaryFile("w") as tokens:  # of mode 0600
        tokens.write("alice:0123456789abcdef\n")
        tokens.flush()
        tenant = read_tokens(Path(tokens.name), store).authenticate("Bearer 0123456789abcdef")
    assert tenant is not None
    return store.namespace(tenant.marked(identity_for("golden", LAYOUT)), LAYOUT)


def write_manifest(store: Store, ns: Namespace) -> None:
    """A name of a warmed document."""
    from prefixstore.warm_manifest import Entry, Manifest

    keys = [ref.key.hex() for ref in refs_of(ns, "alone")]
    entry = Entry("a.txt", "docs", "00" * 16, 0, 128, "", 0, keys, 1_790_000_000)
    Manifest.of(store.folder, ns.name).append([entry])


def expected(spaces: dict[str, Namespace]) -> list[dict[str, Any]]:
    """What must be found, chunk by chunk."""
    found = []
    for label, ns in spaces.items():
        for name in PROMPTS if label == "kv" else ("plain",):
            for depth, ref in enumerate(refs_of(ns, name)):
                payload = content_of(ref.key, ns.layout.payload_bytes)
                options = PROMPTS[name][-1] if label == "kv" else {}
                found.append(
                    {
                        "namespace": label,
                        "name": ns.identity.namespace_hex,
                        "prompt": name,
                        "depth": depth,
                        "key": ref.key.hex(),
                        "sha256": hashlib.sha256(payload).hexdigest(),
                        "tag": options.get("tag", ""),
                        "pinned": options.get("pin", False),
                        "expires": "ttl_s" in options,
                        "alone": options.get("alone", False),
                    }
                )
    return found


def main() -> None:
    """See the module docstring."""
    [name] = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        folder, memory = Path(scratch, "store"), Path(scratch, "memory")
        memory.mkdir()
        with Store.open(folder, memory_dir=str(memory), **SIZES) as store:
            chunks = expected(fill(store))
        settings = folder / "store.json"
        fields = json.loads(settings.read_text())
        settings.write_text(json.dumps({**fields, "memory_dir": "/dev/shm"}, indent=1))
        (folder / "index" / "lock.mdb").unlink()
        with tarfile.open(HERE / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder, "store", filter=_nobodys)
    (HERE / f"{name}.json").write_text(json.dumps(chunks, indent=1) + "\n")


def _nobodys(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main()
