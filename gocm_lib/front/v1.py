"""The v1 door: who has an SDK of Google's for FCM v1 sends by us, with another address and another account file.

Promises what POST /gcm/send does: what is answered with 200 is on disk. The answer waits for Google's for --legacy-wait
seconds; what has none by then counts as sent, or the client would send it again (module message/fcm_door).

An account file of ours (`gocm token new --write-credentials`) has an auth token of ours as the id of its key. SDKs sign
with the key, and name its id; that is what we look at. To check the signature as well would keep out nobody who has the
id, and would take a library that the server does without.
"""

import json
import re
import time
from urllib.parse import parse_qsl

from gocm_lib.front import auth, posts
from gocm_lib.front.endings import Await, Ending
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.posts import Keep
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response
from gocm_lib.message import fcm_door, idempotency, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.fcm_door import JSON
from gocm_lib.state.contract import Conflict, Known, NotKept, Refused, Status

PATH = re.compile(r"/v1/projects/([^/]{1,64})/messages:send")
TOKEN = "/token"
LIFE = 3600  # seconds for which clients keep a token, as they do Google's
LARGEST_ASSERTION = 16 * 1024  # bytes


def send(handlers: Handlers, request: Request) -> Response | Keep:
    """POST /v1/projects/{project}/messages:send: keep a message, answer what became of it."""
    if handlers.draining:
        return _unavailable("stopping: send it again in a moment", 1)
    found = PATH.fullmatch(request.path)
    assert found
    name = next((each for each in handlers.reach.projects.get(found[1], ()) if request.grant.sees(each)), "")
    if not name:
        resource = f"//cloudresourcemanager.googleapis.com/projects/{found[1]}"
        raise BadRequest(f"Permission denied on resource '{resource}' (or it may not exist).", status=403)
    draft = job.draft({**fcm_door.read(request.body), "upstream": name}, 1)
    key = idempotency.read(request.headers.get("idempotency-key"), request.body, request.grant.name)
    accepted = posts.accept(draft, handlers.reach, request.grant, key)._replace(awaited=True)
    patience = handlers.settings.legacy_wait
    if wait := handlers.too_fast(request.grant, [accepted]):
        body = fcm_door.error(429, "this token's rate is used up", "QUOTA_EXCEEDED")
        return Response(429, body, JSON, {"Retry-After": str(wait)})
    return Keep([accepted], lambda kept: _kept(found[1], kept[0], patience))


def _kept(project: str, became: job.Job | NotKept, patience: float) -> Response | Await:
    match became:
        case Refused() as refused:
            return _unavailable(refused.reason, refused.retry_after)
        case Conflict():
            body = fcm_door.error(409, "this key was used for another message: take a new one")
            return Response(409, body, JSON)
        case Known() as known:
            return Await(known.job, patience, lambda found: _told(project, known.job, found))
        case kept:
            audit = posts.to_many([kept])
            return Await(kept.id, patience, lambda found: _told(project, kept.id, found)._replace(audit=audit))


def _unavailable(reason: str, retry_after: int) -> Response:
    return Response(503, fcm_door.error(503, reason, "UNAVAILABLE"), JSON, {"Retry-After": str(retry_after)})


def _told(project: str, job_id: int, found: Ending) -> Response:
    name = job.format_id(job_id)
    fate = found.fates[0] if isinstance(found, Status) and found.fates else None
    if fate and fate.state in ("failed", "cancelled"):
        status, body = fcm_door.failed(fate.failure, fate.reason)
    else:
        status, body = 200, fcm_door.sent(project, name, fate.receipt if fate else "")
    return Response(status, body, JSON, {"X-GoCM-Job": name})


def token(handlers: Handlers, request: Request) -> Response:
    """POST /token: an access token for who has an account file of ours."""
    try:
        form = dict(parse_qsl(request.body.decode("ascii"), max_num_fields=8))
        given = fcm_door.secret(form)
        if handlers.policy.grants:
            auth.check({"authorization": f"Bearer {given}"}, handlers.policy, local=True, public=False, now=time.time())
    except (BadRequest, ValueError) as problem:
        word = problem.error if isinstance(problem, BadRequest) and "_" in problem.error else "invalid_grant"
        told = {"error": word, "error_description": "this is no account file for this server, or its time is over"}
        status, wrong = (401, True) if word == "invalid_grant" else (400, False)
        return Response(status, json.dumps(told).encode() + b"\n", JSON, refuses_token=wrong)
    granted = {"access_token": given, "expires_in": LIFE, "token_type": "Bearer"}
    return Response(200, json.dumps(granted).encode() + b"\n", JSON)
