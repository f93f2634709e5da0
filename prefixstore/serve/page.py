"""The page at `/`: four static files of this package, which ask `/v1/overview` for the numbers.

The files hold nothing that is anybody's secret and need no token; the numbers do. The browser is
told to load nothing from elsewhere, and to show the page in nobody's frame.
"""

from __future__ import annotations

from importlib import resources

from aiohttp import web

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[web.RouteDef]:
    """A route for each file."""
    return [web.get(path, show, allow_head=False) for path in _FILES]


async def show(request: web.Request) -> web.Response:
    """One of the files."""
    name, kind = _FILES[request.path]
    body = _read(name)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=_HEADERS)


def _read(name: str) -> bytes:
    """From the package: a few KiB that the kernel has in memory, so that edits show at once."""
    return resources.files("prefixstore.serve").joinpath("static", name).read_bytes()
