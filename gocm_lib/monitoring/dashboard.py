"""What the status page shows, as one JSON object: the state in a sentence, figures, and what to do about failures.

Pure: figures in, plain values out. The page itself is status.html, which polls /api/status.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from gocm_lib import __version__
from gocm_lib.message.outcome import FAILURES, KEPT_FAILURES
from gocm_lib.monitoring.collector import Figures
from gocm_lib.monitoring.trend import EVERY, Sample, points, troubles
from gocm_lib.process import log
from gocm_lib.state.contract import MANY_DEFERRED, Count, Deferred, Snapshot

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

TOTALS = ("delivered", "failures", "retries", "notregistered", "canonicals")  # those of contract.COUNTERS that it shows


class Advice(NamedTuple):
    """What to do about a reason to fail, and the topic of the help that says more."""

    text: str
    topic: str


# For each of outcome.FAILURES.
ADVICE = {
    "unregistered": Advice("delete these tokens: /gcm/report/notregistered?peek=1 shows them", "reports"),
    "invalid_token": Advice(
        "look at where your application gets its tokens: /gcm/report/invalid?peek=1 has those that are none", "reports"
    ),
    "wrong_sender": Advice(
        "these devices registered with another project: let the app register anew, or send with its key", "credentials"
    ),
    "bad_message": Advice("look at the payload: /gcm/jobs/ID has the upstream's word for it", "sending"),
    "third_party_auth": Advice(
        "look at the APNs key or the web push key in the Firebase console: project settings, Cloud Messaging",
        "credentials",
    ),
    "rejected": Advice("look up the message: /gcm/jobs/ID has the upstream's word", "jobs"),
    "attempts": Advice("send them again when the upstream is well: /gcm/failed/replay", "failed"),
    "expired": Advice(
        "they waited too long: look for a pause above, or give a longer time_to_live; then replay", "failed"
    ),
    "killed_senders": Advice(
        "something in the message kills who sends it: look at the log and report it; do not replay it", "promise"
    ),
}
MINUTE = 60.0  # seconds: so long something is told that went wrong


def sentence(
    reasons: Sequence[str], notes: Sequence[str], snapshot: Snapshot | None, rate: float, now: float = 0.0
) -> str:
    """The state in a sentence: what is wrong, else what is unusual, else what is going on."""
    if reasons:
        return f"Not working: {'; '.join(reasons)}."
    if notes:
        return f"Working, but {'; '.join(notes)}."
    if snapshot is None:
        return "Working, but nobody knows what is pending."
    if not snapshot.pending:
        return "All is well, and nothing is waiting to be sent."
    going = f"{_several(snapshot.tokens, 'token')} to be sent, {rate:,.0f} a second are going out"
    if snapshot.deferred.next_due is None:
        return f"All is well: {going}."
    many, count = snapshot.deferred.tokens, _several(snapshot.deferred.tokens, "token")
    again = f"{'over ' if many >= MANY_DEFERRED else ''}{count} {'waits' if many == 1 else 'wait'} to be tried again"
    return f"Working: {going}; {again}, the next in {max(0.0, snapshot.deferred.next_due - now):,.0f} s."


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def status(
    figures: Figures, samples: Sequence[Sample], reasons: Sequence[str], notes: Sequence[str], sandbox: bool
) -> dict[str, Any]:
    """Everything that the page shows. Times are seconds since 1970, latencies seconds; tokens are shortened."""
    trend = points(samples)
    rate = trend[-1].sent if trend else 0.0
    snapshot = figures.snapshot
    notes = [*notes, *troubles([each for each in samples if each.at > figures.now - MINUTE - EVERY])]
    return {
        "version": __version__,
        "now": round(figures.now, 3),
        "started_at": round(figures.started_at, 3),
        "status": "failing" if reasons else "degraded" if notes else "ok",
        "sentence": sentence(reasons, notes, snapshot, rate, figures.now),
        "sandbox": sandbox,
        "sent_per_second": round(rate, 1),
        "senders": {"ready": figures.senders, "died": figures.restarts["sender"]},
        "upstreams": _upstreams(figures),
        "trend": {
            "seconds": EVERY,
            "points": [
                {"at": round(p.at, 1), "sent": round(p.sent, 2), "latency": p.latency and round(p.latency, 4)}
                for p in trend
            ],
        },
        **_kept(snapshot, figures.now),
    }


def of_upstreams(figures: Figures, names: Collection[str]) -> Figures:
    """The figures without what is about other upstreams than these, for who may see no more."""
    expiry = {name: ends for name, ends in figures.token_expiry.items() if name in names}
    snapshot = figures.snapshot
    if snapshot:
        waiting = {name: count for name, count in snapshot.waiting.items() if name in names}
        counts = {count: value for count, value in snapshot.counts.items() if count.upstream in names}
        tokens = sum(waiting.values())
        # Of the rest nobody knows what is of which upstream.
        snapshot = snapshot._replace(
            counts=counts,
            pending=tokens,
            tokens=tokens,
            claimed=0,
            deferred=Deferred(0, None),
            failed=0,
            listed=dict.fromkeys(snapshot.listed, 0),
            latest_replaced=[],
            latest_unregistered=[],
            oldest=None,
            waves={name: since for name, since in snapshot.waves.items() if name in names},
            held=0,
            nodes=(),
        )
    return figures._replace(token_expiry=expiry, snapshot=snapshot)


def _upstreams(figures: Figures) -> list[dict[str, Any]]:
    """The upstreams that are configured."""
    snapshot = figures.snapshot
    paused, held = (snapshot.pause_reasons, snapshot.held_upstreams) if snapshot else ({}, {})
    return [
        {
            "name": name,
            "paused": paused.get(name),
            "held": held[name]._asdict() if name in held else None,
            "latency": {label: figures.upstreams[name].latency.quantile(q) for label, q in QUANTILES.items()},
            "answers": {code: int(count) for code, count in figures.upstreams[name].codes.items() if count},
            "succeeded_at": round(figures.upstreams[name].succeeded_at, 3) or None,
        }
        for name in sorted(figures.token_expiry)
    ]


def _kept(snapshot: Snapshot | None, now: float) -> dict[str, Any]:
    """What the state process knows; null while it does not answer."""
    if snapshot is None:
        return dict.fromkeys(("pending", "totals", "failed", "failures", "lists", "nodes"))
    counters = snapshot.counters
    oldest = None if snapshot.oldest is None else round(max(0.0, now - snapshot.oldest), 1)
    return {
        "pending": {
            "messages": snapshot.pending,
            "tokens": snapshot.tokens,
            "sending": snapshot.claimed,
            "deferred": snapshot.deferred.tokens,
            "next_due": snapshot.deferred.next_due and round(snapshot.deferred.next_due, 3),
            "oldest_seconds": oldest,
        },
        "totals": {name: counters[name] for name in TOTALS},
        "nodes": [node._asdict() for node in snapshot.nodes],
        "failed": snapshot.failed,
        "failures": [
            {
                "upstream": count.upstream,
                "reason": count.reason,
                "count": value,
                "meaning": FAILURES[count.reason],
                "advice": ADVICE[count.reason].text,
                "help": f"help/{ADVICE[count.reason].topic}",
                "tokens": f"gcm/failed?reason={count.reason}&upstream={count.upstream}"
                if count.reason in KEPT_FAILURES
                else None,
            }
            for count, value in sorted(snapshot.counts.items(), key=_most_first)
            if count.name == "failures"
        ],
        "lists": {
            "notregistered": {
                "waiting": snapshot.listed["notregistered"],
                "held": snapshot.held,
                "waves": {upstream: round(since, 3) for upstream, since in snapshot.waves.items()},
                "latest": [log.token(entry.token) for entry in snapshot.latest_unregistered],
            },
            "invalid": {"waiting": snapshot.listed["invalid"]},
            "canonical": {
                "waiting": snapshot.listed["canonical"],
                "latest": [
                    {"original": log.token(old), "canonical": log.token(new)}
                    for _, old, new in snapshot.latest_replaced
                ],
            },
        },
    }


def _most_first(counted: tuple[Count, int]) -> tuple[int, Count]:
    return -counted[1], counted[0]
