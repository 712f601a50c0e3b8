"""What the state is, as the bytes of an answer. Pure: values in, bytes out."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files

from gocm_lib.message.job import BadRequest, Job, format_id
from gocm_lib.state.contract import Failed, Fate, Refused, Replaced, Snapshot, Status, Unregistered

# Go's encoding/json writes these three escaped, so that JSON can stand in HTML; the original's users may compare bytes.
_GO = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}

STATUS = (files("gocm_lib.front") / "status.html").read_bytes()


def _policy(page: bytes) -> str:
    """The Content-Security-Policy of a page that needs nothing but what is in it, and to ask its own server."""

    def hashed(tag: bytes) -> str:
        [text] = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed(b'script')}; style-src {hashed(b'style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


STATUS_POLICY = _policy(STATUS)


def go_json(value: object) -> bytes:
    """JSON as Go's encoding/json would write it: no spaces, keys in the given order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_GO).encode()


def report(snapshot: Snapshot) -> bytes:
    """The run report, keys in the original's order."""
    counters = snapshot.counters
    return go_json(
        {
            "attempts": counters["attempts"],
            "failures": counters["failures"],
            "pending": snapshot.pending,
            "canonicals": counters["canonicals"],
            "notregistered": counters["notregistered"],
        }
    )


def canonical(entries: Sequence[Replaced]) -> bytes:
    """The list of replaced tokens; `null` when empty, as Go writes a nil slice."""
    pairs = [{"original": original, "canonical": replacement} for _, original, replacement in entries]
    return go_json({"canonical_replacements": pairs or None})


def notregistered(entries: Sequence[Unregistered]) -> bytes:
    """The list of dead tokens; `null` when empty."""
    return go_json({"tokens": [token for _, token in entries] or None})


def status(found: Status) -> bytes:
    """What became of a job and, of a page of its tokens, of each; what to ask for next (null: there is no more)."""
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
    if found.since > found.accepted_at:
        told["replayed_at"] = round(found.since, 3)
    if found.paused:
        told["paused"] = found.paused
    if forgotten := found.size - sum(found.states.values()):
        told["forgotten"] = forgotten
    results = [_result(fate) for fate in found.fates]
    told |= {"results": results, "next": found.fates[-1].n if found.fates else None}
    return json.dumps(told).encode() + b"\n"


def _result(fate: Fate) -> dict[str, object]:
    told: dict[str, object] = {"n": fate.n, "token": fate.token, "state": fate.state, "attempts": fate.attempts}
    if fate.state == "failed":
        told |= {"reason": fate.failure, "detail": fate.reason}
    elif fate.state == "deferred":
        told |= {"reason": fate.reason, "next_due": round(fate.at, 3)}
    if fate.canonical:
        told["canonical"] = fate.canonical
    if fate.state in ("delivered", "failed"):
        told["ended_at"] = round(fate.at, 3)
    return told


def failed(entries: Sequence[Failed]) -> bytes:
    """A page of tokens that were set aside, each with why, and what to ask for next (null: there is no more)."""
    shown = [
        {
            "job": format_id(each.job),
            "n": each.n,
            "token": each.token,
            "upstream": each.upstream,
            "reason": each.failure,
            "detail": each.reason,
            "attempts": each.attempts,
            "failed_at": round(each.died_at, 3),
        }
        for each in entries
    ]
    last = f"{shown[-1]['job']}.{shown[-1]['n']}" if shown else None
    return json.dumps({"failed": shown, "next": last}).encode() + b"\n"


def done(what: str, count: int, left: bool) -> bytes:
    """How many failed tokens were replayed or discarded, and whether some are left that there was no room for."""
    return json.dumps({what: count, "left": left}).encode() + b"\n"


def error(problem: BadRequest) -> bytes:
    """A refusal in one line: what is wrong, and with which field ("" when with no field)."""
    return json.dumps({"error": problem.error, "field": problem.field}).encode() + b"\n"


def line(what: Job | BadRequest | Refused) -> bytes:
    """What became of one message of many, in one line."""
    match what:
        case Job():
            told: dict[str, object] = {"status": 200, "job": format_id(what.id)}
        case BadRequest():
            told = {"status": what.status, "error": what.error, "field": what.field}
        case Refused():
            told = {"status": what.status, "error": what.reason, "retry_after": what.retry_after}
    return json.dumps(told).encode() + b"\n"


def health(reasons: Sequence[str], notes: Sequence[str]) -> bytes:
    """Whether all is well, in one line: what is not, and what else an operator may want to know."""
    told: dict[str, object] = {"status": "failing" if reasons else "degraded" if notes else "ok"}
    if reasons:
        told["reasons"] = list(reasons)
    if notes:
        told["notes"] = list(notes)
    return json.dumps(told).encode() + b"\n"
