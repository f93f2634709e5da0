"""The files of deploy/: they parse, what they start is what the command line takes, their probes
and hooks work against a real server, and what must agree between two places does.

Not run here: the images are not built, nothing is applied to a cluster. The manifests were checked
by hand against the schemas of Kubernetes 1.37 and of the Compose Specification.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from connector.options import EngineOptions
from prefixstore import cli
from prefixstore.config import parse_bytes
from prefixstore.serve import limits
from prefixstore.serve.run import ServeOptions
from tests.serve.support import ADMIN, ALICE, Running, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "prefixstore.service"
UID = 10001


def served(words: Sequence[str]) -> Namespace:
    """The options of `prefixstore serve ...`, as the server would take them."""
    args = cli._parser().parse_args(list(words))
    assert args.verb == "serve"
    ServeOptions(
        host=args.host, port=args.port, uds=args.uds, tls_cert=args.tls_cert, tls_key=args.tls_key,
        tokens=args.tokens, read_only=args.read_only, insecure=args.insecure,
    ).check()  # fmt: skip
    for size in (args.memory, args.disk):
        assert size is None or parse_bytes(size) > 0
    return args


# ---------------------------------------------------------------------- the container
def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Containerfile, continued lines joined."""
    text = (DEPLOY / "Containerfile").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    pairs = (line.split(None, 1) for line in lines if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions():
        if instruction == "FROM":
            name = rest.rsplit(" AS ", 1)[1]
        found.setdefault(name, []).append((instruction, rest))
    return found


def test_the_image_of_the_server() -> None:
    last = dict(stages()["server"])
    assert instructions()[-1][0] == "CMD"
    entry, words = json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])
    args = served([*entry, *words][1:])
    assert entry == ["prefixstore"]
    assert (args.host, args.folder) == ("0.0.0.0", last["VOLUME"])
    assert last["USER"] == f"{UID}:{UID}"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert f"-o {UID} -g {UID} {last['VOLUME']}" in last["RUN"]
    assert last["EXPOSE"] == str(args.port)
    assert f"PREFIXSTORE_HEALTH=http://127.0.0.1:{args.port}/healthz" in last["ENV"]


def test_the_images_have_what_the_wheel_is_made_of() -> None:
    copied = " ".join(rest for name, rest in stages()["wheel"] if name == "COPY").split()
    packages = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert packages is not None
    for name in [*json.loads(packages[1]), "pyproject.toml", "LICENSE"]:
        assert name in copied
        assert (ROOT / name).exists()
    for stage in ("engine", "server"):
        assert ("COPY", "--from=wheel /wheels /wheels") in stages()[stage]


@pytest.fixture
def server(place: Place, tmp_path: Path) -> Iterator[Running]:
    with place.open("4MiB", "4MiB") as store, running(store, tokens=tokens_file(tmp_path)) as one:
        yield one


def run_python(code: str, environment: dict[str, str]) -> int:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, timeout=60,
        capture_output=True,
    ).returncode  # fmt: skip


def test_the_health_check(server: Running) -> None:
    rest = dict(stages()["server"])["HEALTHCHECK"]
    python, flag, code = json.loads(rest.partition(" CMD ")[2])
    assert (python, flag) == ("python", "-c")
    assert run_python(code, {"PREFIXSTORE_HEALTH": f"{server.address}/healthz"}) == 0
    server.server.state.draining = True
    assert run_python(code, {"PREFIXSTORE_HEALTH": f"{server.address}/healthz"}) == 0
    assert run_python(code, {"PREFIXSTORE_HEALTH": f"{server.address}/readyz"}) == 1


# ---------------------------------------------------------------------- compose
def compose() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return value


def test_compose_the_store() -> None:
    value = compose()
    store = value["services"]["store"]
    args = served(store["command"])
    assert args.folder == dict(stages()["server"])["VOLUME"]
    assert store["volumes"] == [f"kv:{args.folder}"]
    assert args.tokens == "/run/secrets/tokens"
    assert store["secrets"] == ["tokens"]
    assert parse_bytes(store["shm_size"]) > 1.1 * parse_bytes(args.memory)  # its index is there too
    assert int(store["stop_grace_period"].removesuffix("s")) > limits.DRAIN_S
    assert store["ports"] == [f"127.0.0.1:{args.port}:{args.port}"]


def test_compose_the_engines() -> None:
    value = compose()
    engines = {k: v for k, v in value["services"].items() if k != "store"}
    assert len(engines) == 2
    devices, ports = set(), set()
    for engine in engines.values():
        model, flag, text = engine["command"]
        assert flag == "--kv-transfer-config"
        assert model.startswith("${MODEL:?")
        assert "$" not in text
        transfer = json.loads(text)
        assert set(transfer) == {
            "kv_connector", "kv_role", "kv_load_failure_policy", "kv_connector_extra_config"
        }  # fmt: skip
        options = EngineOptions.parse(transfer["kv_connector_extra_config"])
        port = served(value["services"]["store"]["command"]).port
        assert options.url == f"http://store:{port}"
        assert options.token_file == "/run/secrets/token"
        assert engine["secrets"] == ["token"]
        assert engine["build"]["target"] in stages()
        assert (DEPLOY / engine["build"]["context"] / engine["build"]["dockerfile"]).exists()
        ports.add(engine["ports"][0])
        [device] = engine["deploy"]["resources"]["reservations"]["devices"]
        devices.add(device["device_ids"][0])
    assert len(devices) == len(ports) == 2


def test_compose_declares_what_it_uses() -> None:
    value = compose()
    for kind in ("secrets", "volumes"):
        used = {
            entry.partition(":")[0]
            for service in value["services"].values()
            for entry in service.get(kind, [])
        }
        assert used == set(value[kind])


# ---------------------------------------------------------------------- Kubernetes
def manifests() -> list[dict[str, Any]]:
    folder = DEPLOY / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in folder.iterdir()}
    return [
        one for name in listed for one in yaml.safe_load_all((folder / name).read_text()) if one
    ]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for one in manifests() if one["kind"] == kind]


def quantity(text: str) -> int:
    """Bytes of a size such as 9Gi."""
    assert text.endswith("i")
    return parse_bytes(f"{text}B")


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    [stateful] = of_kind("StatefulSet")
    spec: dict[str, Any] = stateful["spec"]["template"]["spec"]
    return spec


def test_kubernetes_the_command(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    args = served(container["args"])
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    [claim] = of_kind("StatefulSet")[0]["spec"]["volumeClaimTemplates"]
    # A volume has a lost+found, which makes it no folder for a store: one below it is.
    assert mounts[str(Path(args.folder).parent)] == claim["metadata"]["name"]
    assert volumes[mounts[args.memory_dir]]["emptyDir"]["medium"] == "Memory"
    room = quantity(volumes[mounts[args.memory_dir]]["emptyDir"]["sizeLimit"])
    assert room > parse_bytes(args.memory)
    limit = quantity(container["resources"]["limits"]["memory"])
    under_way = limits.PUT_BYTES_MAX + limits.CHECKED_BYTES_MAX + limits.BODY_BYTES_MAX
    assert limit >= room + under_way
    assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > parse_bytes(args.disk)
    [port] = container["ports"]
    assert port["containerPort"] == args.port
    for service in of_kind("Service"):
        assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for one in (container, *pod["initContainers"]):
        assert {mount["name"] for mount in one["volumeMounts"]} <= {*volumes, "kv"}


def test_kubernetes_who_it_is(pod: dict[str, Any]) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == UID
    for one in (*pod["containers"], *pod["initContainers"]):
        inner = one["securityContext"]
        assert inner["readOnlyRootFilesystem"]
        assert not inner["allowPrivilegeEscalation"]
        assert inner["capabilities"] == {"drop": ["ALL"]}
    [stateful] = of_kind("StatefulSet")
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert stateful["spec"]["selector"]["matchLabels"] == labels
    for service in of_kind("Service"):
        assert service["spec"]["selector"] == labels
    headless = {s["metadata"]["name"] for s in of_kind("Service") if s["spec"].get("clusterIP")}
    assert headless == {stateful["spec"]["serviceName"]}


def test_kubernetes_the_tokens_are_the_servers_own(pod: dict[str, Any], tmp_path: Path) -> None:
    """The init container's command makes of a group-readable file one that the server takes."""
    [init] = pod["initContainers"]
    source, target = init["command"][-2:]
    assert target == served(pod["containers"][0]["args"]).tokens
    (tmp_path / "secret").write_text(f"local:{ADMIN}\n")
    (tmp_path / "secret").chmod(0o440)
    command = [*init["command"][:-2], str(tmp_path / "secret"), str(tmp_path / "tokens")]
    for _ in range(2):  # a pod that is started again
        subprocess.run(command, check=True, timeout=30)
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o400
    secret = next(one for one in pod["volumes"] if "secret" in one)
    mount = next(one for one in init["volumeMounts"] if one["name"] == secret["name"])
    assert source == f"{mount['mountPath']}/tokens"


def test_kubernetes_probes(pod: dict[str, Any], server: Running) -> None:
    [container] = pod["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in
             ("startup", "liveness", "readiness")}  # fmt: skip
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    code = "import sys, urllib.request as u; u.urlopen(sys.argv[1])"
    for path, when_draining in (("/healthz", 0), ("/readyz", 1)):
        words = [sys.executable, "-c", code, f"{server.address}{path}"]
        assert subprocess.run(words, capture_output=True, timeout=60).returncode == 0
        server.server.state.draining = True
        assert subprocess.run(words, capture_output=True, timeout=60).returncode == when_draining
        server.server.state.draining = False


def test_kubernetes_pre_stop_drains(pod: dict[str, Any], server: Running, tmp_path: Path) -> None:
    python, flag, code = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, flag) == ("python", "-c")
    waits = [
        int(one) for one in re.findall(r"sleep\((\d+)\)|timeout=(\d+)", code) for one in one if one
    ]
    assert pod["terminationGracePeriodSeconds"] >= sum(waits) + limits.DRAIN_S + 10
    tokens = served(pod["containers"][0]["args"]).tokens
    assert tokens in code
    assert "http://127.0.0.1:7575/" in code
    code = code.replace(tokens, str(tmp_path / "tokens")).replace("sleep(10)", "sleep(0)")
    code = code.replace("http://127.0.0.1:7575", server.address)
    own = (tmp_path / "tokens").read_text()
    (tmp_path / "tokens").write_text(f"alice:{ALICE}\n")
    assert run_python(code, {}) == 0  # nobody who may drain
    assert not server.server.state.draining
    (tmp_path / "tokens").write_text(own)
    assert run_python(code, {}) == 0
    assert server.server.state.draining


# ---------------------------------------------------------------------- systemd
def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_systemd_the_command() -> None:
    unit = directives()
    environment = (DEPLOY / "systemd" / "serve.env").read_text()
    [default] = [shlex.split(one)[0] for one in unit["Environment"]]
    texts = [default, *(line for line in environment.splitlines() if not line.startswith("#"))]
    texts += [f"PREFIXSTORE_OPTIONS={' '.join(re.findall('--host.*', environment))}"]
    assert len(texts) == 3
    [command] = unit["ExecStart"]
    for text in texts:
        name, _, value = text.partition("=")
        assert f"${name}" in command
        args = served(shlex.split(command.replace(f"${name}", value))[1:])
        assert args.folder == f"/var/lib/{unit['StateDirectory'][0]}"
        assert args.uds in (None, f"/run/{unit['RuntimeDirectory'][0]}/socket")
    assert int(unit["TimeoutStopSec"][0]) > limits.DRAIN_S
    assert unit["RestartPreventExitStatus"] == [str(cli.UNSOUND)]
    assert unit["RemoveIPC"] == ["no"]
    assert "DynamicUser" not in unit
    assert f"u {unit['User'][0]} " in (DEPLOY / "systemd" / "prefixstore.sysusers").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = directives()["ExecStart"][0].split()[0]
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(program, "/bin/true"))
    for words in (["verify"], ["security", "--offline=yes", "--no-pager", "--threshold=20"]):
        done = subprocess.run(
            ["systemd-analyze", *words, str(unit)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert not done.stderr
    unit.write_text(unit.read_text().replace("ProtectSystem", "ProtectSystems"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert "ProtectSystems" in done.stderr  # it would have said so
