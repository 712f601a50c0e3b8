"""The Store: what State needs of a place that keeps packs, and nothing about how it does.

State decides, on packs that it has in memory; a Store is told a whole change and makes it at once or not at all. When
a change's method returns, it is on disk. Every change may be repeated. Reads see all changes before them. A Store
raises Full, Passing and Broken.

A token of a pack is in one of these places:

    in the pack     not tried yet, or in somebody's hand for the first time
    gone from it    delivered at the first attempt, which is an End; or it has become a Single
    a Single        a token with a fate of its own: it is tried again, has failed, ended otherwise, or was replayed

Who has a token in hand is not kept: State knows, and after a restart nobody has anything in hand (module backlog).
"""

from collections.abc import Collection, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from gocm_lib.state.contract import (
    Conflict,
    Count,
    Deferred,
    Entry,
    Failed,
    Hold,
    Known,
    Meaning,
    Node,
    Past,
    Place,
    Replaced,
    Status,
    Summary,
    Unregistered,
    Which,
)
from gocm_lib.state.packs import Key, Pack
from gocm_lib.state.waves import Bucket

# The failure of a Single that was not to be sent any more. As the reason of one that is on its way: it is not to be
# tried again.
CANCELLED = "cancelled"
OPEN, OVER, FAILED = 0, -1, -2  # what a Single is: to be sent still, ended, set aside and may be replayed


class Stored(NamedTuple):
    """A pack as it is read: how many tokens are in it still, which positions are `gone`, how many open Singles its jobs
    have, by job, and how often the node that had it died.
    """

    id: int
    last: int
    upstream: str
    lane: int
    fresh: int
    gone: int
    singles: Mapping[int, int]
    body: str
    losses: int = 0


class Single(NamedTuple):
    """A token with a fate of its own. An open one gets its turn by its `rank` (module turns); one that `waits` is not
    due before `due_at`, which says when it ended if it has. `since` is when it was replayed (0: it was not).
    """

    job: int
    n: int
    upstream: str
    rank: int
    due_at: float
    waits: bool = False
    attempts: int = 0
    charged: int = 0
    deaths: int = 0
    since: float = 0.0
    state: int = OPEN
    failure: str = ""
    reason: str = ""
    canonical: str = ""


class End(NamedTuple):
    """Positions of a pack whose tokens were delivered together: when, and the upstream's ids, one for each in their
    order ("": it gave none), or none at all.
    """

    pack: int
    positions: int
    at: float
    receipts: Sequence[str] = ()


class Changed(NamedTuple):
    """What a change makes of a pack: which positions are gone from it now, and by how much more or less are: tokens in
    it; open tokens, with its Singles; jobs with open tokens; tokens with which the jobs without came.
    """

    id: int
    gone: int
    fresh: int
    open: int
    jobs: int
    finished: int


class Finish(NamedTuple):
    """What became of tokens: everything that changes with it."""

    now: float
    packs: Sequence[Changed] = ()
    opened: Mapping[str, int] = {}  # by how many tokens more or less each upstream has open
    revived: int = 0  # failed tokens that are open again
    singles: Sequence[Single] = ()
    ends: Sequence[End] = ()
    counts: Mapping[Count, int] = {}
    replaced: Sequence[tuple[str, str, str]] = ()  # token, what to use instead, upstream
    unregistered: Sequence[tuple[str, str, bool, bool]] = ()  # token, upstream, whether of a wave, whether to hold it
    invalid: Sequence[tuple[str, str, str]] = ()  # token, reason, upstream
    answers: Mapping[str, tuple[Bucket, bool]] = {}  # of an upstream's minute, and whether the minute is a new one


class Totals(NamedTuple):
    """How much there is: jobs with open tokens; open tokens, by upstream; failed tokens; those that came to another end
    and are kept; the tokens with which the jobs came that are kept; Idempotency-Keys; entries of lists.
    """

    jobs: int
    open: Mapping[str, int]
    failed: int
    over: int
    finished: int
    keys: int
    listed: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Open tokens of all upstreams."""
        return sum(self.open.values())


class Spot(NamedTuple):
    """Where to go on among Singles of an upstream and lane: after this one."""

    rank: int
    job: int = 0
    n: int = -1


class Store(Protocol):
    """See above."""

    totals: Totals
    rescued: bool  # whether others have, or may have, what we had before we came back
    number: int  # of our node, among those that share this Store: job ids have it. 0 where nobody can

    # ------------------------------------------------------------------------------------------------------ accepting

    def known(self, keys: Sequence[Key]) -> dict[int, Known | Conflict]:
        """Of requests that carry a key those that were made before, by the ids that they would get now."""

    def has(self, job: int) -> bool:
        """Whether a job was kept and is not forgotten yet."""

    def keep(self, packs: Sequence[Pack], counts: Mapping[Count, int]) -> None:
        """Keep new packs and their keys. When there are too many keys the oldest are forgotten, and counted."""

    # ----------------------------------------------------------------------------------------------- what is to be sent

    def serve(self, upstreams: Collection[str]) -> None:
        """We send to these upstreams from now on."""

    def held(self) -> Mapping[str, Hold]:
        """The upstreams that somebody holds, as far as we have heard."""

    def hold(self, upstream: str, hold: Hold) -> None:
        """Somebody holds an upstream. If it is held, that stays as it is."""

    def let_go(self, upstream: str) -> None:
        """Nobody holds it any more."""

    def wake(self, now: float, limit: int) -> list[Stored]:
        """Let up to so many packs have their turn that have waited for their time. Returns those that are ours."""

    def fresh(self, upstream: str, lane: int, after: int, tokens: int) -> list[Stored]:
        """Packs of a lane with tokens in them, with ids above `after`, in their order: as few as have so many tokens
        together, or all there are.
        """

    def newest(self, upstream: str, lane: int, before: int, count: int) -> list[Stored]:
        """Packs of a lane with tokens in them, with ids below `before`, the highest first."""

    def take(self, upstream: str, lane: int, tokens: int) -> list[Stored]:
        """Packs that were nobody's, and are ours from now on: as few as have so many open tokens, or all there are.
        Others share this Store, and each of them has its own part of it; what is asked for here is of ours only, but
        by `has`, `status`, and what has to do with failed tokens, the report and keys.
        """

    def give(self, upstream: str, lane: int, after: int, kept: Collection[int]) -> None:
        """Make our packs with open tokens nobody's, those with ids above `after`, but these."""

    def resume(self) -> None:
        """None of the senders is there any more that may have what others rescued: those that are may send."""

    @property
    def sharers(self) -> int:
        """How many share this Store, and are there now. At least 1."""

    def tell_slowed(self, rates: Mapping[str, float]) -> None:
        """Tell those who share this Store how many messages a second we send to upstreams now that refused more."""

    def heard_slowed(self) -> Mapping[str, float]:
        """What others have told of that since this was last asked."""

    def packs(self, ids: Sequence[int]) -> list[Stored]:
        """These packs."""

    def own(self, job: int) -> Stored | None:
        """Make the pack of a job ours, if it is nobody's. None: it is not."""

    def order(self, job: int) -> None:
        """Have the job cancelled by whoever has it."""

    def orders(self) -> Collection[int]:
        """Jobs that somebody who does not have them wants to have cancelled: each is told now and then until it is
        `carried_out`.
        """

    def carried_out(self, job: int) -> None:
        """That order is carried out."""

    def pack_of(self, job: int) -> Stored | None:
        """The pack that a job is in."""

    def due(self, upstream: str, after: Spot, rank: int, count: int, above: int) -> list[Single]:
        """Open Singles of jobs with ids above `above`, in order: up to `count` after a spot, up to a rank."""

    def next_rank(self, upstream: str, after: Spot, below: int, above: int) -> int | None:
        """The rank of the first of those, where ranks are below `below`; None: there is none."""

    def open_singles(self, job: int) -> list[Single]:
        """The open Singles of a job."""

    def died(self, job: int, reason: str) -> bool:
        """Whether a job has a failed token with this reason."""

    def is_sound(self, job: int) -> bool:
        """Whether what ended tokens of this job shows that its message is good. "rejected" may mean either."""

    def deferred(self, upstream: str, after: Sequence[tuple[Spot, int]], most: int) -> Deferred:
        """Singles of an upstream that wait, in each lane after a spot and below a rank: at most `most` are counted."""

    def finish(self, change: Finish) -> None:
        """Make a change."""

    def turn(self) -> AbstractContextManager[None]:
        """Changes within are one: all are on disk when it ends, or none was made."""

    # ----------------------------------------------------------------------------------------------------- looking back

    def status(
        self, job: int, sending: Container[int], queued: Container[int], state: str, after: int, limit: int
    ) -> Status | Past | None:
        """What became of a job (contract.Shared.status); which of its places are in somebody's hand, and which wait for
        nothing but their turn.
        """

    def summaries(self, tag: str, after: int, limit: int, upstreams: Sequence[str]) -> list[Summary]:
        """Jobs with a tag, or, where that is "", those that wait for their time, with ids above `after`, for these
        upstreams (none: for all).
        """

    def meant(self) -> Mapping[str, Meaning]:
        """What the names of upstreams mean, or meant last."""

    def mean(self, meanings: Mapping[str, Meaning]) -> None:
        """They mean this from now on."""

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Failed tokens, in the order of places."""

    def failed_singles(self, which: Which, limit: int) -> list[Single]:
        """The same as Singles, from the first. Within a turn nobody else deals with them before it ends."""

    def is_counted(self, job: int) -> bool:
        """Whether a finished job is among those that are kept, and not only because of its failed tokens."""

    def discard(self, which: Which, limit: int) -> int:
        """Forget up to `limit` failed tokens. Returns how many."""

    def prune_failed(self, before: float, most: int) -> tuple[int, bool]:
        """Forget some that failed before a time, and of the oldest if there are more than `most`. Returns how many were
        forgotten only because there are too many, and whether there is more to do.
        """

    def forget_jobs(self, before: float, most: int) -> bool:
        """Forget some of the jobs that finished before a time, and of those that finished first if finished jobs have
        more than `most` tokens. Returns whether there was something to forget.
        """

    def prune_keys(self, now: float) -> None:
        """Forget some of the keys whose time is over."""

    # ------------------------------------------------------------------------------------------------------- the report

    def counts(self) -> tuple[dict[Count, int], dict[Count, int]]:
        """Every counter that is not 0, and of those what was counted here. When it returns, `totals` are exact, whoever
        shares the Store.
        """

    def nodes(self) -> list[Node]:
        """Those who share this Store; none, where nobody can."""

    def latest(self) -> tuple[list[Replaced], list[Unregistered]]:
        """What came to these lists last in this run, the newest first."""

    def page(self, which: str, after: int, limit: int, upstream: str) -> list[Entry]:
        """Entries of a list with numbers above `after`, those of an upstream ("": of all)."""

    def forget(self, which: str, upto: int, upstream: str) -> bool:
        """Delete a list's entries up to a number. Returns whether any entry ever had it; else nothing is deleted."""

    def hand_out(self, which: str, limit: int, upstream: str) -> list[Entry] | None:
        """The first entries of a list, which nobody else who shares the Store gets until they are `handed_out`. None:
        somebody else is handing them out.
        """

    def handed_out(self, which: str, upto: int, upstream: str) -> None:
        """Delete what was handed out, up to a number (0: nothing was)."""

    def newest_entry(self, which: str) -> int:
        """The highest number that an entry of a list has or had."""

    def answers(self, upstream: str) -> list[Bucket]:
        """What was kept of an upstream's answers."""

    def mark(self, upstream: str, first: int, hold: bool) -> None:
        """Mark what an upstream called unregistered, from this number on, as a wave's, or hold it back."""

    def release_held(self, limit: int) -> int:
        """Put some of what is held back into its list. Returns how many."""

    def discard_held(self, limit: int) -> int:
        """Forget some of what is held back. Returns how many."""

    # ------------------------------------------------------------------------------------------------- clocks, and room

    def last_job(self) -> int:
        """The highest job id that is or was there; 0: none."""

    def last_accepted(self) -> float:
        """When the last job was accepted, by the clock of that time; 0: there is none."""

    def oldest(self) -> float | None:
        """When the oldest job with open tokens was accepted, or some of its tokens replayed; None: there is none."""

    def set_back(self, by: float, now: float, latest: float) -> None:
        """Bring due times forward after the clock was set back by `by` seconds (0: it was not): by as much, and to
        `now` for those that would still be after `latest`.
        """

    def room(self) -> tuple[int, int]:
        """How many bytes are used, and how many are free."""

    def used(self) -> int:
        """How many bytes hold something."""

    def overgrown(self) -> bool:
        """Whether somebody who reads in the store keeps it from giving back what is forgotten."""

    def tend(self, least: int) -> bool:
        """Keep house on the disk, with at least `least` free bytes. Returns whether there is a reserve."""

    def make_way(self) -> None:
        """Write down what is only in the log: it may be that which fills the disk."""

    def use_reserve(self) -> bool:
        """Give up the reserve. Returns whether there was one."""

    def close(self) -> None:
        """Nothing can be called any more."""
