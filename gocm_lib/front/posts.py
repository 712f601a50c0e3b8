"""POST /gcm/send: from what is posted to jobs, and from what became of these to the answer. Pure, but for the clock.

Nothing here keeps anything: a Keep says what is to be kept before the answer may be made.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from gocm_lib.config.settings import Settings
from gocm_lib.config.upstreams import described
from gocm_lib.front import query, response
from gocm_lib.front.auth import Grant, check_upstream
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, unavailable
from gocm_lib.message import fcm, idempotency, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Draft, IdempotencyKey, Job
from gocm_lib.state.contract import Conflict, Known, NotKept, Refused, Status


class Keep(NamedTuple):
    """What a handler wants before it answers: these jobs on disk. `answer` makes the Response of what became of them,
    each in its place, or says what it has to wait for; it may raise BadRequest.
    """

    jobs: Sequence[Job]
    answer: Callable[[Sequence[Job | NotKept]], Response | Await]


class Reach(NamedTuple):
    """Where messages can go: the dialect of each upstream by its name, the default first; the upstreams of each
    project. And the limits for them: how many tokens a message may have, and how long it lives.
    """

    dialects: Mapping[str, str]
    projects: Mapping[str, Sequence[str]]
    default: str
    most: int
    max_age: float

    @classmethod
    def of(cls, settings: Settings) -> "Reach":
        """What these settings say of it."""
        found = described(settings)
        projects: dict[str, list[str]] = {}
        for name, each in found.items():
            if each.dialect == fcm.NAME:
                projects.setdefault(each.project, []).append(name)
        # What could never be taken is a 413, no 503 (admission.Limits).
        most = min(settings.max_tokens, settings.max_pending // min(2, len(found)))
        dialects = {name: each.dialect for name, each in found.items()}
        return cls(dialects, projects, next(iter(found)), most, settings.max_age)

    @property
    def known(self) -> Collection[str]:
        """The upstreams that may be asked for: those that there are, and those that there may have been."""
        return dict.fromkeys((*self.dialects, *DIALECTS))

    def choose(self, asked: str, grant: Grant) -> str:
        """The upstream for a message of who has this grant, and asked for one ("": for none). Raises BadRequest."""
        if grant.upstreams:
            mine = [name for name in self.dialects if grant.sees(name)]
            if asked in self.dialects:
                check_upstream(grant, asked)
            name = asked or next(iter(mine), "")
        else:
            name, mine = asked or self.default, list(self.dialects) if asked else []
        if name not in self.dialects:
            raise BadRequest(
                "no such upstream here; there is " + (", ".join(mine) or "none for this token"), "upstream"
            )
        return name


def send(request: Request, reach: Reach) -> Response | Keep:
    """What a post brings, to be kept. Raises BadRequest when that is nothing."""
    patience = query.wait(_query(request.query)) if request.query else None
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("the body must not be compressed: send it as it is", "content-encoding", 415)
    content_type = request.headers.get("content-type", "")
    key = idempotency.read(request.headers.get("idempotency-key"), request.body, request.grant.name)
    if job.media_type(content_type) == job.LINES:
        if key:
            raise BadRequest("a key is for one message: send lines without it", "idempotency-key")
        if patience is not None:
            raise BadRequest("wait is for one message: send lines without it", "wait")
        return _send_lines(list(_lines(request, reach)))
    accepted = accept(job.parse(content_type, request.body, reach.most), reach, request.grant, key)
    if patience is None:
        return Keep([accepted], lambda kept: _sent(request, accepted, kept[0]))
    accepted = accepted._replace(awaited=True)
    return Keep([accepted], lambda kept: _await(patience, _sent(request, accepted, kept[0]), kept[0]))


def _query(text: str) -> dict[str, str]:
    try:
        return query.parse(text, {"wait"})
    except BadRequest:
        raise BadRequest("but for wait nothing is read from the query string: put it into the body") from None


def _await(patience: int, sent: Response, kept: Job | NotKept) -> Response | Await:
    """The answer for a message whose end the client wants to wait for: the one that was `sent` when it was not kept,
    else what became of it, or 202 and what is known after so many seconds.
    """
    if isinstance(kept, (Refused, Conflict)):
        return sent

    def answer(found: Ending) -> Response:
        if not isinstance(
            found, Status
        ):  # it has ended, and is forgotten; or it is not known, and on disk all the same
            status, body = 202 if isinstance(found, Exception) else 200, {"job": job.format_id(job_id)}
            return sent._replace(status=status, body=json.dumps(body).encode() + b"\n", content_type="application/json")
        status = 200 if found.finished else 202
        return sent._replace(
            status=status, body=response.status(response.first_page(found)), content_type="application/json"
        )

    job_id = kept.job if isinstance(kept, Known) else kept.id
    return Await(job_id, patience, answer)


def _sent(request: Request, accepted: Job, became: Job | NotKept) -> Response:
    """The answer to a post of one message. Raises BadRequest."""
    match became:
        case Refused() as refused:
            return unavailable(refused.reason, refused.status, refused.retry_after)
        case Conflict():
            raise BadRequest("this key was used for another message: take a new one", "idempotency-key", 422)
        case Known() as known:
            return _taken(accepted, known.job, request, {"Idempotency-Replayed": "true"})
        case kept:
            return _taken(kept, kept.id, request, {}, to_many([kept]))


def accept(draft: Draft, reach: Reach, grant: Grant, key: IdempotencyKey | None = None) -> Job:
    """The job that a draft becomes, without its id. Raises BadRequest when it cannot be sent, or not by who has this
    grant.
    """
    name = draft.upstream or reach.default
    if grant.upstreams or name not in reach.dialects:
        name = reach.choose(draft.upstream, grant)
    now = time.time()
    return job.accept(
        draft,
        upstream=name,
        message=DIALECTS[reach.dialects[name]].message(draft, draft.send_at if draft.send_at > now else now),
        now=now,
        max_age=reach.max_age,
        key=key,
        by=grant.name,
    )


def _lines(request: Request, reach: Reach) -> Iterator[Job | BadRequest]:
    """The job of each line, or what is wrong with it."""
    for draft in job.parse_lines(request.body, reach.most):
        try:
            yield draft if isinstance(draft, BadRequest) else accept(draft, reach, request.grant)
        except BadRequest as problem:
            yield problem


def _send_lines(given: Sequence[Job | BadRequest]) -> Response | Keep:
    """Keep the good ones of many messages, in one commit."""
    jobs = [line for line in given if isinstance(line, Job)]
    return Keep(jobs, lambda kept: _sent_lines(given, kept)) if jobs else _sent_lines(given, ())


def _sent_lines(given: Sequence[Job | BadRequest], became: Sequence[Job | NotKept]) -> Response:
    """The answer that tells for each line what became of it. Its status is 200 when at least one was kept, else the
    status of the first.
    """
    kept = iter(became)
    lines: list[Job | BadRequest | Refused] = []
    for line in given:
        what = next(kept) if isinstance(line, Job) else line
        assert not isinstance(what, (Known, Conflict)), "they are said of keys, which lines have none of"
        lines.append(what)
    first = lines[0]
    status = 200 if any(isinstance(line, Job) for line in lines) or isinstance(first, Job) else first.status
    waits = [line.retry_after for line in lines if isinstance(line, Refused)]
    headers: dict[str, str | Sequence[str]] = {"Retry-After": str(max(waits))} if waits else {}
    audit = to_many([line for line in lines if isinstance(line, Job)])
    return Response(status, b"".join(map(response.line, lines)), job.LINES, headers, audit=audit)


def _taken(kept: Job, job_id: int, request: Request, headers: Mapping[str, str], audit: str = "") -> Response:
    """The answer for a message that is on disk as job `job_id`: as the original gives it, or as JSON, for who wants
    that or must know what was left out.
    """
    name = job.format_id(job_id)
    told: dict[str, str | Sequence[str]] = {"X-GoCM-Job": name, "Location": f"/gcm/jobs/{name}", **headers}
    if kept.skipped or _wants_json(request.headers.get("accept", "")):
        return Response(200, json.dumps(response.accepted(kept, job_id)).encode() + b"\n", headers=told, audit=audit)
    return Response(200, b"ok\n", "text/html", told, audit=audit)


def _wants_json(accept: str) -> bool:
    """Whether a client takes JSON, and neither text nor anything: such cannot read `ok` (RFC 9110, section 12.5.1)."""
    accept = accept.lower()
    if "json" not in accept:  # as nearly always
        return False
    ranges = (part.partition(";") for part in accept.split(","))
    taken = {name.strip() for name, _, rest in ranges if not re.search(r"\bq=0(\.0*)?\s*(;|$)", rest)}
    return "application/json" in taken and not any(name.startswith(("text/", "*/")) for name in taken)


def to_many(jobs: Sequence[Job]) -> str:
    """The audit text for messages that may reach everybody: those to topics and conditions."""
    sent = [each for each in jobs if each.target in ("topic", "condition")]
    if not sent:
        return ""
    last = f"{sent[-1].target} {sent[-1].tokens[0]!r} as {job.format_id(sent[-1].id)}"
    return (
        f"sent to {last}"
        if len(sent) == 1
        else f"sent {len(sent)} messages to topics and conditions, the last to {last}"
    )
