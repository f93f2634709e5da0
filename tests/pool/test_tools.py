"""The address of a pool wherever one of a server may be given: tools and engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from connector.options import EngineOptions
from prefixstore import warm_store
from prefixstore.codec import of_pool
from prefixstore.connect import layout_of
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.identity import ModelIdentity
from prefixstore.interface import open_store
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
from prefixstore.urls import shown
from prefixstore.warm_address import Address
from prefixstore.warm_pool import PoolTarget
from tests.pool.servers import Redis, redis
from tests.serve.test_connect import Connect, options_of
from tests.serve.test_connect import model as model
from tests.serve.test_connect import run as run


@pytest.fixture
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


def test_connect(run: Connect, server: Redis, model: Path) -> None:
    """Bytes there and back, and nothing is left of them; then the option for the engine."""
    out, _ = run(server.url, "--engine", '{"dtype": "float32"}')
    assert options_of(out) == {"url": server.url}
    for word in ("ready", "entered now", "KV float32", "GB/s", "round trip"):
        assert word in out
    identity = ModelIdentity.from_folder(model, model_dtype="float32")
    with open_store(server.url) as store:
        ns = store.namespace_of(identity.namespace)
        assert ns.identity == identity
    keys = server.ask("KEYS", f"prefixstore/1/{identity.namespace_hex}/*")
    assert keys == []
    found = run.found(server.url)
    assert found["was_known"]
    assert min(found["round_trip_ms"], found["put_gb_s"], found["get_gb_s"]) > 0


@pytest.mark.parametrize("codec", ["auto", "lossless", "fp8"])
def test_connect_with_a_codec(run: Connect, server: Redis, model: Path, codec: str) -> None:
    """It says whether the pool's pays, but for KV that is rounded, and enters the namespace that
    engines will have; nothing is left."""
    words = ("--engine", '{"dtype": "bfloat16"}', "--codec", codec)
    out, _ = run(server.url, *words)
    assert options_of(out) == {"url": server.url, "codec": codec}
    for line in (one for one in out.splitlines() if one.startswith("codec ")):
        assert line.split()[:2] == ["codec", "lossless"]
        for told in ("pay", "as it is", "of the bytes", "made-up"):
            assert told in line
    exact = ModelIdentity.from_folder(model, model_dtype="bfloat16")
    identity = exact.with_codec(codec)
    assert (identity != exact) == (codec == "fp8")
    with open_store(server.url, codec=of_pool(codec)) as store:
        ns = store.namespace_of(identity.namespace)
        assert ns.identity == identity
        assert ns.layout == layout_of(identity)
    found = run.found(server.url, *words)
    assert found["was_known"]
    assert isinstance(found["codec_pays"], bool) == (codec != "fp8")
    assert ("ms with lossless" in found["codec_why"]) == (codec != "fp8")
    assert ("\ncodec " in out) == (codec != "fp8")
    assert server.ask("KEYS", f"prefixstore/1/{identity.namespace_hex}/*") == []


def test_connect_says_what_is_wrong(run: Connect, server: Redis) -> None:
    server.ask("CONFIG", "SET", "requirepass", "sesame")
    assert "NOAUTH" in run.refusal(server.url)
    assert "WRONGPASS" in run.refusal(server.url, "--token", "hunter2")
    assert "hunter2" not in run.refusal(f"redis://:hunter2@{server.host}:{server.port}")
    out, _ = run(server.url, "--token", "sesame")
    assert options_of(out)["token_file"] == "TOKEN_FILE"
    server.kill()
    assert "refused" in run.refusal(server.url)


def test_what_warming_and_match_see(server: Redis) -> None:
    address = Address.parse(server.url)
    assert address.is_pool
    assert address.engine_options == {"url": server.url}
    with warm_store.open_target(address) as target:
        assert isinstance(target, PoolTarget)
        assert target.listed() == []
        assert warm_store.known(target, identity_for("a")) is None
        ns = target.store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(1, 5)).refs()
        ns.put(refs[:3], [content_of(r.key, CONTRACT_LAYOUT.payload_bytes) for r in refs[:3]])
        [one] = target.listed()
        assert (one.name, one.identity, one.layout) == (ns.name, ns.identity, CONTRACT_LAYOUT)
        found = warm_store.known(target, identity_for("a"))
        assert found is not None
        assert target.kept(found, refs) == (3, [True] * 3 + [False] * 2)
        assert target.weight(one, tokens_of(1, 5)) == 3 * CONTRACT_LAYOUT.chunk_tokens
        assert target.written(1.0)
        text = tokens_of(2, 40)
        refs = ns.chain(text).refs()
        ns.put(refs, [content_of(r.key, CONTRACT_LAYOUT.payload_bytes) for r in refs])
    with warm_store.open_target(address) as target:
        again = warm_store.known(target, identity_for("a"))
        assert again is not None
        [found_at] = again.find_segments(text[3:])
        assert (found_at.start, found_at.num_tokens, found_at.source_start) == (0, 157, 3)
    server.kill()
    with pytest.raises(RemoteError, match=f"{server.port}"):
        warm_store.open_target(address)


def test_codec_of_an_address(server: Redis) -> None:
    """What warming tells the engine; the namespace is that of all others."""
    address = Address.parse(server.url, codec="lossless")
    assert address.engine_options == {"url": server.url, "codec": "lossless"}
    assert EngineOptions.parse(address.engine_options).codec == "lossless"
    with warm_store.open_target(address) as target:
        ns = target.store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert ns.identity == identity_for("a")
    with warm_store.open_target(Address.parse(server.url)) as target:
        found = warm_store.known(target, identity_for("a"))
        assert found is not None
        assert found.name == ns.name
    for codec, store in (("zip", server.url), ("auto", "http://host:1"), ("lossless", "/kv")):
        with pytest.raises(ConfigError, match="codec"):
            Address.parse(store, codec=codec)
    for given in ({"url": "http://host:1"}, {"dir": "/var/cache/kv"}):
        with pytest.raises(ConfigError, match=r"without a pool.*int8"):
            EngineOptions.parse({**given, "codec": "lossless"})
    with pytest.raises(ConfigError, match="lossless"):
        EngineOptions.parse({"url": server.url, "codec": "zip"})


@pytest.mark.parametrize("store", ["http://host:1", "/var/cache/kv", "redis://host"])
def test_engines_round_with_any_store(store: str) -> None:
    address = Address.parse(store, codec="int8")
    assert EngineOptions.parse(address.engine_options).codec == "int8"


def test_options_of_an_engine() -> None:
    url = "redis://kv:hunter2@host:7000,other:7001/0"
    options = EngineOptions.parse({"url": url, "dir": "/var/cache/kv", "memory": "1GiB"})
    assert options.url == url
    assert options.where == "/var/cache/kv behind redis://host:7000,other:7001/0"
    assert str(Address.parse(url)) == shown(url) == "redis://host:7000,other:7001/0"
    with pytest.raises(ConfigError, match="redis://") as caught:
        EngineOptions.parse({"url": "reddis://kv:hunter2@host"})
    assert "hunter2" not in str(caught.value)
