"""What every handler needs of its request: the state of the server, and who asks."""

from __future__ import annotations

from contextlib import ExitStack

from aiohttp import web

from prefixstore.serve.auth import Tenant
from prefixstore.serve.state import State

STATE = web.AppKey("state", State)
TENANT = web.RequestKey("tenant", Tenant)
HELD = web.RequestKey("held", ExitStack)  # room for what it takes, until it is answered


def state_of(request: web.Request) -> State:
    """The state of the server."""
    return request.app[STATE]


def tenant_of(request: web.Request) -> Tenant:
    """Who asks; the middleware has made sure that there is one."""
    return request[TENANT]
