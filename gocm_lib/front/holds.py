"""The routes by which somebody holds an upstream, and lets it go again.

While it is held nothing is sent to it, and messages for it are taken and kept. That outlives every restart.
"""

import re
import time

from gocm_lib.front import auth, query, response
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest

PATH = re.compile("/gcm/upstreams/([a-z0-9_-]{1,31})/(?:hold|resume)")


def hold(handlers: Handlers, request: Request) -> Response:
    """POST /gcm/upstreams/{name}/hold: send nothing to it until it is resumed."""
    name = _named(handlers, request)
    handlers.client.hold(name, request.grant.name, time.time())
    return Response(200, response.held(name, True), audit=f"held upstream {name}")


def resume(handlers: Handlers, request: Request) -> Response:
    """POST /gcm/upstreams/{name}/resume: send to it again."""
    name = _named(handlers, request)
    was_held = handlers.client.let_go(name)
    return Response(200, response.held(name, False), audit=f"resumed upstream {name}" if was_held else "")


def _named(handlers: Handlers, request: Request) -> str:
    if request.body and job.media_type(request.headers.get("content-type", "")) != query.FORM:
        raise BadRequest("nothing is read from the body: leave it out", "content-type", 415)
    if request.query or request.body:
        raise BadRequest("nothing is read but the path")
    found = PATH.fullmatch(request.path)
    name = found[1] if found else ""
    if name not in handlers.reach.dialects and name not in handlers.client.snapshot().held_upstreams:
        raise BadRequest("no such upstream here; there is " + ", ".join(handlers.reach.dialects), "upstream", 404)
    auth.check_upstream(request.grant, name)
    return name
