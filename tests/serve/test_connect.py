"""`prefixstore connect` against real servers: what it finds, what it prints, what it says when
something is wrong. Nothing may stay behind but the namespace."""

from __future__ import annotations

import json
import shlex
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connector.options import EngineOptions
from prefixstore import Layout, ModelIdentity, Store, admin, connect, connect_probe
from prefixstore.cli import OK, REFUSED, main
from prefixstore.client.connection import Address
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.client.token import TOKEN_VARIABLE
from prefixstore.errors import ConfigError
from prefixstore.serve import limits
from tests.engine.support import tiny_model
from tests.serve.support import ALICE, BOB, Running, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("64MiB", "64MiB") as opened:
        yield opened


class Connect:
    """Runs the command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], model: Path) -> None:
        self._capsys, self.model = capsys, model

    def __call__(self, url: str, *words: object, code: int = OK) -> tuple[str, str]:
        self._capsys.readouterr()
        given = ["connect", url, "--model", self.model, "--without-vllm", *words]
        assert main([str(word) for word in given]) == code
        out, err = self._capsys.readouterr()
        return out, err

    def found(self, url: str, *words: object) -> dict[str, Any]:
        out, err = self(url, "--json", *words)
        assert err == ""
        value: dict[str, Any] = json.loads(out)
        return value

    def refusal(self, url: str, *words: object) -> str:
        out, err = self(url, *words, code=REFUSED)
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("prefixstore: error: ")
        return err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: Path) -> Connect:
    return Connect(capsys, model)


def options_of(printed: str) -> dict[str, Any]:
    """What the printed option gives the engine, taken apart as a shell would."""
    flag, text = shlex.split(printed.splitlines()[-1])
    assert flag == "--kv-transfer-config"
    value = json.loads(text)
    extra: dict[str, Any] = value.pop("kv_connector_extra_config")
    assert value == {
        "kv_connector": "PrefixStoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    EngineOptions.parse(extra)
    return extra


def test_a_good_server(run: Connect, server: Running, store: Store, model: Path) -> None:
    out, err = run(server.address, "--engine", '{"dtype": "float32"}')
    assert options_of(out) == {"url": server.address}
    for word in ("ready", "token       none", "entered now", "KV float32", "GB/s", "round trip"):
        assert word in out
    assert (
        err == "prefixstore: note: without vLLM the identity is that of the folder and --engine\n"
    )
    identity = ModelIdentity.from_folder(model, model_dtype="float32")
    [record] = store.namespaces()
    assert record.identity == identity
    assert record.layout == Layout(2, 2, 2, 64, 256)
    assert not list(admin.list_chunks(store))  # what was sent is gone again
    found = run.found(server.address)
    assert found["was_known"]
    assert found["namespace"] == identity.namespace_hex
    assert found["sent_bytes"] == 8 * record.layout.payload_bytes
    assert min(found["round_trip_ms"], found["put_gb_s"], found["get_gb_s"]) > 0
    assert not list(admin.list_chunks(store))


def test_a_known_namespace_keeps_what_it_has(run: Connect, server: Running, store: Store) -> None:
    run(server.address)
    [record] = store.namespaces()
    namespace = store.namespace(record.identity, record.layout)
    refs = namespace.chain(range(64 * 8)).refs()  # the tokens that are sent, without their salt
    payload = b"k" * record.layout.payload_bytes
    namespace.put(refs, [payload] * 8)
    assert run.found(server.address)["was_known"]
    out = memoryview(bytearray(len(payload)))
    assert namespace.get(refs[3:4], [out]) == [1]
    assert out == payload
    assert len(list(admin.list_chunks(store))) == 8


def test_tokens(run: Connect, store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "token"
    file.write_text(f"{ALICE}\n")
    with running(store, tokens=tokens_file(tmp_path)) as server:
        url = server.address
        assert "wants a token (give --token-file, or set PREFIXSTORE_TOKEN)" in run.refusal(url)
        assert "does not take this token" in run.refusal(url, "--token", "x" * 20)
        out, err = run(url, "--token-file", file)
        assert "token       taken" in out
        assert options_of(out) == {"url": url, "token_file": str(file)}
        assert "TOKEN_FILE" not in err
        monkeypatch.setenv(TOKEN_VARIABLE, BOB)
        out, err = run(url)
        assert options_of(out) == {"url": url, "token_file": "TOKEN_FILE"}
        assert "write the token to a file" in err
        for printed in (out, err):
            assert BOB not in printed
        assert "give one" in run.refusal(url, "--token", BOB, "--token-file", file)
        for text in (f"alice:{ALICE}", "", "a\nb"):
            file.write_text(text)
            assert "does not hold one token" in run.refusal(url, "--token-file", file)
        assert "cannot read the token file" in run.refusal(url, "--token-file", tmp_path / "no")
    with running(store) as server:
        found = run.found(server.address)
        assert found["token"] == "not asked for"
        assert options_of(run(server.address)[0]) == {"url": server.address}


def test_what_the_engine_is_told(run: Connect, server: Running, tmp_path: Path) -> None:
    out, _ = run(server.address, "--dir", tmp_path / "kv", "--chunk-tokens", "128")
    assert options_of(out) == {
        "url": server.address, "dir": str(tmp_path / "kv"), "chunk_tokens": 128
    }  # fmt: skip
    assert "chunks of 128 tokens" in out
    odd = {"block_size": 48, "dtype": "bfloat16", "enforce_eager": True, "enable_lora": True}
    found = run.found(server.address, "--engine", json.dumps(odd))
    assert found["model"]["chunk_tokens"] == 96
    assert found["model"]["kv_dtype"] == "bfloat16"
    assert any("not looked at: enable_lora;" in note for note in found["notes"])
    assert any("the nearest differs in" in note and "dtype" in note for note in found["notes"])


def test_a_unix_socket(run: Connect, store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    with running(store, uds=str(tmp_path / "socket")):
        monkeypatch.chdir(tmp_path)
        out, _ = run("unix:socket")
        assert options_of(out) == {"url": f"unix:{tmp_path}/socket"}
    assert "check the path of the socket" in run.refusal("unix:socket")


def test_read_only(run: Connect, store: Store) -> None:
    """Neither flag changes anything, not even the list of namespaces."""
    with running(store) as server:
        found = run.found(server.address, "--read-only")
        assert (found["namespace"], found["was_known"], found["sent_bytes"]) == ("", False, 0)
        assert found["round_trip_ms"] > 0
        assert not store.namespaces()
        run(server.address)
        assert run.found(server.address, "--read-only")["was_known"]
    with running(store, read_only=True) as server:
        out, err = run(server.address)
        assert options_of(out) == {"url": server.address, "save": False}
        assert "takes nothing new" in out
        assert "engines only load" in err


def test_servers_that_are_none(run: Connect, server: Running, tmp_path: Path) -> None:
    for url in ("dir:/x", "host:7575", "memcached://h"):
        assert "`prefixstore config`" in run.refusal(url)
    for url in ("http://h/path", "http://h:0"):
        assert "no address of a server" in run.refusal(url)
    for url in (
        "HTTPS://h",
        "Https://h",
        " https://h",
        "https\t://h",
    ):  # not in the open
        with pytest.raises(ConfigError, match="no address of a server"):
            Address.parse(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    assert "start it: prefixstore serve DIR" in run.refusal(f"http://127.0.0.1:{closed}")
    assert "check the host's name" in run.refusal("http://no-such-host.invalid")
    with _answering(b"SSH-2.0-OpenSSH_9.2\r\n\r\n") as url:
        assert "something else listens there" in run.refusal(url)
    for status, body in (("200 OK", b"{}"), ("404 Not Found", b"<html>")):
        answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        with _answering(answer) as url:
            assert "not like a prefixstore server" in run.refusal(url)
    assert "try http://" in run.refusal(server.address.replace("http:", "https:"))
    server.server.state.draining = True
    assert "is not ready: this server is being stopped" in run.refusal(server.address)


@contextmanager
def _answering(answer: bytes) -> Iterator[str]:
    """Something that gives every connection the same answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_tls(run: Connect, store: Store, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    assert ssl.HAS_TLSv1_2
    with running(store, tls_cert=str(cert), tls_key=str(key)) as server:
        assert "--ca-file" in run.refusal(server.address)
        assert "https://" in run.refusal(server.address.replace("https:", "http:"))
        assert "cannot use" in run.refusal(server.address, "--ca-file", tmp_path / "no.pem")
        assert "cannot use" in run.refusal(server.address, "--ca-file", key)
        out, _ = run(server.address, "--ca-file", cert, "--token", ALICE)
        assert options_of(out) == {"url": server.address, "ca_file": str(cert)}


def test_models_that_do_not_fit(
    run: Connect, server: Running, store: Store, model: Path, tmp_path: Path
) -> None:
    identity = ModelIdentity.from_folder(model)
    store.namespace(identity, Layout(2, 2, 2, 64, 128))
    assert "keeps this model's KV as" in run.refusal(server.address)
    assert "--engine is no JSON" in run.refusal(server.address, "--engine", "{")
    assert "whole number" in run.refusal(server.address, "--chunk-tokens", "0")
    run.model = tmp_path
    assert "config.json" in run.refusal(server.address)


def test_layouts_only_the_engine_knows(model: Path) -> None:
    identity = ModelIdentity.from_folder(model)
    assert connect.layout_of(identity) == Layout(2, 2, 2, 64, 256)

    def changed(**config: Any) -> Layout | None:
        return connect.layout_of(ModelIdentity.from_folder(model, config_overrides=config))

    assert changed(layer_types=["full_attention", "linear_attention"]) is None
    assert changed(layer_types=["full_attention", "full_attention"]) is not None
    latent = changed(kv_lora_rank=32, qk_rope_head_dim=16)
    assert latent == Layout(2, 1, 1, 64, 48 * 4)
    packed = ModelIdentity.from_folder(model, kv_dtype="fp8_ds_mla")
    assert connect.layout_of(packed) is None


def test_no_room(run: Connect, store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    tokens = tokens_file(tmp_path, f"alice:{ALICE}:256KiB\n")
    with running(store, tokens=tokens) as server:
        assert "the tenant's, in its --tokens file" in run.refusal(
            server.address, "--token", ALICE, "--chunk-tokens", "4096"
        )
        assert not list(admin.list_chunks(store))
        monkeypatch.setattr(limits, "NAMESPACES_PER_TENANT_MAX", 1)
        assert "namespaces" in run.refusal(server.address, "--token", ALICE)


def test_bytes_that_come_back_wrong(
    run: Connect, server: Running, store: Store, monkeypatch: Any
) -> None:
    """Also what fails in the middle leaves nothing behind."""
    real = RemoteNamespace.get

    def broken(self: RemoteNamespace, refs: Any, outs: Any, *rest: Any) -> list[int]:
        tiers = real(self, refs, outs, *rest)
        outs[0][7] ^= 1
        return tiers

    monkeypatch.setattr(RemoteNamespace, "get", broken)
    assert "changes bytes" in run.refusal(server.address)
    monkeypatch.setattr(RemoteNamespace, "get", lambda self, refs, outs: [0] * len(refs))
    assert "0 came back" in run.refusal(server.address)
    assert not list(admin.list_chunks(store))
    assert connect_probe.DEADLINE_S < 10


@pytest.mark.engine
def test_with_vllm_it_is_the_engines_own_identity(
    run: Connect, server: Running, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    engine = {"dtype": "float32", "block_size": 32, "max_model_len": 512}
    words = ["connect", server.address, "--model", str(model), "--engine", json.dumps(engine)]
    assert main([*words, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == []
    assert found["model"]["chunk_tokens"] == 64
    assert found["namespace"] == ModelIdentity.from_folder(model).namespace_hex
    assert main([*words[:-1], '{"no_such_argument": 1}']) == REFUSED
    assert "vLLM refuses" in capsys.readouterr().err
