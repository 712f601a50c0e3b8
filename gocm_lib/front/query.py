"""The fields of query strings and of our own short forms, read strictly. Pure."""

import math
import re
from collections.abc import Collection
from urllib.parse import parse_qsl

from gocm_lib.front.auth import NAME_OF_TOKEN, Grant, only_upstream
from gocm_lib.front.request import Request
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.outcome import KEPT_FAILURES
from gocm_lib.state.contract import Which

FORM = job.FORM
LONGEST_WAIT = 30  # seconds: what stands between may take a longer silence for the end
SMALL_FORM = 4096  # bytes: what our own short forms may have
LARGEST_PAGE = 10_000  # entries that may be asked for


def form(request: Request, known: set[str], example: str) -> dict[str, str]:
    """The fields of one of our short forms. Raises BadRequest."""
    if job.media_type(request.headers.get("content-type", "")) != job.FORM:
        raise BadRequest(f"send a form: curl -d {example}", "content-type", 415)
    if request.query:
        raise BadRequest("nothing is read from the query string: put it into the body")
    return parse(request.body.decode("latin-1"), known)


def parse(text: str, known: set[str]) -> dict[str, str]:
    """The fields of a query string: each given once, each one of `known`. Raises BadRequest."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=8, errors="strict")
    except ValueError:
        raise BadRequest("malformed query string") from None
    for name, _ in pairs:
        if name not in known:
            raise BadRequest("unknown query parameter; known are " + ", ".join(sorted(known)), name[:64])
    if len(dict(pairs)) != len(pairs):
        raise BadRequest("a query parameter is given twice")
    return dict(pairs)


def which(fields: dict[str, str], grant: Grant, there: Collection[str], now: float) -> Which:
    """The failed tokens that are asked for by who has this grant, where these upstreams are `there`; `older` is in
    seconds before `now`. Raises BadRequest.
    """
    reason, upstream = fields.get("reason", ""), fields.get("upstream", "")
    if "reason" in fields and reason not in KEPT_FAILURES:
        raise BadRequest("what is kept failed for " + ", ".join(KEPT_FAILURES), "reason")
    if "upstream" in fields and not upstream:
        raise BadRequest("upstream is empty: leave it out for all", "upstream")
    if "by" in fields and not re.fullmatch(NAME_OF_TOKEN, fields["by"]):
        raise BadRequest("that is no name of a token", "by")
    older = number(fields, "older", 0, 10**9)
    # All of them, also such as failed later than it is now: the clock may have been set back.
    before = math.inf if older is None else now - older
    one = job.parse_id(fields["job"]) if "job" in fields else 0
    return Which(one, reason, only_upstream(grant, upstream, there), before, fields.get("by", ""))


def number(fields: dict[str, str], name: str, low: int, high: int) -> int | None:
    """A field as a number from `low` to `high`; None when it is not given. Raises BadRequest."""
    if name not in fields:
        return None
    if not re.fullmatch("[0-9]{1,19}", fields[name]) or not low <= int(fields[name]) <= high:
        raise BadRequest(f"{name} must be a number from {low} to {high}", name)
    return int(fields[name])


def wait(fields: dict[str, str]) -> int | None:
    """For how many seconds a client wants to wait for a message's end; None: it does not. Raises BadRequest."""
    return number(fields, "wait", 1, LONGEST_WAIT)
