"""The pages of the help: what `gocm help` shows, for a browser. Nothing in them is secret, so they need no token."""

import functools

from gocm_lib.front.handlers import Handlers
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response
from gocm_lib.help import page
from gocm_lib.help.topics import TOPICS, nearest, source
from gocm_lib.message.bad_request import BadRequest


def help_index(handlers: Handlers, request: Request) -> Response:
    """GET /help: the topics."""
    return _page("")


def help_topic(handlers: Handlers, request: Request) -> Response:
    """GET /help/{topic}: one of them."""
    topic = request.path.removeprefix("/help/")
    if topic not in TOPICS:
        near = nearest(topic)
        raise BadRequest("no such topic" + (f"; did you mean {near}?" if near else ": see /help"), status=404)
    return _page(topic)


@functools.cache
def _page(topic: str) -> Response:
    body = page.render(TOPICS, topic, source(topic) if topic else "").encode()
    return Response(200, body, "text/html; charset=utf-8", {"Content-Security-Policy": page.POLICY})
