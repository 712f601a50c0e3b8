"""What is answered: the Response, and the state as the bytes of its body. Pure: values in, bytes out."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from gocm_lib.message import fcm_door
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Job, Skip, format_id
from gocm_lib.state.contract import (
    SHOWN,
    Failed,
    Fate,
    Invalid,
    Refused,
    Replaced,
    Snapshot,
    Status,
    Summary,
    Unregistered,
)

# Go's encoding/json writes these three escaped, so that JSON can stand in HTML; the original's users may compare bytes.
_GO = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}

# Two headers: of one with both, browsers understand neither, and never ask for the password.
GOOGLES = "/v1/"  # paths where refusals have Google's form
CHALLENGE = ('Bearer realm="gocm"', 'Basic realm="gocm"')

STATUS = (files("gocm_lib.front") / "status.html").read_bytes()


def _policy(page: bytes) -> str:
    """The Content-Security-Policy of a page that contains everything it needs and asks only its own server."""

    def hashed(tag: bytes) -> str:
        [text] = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed(b'script')}; style-src {hashed(b'style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


STATUS_POLICY = _policy(STATUS)


class Response(NamedTuple):
    """An answer. `written`, if given, is called once, with whether the whole response was handed to the network.
    `audit`: what was done, for the log, together with who asked for it. `refuses_token`: the client gave no good one.
    """

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: dict[str, str | Sequence[str]] = {}
    written: Callable[[bool], None] | None = None
    audit: str = ""
    refuses_token: bool = False


def refusal(problem: BadRequest, path: str = "") -> Response:
    """The answer to a client's mistake."""
    headers: dict[str, str | Sequence[str]] = {"Allow": problem.allow} if problem.allow else {}
    if problem.status == 503:
        headers["Retry-After"] = "1"
    if problem.status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    if path.startswith(GOOGLES):
        status, body = fcm_door.refusal(problem)
        return Response(status, body, fcm_door.JSON, headers, refuses_token=problem.status == 401)
    return Response(problem.status, error(problem), headers=headers, refuses_token=problem.status == 401)


def unavailable(reason: str, status: int = 503, retry_after: int = 1) -> Response:
    """503 or 507: what was asked is not done, or not completely; come again after this many seconds."""
    return Response(status, error(BadRequest(reason)), headers={"Retry-After": str(retry_after)})


def count_lost(what: str, count: int, of: str) -> Response:
    """The answer when it is not known with how many was dealt."""
    reason = f"{count} {what}, perhaps more, and then the count was lost: ask again for those left"
    return unavailable(reason)._replace(audit=f"{what} {count} or more {of}")


def go_json(value: object) -> bytes:
    """JSON as Go's encoding/json writes it: no spaces, keys in the given order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_GO).encode()


def report(snapshot: Snapshot, upstreams: Collection[str] = ()) -> bytes:
    """The run report, keys in the original's order; of some upstreams only, if they are named."""
    counters, pending = snapshot.counters, snapshot.pending
    if upstreams:
        own = {count: value for count, value in snapshot.counts.items() if count.upstream in upstreams}
        counters = snapshot._replace(counts=own).counters
        pending = sum([snapshot.waiting.get(each, 0) for each in upstreams])
    return go_json(
        {
            "attempts": counters["attempts"],
            "failures": counters["failures"],
            "pending": pending,
            "canonicals": counters["canonicals"],
            "notregistered": counters["notregistered"],
        }
    )


def canonical(entries: Sequence[Replaced]) -> bytes:
    """The list of replaced tokens; `null` when empty, as Go writes a nil slice."""
    pairs = [{"original": original, "canonical": replacement} for _, original, replacement in entries]
    return go_json({"canonical_replacements": pairs or None})


def notregistered(entries: Sequence[Unregistered]) -> bytes:
    """The list of unregistered tokens; `null` when empty."""
    return go_json({"tokens": [entry.token for entry in entries] or None})


def unregistered(entries: Sequence[Unregistered]) -> bytes:
    """The same for those who only look: with a word where tokens came in a wave, and which did."""
    return go_json({"tokens": [entry.token for entry in entries] or None, **of_wave(entries)})


def of_wave(entries: Sequence[Unregistered]) -> dict[str, object]:
    """What there is to say of entries that came in a wave; nothing if none did."""
    found = [entry.token for entry in entries if entry.wave]
    return {"wave": True, "in_wave": found} if found else {}


def invalid(entries: Sequence[Invalid]) -> bytes:
    """The list of what is no token of ours, each with the reason; `null` when empty."""
    return go_json({"tokens": [{"token": entry.token, "reason": entry.reason} for entry in entries] or None})


def first_page(found: Status) -> Status:
    """The same with the first SHOWN of its tokens."""
    if len(found.fates) <= SHOWN:
        return found
    fates = found.fates[:SHOWN]
    return found._replace(fates=fates, skipped=[skip for skip in found.skipped if skip.n < fates[-1].n][:SHOWN])


def status(found: Status) -> bytes:
    """What became of a job, and of each token in a page of them; `next` is what to ask for next, null at the end."""
    told: dict[str, object] = {
        "job": format_id(found.job),
        "upstream": found.upstream,
        "target": found.target,
        "accepted_at": round(found.accepted_at, 3),
        "expires_at": round(found.expires_at, 3),
        "ended_at": round(found.finished, 3) if found.finished else None,
        "tokens": found.size,
        "states": found.states,
    }
    if found.since > max(found.accepted_at, found.send_at):
        told["replayed_at"] = round(found.since, 3)
    if found.paused:
        told["paused"] = found.paused
    told |= _labels(found)
    if forgotten := found.size - sum(found.states.values()):
        told["forgotten"] = forgotten
    if found.skipped:
        told["skipped"] = skipped(found.skipped)
    results = [_result(fate) for fate in found.fates]
    told |= {"results": results, "next": found.fates[-1].n if found.fates else None}
    return json.dumps(told).encode() + b"\n"


def _labels(found: Status | Summary) -> dict[str, object]:
    """By whom a job was sent, its tag, and when it is to be sent; without what it has not."""
    told: dict[str, object] = {"by": found.by, "tag": found.tag}
    told["send_at"] = round(found.send_at, 3)
    return {name: value for name, value in told.items() if value}


def summaries(entries: Sequence[Summary]) -> bytes:
    """A page of jobs, each with how many of its tokens are where; `next` is what to ask for next, null at the end."""
    shown = [
        {
            "job": format_id(each.job),
            "upstream": each.upstream,
            **_labels(each),
            "accepted_at": round(each.accepted_at, 3),
            "tokens": each.size,
            "pending": each.pending,
            "delivered": each.delivered,
            "failed": each.failed,
            "cancelled": each.cancelled,
        }
        for each in entries
    ]
    return json.dumps({"jobs": shown, "next": format_id(entries[-1].job) if entries else None}).encode() + b"\n"


def _result(fate: Fate) -> dict[str, object]:
    told: dict[str, object] = {"n": fate.n, "token": fate.token, "state": fate.state, "attempts": fate.attempts}
    if fate.state == "failed":
        told |= {"reason": fate.failure, "detail": fate.reason}
    elif fate.state == "deferred":
        told |= {"reason": fate.reason, "next_due": round(fate.at, 3)}
    if fate.receipt:
        told["message_id"] = fate.receipt
    if fate.canonical:
        told["canonical"] = fate.canonical
    if fate.state in ("delivered", "failed", "cancelled"):
        told["ended_at"] = round(fate.at, 3)
    return told


def failed(entries: Sequence[Failed]) -> bytes:
    """A page of failed tokens with the reasons; `next` is what to ask for next, null at the end."""
    shown = [
        {
            "job": format_id(each.job),
            "n": each.n,
            "token": each.token,
            "upstream": each.upstream,
            "reason": each.failure,
            "detail": each.reason,
            "attempts": each.attempts,
            "failed_at": round(each.failed_at, 3),
        }
        for each in entries
    ]
    last = f"{shown[-1]['job']}.{shown[-1]['n']}" if shown else None
    return json.dumps({"failed": shown, "next": last}).encode() + b"\n"


def done(what: str, count: int, left: bool | None = None) -> bytes:
    """How many were dealt with, and whether some are left that there was no room for (None: that cannot be)."""
    told: dict[str, object] = {what: count}
    return json.dumps(told if left is None else told | {"left": left}).encode() + b"\n"


def cancelled(job: str, count: int | None, in_air: int | None) -> bytes:
    """How many tokens of a message were cancelled, and how many are on their way; null: another node does it."""
    return json.dumps({"job": job, "cancelled": count, "in_air": in_air}).encode() + b"\n"


def cancelled_tagged(tag: str, jobs: int, count: int, in_air: int, elsewhere: int) -> bytes:
    """The same of all messages with a tag; `elsewhere` is how many of these another node has, which will do it."""
    told = {"tag": tag, "jobs": jobs, "cancelled": count, "in_air": in_air, "elsewhere": elsewhere}
    return json.dumps(told).encode() + b"\n"


def held(upstream: str, is_held: bool) -> bytes:
    """Whether an upstream is held now."""
    return json.dumps({"upstream": upstream, "held": is_held}).encode() + b"\n"


def skipped(skips: Iterable[Skip]) -> list[dict[str, object]]:
    """What was left out of a list of tokens: its place in the list from 0, and what is wrong with it."""
    return [{"n": skip.n, "error": skip.why} for skip in skips]


def accepted(kept: Job, job_id: int) -> dict[str, object]:
    """A message that was kept under this id."""
    told: dict[str, object] = {"job": format_id(job_id), "upstream": kept.upstream, "tokens": len(kept.tokens)}
    return told | {"skipped": skipped(kept.skipped)}


def error(problem: BadRequest) -> bytes:
    """A refusal in one line: what is wrong, and in which field ("": in none)."""
    return json.dumps({"error": problem.error, "field": problem.field}).encode() + b"\n"


def line(what: Job | BadRequest | Refused) -> bytes:
    """What became of one message of many, in one line."""
    match what:
        case Job():
            told: dict[str, object] = {"status": 200, "job": format_id(what.id)}
            if what.skipped:
                told["skipped"] = skipped(what.skipped)
        case BadRequest():
            told = {"status": what.status, "error": what.error, "field": what.field}
        case Refused():
            told = {"status": what.status, "error": what.reason, "retry_after": what.retry_after}
    return json.dumps(told).encode() + b"\n"


def health(reasons: Sequence[str], notes: Sequence[str]) -> bytes:
    """The reasons why something is wrong, and notes for the operator, in one line."""
    told: dict[str, object] = {"status": "failing" if reasons else "degraded" if notes else "ok"}
    if reasons:
        told["reasons"] = list(reasons)
    if notes:
        told["notes"] = list(notes)
    return json.dumps(told).encode() + b"\n"
