"""The routes about jobs: what became of one, lists of them, and how to stop them.

Promises that a token which is for some upstreams only sees and stops nothing of others.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from gocm_lib.front import auth, query, response
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, count_lost
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import AT_ONCE, SHOWN, STATES, Cancelled, Past, Status, Summary

CANCEL_PATIENCE = 10.0  # seconds that a cancel goes on asking a state process that is busy
LARGEST_LIST = 1000  # jobs on a page
LISTED = 100  # when no number is asked for

Got = TypeVar("Got")


def status(handlers: Handlers, request: Request) -> Response | Await:
    """GET /gcm/jobs/{id}: what became of a message, and of each of its tokens, in pages."""
    fields = query.parse(request.query, {"limit", "after", "state", "wait"})
    job_id = job.parse_id(request.path.removeprefix("/gcm/jobs/"))
    if (patience := query.wait(fields)) is not None:
        if len(fields) > 1:
            raise BadRequest("wait gives the first page of all states: ask for others then", "wait")
        return Await(job_id, patience, lambda found: _first_page(request, found))
    state = fields.get("state", "")
    if "state" in fields and state not in STATES:
        raise BadRequest("a token is " + ", ".join(STATES), "state")
    after = query.number(fields, "after", 0, 10**9)
    limit = query.number(fields, "limit", 1, query.LARGEST_PAGE) or SHOWN
    with handlers.lists.one_page():
        return _status(request, handlers.client.status(job_id, state, -1 if after is None else after, limit))


def _first_page(request: Request, found: Ending) -> Response:
    return _status(request, response.first_page(found) if isinstance(found, Status) else found)


def _status(request: Request, found: Ending) -> Response:
    """The answer to who asks for a message."""
    return Response(200, response.status(_known(request, found)))


def _known(request: Request, found: Ending) -> Status:
    """What is known of a message, if this client may know it. Raises BadRequest, StateUnavailable."""
    if isinstance(found, StateUnavailable):
        raise found
    if found is None:
        raise BadRequest("no such message", "job", status=404)
    if isinstance(found, Past):
        raise BadRequest("what became of messages so old is not kept: --keep-jobs, --max-kept", "job", status=410)
    auth.check_upstream(request.grant, found.upstream)
    return found


def listed(handlers: Handlers, request: Request) -> Response:
    """GET /gcm/jobs: messages with a tag, or those that wait for their time, in pages."""
    fields = query.parse(request.query, {"tag", "scheduled", "after", "limit"})
    if "tag" in fields:
        job.check_tag(fields["tag"])
    if ("tag" in fields) == ("scheduled" in fields) or fields.get("scheduled", "1") != "1":
        raise BadRequest("say which: tag=TAG, or scheduled=1", "tag")
    after = _after(fields["after"]) if "after" in fields else 0
    limit = query.number(fields, "limit", 1, LARGEST_LIST) or LISTED
    with handlers.lists.one_page():
        found = handlers.client.jobs(fields.get("tag", ""), after, limit, request.grant.upstreams)
        return Response(200, response.summaries(found))


def _after(text: str) -> int:
    try:
        return job.parse_id(text)
    except BadRequest:
        raise BadRequest("after must be the `next` of the page before", "after") from None


def cancel(handlers: Handlers, request: Request) -> Response:
    """DELETE /gcm/jobs/{id}: end all of a message that is not on its way."""
    query.parse(request.query, set())
    job_id = job.parse_id(request.path.removeprefix("/gcm/jobs/"))
    name = job.format_id(job_id)
    if request.grant.upstreams:
        _known(request, handlers.client.status(job_id, "", -1, 1))
    count, found = _end(handlers.client, job_id)
    if isinstance(found, StateUnavailable):
        return count_lost("cancelled", count, f"tokens of {name}")
    if not isinstance(found, Cancelled):
        _known(request, found)
        raise AssertionError("there is no such job, or nobody knows")
    if found.elsewhere:
        return Response(202, response.cancelled(name, None, None), audit=f"cancelled {name}, which another node has")
    audit = f"cancelled {count} tokens of {name}" if count or found.in_air else ""
    return Response(200, response.cancelled(name, count, found.in_air), audit=audit)


def _end(client: Client, job_id: int) -> tuple[int, Cancelled | Past | StateUnavailable | None]:
    """Cancel a job, some tokens at a time. Returns how many were cancelled, and what was said last."""
    count = 0
    while True:
        try:
            found = _patiently(client.cancel, job_id, time.time())
        except StateUnavailable as error:
            return count, error
        if not isinstance(found, Cancelled) or not found.tokens:
            return count, found
        count += found.tokens


def cancel_tagged(handlers: Handlers, request: Request) -> Response:
    """POST /gcm/jobs/cancel: the same for all messages with a tag."""
    fields = query.form(request, {"tag"}, "tag=spring-sale")
    job.check_tag(fields.get("tag"))
    jobs, ended = 0, Counter[str]()
    try:
        for page in _tagged(handlers.client, fields["tag"], request.grant.upstreams):
            left = [each.job for each in page if each.pending]
            jobs += len(left)
            while left:
                left = left[_end_some(handlers.client, left, ended) :]
    except StateUnavailable:
        return count_lost("cancelled", ended["tokens"], f"tokens tagged {fields['tag']}")
    audit = f"cancelled {ended['tokens']} tokens of {jobs} messages tagged {fields['tag']}" if jobs else ""
    told = response.cancelled_tagged(fields["tag"], jobs, ended["tokens"], ended["in_air"], ended["elsewhere"])
    return Response(200, told, audit=audit)


def _end_some(client: Client, jobs: Sequence[int], ended: Counter[str]) -> int:
    """Cancel the first of these jobs, and count what has ended. Returns of how many nothing is left to cancel. Raises
    StateUnavailable.
    """
    done = _patiently(client.cancel_all, jobs, time.time())
    for found in done:
        ended.update(found._asdict() if isinstance(found, Cancelled) else {})
    last = done[-1]
    partly = isinstance(last, Cancelled) and last.tokens >= AT_ONCE
    if partly and isinstance(last, Cancelled):
        ended["in_air"] -= last.in_air  # they are told again
    return len(done) - partly


def _tagged(client: Client, tag: str, upstreams: Sequence[str]) -> Iterator[Sequence[Summary]]:
    after = 0
    while found := _patiently(client.jobs, tag, after, LISTED, upstreams):
        yield found
        after = found[-1].job


def _patiently(ask: Callable[..., Got], *arguments: object) -> Got:
    """What the state process answers, which may be busy, or be replaced. Raises StateUnavailable."""
    patient_until = time.monotonic() + CANCEL_PATIENCE
    while True:
        try:
            return ask(*arguments)
        except StateUnavailable:  # what is said twice is done once
            if time.monotonic() > patient_until:
                raise
            time.sleep(0.05)
