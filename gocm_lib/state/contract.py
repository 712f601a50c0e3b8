"""What other rooms know of the shared state: its verbs, what they take and what they answer.

Client calls the verbs. How things are stored is the state's own business.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from gocm_lib.message.job import Skip, Slice
from gocm_lib.message.outcome import Result
from gocm_lib.message.suspect import InFlight
from gocm_lib.state.packs import Pack

COUNTERS = {
    "accepted_messages": "messages that were kept",
    "accepted_tokens": "their tokens",
    "attempts": "tokens that were tried, each once however often it was retried, as the Go server counted its calls",
    "delivered": "tokens that the upstream took",
    "failures": "tokens that came to an end without being delivered",
    "cancelled": "tokens that somebody stopped before they were sent",
    "replayed": "failed tokens that somebody had sent again, as if they were new",
    "retries": "attempts after which a token is to be tried again",
    "canonicals": "how often the upstream replaced a token",
    "notregistered": "how often the upstream called a token unregistered",
    "keys_forgotten": "Idempotency-Keys that were forgotten before their time, there being too many",
    "dropped": "entries that a full list had no room for",
}

# What a token of a job can be.
MANY_DEFERRED = 1000  # tokens of an upstream
STATES = ("ready", "deferred", "sending", "delivered", "failed", "cancelled")


class Full(Exception):
    """The disk is full, and nothing was kept. The call may be repeated."""


class Passing(Exception):
    """Another program has the spool locked just now. The call may be repeated."""


class Overtaken(Passing):
    """Somebody else, who shares the spool, kept the same at this moment. The call may be repeated at once."""


class Broken(Exception):
    """The spool failed, and nobody knows what it would keep from now on."""


class Unsure(Exception):
    """Nobody here knows whether a change was kept: the process must end, and the next one reads what there is."""


class Lost(Exception):
    """What was ours is somebody else's, who shares the spool: the process must end, and so must all senders."""


class Refused(NamedTuple):
    """A message was not taken: the HTTP status to answer, the reason, and after how many seconds to come again."""

    status: int
    reason: str
    retry_after: int


class Known(NamedTuple):
    """The request was made before, and became this job."""

    job: int


class Conflict(NamedTuple):
    """The key was used before, for another request."""


NotKept = Refused | Known | Conflict  # why a job was not kept


class Which(NamedTuple):
    """A selection of failed tokens: of one job (0: any), for one of outcome.FAILURES ("": any), of one upstream ("":
    any), that failed before a time, sent by the token of this name ("": any).
    """

    job: int
    failure: str
    upstream: str
    before: float
    by: str = ""


class Place(NamedTuple):
    """The position of a failed token among all: its job, and its place in that job."""

    job: int
    n: int


BEFORE_ALL = Place(0, -1)


class Failed(NamedTuple):
    """A failed token: where it belongs, and why it failed."""

    job: int
    n: int
    token: str
    upstream: str
    attempts: int
    failure: str
    reason: str
    failed_at: float


class Fate(NamedTuple):
    """What became of a token so far. `state` is one of STATES. `failure` and `reason` as in spool.End, or why it is
    tried again. `at` is when it is tried again, or when it ended.
    """

    n: int
    token: str
    state: str
    attempts: int
    failure: str
    reason: str
    canonical: str
    at: float
    receipt: str = ""  # the upstream's own id of the message that it took


class Status(NamedTuple):
    """A job, how many of its tokens are in each state, a page of their fates, and why its upstream is paused ("": it is
    not). The job came with `size` tokens; some of them may be forgotten.
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
    skipped: list[Skip] = []  # on this page
    by: str = ""  # the name of the token that sent it
    tag: str = ""
    send_at: float = 0.0  # when it is to be sent, if it waits for that; 0: it does not


SHOWN = 100  # tokens of a job that are told when no number is asked for
MANY_SHOWN = 1000  # that are told to who waits for its end: as many as Google's legacy protocol has in a request


class Summary(NamedTuple):
    """A job in a list of jobs: how many tokens it came with, and how many are to be sent still, were delivered, failed
    and were cancelled. `send_at` as in Status.
    """

    job: int
    upstream: str
    by: str
    tag: str
    accepted_at: float
    send_at: float
    size: int
    pending: int
    delivered: int
    failed: int
    cancelled: int


class Hold(NamedTuple):
    """Somebody holds an upstream: nothing is sent to it. Since when, and the name of his token ("": it has none)."""

    since: float
    by: str


class Meaning(NamedTuple):
    """What the name of an upstream means: the dialect in which its messages are written, and of which project the
    devices are that they are for ("": of none, in the legacy one).
    """

    dialect: str
    project: str


class Past(NamedTuple):
    """Nothing is known of a job any more."""


AT_ONCE = 2000  # tokens that are replayed, discarded or cancelled in a transaction


class Cancelled(NamedTuple):
    """How many tokens of a job were cancelled by a call; how many are on their way, of which the next answer is the
    end; and whether the job is `elsewhere`: in the hands of another node, which has been told and will cancel it.
    """

    tokens: int
    in_air: int
    elsewhere: bool = False


class Replaced(NamedTuple):
    """An entry of the list `canonical`: a token, and the token to use instead. `number` is 0 where it is not told."""

    number: int
    original: str
    canonical: str


class Unregistered(NamedTuple):
    """An entry of the list `notregistered`: a token to delete. `number` is 0 where it is not told. `wave`: it came with
    so many others (module waves) that somebody should look first.
    """

    number: int
    token: str
    wave: bool = False


class Invalid(NamedTuple):
    """An entry of the list `invalid`: something that is no token of ours, and why, one of outcome.INVALID."""

    number: int
    token: str
    reason: str


Entry = Replaced | Unregistered | Invalid
LISTS = ("canonical", "notregistered", "invalid")


class Count(NamedTuple):
    """The name of a counter: one of COUNTERS, of one upstream, for one reason ("" where these do not apply)."""

    name: str
    upstream: str = ""
    reason: str = ""


class Deferred(NamedTuple):
    """Tokens that wait to be tried again: how many, and when the next is due (seconds since 1970; None: there are
    none). More than MANY_DEFERRED of an upstream are not counted.
    """

    tokens: int
    next_due: float | None


class Node(NamedTuple):
    """One of those who share the spool: whether it is this one, whether it is heard of, and its version."""

    name: str
    own: bool
    alive: bool
    version: str


class Snapshot(NamedTuple):
    """Everything to report, all of one moment. Where several nodes share the spool it is about all of them, but for
    `own`, what this one counted of `counts`, and for pauses, waves and what is claimed.
    """

    counts: dict[Count, int]
    pending: int  # messages
    tokens: int  # of those, that are to be sent still,
    claimed: int  # of those, that are in senders' hands
    deferred: Deferred  # of those, that wait to be tried again
    failed: int  # that were set aside as failed
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
    waves: dict[str, float] = {}  # upstreams with a wave of unregistered tokens, and since when
    held: int = 0  # entries of waves that are held back from the list
    own: Mapping[Count, int] = {}
    nodes: Sequence[Node] = ()
    held_upstreams: Mapping[str, Hold] = {}
    waiting: Mapping[str, int] = {}  # tokens that are to be sent still, by upstream
    meant: Mapping[str, Meaning] = {}  # what the names of those mean

    @property
    def counters(self) -> dict[str, int]:
        """The counters, summed over all upstreams and reasons."""
        sums = dict.fromkeys(COUNTERS, 0)
        for count, value in self.counts.items():
            sums[count.name] += value
        return sums


class Pause(NamedTuple):
    """An upstream is not sent to until `until`, which is `delay` seconds after the pause `began`; then one token probes
    whether the cause is gone. The upstream is away `since` then, over one pause or several.

    While a token is the `probe` (its job; 0: none is), `until` is when we stop waiting for its end and send another.
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


class Accepted(NamedTuple):
    """The answer to an accept: which jobs were not kept, by their ids, and why. Jobs that nothing waits before may be
    `gone` straight into the hands of a generation; whoever was answered so says with his next call that he has `seen`
    this `number`, or they wait for their turn again.
    """

    not_kept: dict[int, NotKept]
    number: int = 0
    generation: int = 0
    gone: Sequence[int] = ()


class Claimed(NamedTuple):
    """The answer to a claim: tokens to send now, and which upstreams are paused or refuse our credential. `since` has
    the jobs that have waited for their turn since another time than their ids say.
    """

    slices: list[Slice]
    pauses: dict[str, Pause]
    since: Mapping[int, float] = {}


class Shared(Protocol):
    """The verbs of the shared state. Each is one transaction: when it returns, its changes are on disk.

    State raises Full, Passing and Broken; Client raises StateUnavailable.
    """

    def accept(self, packs: Sequence[Pack], seen: int | None = None) -> Accepted:
        """Keep jobs: when this returns they are on disk, all but those that it returns. A caller that puts what has
        gone straight through into the queue says which answer it has `seen` last (0: none yet).
        """

    def follow(self, rates: Mapping[str, float], meanings: Mapping[str, Meaning], now: float) -> None:
        """There are these upstreams from now on; so many messages a second each takes (0: nobody knows), and this is
        what their names mean.
        """

    def hold(self, upstream: str, by: str, now: float) -> None:
        """Send nothing to an upstream until it is let go: somebody wants that, with a token of this name."""

    def let_go(self, upstream: str) -> bool:
        """Send to it again. Returns whether somebody held it."""

    def begin(self, generation: int) -> None:
        """From now on only this generation, or a newer one, may claim. A waiting claim of an older one ends."""

    def claim(
        self,
        generation: int,
        batch: int,
        in_hand_limits: Mapping[str, int],
        ready: Mapping[str, float],
        now: float,
        wait: float,
    ) -> Claimed:
        """Due tokens of the `ready` upstreams, for a generation that may have as many of each in hand as
        `in_hand_limits` says. `ready` says since when each upstream has had its credential.

        Waits up to `wait` seconds for the first token, or for news of a pause. The caller numbers its batches, and
        takes the next number once it has received one. So a batch whose answer was lost, because this process was
        killed or stood still, is given again, instead of being forgotten in the generation's hands.
        """

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        """Record what became of tokens in a generation's hands. Tokens that it does not hold (any more) are ignored."""

    def record_crash(self, generation: int, sender: str, flights: Sequence[InFlight], now: float) -> int:
        """A sender of this generation died: hold that against what it had in flight (module suspect). Returns how many
        tokens were set aside for it. Repeating the call changes nothing.
        """

    def release(self, generation: int) -> int:
        """Make ready again what a generation that has ended still has in hand. Returns how many tokens."""

    def snapshot(self) -> Snapshot:
        """Everything to report."""

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        """What became of a job, with up to `limit` of its tokens after place `after`, in one of STATES ("": any). None:
        there is no such job. Past: jobs as late as this one were forgotten, and it may have been one of them.
        """

    def ended(self, jobs: Sequence[int], anyway: Sequence[int], now: float) -> dict[int, Status | Past | None]:
        """What became of those `jobs` of which nothing is to be sent any more, and of others `anyway`, each with up to
        MANY_SHOWN of its tokens. `now` is monotonic.
        """

    def jobs(self, tag: str, after: int, limit: int, upstreams: Sequence[str] = ()) -> list[Summary]:
        """Jobs with a tag, or, where that is "", those that wait for their time, with ids above `after`, for these
        upstreams (none: for all). Fewer than there are, where that takes long; none only if there are none.
        """

    def page(self, which: str, after: int, limit: int, upstream: str = "") -> Sequence[Entry]:
        """Entries of one of LISTS with numbers above `after`, those of an upstream ("": of all)."""

    def hand_out(self, which: str, limit: int, upstream: str = "") -> Sequence[Entry] | None:
        """The first entries of one of LISTS, for the only reader that gets them; `handed_out` says that he has. None:
        another node hands them out just now.
        """

    def handed_out(self, which: str, upto: int, upstream: str = "") -> None:
        """What was handed out is deleted up to number `upto`; 0: nobody has it."""

    def forget(self, which: str, upto: int, upstream: str = "") -> bool:
        """Delete a list's entries up to number `upto`, because the application has them. Returns whether that number
        ever existed.
        """

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Failed tokens after this place."""

    def cancel(self, job: int, now: float) -> Cancelled | Past | None:
        """End some of the tokens of a job that nobody has in hand, at most AT_ONCE of them; call again until there are
        none. Those that are on their way are not tried again. None and Past as in `status`.
        """

    def cancel_all(self, jobs: Sequence[int], now: float) -> list[Cancelled | Past | None]:
        """The same of several, at most AT_ONCE tokens of each, as far as that does not take long: of the first ones, at
        least of one. Where fewer are cancelled nothing is left to cancel.
        """

    def replay(self, which: Which, now: float) -> int:
        """Send some of the failed tokens again, as many as there is room for. Returns how many; 0: none is left."""

    def discard(self, which: Which) -> int:
        """Forget some of the failed tokens. Returns how many; 0: there are no more."""

    def release_held(self) -> int:
        """Put some of the entries that are held back, because they came in a wave, into the list. Returns how many; 0:
        there are no more.
        """

    def discard_held(self) -> int:
        """Forget some of the entries that are held back. Returns how many; 0: there are no more."""


VERBS = tuple(name for name in vars(Shared) if not name.startswith("_"))
