"""The page, end to end, in a real Chromium: live, without data, without a server, with tokens."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore import Store
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.serve import follower
from prefixstore.serve.page import PAGE_PATHS
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.browser import CHROMIUM, Browser, browser
from tests.serve.raw import ask, connect
from tests.serve.support import ADMIN, ALICE, Running, running, tokens_file

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes
STATIC = Path(__file__).parents[2] / "prefixstore" / "serve" / "static"
LIVE = "document.body.dataset.state === 'live'"
# Contrast of every text with what is behind it, by WCAG 2: relative luminance, as painted.
_CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const color = rgb(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] > .99) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const one = node.parentElement;
    if (!node.data.trim() || !one.getClientRects().length || one.closest("noscript")) continue;
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`${node.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return bad;
})()
"""
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture(autouse=True)
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SAMPLE_S", 0.3)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def page(chromium: Browser) -> Browser:
    chromium.show("about:blank")
    chromium.look(1440, 900)
    chromium.complaints.clear()
    return chromium


def text(page: Browser, name: str) -> str:
    return str(page.value(f"document.getElementById('{name}').innerText"))


def use(server: Running, token: str = "") -> RemoteNamespace:
    """Put, find, miss; a tag that must never be taken for markup."""
    with server.open(token) as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(1, 4)).refs()
        ns.put(refs, [content_of(ref.key, SIZE) for ref in refs], tag="<b>handbook</b>")
        ns.match(refs)
        ns.get(refs, outputs(CONTRACT_LAYOUT, 4))
        ns.match(ns.chain([*tokens_of(1, 3), *tokens_of(5, 1)]))
    return ns


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_shows_what_happens(store: Store, page: Browser, width: int, dark: bool) -> None:
    page.look(width, 900 if width > 500 else 844, dark)
    with running(store) as server:
        page.show(server.address)
        page.until(LIVE)
        assert page.value("!document.getElementById('found-hint').hidden")
        assert "prefixstore connect http://127.0.0.1" in text(page, "found-command")
        use(server)
        page.until("document.getElementById('found-rate').innerText.includes('88')")
        page.until("document.getElementById('texts').innerText.includes('<b>handbook</b>')")
        page.until("document.getElementById('misses').innerText.includes('3 of 4')")
        assert "not stored" in text(page, "misses")
        assert "match" in text(page, "latency")
        assert re.search(r"local\s+loopback", text(page, "clients"))
        assert "ContractModel a" in text(page, "spaces")
        assert page.value("document.getElementById('found-hint').hidden")
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.value(_CONTRAST) == []
        ground = page.value("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 80) == dark
        first = page.value("document.getElementById('about').innerText")
        page.until(f"document.getElementById('about').innerText !== {first!r}")  # it is live
    assert page.complaints == []


@needs_chromium
def test_a_server_that_goes_is_said_so_and_found_again(
    store: Store, page: Browser, free_port: int
) -> None:
    with running(store, port=free_port) as server:
        page.show(server.address)
        page.until(LIVE)
    page.until("document.body.dataset.state === 'gone'")
    assert "No answer from the server since" in text(page, "banner")
    with running(store, port=free_port) as server:
        page.until(LIVE)
        assert page.value("document.getElementById('banner').hidden")


@needs_chromium
def test_a_server_that_drains_is_said_so(store: Store, page: Browser) -> None:
    with running(store) as server:
        ask(server.address, "POST", "/v1/drain")
        page.show(server.address)
        page.until("document.getElementById('banner').innerText.includes('takes no more puts')")
        assert text(page, "state-text") == "draining"


@needs_chromium
def test_it_asks_for_a_token_and_keeps_it_in_the_tab(
    store: Store, page: Browser, tmp_path: Path
) -> None:
    with running(store, tokens=tokens_file(tmp_path)) as server:
        page.show(server.address)
        page.until("!document.getElementById('gate').hidden")
        assert page.value("document.activeElement.id") == "token"
        for wrong, words in (("x" * 24, "not accepted"), (ALICE, "another tenant")):
            page.type(wrong)
            page.until(f"document.getElementById('gate-problem').innerText.includes('{words}')")
            assert page.value("document.getElementById('main').hidden")
        assert page.value(_CONTRAST) == []
        page.type(ADMIN)
        page.until(LIVE)
        kept = "[Object.values(sessionStorage), localStorage.length, document.cookie]"
        assert page.value(kept) == [[ADMIN], 0, ""]
        page.value("window.before = true")
        page.call("Page.reload")
        page.until(f"!window.before && {LIVE}")
        page.value("document.getElementById('forget').click()")
        page.until("!document.getElementById('gate').hidden")
        assert page.value(kept) == [[], 0, ""]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_the_files_may_load_nothing_from_elsewhere(store: Store, tmp_path: Path) -> None:
    """Served with no token, under a policy that the files themselves keep."""
    with running(store, tokens=tokens_file(tmp_path)) as server:
        for path in PAGE_PATHS:
            with connect(server.address) as sock:
                sock.sendall(
                    f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                )
                answer = b""
                while got := sock.recv(65536):
                    answer += got
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            policy = re.search(rb"content-security-policy: (.*)", head.lower())
            assert policy is not None
            assert policy[1].startswith(b"default-src 'self';")
            elsewhere = re.findall(rb"(?:https?:)?//[\w.]+", body)
            assert set(elsewhere) <= {b"http://www.w3.org"}  # names of XML, not addresses
            assert b" style=" not in body
            assert len(body) < 64 << 10
        assert ask(server.address, "GET", "/page.html")[0] == 401


def test_every_file_of_the_page_is_served() -> None:
    assert {path.name for path in STATIC.iterdir()} == {
        "index.html", *(path.removeprefix("/") for path in PAGE_PATHS if path != "/")
    }  # fmt: skip
