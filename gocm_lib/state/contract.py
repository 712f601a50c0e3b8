"""What all others know of the shared state: what its verbs are given and what they answer.

Client calls them; how they are kept is the state's own matter.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from gocm_lib.message.job import Job, Slice
from gocm_lib.message.outcome import Result
from gocm_lib.message.suspect import Aloft

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


class Full(Exception):
    """The disk is full: nothing was kept. It may be tried again."""


class Passing(Exception):
    """It could not be done just now, because another program has the spool locked. It may be tried again."""


class Broken(Exception):
    """The spool failed, and nobody knows what it would keep from now on."""


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


class Place(NamedTuple):
    """Where a failed token stands among all: its job, and which of that job's tokens it is."""

    job: int
    n: int


BEFORE_ALL = Place(0, -1)


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


class Replaced(NamedTuple):
    """An entry of the list `canonical`: a token, and the one to use instead. `number`: 0 where it is not told."""

    number: int
    original: str
    canonical: str


class Unregistered(NamedTuple):
    """An entry of the list `notregistered`: a token to delete. `number`: 0 where it is not told."""

    number: int
    token: str


Entry = Replaced | Unregistered


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
    # What came to each list last in this run, the newest first, read or not.
    latest_replaced: list[Replaced]
    latest_unregistered: list[Unregistered]
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
    cause: str = ""  # as an Outcome has it


class Claimed(NamedTuple):
    """What a claim gives: tokens to send now, and who is paused, or refuses our credential."""

    slices: list[Slice]
    pauses: dict[str, Pause]


class Shared(Protocol):
    """The verbs of the shared state. Each is one transaction: when it returns, what it changed is on disk.

    Raises, from State, Full, Passing and Broken; from Client, StateUnavailable.
    """

    def accept(self, jobs: Sequence[Job]) -> dict[int, NotKept]:
        """Keep jobs, all but those it returns, by their ids."""

    def begin(self, generation: int) -> None:
        """From now on only this generation, or a newer one, claims; a claim of an older one that waits ends."""

    def claim(
        self, generation: int, batch: int, rooms: Mapping[str, int], ready: Mapping[str, float], now: float, wait: float
    ) -> Claimed:
        """Due tokens of the `ready` upstreams for a generation that may have so many of each in hand (`rooms`).
        `ready` says since when each has had its credential.

        Waits up to `wait` seconds for the first, or for news of a pause. The caller numbers its batches, and goes on to
        the next number when it has received one. So a batch whose answer was lost, because this process was killed or
        stood still, is given again, not forgotten in the generation's hands.
        """

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        """Record what became of tokens in a generation's hands; those it does not hold (any more) are passed over."""

    def accuse(self, generation: int, sender: str, flights: Sequence[Aloft], now: float) -> int:
        """Hold the death of a sender of this generation against what it had in the air (module suspect); how many
        tokens were buried for it. A sender dies once, however often this is told.
        """

    def release(self, generation: int | None) -> int:
        """Make ready again what a generation that has ended (None: every one) still has in hand; how many."""

    def snapshot(self) -> Snapshot:
        """What there is to report."""

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        """What became of a job, with up to `limit` of its tokens after number `after`, of one of STATES ("": of any).
        None: there is no such job. Past: jobs as late as this one were forgotten, so it may have been one of them.
        """

    def page(self, which: str, after: int, limit: int) -> Sequence[Entry]:
        """Entries of the list `canonical` or `notregistered` numbered above `after`."""

    def forget(self, which: str, upto: int) -> bool:
        """Delete a list's entries up to number `upto`: somebody has them. Whether there ever was that number."""

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Tokens that were set aside as failed, after this place."""

    def replay(self, which: Which, now: float) -> int:
        """Send some of the failed tokens again, as many as there is room for; how many. 0: there are no more."""

    def discard(self, which: Which) -> int:
        """Forget some of the failed tokens; how many. 0: there are no more."""


VERBS = tuple(name for name in vars(Shared) if not name.startswith("_"))
