"""What a connection and the loop that serves it ask of each other, whichever protocol the client speaks; and the way
from the head of a request to its route.
"""

import time
from collections.abc import Callable
from typing import Protocol

from gocm_lib.front import google_door, routes
from gocm_lib.front.answered import Answered
from gocm_lib.front.endings import Await
from gocm_lib.front.gate import Asker, Gate, Place
from gocm_lib.front.handlers import Answer, Handlers
from gocm_lib.front.posts import Keep
from gocm_lib.front.request import Head, Request, check_no_body
from gocm_lib.front.response import unavailable
from gocm_lib.front.routes import Route
from gocm_lib.front.wire import Wire
from gocm_lib.front.workers import Workers
from gocm_lib.message.bad_request import BadRequest

OUTWARD = 5.0  # seconds that a request may wait for its turn to go to another server: then its client may be gone, and
BUSY = unavailable("others wait for Google, too: come again in a moment")  # a later one of his be there already
PARSED_AT_ONCE = 8192  # bytes of a body that is parsed in the loop: a larger one would keep all others waiting


class Served(Protocol):
    """A connection, as the loop needs it. All times are monotonic."""

    closed: bool
    deadline: float  # of what it does now,
    scheduled: float  # and when the loop looks at that next

    def fileno(self) -> int: ...

    def __hash__(self) -> int: ...

    def on_ready(self) -> None:
        """The socket can be read, or written, whichever is watched for."""

    def on_time(self, now: float) -> None:
        """The deadline has passed."""

    def go_on(self) -> None:
        """Go on with what was put off."""

    def waits_for_room(self) -> bool:
        """Whether it waits for room for a body."""


class Watcher(Protocol):
    """The loop, as a connection needs it. All times are monotonic."""

    handlers: Handlers
    gate: Gate
    workers: Workers
    answered: Answered

    def watch(self, connection: Served, reads: bool, writes: bool) -> None:
        """Call `on_ready` when the connection can be read, or written."""

    def wake_at(self, connection: Served, when: float) -> None:
        """Call `on_time` at this time, or a little later, unless another time is set before."""

    def adopt(self, connection: Served) -> None:
        """Serve a new connection."""

    def speaks_http2(self, connection: Served, wire: Wire, place: Place, asker: Asker) -> None:
        """Serve what comes from a connection's client as HTTP/2 from now on, and the connection itself no more."""

    def call_again(self, connection: Served) -> None:
        """Call `go_on` in the next turn."""

    def wait_for_room(self, connection: Served) -> int:
        """Call `go_on` whenever there may be more room for bodies. Returns its place in the line, from 1."""

    def carry_out(self, what: Keep | Await, done: Callable[[Answer], None]) -> None:
        """Have done what must be before an answer, and go on with what comes next."""

    def forget(self, connection: Served) -> None:
        """The connection is about to be closed."""


def find_route(head: Head | Request, handlers: Handlers, asker: Asker) -> tuple[Route, Asker]:
    """The route of a request, and who asks. Raises BadRequest when this client may not make it."""
    route = (google_door if asker.by_google else routes).find(head.method, head.path)
    check_no_body(head)
    if asker.by_google:
        grant = google_door.admit(handlers, head, route)
    else:
        grant = handlers.admit(head.headers, asker, route.public, route.right)
    if (head.length if isinstance(head, Head) else len(head.body)) > route.most:
        raise BadRequest(f"the body is longer than {route.most} bytes", "content-length", 413)
    return route, asker if grant is asker.grant else asker._replace(grant=grant)


def set_to_work(watcher: Watcher, request: Request, route: Route, decided: Callable[[Answer], None]) -> None:
    """Have an admitted request answered: at once, or by a worker."""
    handlers, handler = watcher.handlers, route.handler
    if not route.waits and len(request.body) <= PARSED_AT_ONCE:
        decided(handlers.answer(request, handler))
    elif route.outward:
        late = time.monotonic() + OUTWARD
        watcher.workers.do(
            "outward", lambda: BUSY if time.monotonic() > late else handlers.answer(request, handler), decided
        )
    else:
        kind = "quick" if route.public else "route" if route.waits else "parse"
        watcher.workers.do(kind, lambda: handlers.answer(request, handler), decided)
