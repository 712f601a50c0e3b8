"""The legacy door: who still speaks Google's legacy protocol sends by us, with another address and nothing else.

Promises what POST /gcm/send does: what is answered with 200 is on disk. The answer waits for results for --legacy-wait
seconds, as these clients want one for each token; what has none by then counts as sent (module message/legacy).
"""

from collections.abc import Sequence

from gocm_lib.front import posts
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.posts import Keep, Reach
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, unavailable
from gocm_lib.message import idempotency, job, legacy
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.legacy import Asked, Result
from gocm_lib.state.contract import Conflict, Known, NotKept, Refused, Status


def send(request: Request, reach: Reach, patience: float) -> Response | Keep:
    """What a request of the legacy protocol asks for, to be kept; its answer waits for results for so long."""
    try:
        asked = legacy.read(request.headers.get("content-type", ""), request.body)
    except BadRequest as problem:
        return Response(400, problem.error.encode(), legacy.TEXT)
    try:
        key = idempotency.read(request.headers.get("idempotency-key"), request.body, request.grant.name)
        accepted = posts.accept(job.draft(asked.fields, legacy.MOST), reach, request.grant, key)
    except BadRequest as problem:
        return _response(legacy.refusal(asked, problem))
    return Keep([accepted._replace(awaited=True)], lambda kept: _kept(asked, kept[0], patience))


def _response(told: tuple[int, str, bytes]) -> Response:
    status, content_type, body = told
    return Response(status, body, content_type)


def _kept(asked: Asked, became: job.Job | NotKept, patience: float) -> Response | Await:
    match became:
        case Refused() as refused:
            return unavailable(refused.reason, refused.status, refused.retry_after)
        case Conflict():
            return Response(422, b"this key was used for another message: take a new one", legacy.TEXT)
        case Known() as known:
            return Await(known.job, patience, lambda found: _told(asked, known.job, found))
        case kept:
            audit = posts.to_many([kept])
            return Await(kept.id, patience, lambda found: _told(asked, kept.id, found)._replace(audit=audit))


def _told(asked: Asked, job_id: int, found: Ending) -> Response:
    headers: dict[str, str | Sequence[str]] = {"X-GoCM-Job": job.format_id(job_id)}
    if not isinstance(found, Status):
        return _response(legacy.answer(asked, job_id, {}, ()))._replace(headers=headers)
    results = {
        fate.n: Result(
            fate.receipt, fate.canonical, fate.failure if fate.state in ("failed", "cancelled") else "", fate.reason
        )
        for fate in found.fates
    }
    invalid = [skip.n for skip in found.skipped]
    return _response(legacy.answer(asked, job_id, results, invalid))._replace(headers=headers)
