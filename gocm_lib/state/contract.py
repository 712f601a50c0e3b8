"""What all others know of the shared state: what its verbs are given and what they answer.

Client calls them; how they are kept is the state's own matter.
"""

from typing import NamedTuple

COUNTERS = {
    "accepted_messages": "messages that were kept",
    "accepted_tokens": "their tokens",
    "attempts": "tokens that were tried, each once however often it was retried, as the Go server counted its calls",
    "delivered": "tokens that the upstream took",
    "failures": "tokens that came to an end without being delivered",
    "replayed": "failed tokens that somebody had sent again, as if they were new",
    "retries": "attempts after which a token is to be tried again",
    "canonicals": "how often the upstream replaced a token",
    "notregistered": "how often the upstream called a token dead",
    "keys_forgotten": "Idempotency-Keys that were forgotten before their time, there being too many",
    "dropped": "entries that a full list had no room for",
}

# What a token of a job can be.
STATES = ("ready", "deferred", "sending", "delivered", "failed")


class Refused(NamedTuple):
    """A message that was not taken: the status to answer, why, and after how many seconds to come again."""

    status: int
    reason: str
    retry_after: int


class Known(NamedTuple):
    """The request was made before, and became this job."""

    job: int


class Conflict(NamedTuple):
    """The key was used for another request."""


NotKept = Refused | Known | Conflict  # why a job was not kept


class Which(NamedTuple):
    """Which dead tokens: those of a job (0: any), that failed for one of outcome.FAILURES ("": any), with an upstream
    ("": any), before a time.
    """

    job: int
    failure: str
    upstream: str
    before: float


class Failed(NamedTuple):
    """A dead token: where it belongs, and why it failed."""

    job: int
    n: int
    token: str
    upstream: str
    attempts: int
    failure: str
    reason: str
    died_at: float


class Fate(NamedTuple):
    """What became of a token so far: `state` is one of STATES; `failure` and `reason` as in spool.End, or why it is
    tried again; `at`: when that is, or when it ended.
    """

    n: int
    token: str
    state: str
    attempts: int
    failure: str
    reason: str
    canonical: str
    at: float


class Status(NamedTuple):
    """A job, how many of its tokens are in each state, a page of their fates, and why its upstream is paused ("": it is
    not). Of the `size` tokens that it came with those may be missing whose time is over.
    """

    job: int
    upstream: str
    target: str
    accepted_at: float
    since: float
    expires_at: float
    size: int
    finished: float
    states: dict[str, int]
    fates: list[Fate]
    paused: str = ""


class Past(NamedTuple):
    """Nothing is known of a job any more."""


class Count(NamedTuple):
    """Which counter: one of COUNTERS, of which upstream, for which reason ("" where that does not matter)."""

    name: str
    upstream: str = ""
    reason: str = ""


class Snapshot(NamedTuple):
    """What there is to report, all of one moment."""

    counts: dict[Count, int]
    pending: int  # messages
    tokens: int  # of those, that are to be sent still,
    claimed: int  # of those, that are in senders' hands
    dead: int  # that were set aside as failed
    keys: int  # Idempotency-Keys that are remembered
    over: int  # that came to another end, and are kept for those who ask
    listed: dict[str, int]  # entries in each list
    latest: dict[str, list[tuple]]  # what came to each list last in this run, the newest first, read or not
    oldest: float | None  # when the oldest pending message was accepted
    bytes: int  # in the spool
    paused_until: dict[str, float]  # by upstream
    pause_reasons: dict[str, str]
    refusing: str  # why no message is taken now

    @property
    def counters(self) -> dict[str, int]:
        """The counters, those of all upstreams and reasons together."""
        sums = dict.fromkeys(COUNTERS, 0)
        for count, value in self.counts.items():
            sums[count.name] += value
        return sums


class Pause(NamedTuple):
    """An upstream that is not sent to until `until`, `delay` seconds after it `began`; then one token probes whether
    the cause is gone. It is away `since`, over one pause or several.

    While a job's token is the `probe` (0: none is), `until` is when we stop waiting for its end and send another.
    `manner` is how the upstream behaves: one of PAUSES.
    """

    reason: str
    began: float
    delay: float
    until: float
    since: float
    probe: int = 0
    manner: str = ""
