"""The routes about jobs: what became of one, lists of them, and how to stop them.

Promises that a token which is for some upstreams only sees and stops nothing of others.
"""

import time
from collections.abc import Iterator

from gocm_lib.front import auth, query, response
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, count_lost
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import SHOWN, STATES, Cancelled, Past, Status, Summary

CANCEL_PATIENCE = 10.0  # seconds that a cancel goes on asking a state process that is busy
LARGEST_LIST = 1000  # jobs on a page
LISTED = 100  # when no number is asked for


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
    after = job.parse_id(fields["after"]) if "after" in fields else 0
    limit = query.number(fields, "limit", 1, LARGEST_LIST) or LISTED
    with handlers.lists.one_page():
        found = handlers.client.jobs(fields.get("tag", ""), after, limit)
        shown = [each for each in found if request.grant.sees(each.upstream)]
        return Response(200, response.summaries(shown, found[-1].job if found else 0))


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
    count, patient_until = 0, time.monotonic() + CANCEL_PATIENCE
    while True:
        try:
            found = client.cancel(job_id, time.time())
        except StateUnavailable as error:  # it may be busy: what is said twice is done once
            if time.monotonic() > patient_until:
                return count, error
            time.sleep(0.05)
            continue
        if not isinstance(found, Cancelled) or not found.tokens:
            return count, found
        count, patient_until = count + found.tokens, time.monotonic() + CANCEL_PATIENCE


def cancel_tagged(handlers: Handlers, request: Request) -> Response:
    """POST /gcm/jobs/cancel: the same for all messages with a tag."""
    fields = query.form(request, {"tag"}, "tag=spring-sale")
    job.check_tag(fields.get("tag"))
    jobs = count = in_air = elsewhere = 0
    for each in _tagged(handlers.client, fields["tag"]):
        if not each.pending or not request.grant.sees(each.upstream):
            continue
        ended, found = _end(handlers.client, each.job)
        count += ended
        if isinstance(found, StateUnavailable):
            return count_lost("cancelled", count, f"tokens tagged {fields['tag']}")
        if isinstance(found, Cancelled):
            jobs, in_air, elsewhere = jobs + 1, in_air + found.in_air, elsewhere + found.elsewhere
    audit = f"cancelled {count} tokens of {jobs} messages tagged {fields['tag']}" if jobs else ""
    return Response(200, response.cancelled_tagged(fields["tag"], jobs, count, in_air, elsewhere), audit=audit)


def _tagged(client: Client, tag: str) -> Iterator[Summary]:
    after = 0
    while found := client.jobs(tag, after, LISTED):
        yield from found
        after = found[-1].job
