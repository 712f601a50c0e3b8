"""State: what is decided about messages, from their acceptance to their end.

The state process owns the only Store. Its verbs are whole steps in a message's life; State decides on packs that it has
in memory (module backlog), and has the Store make each change at once, so "accepted", "settled", the counters and the
lists cannot disagree. Promises:

* When `accept` returns, the jobs are on disk: the Store's commit is fsynced before it returns.
* Every verb may be repeated: a caller whose answer was lost, because this process died, calls again. (A repeated replay
  or discard does nothing twice, either; but it cannot tell again how many there were.)
"""

import math
import random
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from gocm_lib.message.job import Slice, job_time
from gocm_lib.message.outcome import (
    BLAMES_UPSTREAM,
    FIRST_ANSWERS,
    INVALID,
    KEPT_FAILURES,
    TROUBLE,
    Outcome,
    Result,
    Verdict,
)
from gocm_lib.message.retry import LONGEST_RETRY_AFTER, Action, Held, Policy, Ruling, next_step, spread
from gocm_lib.message.suspect import COMPANY, FATAL, LOSSES, InFlight, load, unrest
from gocm_lib.process import log
from gocm_lib.state import packs as packing
from gocm_lib.state import turns
from gocm_lib.state.admission import DISK_WAIT, Drain, Keeping, Usage, drain_rate, drained, refuse
from gocm_lib.state.backlog import Backlog, Loaded, Piece, slices
from gocm_lib.state.blame import remember
from gocm_lib.state.contract import (
    AT_ONCE,
    LISTS,
    MANY_DEFERRED,
    MANY_SHOWN,
    Accepted,
    Cancelled,
    Claimed,
    Count,
    Entry,
    Failed,
    Full,
    Hold,
    Known,
    Meaning,
    NotKept,
    Overtaken,
    Passing,
    Past,
    Place,
    Refused,
    Shared,
    Snapshot,
    Status,
    Summary,
    Which,
)
from gocm_lib.state.pace import Pace
from gocm_lib.state.pacing import Pacing
from gocm_lib.state.packs import Pack
from gocm_lib.state.store import CANCELLED, FAILED, OPEN, OVER, End, Finish, Single, Store
from gocm_lib.state.waves import Bucket, Tally, Watch, minute

HOUSEKEEPING, SOON = 1.0, 0.05  # seconds between two looks at what has grown too old; while there is much of it
REFUSALS_NOTED = 60.0  # seconds: how often the log is told that messages are refused
WOKEN = 100  # packs that get their turn at once, of those whose time has come
_RULED = TROUBLE | {Verdict.PUT_OFF, Verdict.HELD, Verdict.RETURNED}  # verdicts that do not say what becomes of a token
# Of those, after which a token is as good as not sent, unless it is charged.
_UNTRIED = BLAMES_UPSTREAM | {Verdict.RETURNED}
_GOES_ON = (Action.RETURN, Action.RETRY, Action.SET_ASIDE)  # after which a token is sent again, or may be replayed
LATE = 1.0  # seconds from a job's id to its life, if it was to be sent later
CLOCK_STEP = 1.0  # seconds by which the clock must go back before we take it for set back
SENDERS_DIED = f"its sender died {FATAL} times"  # why a token has failed
LOOKED_UP_AGAIN = 0.25  # seconds between two looks in the Store for a job that somebody waits for
NODES_DIED = "every node that sent it died"
ALONE_EVERY = 0.25  # seconds from the turn of one suspect that must be alone at a node to the next, at least


class _Feed(NamedTuple):
    """What the last claim said: whom it was for, how many tokens of each upstream may be in hand, and which upstreams
    have a credential.
    """

    generation: int
    in_hand_limits: Mapping[str, int]
    ready: Mapping[str, float]


class _Token(NamedTuple):
    """A token in somebody's hand (`holder` 0: that waits), for one who decides about it: a position in its pack, or a
    Single.
    """

    pack: Loaded
    holder: int
    bit: int
    single: Single | None
    job: int
    held: Held

    def becomes(self, state: int, attempts: int, due_at: float, **more: Any) -> Single:
        """The Single that it is from now on."""
        pack, before, n = self.pack, self.single, self.held.n
        rank = turns.rank(turns.lane_of(before.rank) if before else pack.lane, due_at * 1e6)
        since = before.since if before else 0.0
        fields = {"charged": self.held.charged, "since": since, **more}
        return Single(self.job, n, pack.upstream, rank, due_at, attempts=attempts, state=state, **fields)


class _Work:
    """A change in the making."""

    def __init__(self, backlog: Backlog, now: float) -> None:
        self.backlog = backlog
        self.now = now
        self.singles: dict[tuple[int, int], Single] = {}
        self.ended: defaultdict[Loaded, list[tuple[int, int, Sequence[str]]]] = defaultdict(list)
        self.counts: Counter[Count] = Counter()
        self.opened: Counter[str] = Counter()
        self.at_once: Counter[str] = Counter()  # tokens that were delivered at the first attempt, not in `counts` yet
        self.revived = 0
        self.replaced: list[tuple[str, str, str]] = []
        self.unregistered: list[tuple[str, str, bool, bool]] = []
        self.invalid: list[tuple[str, str, str]] = []
        self.answers: dict[str, tuple[Bucket, bool]] = {}
        self.told: list[tuple[str, str]] = []  # what the log is told of ends: why, and the token

    def deliver(self, pack: Loaded, holder: int, job: int, bits: int) -> None:
        """Positions of a job have ended where they were."""
        count = bits.bit_count()
        self.backlog.leave(pack, holder, bits)
        self.backlog.end(pack, job, count)
        self.opened[pack.upstream] -= count

    def note(self, pack: Loaded, bits: int, result: Result) -> None:
        """Positions of a pack, all of the job that a result is about, were delivered; remember the upstream's ids."""
        index, receipts = pack.index(result.job), result.receipts
        first = pack.span(result.job, result.n, 1).bit_length() - 1
        assert index >= 0
        for low, high in packing.runs(bits):
            self.ended[pack].append((low, high - low, receipts[low - first : high - first]))

    def become(self, token: _Token, now: Single) -> None:
        """A token is this Single from now on."""
        pack = token.pack
        if token.single:
            self.backlog.drop(pack, token.holder, token.single)
        else:
            self.backlog.leave(pack, token.holder, token.bit)
        self.singles[now.job, now.n] = now
        if now.state == OPEN:
            self.backlog.put(now)
        else:
            self.backlog.end(pack, now.job, 1)
            self.opened[pack.upstream] -= 1

    def finish(self) -> Finish | None:
        """The change; None: nothing has changed."""
        changed = self.backlog.changes()
        if not (changed or self.singles or self.counts):
            return None
        return Finish(
            self.now,
            changed,
            self.opened,
            self.revived,
            list(self.singles.values()),
            [_end(pack, segments, self.now) for pack, segments in self.ended.items()],
            self.counts,
            self.replaced,
            self.unregistered,
            self.invalid,
            self.answers,
        )


class State(Shared):
    """The shared state, for one caller at a time (module loop)."""

    def __init__(
        self,
        store: Store,
        policy: Policy,
        keeping: Keeping,
        paces: Mapping[str, Pace],
        draw: Callable[[], float] = random.random,
        living: Collection[int] = (),
    ) -> None:
        """`living` are the generations that may have something in hand, of a state process that died."""
        self.store = store
        self.policy = policy
        self.keeping = keeping
        self.draw = draw
        self.pacing = Pacing(paces, policy)
        self.living = set(living)
        self.looked_up: dict[int, float] = {}  # jobs that are awaited, and when to look in the Store for them again
        self.last_suspect = 0.0  # until when the turns are given away of suspects that were put off
        self.backlog = Backlog(store, store.last_job() if living else 0)
        self.waves: dict[str, Watch] = {}
        self.drain = Drain(0.0, 0.0)
        self.refused_at = -REFUSALS_NOTED  # when the log was last told of refusals
        self.latest = 0.0  # the latest time that anybody told us
        self.tidied = 0.0  # when we last kept house
        self.deaths: deque[float] = deque(maxlen=FATAL)  # when senders died, but for those that a lone suspect ended
        self.crashes: defaultdict[int, dict[str, int]] = defaultdict(dict)  # by generation and sender: tokens set aside
        self.generation = 0  # the newest; older ones claim nothing more
        self.batches: dict[int, tuple[int, list[Slice]]] = {}  # the last batch each generation was given
        self.feed: _Feed | None = None
        # The number of the last answer that packs went straight through with: above those of who was here before.
        self.straight = time.monotonic_ns()
        self.unseen: dict[int, tuple[int, list[int]]] = {}  # those of which nobody has said that he had them
        self.sound: OrderedDict[int, None] = OrderedDict()  # jobs whose messages are good, as an answer has shown
        # Jobs whose first answers found the message bad: why, and how often.
        self.rejected_messages: dict[int, tuple[str, int]] = {}
        self.together = False  # whether what is done now is a part of a turn
        self.busy = False  # whether there is more to forget, and soon
        self._serve()

    def _serve(self) -> None:
        """Find out what the Store has of the upstreams that there are."""
        self.store.serve(self.pacing.names)
        self.pacing.stopped = self.store.held()
        for upstream in self.pacing.names:
            self._wave(upstream)

    def _wave(self, upstream: str) -> Watch:
        """Whether there is a wave of an upstream's answers."""
        if upstream not in self.waves:
            self.waves[upstream] = Watch(self.store.answers(upstream))
        return self.waves[upstream]

    def follow(self, rates: Mapping[str, float], meanings: Mapping[str, Meaning], now: float) -> None:
        limits = self.keeping.limits._replace(upstreams=max(1, len(rates)))
        self.keeping = self.keeping._replace(limits=limits)
        self.pacing.follow(rates, now)
        self.store.mean(meanings)
        self._serve()

    def hold(self, upstream: str, by: str, now: float) -> None:
        self.store.hold(upstream, Hold(now, by))
        self.pacing.stopped = self.store.held()

    def let_go(self, upstream: str) -> bool:
        held = upstream in self.store.held()
        if held:
            self.store.let_go(upstream)
        self.pacing.stopped = self.store.held()
        return held

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Accepts and settles in this block are one transaction: all of them are kept, or none has happened."""
        before = self.rejected_messages.copy(), self.unseen.copy()
        self.backlog.begin_turn()
        self.together = True
        try:
            with self.store.turn():
                yield
        except BaseException:
            self.backlog.undo_turn()
            self.rejected_messages, self.unseen = before
            raise
        finally:
            self.together = False
        self.backlog.end_turn()

    @contextmanager
    def _change(self, now: float) -> Iterator[_Work]:
        """Decide in this block; then the Store makes the change, or all is as it was."""
        rejected = self.rejected_messages.copy()
        self.backlog.begin()
        work = _Work(self.backlog, now)
        try:
            yield work
            if change := work.finish():
                self.store.finish(change)
        except BaseException:
            self.backlog.rollback()
            self.rejected_messages = rejected
            raise
        self.backlog.commit()

    # ------------------------------------------------------------------------------------------------------- accepting

    def accept(self, packs: Sequence[Pack], seen: int | None = None) -> Accepted:
        if seen is not None:
            self._take_back(seen)
        new: list[Pack] = []
        idle = self._idle(packs) if seen is not None and packs else set()
        try:
            try:
                answers, new = self._accept(packs)
            except Overtaken:
                if self.together:
                    raise
                answers, new = self._accept(packs)
        except Full:
            if self.together:
                raise
            self.store.make_way()  # it may be the log that fills it
            full = Refused(507, "the disk is full", DISK_WAIT)
            answers = {job: full for each in packs for job, _, _ in each.jobs}
        if refused := [answer for answer in answers.values() if isinstance(answer, Refused)]:
            self._note_refusal(refused[0], packs[0].since)
        gone = self._go_straight([each for each in new if each.upstream in idle])
        for each in new:
            self.backlog.arrive(each, self.generation_fed if each.id in gone else 0)
        if not gone:
            return Accepted(answers)
        self.straight += 1
        self.unseen[self.straight] = self.generation_fed, gone
        jobs = [job for each in new if each.id in gone for job, _, _ in each.jobs]
        return Accepted(answers, self.straight, self.generation_fed, jobs)

    @property
    def generation_fed(self) -> int:
        """The generation that the last claim was for; 0: there was none."""
        return self.feed.generation if self.feed else 0

    def _accept(self, packs: Sequence[Pack]) -> tuple[dict[int, NotKept], list[Pack]]:
        """Keep the jobs whose requests are new and for which there is room. Returns what became of the others, and the
        packs that were kept.
        """
        known = self.store.known([key for each in packs for key in each.keys])
        again = {job: None for each in packs for job, _, _ in each.jobs if job not in known and self.store.has(job)}
        again |= {job: None for job, answer in known.items() if answer == Known(job)}
        new = packing.without(packs, {**known, **again}) if known or again else list(packs)
        refused = self._make_room(new) if new else {}
        if refused:
            new = packing.without(new, refused)
        self._keep(new)
        answers: dict[int, NotKept] = dict(refused)
        for job, answer in known.items():
            if job not in again:
                # Of two alike in one commit the second is what the first is.
                answers[job] = refused.get(answer.job, answer) if isinstance(answer, Known) else answer
        return answers, new

    def _make_room(self, packs: Sequence[Pack]) -> dict[int, Refused]:
        """The jobs for which there is no room, by id. What is over is forgotten first."""
        rate = drain_rate(self.drain, max(each.since for each in packs))
        used, free = self.store.room()
        size, tokens = packing.disk_size(packs), Counter[str]()
        for each in packs:
            tokens[each.upstream] += each.size
        together = [(count, self._usage(name, used + size, free - size)) for name, count in tokens.items()]
        if not any(refuse(count, usage, self.keeping.limits, rate) for count, usage in together):
            return {}
        if self._may_make_room(packs) and self.store.forget_jobs(math.inf, 0):
            return self._make_room(packs)
        refused: dict[int, Refused] = {}
        kept: Counter[str] = Counter()
        for each in packs:
            for job, count, _ in each.jobs:
                usage = self._usage(each.upstream, used, free)
                own = kept[each.upstream]
                usage = usage._replace(pending=usage.pending + kept.total(), of_upstream=usage.of_upstream + own)
                if no := refuse(count, usage, self.keeping.limits, rate):
                    refused[job] = no
                    continue
                share = packing.disk_size([each]) * count // each.size
                used, free = used + share, free - share
                kept[each.upstream] += count
        return refused

    def _may_make_room(self, packs: Sequence[Pack]) -> bool:
        """Whether forgetting what is over could make room for any of these jobs. Not when too many tokens are pending;
        nor while a reader keeps the Store from giving back what it has.
        """
        share, opened = self.keeping.limits.share, self.store.totals.open
        fits = any(opened.get(each.upstream, 0) + size <= share for each in packs for _, size, _ in each.jobs)
        return fits and not self.store.overgrown()

    def _usage(self, upstream: str, used: int, free: int) -> Usage:
        totals = self.store.totals
        return Usage(totals.tokens, used, free, totals.open.get(upstream, 0), self._reserved(upstream, totals.open))

    def _reserved(self, upstream: str, opened: Mapping[str, int]) -> int:
        """How much room is kept for the upstreams but this one."""
        if self.keeping.limits.upstreams < 3:
            return 0  # the share of the one says it all
        reserve = self.keeping.limits.reserve
        return sum([max(0, reserve - opened.get(each, 0)) for each in self.pacing.names if each != upstream])

    def _refuses(self) -> Refused | None:
        """Why not even the smallest message for the upstream with the most room would be taken now; None: it would."""
        totals = self.store.totals
        several = self.keeping.limits.upstreams > 1
        least = min(self.pacing.names, key=lambda each: totals.open.get(each, 0)) if several else ""
        usage = self._usage(least, *self.store.room())
        if not several:
            usage = usage._replace(of_upstream=totals.tokens)
        return refuse(1, usage, self.keeping.limits, 0.0)

    def _keep(self, packs: Sequence[Pack]) -> None:
        counts: Counter[Count] = Counter()
        for each in packs:
            counts[Count("accepted_messages", each.upstream)] += len(each.jobs)
            counts[Count("accepted_tokens", each.upstream)] += each.size
        if packs:
            self.store.keep(packs, counts)

    def _note_refusal(self, refused: Refused, now: float) -> None:
        if not 0 <= now - self.refused_at < REFUSALS_NOTED:
            self.refused_at = now
            log.logger.warning("messages are refused: %s; see gocm help limits", refused.reason)

    # ------------------------------------------------------------------------------------------------ straight through

    def _idle(self, packs: Sequence[Pack]) -> set[str]:
        """The upstreams of these packs that nothing waits for, if somebody is fed."""
        feed = self.feed
        if feed is None or feed.generation < self.generation or feed.generation in self.living:
            return set()
        now = max([self.latest, *(each.since for each in packs)])
        return {each.upstream for each in packs if self.backlog.is_idle(each.upstream, now)}

    def _go_straight(self, packs: Sequence[Pack]) -> list[int]:
        """Which of these packs, of upstreams that nothing waits for, the generation that is fed gets at once: those of
        an upstream that may all go now. So nobody overtakes.
        """
        feed = self.feed
        gone: list[int] = []
        if feed is None:
            return gone
        self.pacing.stopped = self.store.held()
        for upstream in {each.upstream for each in packs}:
            mine = [each for each in packs if each.upstream == upstream]
            count, now = sum([each.size for each in mine]), max(self.latest, *(each.since for each in mine))
            room = feed.in_hand_limits.get(upstream, 0) - self.backlog.in_hand[feed.generation, upstream]
            if upstream not in feed.ready or upstream in self.pacing.pauses or room < count or mine[0].lane < 0:
                continue
            if not self.pacing.holds(upstream, now) and self.pacing.allow(upstream, now)[0] >= count:
                self.pacing.sent(upstream, count, mine[0].id, now)
                gone += [each.id for each in mine]
        return gone

    def _take_back(self, seen: int) -> None:
        """Whoever asks now has had all answers up to number `seen`: what went with others reached nobody."""
        for number in [number for number in self.unseen if number > seen]:
            generation, lost = self.unseen[number]
            for each in lost:
                pack = self.backlog.packs.get(each)
                if pack and (held := pack.held.get(generation)):  # it may have been released meanwhile
                    self.backlog.give_back(pack, generation, held)
        self.unseen.clear()

    # --------------------------------------------------------------------------------------------------------- claiming

    def begin(self, generation: int) -> None:
        """From now on only this generation, or a newer one, claims; a claim of an older one that waits ends."""
        self.generation = max(self.generation, generation)

    def claim(
        self,
        generation: int,
        batch: int,
        in_hand_limits: Mapping[str, int],
        ready: Mapping[str, float],
        now: float,
        wait: float,
    ) -> Claimed:
        self.keep_house(now)
        return self.look(generation, batch, in_hand_limits, ready, now)[0]  # module loop waits

    def look(
        self,
        generation: int,
        batch: int,
        in_hand_limits: Mapping[str, int],
        ready: Mapping[str, float],
        now: float,
    ) -> tuple[Claimed, float]:
        """A claim, without waiting and without keeping house. When there is nothing yet, also in how many seconds there
        could be something merely because time passes; 0: the answer is final.
        """
        if generation < self.generation:
            return Claimed([], {}), 0.0
        last, given = self.batches.get(generation, (0, []))
        if batch <= last:
            return Claimed(given if batch == last else [], {}), 0.0
        self.feed = _Feed(generation, in_hand_limits, ready)
        self.pacing.stopped = self.store.held()
        self._heed_others(now)
        found: list[Slice] = []
        late: dict[int, float] = {}
        rest = 60.0
        for upstream, since in ready.items() if generation not in self.living else ():
            self.pacing.end_pause(upstream, since, now)
            more, idle = self._claim(generation, in_hand_limits.get(upstream, 0), upstream, late, now)
            found += more
            rest = min(rest, idle)
        if found:
            self.batches[generation] = batch, found
        return Claimed(found, self.pacing.news(), late), 0.0 if found else max(0.001, rest)

    def _claim(
        self, generation: int, room: int, upstream: str, late: dict[int, float], now: float
    ) -> tuple[list[Slice], float]:
        """One upstream's share of a claim, and in how many seconds there could be more merely because time passes. Adds
        to `late` what has waited since another time than its id says (Claimed.since).
        """
        free = room - self.backlog.in_hand[generation, upstream]
        if free <= 0:
            return [], 60.0
        allowed, rest = self.pacing.allow(upstream, now)
        if not allowed:
            return [], rest
        due = self.backlog.next_due(upstream, now)
        if due is None or due > now:
            return [], 60.0 if due is None else due - now
        with self._change(now) as work:
            last_trouble = self.pacing.probing(upstream)
            if last_trouble:
                pieces = self.backlog.probe(upstream, last_trouble, now)
            else:
                pieces = self.backlog.take(upstream, min(free, allowed), now)
            if any([piece.single and piece.single.reason == CANCELLED for piece in pieces]):
                pieces = self._without_cancelled(work, pieces)
            if any(piece.expires_at <= now for piece in pieces):
                pieces = self._set_aside_expired(work, pieces)
            if self.pacing.holds(upstream, now):
                pieces = self._put_off_held(work, pieces)
            if any([piece.pack.losses >= LOSSES for piece in pieces]):
                pieces = self._put_off_suspects(work, generation, pieces)
            taken = self.backlog.hold(pieces, generation)
            late |= {p.run.job: p.job.accepted_at for p in pieces if p.job.accepted_at > job_time(p.run.job) + LATE}
            self._foresee_deaths(work, generation, pieces)
        found = slices(pieces)
        if taken:
            self.pacing.sent(upstream, taken, found[0].job, now)
        self._log_ends(work.told)
        return found, 0.0

    def _set_aside_expired(self, work: _Work, pieces: Iterable[Piece]) -> list[Piece]:
        """Set aside what is too old. Returns the rest."""
        left = []
        for piece in pieces:
            if piece.expires_at > work.now:
                left.append(piece)
                continue
            for token in _tokens_of(piece):
                attempts = piece.run.attempt - 1
                work.become(token, token.becomes(FAILED, attempts, work.now, failure="expired", reason="too old"))
                work.told.append(("too old", token.held.token))
            work.counts[Count("failures", piece.pack.upstream, "expired")] += len(piece.run.tokens)
        return left

    def _without_cancelled(self, work: _Work, pieces: Iterable[Piece]) -> list[Piece]:
        """End what was on its way when it was cancelled, and came back because its senders ended. Returns the rest."""
        left = []
        for piece in pieces:
            if piece.single and piece.single.reason == CANCELLED:
                for token in _tokens_of(piece):
                    self._end_cancelled(work, token, piece.run.attempt - 1)
            else:
                left.append(piece)
        return left

    def _put_off_held(self, work: _Work, pieces: Iterable[Piece]) -> list[Piece]:
        """Put off tokens that must wait because they, or their topic, have had too much. Returns the rest."""
        left = []
        for piece in pieces:
            upstream, first, bit = piece.pack.upstream, piece.run.first, piece.bits
            for token in _tokens_of(piece):
                until = spread(self.pacing.held(upstream, token.held.token, work.now), work.now, self.draw())
                if until:
                    before = token.single
                    kept = {"deaths": before.deaths, "reason": before.reason} if before else {}
                    work.become(token, token.becomes(OPEN, piece.run.attempt - 1, until, waits=True, **kept))
                else:
                    run = piece.run._replace(first=first, tokens=[token.held.token])
                    left.append(piece._replace(run=run, bits=bit & -bit))
                first, bit = first + 1, bit & (bit - 1)
        return left

    def _put_off_suspects(self, work: _Work, generation: int, pieces: Iterable[Piece]) -> list[Piece]:
        """Of packs that lost their node too often set those tokens aside with which nodes died, and put off those that
        may not fly beside others now. Returns the rest, each as a Single.
        """
        free = [piece for piece in pieces if piece.pack.losses < LOSSES]
        suspects = [(each, token) for each in pieces if each.pack.losses >= LOSSES for token in _tokens_of(each)]
        doomed = {(t.job, t.held.n): t for _, t in suspects if t.single and t.single.deaths >= FATAL}
        if doomed:
            self._set_aside_doomed(work, generation, doomed, NODES_DIED)
            return free  # others of their jobs may have gone with them: what is left comes again at once
        company = self.backlog.suspects_in_hand()
        for piece, token in suspects:
            before, attempts = token.single, piece.run.attempt - 1
            deaths, reason = max(1, before.deaths if before else 0), before.reason if before else ""
            if company + load(deaths) > COMPANY:
                self.last_suspect = max(work.now, self.last_suspect) + ALONE_EVERY * load(deaths) / COMPANY
                later = token.becomes(OPEN, attempts, self.last_suspect, waits=True, deaths=deaths, reason=reason)
                work.become(token, later)
                continue
            company += load(deaths)
            if not before:
                self.backlog.leave(token.pack, 0, token.bit)
            now = token.becomes(OPEN, attempts, work.now, deaths=deaths, reason=reason)
            run = piece.run._replace(first=token.held.n, tokens=[token.held.token])
            free.append(piece._replace(run=run, bits=0, single=now))
        return free

    def _foresee_deaths(self, work: _Work, generation: int, pieces: Iterable[Piece]) -> None:
        """Write down that this node died of what it is about to send of packs that lost their node too often."""
        for pack, _, _, _, single in pieces:
            if single and pack.losses >= LOSSES:
                foreseen = single._replace(deaths=single.deaths + 1)
                work.singles[single.job, single.n] = foreseen
                self.backlog.keep_in_hand(pack, generation, foreseen)

    # ---------------------------------------------------------------------------------------------------- keeping house

    def keep_house(self, now: float) -> None:
        """Forget what is too old or too much, keep the disk reserve, notice a clock that was set back."""
        self.busy = self._keep_house(now)

    def _keep_house(self, now: float) -> bool:
        if now < self.latest - CLOCK_STEP:
            self._set_back(self.latest - now, now)
            self.tidied = now - HOUSEKEEPING
        self.latest = now
        if now < self.tidied + HOUSEKEEPING:
            return False
        self._look_for_waves(now)
        self.tidied = now
        try:
            more = self._tidy(now)
            if more:
                self.tidied = now + SOON - HOUSEKEEPING
            return more
        except (Full, Passing) as error:  # what cannot be tidied now can be later, and must not keep anybody waiting
            totals = self.store.totals
            if isinstance(error, Full) and (totals.over or not totals.tokens):
                self.use_reserve()  # to forget and to shrink takes room before it makes some: for the reserve, again
            return False

    def _tidy(self, now: float) -> bool:
        has_reserve = self.store.tend(self.keeping.limits.free_disk)
        self.store.prune_keys(now)
        woken = self.store.wake(now, WOKEN)
        for pack in woken:
            self.backlog.wake(pack)
        more = len(woken) == WOKEN
        if self.store.totals.failed:
            dropped, left = self.store.prune_failed(now - self.keeping.failed_age, self.keeping.max_failed)
            more |= left
            if dropped:
                log.logger.info("%d failed tokens are forgotten: there are more than --max-failed", dropped)
        self._carry_out_orders(now)
        if (sharers := self.store.sharers) > 1:
            self._share()
        self.pacing.divide(sharers)
        if not self.store.totals.over or self.store.overgrown():
            return more
        refused = self._refuses()
        for_room = not has_reserve or (refused and refused.status == 507 and not self.store.overgrown())
        before = math.inf if for_room else now - self.keeping.keep_jobs
        return self.store.forget_jobs(before, self.keeping.max_kept) or more

    def _share(self) -> None:
        """Let the others who share the Store have what we do not get to."""
        self.backlog.closed = list(self.pacing.pauses)
        for upstream in self.pacing.standings:
            if upstream in self.pacing.pauses:
                self.backlog.hand_over(upstream)
            else:
                self.backlog.share(upstream)

    # --------------------------------------------------------------------------------------------------------- settling

    def settle(self, generation: int, results: Sequence[Result], now: float) -> None:
        """Record what became of tokens in a generation's hands; those it does not hold (any more) are passed over."""
        delivered = [result for result in results if _is_plain(result.outcome)]
        others = [result for result in results if not _is_plain(result.outcome)]
        self._hear(delivered, others, now)
        self._heed_others(now)
        first = self.store.newest_entry("notregistered") + 1 if others else 0
        with self._change(now) as work:
            for result in delivered:
                self._settle_delivered(work, generation, result)
            for upstream, count in work.at_once.items():
                work.counts[Count("delivered", upstream)] += count
                work.counts[Count("attempts", upstream)] += count
            settled = [result for result in others if self._settle(work, generation, result)]
            heard = _heard(work.counts, first, now)
            work.answers = {name: (each, each.number > self._wave(name).newest) for name, each in heard.items()}
            self._try_messages(work, settled, {result.job for result in delivered})
        self.drain = drained(self.drain, -work.opened.total(), now)
        for upstream, each in heard.items():
            self.waves[upstream].hear(each.tally, each.first, now)
        self._look_for_waves(now)
        if work.told:
            self._log_ends(work.told)

    def _heed_others(self, now: float) -> None:
        """Slow down to what others who share the Store have found that upstreams take."""
        for upstream, rate in self.store.heard_slowed().items():
            self.pacing.slow_down(upstream, rate, now)

    def _hear(self, delivered: Sequence[Result], others: Sequence[Result], now: float) -> None:
        """Tell Pacing the answers to each upstream's messages."""
        answered = [r for r in others if r.outcome.verdict not in TROUBLE and r.outcome.verdict is not Verdict.RETURNED]
        troubles = [result for result in others if result.outcome.verdict in TROUBLE]
        sound = {r.job for r in (*delivered, *answered) if _finds_sound(r.outcome)} if troubles else set()
        proven = {job: job in sound or self._is_sound(job) for job in {result.job for result in troubles}}
        for upstream in {result.upstream for result in (*delivered, *answered, *troubles)}:
            self.pacing.hear(
                upstream,
                [result for result in (*delivered, *answered) if result.upstream == upstream],
                [result for result in troubles if result.upstream == upstream],
                proven.__getitem__,
                self.backlog.in_hands_of_all(upstream),
                now,
            )
        if slowed := self.pacing.take_slowed():
            self.store.tell_slowed(slowed)

    def _settle_delivered(self, work: _Work, generation: int, result: Result) -> None:
        """Settle tokens that were simply delivered: nearly all of them."""
        upstream, job, n, attempt, _, size, receipts = result
        if attempt == 1 and (whole := self.backlog.end_whole(generation, job, n, size)):
            work.ended[whole[0]].append((whole[1], size, receipts))
            work.opened[upstream] -= size
            work.at_once[upstream] += size
            return
        pack, bits, singles, holder = self.backlog.found(generation, self.living, job, n, attempt, size)
        if pack is None:
            return
        count = bits.bit_count()
        if count:
            work.deliver(pack, holder, job, bits)
            work.note(pack, bits, result)
        for single in singles:
            token = _Token(pack, holder, 0, single, job, Held(single.n, "", single.charged, 0.0, 0.0))
            work.become(token, token.becomes(OVER, attempt, work.now))
            work.note(pack, pack.span(job, single.n, 1), result)
        count += len(singles)
        if count:
            work.counts[Count("delivered", upstream)] += count
            if attempt == 1:
                work.counts[Count("attempts", upstream)] += count

    def _settle(self, work: _Work, generation: int, result: Result) -> bool:
        """Settle a result's tokens that were not simply delivered. Returns whether any of them was in the generation's
        hands.
        """
        _, job, n, attempt, _, size, _ = result
        pack, bits, singles, holder = self.backlog.found(generation, self.living, job, n, attempt, size)
        if pack is None:
            return False
        returned = 0
        for token in self._tokens(pack, holder, job, bits, singles):
            if self._settle_token(work, result, token):
                returned |= token.bit
        if returned:
            self.backlog.give_back(pack, holder, returned)
        return bool(bits or singles)

    def _tokens(self, pack: Loaded, holder: int, job: int, bits: int, singles: Iterable[Single]) -> Iterator[_Token]:
        """Positions and Singles of a job, as tokens in somebody's hand."""
        index = pack.index(job)
        packed = self.backlog.read(pack)[index]
        for low, high in packing.runs(bits):
            for at in range(low, high):
                own = at - pack.starts[index]
                held = Held(packed.place(own), packed.tokens[own], 0, packed.accepted_at, packed.expires_at)
                yield _Token(pack, holder, 1 << at, None, job, held)
        for single in singles:
            since = single.since or packed.accepted_at
            expires_at = packed.expires_at + since - packed.accepted_at
            name = packed.tokens[packed.index_of(single.n)]
            yield _Token(pack, holder, 0, single, job, Held(single.n, name, single.charged, since, expires_at))

    def _settle_token(self, work: _Work, result: Result, token: _Token) -> bool:
        """Settle one token in somebody's hand that was not simply delivered. Returns whether its position in its pack
        is to be given back.
        """
        outcome, held, upstream, now = result.outcome, token.held, result.upstream, work.now
        ruled = outcome.verdict in _RULED
        ruling = self.pacing.rule(result, held, now) if ruled else Ruling(held.charged)
        step = next_step(outcome, ruling, held.expires_at, now, self.draw(), self.policy)
        tried = ruling.charged > held.charged or outcome.verdict not in _UNTRIED
        if step.action in _GOES_ON and token.single and token.single.reason == CANCELLED:
            return self._settle_cancelled(work, result, token, tried)
        if step.action is Action.RETURN:
            if single := token.single:
                back = single._replace(attempts=result.attempt - 1, deaths=0, reason="")
                self.backlog.give_back_single(token.pack, token.holder, back)
                work.singles[single.job, single.n] = back
            return token.single is None
        attempts = result.attempt if tried else result.attempt - 1
        work.counts[Count("attempts", upstream)] += tried and result.attempt == 1
        if step.action is Action.RETRY:
            if outcome.verdict is not Verdict.RETURNED:
                work.counts[Count("retries", upstream, step.counted)] += 1
            more = {"waits": True, "charged": ruling.charged, "reason": step.counted}
            work.become(token, token.becomes(OPEN, attempts, step.due_at, **more))
            return False
        if outcome.verdict is Verdict.DELIVERED:
            self._replace(work, result, token)
            return False
        state = FAILED if step.action is Action.SET_ASIDE else OVER
        work.become(token, token.becomes(state, attempts, now, failure=step.counted, reason=step.reason))
        work.counts[Count("failures", upstream, step.counted)] += 1
        work.told.append((step.reason, held.token))
        if outcome.verdict is Verdict.UNREGISTERED:
            work.counts[Count("notregistered", upstream)] += 1
            wave = bool(self._wave(upstream).since)
            work.unregistered.append((held.token, upstream, wave, wave and self.keeping.hold_waves))
        elif step.counted in INVALID:
            work.invalid.append((held.token, step.counted, upstream))
        return False

    def _settle_cancelled(self, work: _Work, result: Result, token: _Token, tried: bool) -> bool:
        """The same for one that is not to be tried again."""
        self._end_cancelled(work, token, result.attempt if tried else result.attempt - 1)
        if tried and result.attempt == 1:
            work.counts[Count("attempts", result.upstream)] += 1
        return False

    @staticmethod
    def _replace(work: _Work, result: Result, token: _Token) -> None:
        """A token was delivered, and another is to take its place."""
        canonical, n = result.outcome.canonical, token.held.n
        work.become(token, token.becomes(OVER, result.attempt, work.now, canonical=canonical))
        work.counts[Count("delivered", result.upstream)] += 1
        work.counts[Count("canonicals", result.upstream)] += 1
        work.replaced.append((token.held.token, canonical, result.upstream))
        work.note(token.pack, token.pack.span(result.job, n, 1), result)

    def _look_for_waves(self, now: float) -> None:
        """Notice where a wave of unregistered tokens begins or ends. What made it one is a part of it."""
        for upstream, watch in self.waves.items():
            if not watch.look(now):
                continue
            if not watch.since:
                log.logger.warning("upstream %s: the wave of unregistered tokens is over", upstream)
                continue
            answers, unregistered = watch.recent(now)
            self.store.mark(upstream, watch.first(now), self.keeping.hold_waves)
            log.logger.error(
                "upstream %s: %d of the last %d answers say that a token is unregistered, far more than usual: look at "
                "the credentials, the project and the app's APNs environment before anybody deletes tokens; %s; "
                "see gocm help reports",
                upstream,
                unregistered,
                answers,
                "they are held back" if self.keeping.hold_waves else "--hold-waves would hold them back",
            )

    def _try_messages(self, work: _Work, results: Sequence[Result], delivered: set[int]) -> None:
        """Stop the jobs whose first answers all rejected the message itself.

        Any other answer shows that the message is sound, and then nothing more can stop its job. Before it is decided
        here, the pool of each sender already holds back the job's other requests (Pool._judge_message).
        """
        sound = {result.job for result in results if _finds_sound(result.outcome)}
        for job in sound:
            remember(self.sound, job, None)
        sound |= delivered
        for result in results:
            if result.outcome.rejects_message:
                reason, count = self.rejected_messages.get(result.job, (result.outcome.reason, 0))
                count = count * (reason == result.outcome.reason) + result.span
                self.rejected_messages[result.job] = result.outcome.reason, count
        jobs = delivered | {result.job for result in results}
        for job in jobs & self.rejected_messages.keys():
            if job in sound:
                del self.rejected_messages[job]
            elif self.rejected_messages[job][1] >= FIRST_ANSWERS and not self._is_sound(job):
                self._stop(work, job, self.rejected_messages[job][0])
        for job in jobs & self.rejected_messages.keys():
            pack = self.backlog.pack_of(job)
            if pack is None or not pack.open[pack.index(job)]:
                del self.rejected_messages[job]

    def _is_sound(self, job: int) -> bool:
        """Whether the upstream has said something of a token of this job that shows that its message is good."""
        return job in self.sound or self.store.is_sound(job)

    def _stop(self, work: _Work, job: int, reason: str) -> None:
        """End the tokens of a job that nobody has in hand: its message is bad."""
        pack, bits, stored = self.backlog.waiting_of(job)
        if pack is None:
            return
        singles = {each.n: each for each in stored} | {n: each for (of, n), each in work.singles.items() if of == job}
        waiting = [
            each
            for each in singles.values()
            if each.state == OPEN and not self.backlog.singles.get((job, each.n), (each, 0))[1]
        ]
        for token in self._tokens(pack, 0, job, bits, waiting):
            attempts = token.single.attempts if token.single else 0
            work.become(token, token.becomes(OVER, attempts, work.now, failure="bad_message", reason=reason))
            work.counts[Count("failures", pack.upstream, "bad_message")] += 1

    @staticmethod
    def _log_ends(ends: list[tuple[str, str]]) -> None:
        for reason, count in Counter(reason for reason, _ in ends).items():
            example = next(token for why, token in ends if why == reason)
            log.logger.info("not delivered: %s: %d tokens, one is %s", reason, count, log.token(example))

    # ------------------------------------------------------------------------------------------------- senders that die

    def record_crash(self, generation: int, sender: str, flights: Sequence[InFlight], now: float) -> int:
        """Hold the death of a sender of this generation against what it had in flight (module suspect); how many
        tokens were set aside for it. A sender dies once, however often this is told.
        """
        known = self.crashes[generation]
        if sender in known:
            return known[sender]
        alone = len({in_flight.job for in_flight in flights}) == 1
        spare = not alone or unrest(self.deaths, now)
        with self._change(now) as work:
            doomed = self._count_deaths(work, generation, flights)
            if not spare:
                self._set_aside_doomed(work, generation, doomed, SENDERS_DIED)
        if not (alone and doomed):
            self.deaths.append(now)
        known[sender] = len(work.told)
        self._log_ends(work.told)
        return len(work.told)

    def _count_deaths(self, work: _Work, generation: int, flights: Sequence[InFlight]) -> dict[tuple[int, int], _Token]:
        """Count a death for each token that a sender of this generation had in flight. Returns those for which it would
        be one too many, which is not counted.
        """
        suspects: dict[tuple[int, int], _Token] = {}  # each once, however it was noted: it is one death
        for job, low, high in flights:
            for token in self._in_hand(generation, job, low, high - low + 1):
                suspects[job, token.held.n] = token
        doomed = {}
        for place, token in suspects.items():
            before = token.single
            deaths = (before.deaths if before else 0) + (token.pack.losses < LOSSES)  # else it was foreseen
            if deaths >= FATAL:
                doomed[place] = token
                continue
            rank = turns.rank(token.pack.lane, job_time(place[0]) * 1e6)
            now = before or Single(*place, token.pack.upstream, rank, token.held.since)
            if not before:
                self.backlog.leave(token.pack, token.holder, token.bit)
            work.singles[place] = now = now._replace(deaths=deaths)
            self.backlog.keep_in_hand(token.pack, token.holder, now)
        return doomed

    def _in_hand(self, generation: int, job: int, n: int, size: int) -> list[_Token]:
        """What a generation has in hand of `size` tokens of a job from place `n` on, for whatever attempt."""
        pack, bits, _, holder = self.backlog.found(generation, self.living, job, n, 1, size)
        if pack is None:
            return []
        singles = [
            single
            for place in range(n, n + size)
            for single, whose in [self.backlog.singles.get((job, place), (None, 0))]
            if single and whose == holder
        ]
        return list(self._tokens(pack, holder, job, bits, singles))

    def _set_aside_doomed(
        self, work: _Work, generation: int, doomed: Mapping[tuple[int, int], _Token], reason: str
    ) -> None:
        """Set tokens aside that have ended too many senders or nodes, which is the `reason`. When a second token of a
        job is set aside so, the message is at fault, and the whole job is.
        """
        for job in {job for job, _ in doomed}:
            mine = [token for place, token in doomed.items() if place[0] == job]
            for token in mine:
                assert token.single
                work.counts[Count("attempts", token.pack.upstream)] += token.single.attempts == 0
            others: list[_Token] = []
            if self.store.died(job, reason):
                pack, bits, singles = self.backlog.waiting_of(job)
                assert pack
                waiting = self._tokens(pack, 0, job, bits, singles)
                others = [*waiting, *self._in_hand(generation, job, 0, pack.places_of(job))]
            for token in {(each.job, each.held.n): each for each in [*others, *mine]}.values():
                attempts = token.single.attempts if token.single else 0
                aside = token.becomes(FAILED, attempts, work.now, failure="killed_senders", reason=reason)
                work.become(token, aside)
                work.counts[Count("failures", token.pack.upstream, "killed_senders")] += 1
                work.told.append((reason, token.held.token))

    def release(self, generation: int) -> int:
        """Make ready again what a generation that has ended still has in hand; how many."""
        released = self.backlog.release(generation)
        # A claim of that generation that comes now was given up long ago by who asked for it.
        self.generation = max(self.generation, generation + 1)
        self.crashes.pop(generation, None)
        self.batches.pop(generation, None)
        self.living.discard(generation)
        if not self.living:
            self.store.resume()
        if self.backlog.barrier and not self.living:
            released += self.backlog.lift_bar()
        return released

    # -------------------------------------------------------------------------------------------------- what others ask

    def make_way(self) -> None:
        """Write down what the Store has only in its log, unless somebody reads in it."""
        self.store.make_way()

    def use_reserve(self) -> None:
        """Give up the disk reserve, if there is one, so that work can go on."""
        if self.store.use_reserve():
            log.logger.warning("the disk is full: going on in the spool's reserve")

    def snapshot(self) -> Snapshot:
        """What there is to report."""
        counts, own = self.store.counts()  # first: the totals are exact then
        totals, pauses = self.store.totals, self.pacing.pauses
        refused = self._refuses()
        replaced, unregistered = self.store.latest()
        return Snapshot(
            counts=counts,
            pending=totals.jobs,
            tokens=totals.tokens,
            claimed=self.backlog.claimed_tokens(),
            deferred=self.backlog.deferred([each for each, n in totals.open.items() if n], MANY_DEFERRED),
            failed=totals.failed,
            listed={which: totals.listed[which] for which in LISTS},
            latest_replaced=replaced,
            latest_unregistered=unregistered,
            oldest=self.store.oldest() if totals.tokens else None,
            keys=totals.keys,
            over=totals.over,
            bytes=self.store.used(),
            paused_until={upstream: paused.until for upstream, paused in pauses.items()},
            pause_reasons={upstream: paused.reason for upstream, paused in pauses.items()},
            refusing=refused.reason if refused else "",
            waves={upstream: watch.since for upstream, watch in self.waves.items() if watch.since},
            held=totals.listed["held"],
            own=own,
            nodes=self.store.nodes(),
            held_upstreams=dict(self.store.held()),
            waiting=(waiting := {upstream: count for upstream, count in totals.open.items() if count}),
            meant={name: meaning for name, meaning in self.store.meant().items() if name in waiting},
        )

    def page(self, which: str, after: int, limit: int, upstream: str = "") -> Sequence[Entry]:
        """Entries of one of LISTS numbered above `after`."""
        return self.store.page(which, after, limit, upstream)

    def hand_out(self, which: str, limit: int, upstream: str = "") -> Sequence[Entry] | None:
        return self.store.hand_out(which, limit, upstream)

    def handed_out(self, which: str, upto: int, upstream: str = "") -> None:
        self.store.handed_out(which, upto, upstream)

    def forget(self, which: str, upto: int, upstream: str = "") -> bool:
        """Delete a list's entries up to number `upto`: somebody has them. Whether there ever was that number."""
        return self.store.forget(which, upto, upstream)

    def jobs(self, tag: str, after: int, limit: int, upstreams: Sequence[str] = ()) -> list[Summary]:
        return self.store.summaries(tag, after, limit, upstreams)

    def status(self, job: int, state: str, after: int, limit: int) -> Status | Past | None:
        """What became of a job."""
        found = self.store.status(job, *self.backlog.places(job), state, after, limit)
        if not isinstance(found, Status):
            return found
        if held := self.pacing.stopped.get(found.upstream):
            return found._replace(paused=f"somebody holds it{f', {held.by}' if held.by else ''}")
        if found.upstream not in self.pacing.names and not found.finished:
            return found._replace(paused="there is no such upstream any more")
        paused = self.pacing.pauses.get(found.upstream)
        return found._replace(paused=paused.reason) if paused else found

    def ended(self, jobs: Sequence[int], anyway: Sequence[int], now: float) -> dict[int, Status | Past | None]:
        found = {job: self.status(job, "", -1, MANY_SHOWN) for job in anyway}
        before, self.looked_up = self.looked_up, {}
        for job in jobs:
            pack = self.backlog.of_job.get(job)
            if pack and pack.open[pack.index(job)]:
                continue
            # What is not in memory has ended, or all of it is put off: only the Store knows.
            if now < (look_at := before.get(job, 0.0)):
                self.looked_up[job] = look_at
                continue
            self.looked_up[job] = now + LOOKED_UP_AGAIN
            status = self.status(job, "", -1, MANY_SHOWN)
            if not isinstance(status, Status) or status.finished:
                found[job] = status
        return found

    def failed(self, which: Which, after: Place, limit: int) -> list[Failed]:
        """Tokens that were set aside as failed."""
        return self.store.failed(which, after, limit)

    def discard(self, which: Which) -> int:
        """Forget some of the failed tokens; how many, at most AT_ONCE."""
        return self.store.discard(which, AT_ONCE)

    def release_held(self) -> int:
        """Put some of the entries that are held back into the list; how many, at most AT_ONCE."""
        return self.store.release_held(AT_ONCE)

    def discard_held(self) -> int:
        """Forget some of the entries that are held back; how many, at most AT_ONCE."""
        return self.store.discard_held(AT_ONCE)

    def cancel(self, job: int, now: float) -> Cancelled | Past | None:
        if job <= self.backlog.barrier:
            raise Passing("it is not known yet what is on its way: the state process was replaced a moment ago")
        if self.backlog.pack_of(job) is None and (stored := self.store.own(job)):
            self.backlog.adopt(stored)
        if self.backlog.pack_of(job):
            done = self._cancel(job, now)
            if done.tokens or done.in_air:
                return done
        status = self.store.status(job, (), (), "", -1, 1)
        if not isinstance(status, Status) or status.finished:
            return Cancelled(0, 0) if isinstance(status, Status) else status
        self.store.order(job)
        return Cancelled(0, 0, elsewhere=True)

    def cancel_all(self, jobs: Sequence[int], now: float) -> list[Cancelled | Past | None]:
        done: list[Cancelled | Past | None] = []
        tokens = 0
        with self.turn():  # packs that several are in are read once
            for job in jobs:
                done.append(found := self.cancel(job, now))
                tokens += found.tokens if isinstance(found, Cancelled) else 0
                if tokens >= AT_ONCE:
                    break
        return done

    def _cancel(self, job: int, now: float) -> Cancelled:
        """The same for one of ours."""
        with self._change(now) as work:
            pack, bits, singles = self.backlog.waiting_of(job)
            assert pack
            waiting = self._tokens(pack, 0, job, packing.lowest(bits, AT_ONCE), singles[:AT_ONCE])
            count = 0
            for token in waiting:
                self._end_cancelled(work, token, token.single.attempts if token.single else 0)
                count += 1
            flying = [token for holder in self._holders(pack) for token in self._in_hand_of(pack, holder, job)]
            for token in flying:
                self._mark_cancelled(work, token)
        return Cancelled(count, len(flying))

    def _holders(self, pack: Loaded) -> set[int]:
        """Who may have something of a pack in hand."""
        return {*pack.held, *(holder for (job, _), (_, holder) in self.backlog.singles.items() if job in pack.jobs)} - {
            0
        }

    def _in_hand_of(self, pack: Loaded, holder: int, job: int) -> list[_Token]:
        """What somebody has in hand of a job."""
        bits = pack.span(job, 0, pack.places_of(job)) & pack.held.get(holder, 0)
        mine = self.backlog.singles.items()
        singles = [single for (of, _), (single, whose) in mine if of == job and whose == holder]
        return list(self._tokens(pack, holder, job, bits, singles))

    @staticmethod
    def _end_cancelled(work: _Work, token: _Token, attempts: int) -> None:
        """A token that is not to be sent any more has ended, after so many attempts."""
        work.become(token, token.becomes(OVER, attempts, work.now, failure=CANCELLED))
        work.counts[Count("cancelled", token.pack.upstream)] += 1

    def _mark_cancelled(self, work: _Work, token: _Token) -> None:
        """A token that is on its way is not to be tried again."""
        before = token.single
        if before and before.reason == CANCELLED:
            return
        rank = turns.rank(token.pack.lane, job_time(token.job) * 1e6)
        now = before or Single(token.job, token.held.n, token.pack.upstream, rank, token.held.since)
        if not before:
            self.backlog.leave(token.pack, token.holder, token.bit)
        work.singles[now.job, now.n] = now = now._replace(reason=CANCELLED)
        self.backlog.keep_in_hand(token.pack, token.holder, now)

    def _carry_out_orders(self, now: float) -> None:
        """Cancel what others were asked to, if we have it."""
        for job in self.store.orders():
            while (done := self.cancel(job, now)) and isinstance(done, Cancelled) and done.tokens:
                pass
            if not (isinstance(done, Cancelled) and done.elsewhere):
                self.store.carried_out(job)

    def replay(self, which: Which, now: float) -> int:
        """Send some of the failed tokens again, as many as there is room for; how many, at most AT_ONCE."""
        with self.turn(), self._change(now) as work:
            done = 0
            upstreams = [which.upstream] if which.upstream else {*self.pacing.standings, *self.store.totals.open}
            for upstream in upstreams:
                room = self.keeping.limits.share - self.store.totals.open.get(upstream, 0)
                found = self.store.failed_singles(which._replace(upstream=upstream), max(0, min(AT_ONCE - done, room)))
                self._revive(work, found)
                work.counts[Count("replayed", upstream)] += len(found)
                done += len(found)
        return done

    def _revive(self, work: _Work, found: Sequence[Single]) -> None:
        """Failed tokens of an upstream are ready again, as if they had come now: in the lane of what comes together."""
        sizes = Counter(single.job for single in found)
        counted = {job: self.store.is_counted(job) for job in sizes}
        for single in found:
            rank = turns.rank(turns.lane(sizes[single.job]), work.now * 1e6)
            now = Single(single.job, single.n, single.upstream, rank, work.now, since=work.now)
            if self.backlog.reopen(now, counted[single.job]):
                work.singles[now.job, now.n] = now
                work.opened[now.upstream] += 1
                work.revived += 1

    def last_job(self) -> int:
        """The highest job id on disk. New ids must be above it, whatever the clock says."""
        return self.store.last_job()

    def start(self, now: float) -> None:
        """Adjust due times to the clock, which may have been set back while no GoCM ran."""
        self._set_back(max(0.0, self.store.last_accepted() - now), now)

    def _set_back(self, by: float, now: float) -> None:
        if by > CLOCK_STEP:
            log.logger.warning("the clock was set back by %.0f s", by)
        latest = now + max(self.policy.retry_cap, LONGEST_RETRY_AFTER) + self.policy.retry_base
        self.store.set_back(by if by > CLOCK_STEP else 0.0, now, latest)
        self.last_suspect = 0.0
        self.backlog.rewind_singles()

    def close(self) -> None:
        """Close the Store. Nothing can be called any more."""
        self.store.close()


# -------------------------------------------------------------------------------------------------------- small pieces


def _tokens_of(piece: Piece) -> Iterator[_Token]:
    """The tokens of a piece that is taken, but in nobody's hand."""
    pack, job, run, bits, single = piece
    since = (single.since if single else 0.0) or job.accepted_at
    charged = single.charged if single else 0
    for n, token in enumerate(run.tokens, run.first):
        yield _Token(pack, 0, bits & -bits, single, run.job, Held(n, token, charged, since, piece.expires_at))
        bits &= bits - 1


def _end(pack: Loaded, segments: list[tuple[int, int, Sequence[str]]], now: float) -> End:
    """The End of runs of positions: the first of each, how many, and the upstream's ids."""
    segments.sort()
    positions = 0
    for low, size, _ in segments:
        positions |= packing.span(low, size)
    if not any(receipts for _, _, receipts in segments):
        return End(pack.id, positions, now)
    return End(pack.id, positions, now, [each for _, size, ids in segments for each in ids or [""] * size])


def _heard(counts: Mapping[Count, int], first: int, now: float) -> dict[str, Bucket]:
    """The answers about tokens that were just counted, by upstream; what came of them in the list has numbers from
    `first` on.
    """
    answers: Counter[str] = Counter()
    for (name, upstream, reason), count in counts.items():
        if name == "delivered" or (name == "failures" and reason not in KEPT_FAILURES):
            answers[upstream] += count
    gone = {upstream: counts.get(Count("notregistered", upstream), 0) for upstream in answers}
    return {
        upstream: Bucket(minute(now), Tally(count, gone[upstream]), first if gone[upstream] else 0)
        for upstream, count in answers.items()
        if count
    }


def _is_plain(outcome: Outcome) -> bool:
    """Whether a token was delivered, and there is nothing more to say of it."""
    return outcome.verdict is Verdict.DELIVERED and not outcome.canonical


def _finds_sound(outcome: Outcome) -> bool:
    """Whether an outcome shows that the message itself is good."""
    return not outcome.rejects_message and outcome.verdict not in _RULED and outcome.verdict is not Verdict.SHARED
