"""The backlog in memory: what waits, in its order, and who has what in hand. The Store has the rest of it.

Of each lane of an upstream (module turns) the first part is in memory: all its packs up to a mark, as far as any of
their tokens wait or are in hand, and the Singles that are due up to another mark. What is beyond the marks is only in
the Store, and is read when its turn comes. Who has a token in hand is known here and nowhere else:

                    arrive (kept by the Store)                take, hold
      -----------------------------------------> WAITING ----------------> IN HAND of a generation
                          or at once:              ^   ^                      |  |
                          straight through         |   +--- give_back --------+  |
                                                   |        release              | leave, put, drop (ended; or it is
                          due again ---------------+                             v  a Single in the Store from now on)

After a restart of everything nobody has anything in hand, and all that the Store has open waits. After a restart of the
state process alone the generations that live still have tokens in hand, and nobody knows which. So what was there
before (ids up to `barrier`) waits behind a bar: it is offered to nobody, whoever lives may settle it, and when the last
of them is released the bar is lifted. What comes after goes its way meanwhile.

Changes are made between `begin` and `commit`; `rollback` undoes them, when the Store could not make them.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from gocm_lib.message.job import Run, Slice, job_time
from gocm_lib.message.suspect import LOSSES, load
from gocm_lib.state import packs, turns
from gocm_lib.state.contract import Deferred
from gocm_lib.state.packs import Pack, Packed
from gocm_lib.state.store import Changed, Single, Spot, Store, Stored
from gocm_lib.state.turns import LANES

WINDOW = 5000  # tokens of a lane that stay in memory as they arrive
READ_AT_ONCE = 2000  # due Singles of a lane that are read at once, so that nobody waits long
LOOKED_AT = 100  # jobs of a lane among which the probe of a paused upstream is chosen
LIVING = -1  # in whose hand a token is that some living generation may have: module docstring

Place = tuple[int, int]  # a job, and a place in it


class Loaded:
    """A pack in memory. Bitmaps are of its positions: `full` has all, `gone` those that left, `held` those in hand, by
    generation. `open` is how many tokens of each job have not ended; `alone` how many of its Singles are in hand;
    `filed` how many of its tokens its lane counts as waiting; `losses` how often the node that had it died.
    """

    __slots__ = (
        *("id", "last", "upstream", "lane", "jobs", "starts", "places", "full"),
        *("gone", "held", "open", "alone", "filed", "losses", "text", "read"),
    )

    def __init__(
        self, pack: Pack | Stored, jobs: Sequence[tuple[int, int, Sequence[int]]], read: list[Packed] | None
    ) -> None:
        self.id, self.last, self.upstream, self.lane = pack.id, pack.last, pack.upstream, pack.lane
        self.jobs = [job for job, _, _ in jobs]
        self.starts = [0]
        for _, size, _ in jobs:
            self.starts.append(self.starts[-1] + size)
        self.places = {job: places for job, _, places in jobs if places}
        self.full = (1 << self.starts[-1]) - 1
        self.gone = 0
        self.held: dict[int, int] = {}
        self.open = [size for _, size, _ in jobs]
        self.alone = self.filed = 0
        self.losses = pack.losses if isinstance(pack, Stored) else 0
        self.text = pack.body if read is None else ""
        self.read = read

    def waiting(self) -> int:
        """The bitmap of what waits."""
        bits = self.full & ~self.gone
        for held in self.held.values():
            bits &= ~held
        return bits

    def index(self, job: int) -> int:
        """Which of its jobs this is; -1: none."""
        found = bisect_left(self.jobs, job)
        return found if found < len(self.jobs) and self.jobs[found] == job else -1

    def places_of(self, job: int) -> int:
        """Below which number all places of a job are."""
        index = self.index(job)
        return self.places[job][-1] + 1 if job in self.places else self.starts[index + 1] - self.starts[index]

    def span(self, job: int, n: int, size: int) -> int:
        """The bitmap of `size` places of a job from place `n` on; 0: it is not here."""
        index = self.index(job)
        if index < 0:
            return 0
        start, end = self.starts[index], self.starts[index + 1]
        low, high = n, n + size
        if places := self.places.get(job):
            low, high = bisect_left(places, low), bisect_left(places, high)
        return packs.span(start + low, max(0, min(end - start, high) - low))


class Piece(NamedTuple):
    """Neighbouring tokens of a job that are taken: positions in its pack, or a Single."""

    pack: Loaded
    job: Packed
    run: Run
    bits: int
    single: Single | None = None

    @property
    def expires_at(self) -> float:
        """When they are too old."""
        since = self.single.since if self.single else 0.0
        return self.job.expires_at + (since - self.job.accepted_at if since else 0.0)


class _Lane:
    """The first part of a lane: `packs` that wait and are not after `mark`, `singles` that wait, by rank, and are not
    after `spot`. `more`: there may be packs after the mark. `next_rank`: no Single after the spot has a lower one.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.more = True
        self.packs: list[Loaded] = []
        self.waiting = 0  # tokens of these packs
        self.spot = Spot(0)
        self.next_rank: float = 0
        self.singles: list[tuple[int, int, int]] = []


def slices(pieces: Iterable[Piece]) -> list[Slice]:
    """What was taken, in the order of jobs: the tokens of a job that are equally suspect go together, in runs."""
    found: list[Slice] = []
    runs: list[Run] = []
    last = 0, 0
    for pack, job, run, _, single in sorted(pieces, key=lambda piece: piece[2][:2]):
        deaths = single.deaths if single else 0
        if last != (run.job, deaths):
            last, runs = (run.job, deaths), [run]
            found.append(Slice(pack.upstream, job.target, job.message, runs, deaths))
        elif runs[-1].attempt == run.attempt and runs[-1].first + len(runs[-1].tokens) == run.first:
            runs[-1] = runs[-1]._replace(tokens=[*runs[-1].tokens, *run.tokens])
        else:
            runs.append(run)
    return found


class _Before:
    """How what has changed was before."""

    def __init__(self, in_hand: Counter[tuple[int, str]]) -> None:
        self.packs: dict[Loaded, tuple[int, dict[int, int], list[int], int]] = {}
        self.singles: dict[Place, tuple[Single, int] | None] = {}
        self.in_hand = in_hand.copy()
        self.arrived: list[Loaded] = []  # in a turn: what was not in memory before it


class Backlog:
    """See above. For State."""

    def __init__(self, store: Store, barrier: int = 0) -> None:
        self.store = store
        self.barrier = barrier  # jobs with ids up to this one wait behind the bar
        self.packs: dict[int, Loaded] = {}
        self.of_job: dict[int, Loaded] = {}
        self.singles: dict[Place, tuple[Single, int]] = {}  # in whose hand they are; 0: they wait
        self.lanes: defaultdict[tuple[str, int], _Lane] = defaultdict(lambda: _Lane(self.barrier))
        self.in_hand: Counter[tuple[int, str]] = Counter()  # tokens, by generation and upstream
        self.credit: defaultdict[str, turns.Credit] = defaultdict(turns.Credit)  # by upstream
        self.closed: Collection[str] = ()  # upstreams that are paused: of these no more is taken than a probe needs
        self.probes: Counter[str] = Counter()  # how often a probe of a paused upstream was chosen,
        self.looked_at: dict[tuple[str, int], tuple[int, Spot]] = {}  # and the last jobs looked at of its lanes
        self._before = _Before(self.in_hand)  # what has changed since `begin`,
        self._turn: _Before | None = None  # and since `begin_turn`
        self._uncounted: set[int] = set()  # jobs that are replayed, and of which only failed tokens were left

    # ---------------------------------------------------------------------------------------------------- transactions

    def begin(self) -> None:
        """From here on changes can be undone."""
        self._put_down(self._before)
        self._before = _Before(self.in_hand)
        self._uncounted.clear()

    def changes(self) -> list[Changed]:
        """What has changed since `begin` that the Store must know."""
        return [
            _difference(pack, gone, open_, self._uncounted)
            for pack, (gone, _, open_, _) in self._before.packs.items()
            if pack.gone != gone or pack.open != open_
        ]

    def commit(self) -> None:
        """The Store has made the changes."""
        self.begin()

    def rollback(self) -> None:
        """It has not."""
        self._undo(self._before)
        self.begin()

    def begin_turn(self) -> None:
        """From here on changes that were committed can be undone, too."""
        self.begin()
        self._turn = _Before(self.in_hand)

    def end_turn(self) -> None:
        """The Store has made all of them."""
        self.begin()
        turn, self._turn = self._turn, None
        self._put_down(turn)

    def undo_turn(self) -> None:
        """It has made none."""
        self.begin()
        turn, self._turn = self._turn, None
        assert turn
        self._undo(turn)
        for pack in turn.arrived:
            pack.gone, pack.held = pack.full, {}
            self._file(pack)
            self._let_go(pack)
        # What was read in the meantime may have been what was not kept.
        for lane in self.lanes.values():
            self._rewind(lane)
        self.rewind_singles()

    def _undo(self, before: "_Before") -> None:
        for pack, was in before.packs.items():
            pack.gone, pack.held, pack.open, pack.alone = was
            self._file(pack)
        for place, single in before.singles.items():
            self._set(place, single)
        self.in_hand = before.in_hand

    def _put_down(self, done: "_Before | None") -> None:
        """What was changed need not be undone by itself any more."""
        if done is None:
            return
        if self._turn is not None:
            for pack, was in done.packs.items():
                self._turn.packs.setdefault(pack, was)
            for place, single in done.singles.items():
                self._turn.singles.setdefault(place, single)
            return
        for pack in done.packs:
            self._let_go(pack)

    def _touch(self, pack: Loaded) -> None:
        if pack not in self._before.packs:
            self._before.packs[pack] = pack.gone, pack.held.copy(), pack.open.copy(), pack.alone

    def _set(self, place: Place, now: tuple[Single, int] | None) -> None:
        before = self.singles.get(place)
        if before and not before[1]:
            waiting = self._lane_of(before[0]).singles
            del waiting[bisect_left(waiting, (before[0].rank, *place))]
        if now is None:
            self.singles.pop(place, None)
            return
        self.singles[place] = now
        if not now[1]:
            insort(self._lane_of(now[0]).singles, (now[0].rank, *place))

    def _lane_of(self, single: Single) -> _Lane:
        return self.lanes[single.upstream, turns.lane_of(single.rank)]

    def _change(self, place: Place, now: tuple[Single, int] | None) -> None:
        self._before.singles.setdefault(place, self.singles.get(place))
        self._set(place, now)

    def _file(self, pack: Loaded) -> None:
        """Have the lane of a pack know how much of it waits."""
        lane = self.lanes[pack.upstream, pack.lane]
        bits = pack.waiting() if pack.id <= lane.mark else 0
        count = bits.bit_count()
        if count and not pack.filed:
            insort(lane.packs, pack, key=lambda each: each.id)
        elif pack.filed and not count:
            del lane.packs[bisect_left(lane.packs, pack.id, key=lambda each: each.id)]
        lane.waiting += count - pack.filed
        pack.filed = count

    def _let_go(self, pack: Loaded) -> None:
        """Keep no pack in memory that has nothing to do here."""
        if not (pack.filed or pack.alone or any(pack.held.values())):
            self.packs.pop(pack.id, None)
            for job in pack.jobs:
                self.of_job.pop(job, None)
        elif not pack.filed:
            pack.read = None  # it is read again in the rare case

    # -------------------------------------------------------------------------------------------------- what comes in

    def arrive(self, pack: Pack, holder: int = 0) -> None:
        """A pack was kept. With a `holder`, it is in its hand at once."""
        lane = self.lanes[pack.upstream, pack.lane]
        if holder:
            loaded = self._load(pack)
            loaded.held[holder] = loaded.full
            self.in_hand[holder, pack.upstream] += loaded.starts[-1]
            if pack.id > lane.mark and not lane.more:
                lane.mark = pack.id
        elif pack.id <= lane.mark:
            self._file(self._load(pack))
        elif not lane.more and lane.waiting < WINDOW:
            lane.mark = pack.id
            self._file(self._load(pack))
        else:
            lane.more = True

    def wake(self, pack: Stored) -> None:
        """A pack of ours that has waited for its time has its turn."""
        known = self.packs.get(pack.id)
        if known:  # somebody has cancelled some of it
            known.lane = pack.lane
        lane = self.lanes[pack.upstream, pack.lane]
        if pack.id > lane.mark:
            lane.more = True  # it is read in its order
        else:
            self._file(known or self._load(pack))

    def _load(self, pack: Pack | Stored) -> Loaded:
        if isinstance(pack, Stored):
            read = packs.read(pack.body)
            loaded = Loaded(pack, [(job.job, len(job.tokens), job.places) for job in read], read)
            loaded.gone = pack.gone
            if loaded.gone:
                for index, job in enumerate(loaded.jobs):
                    low, high = loaded.starts[index], loaded.starts[index + 1]
                    gone = (loaded.gone & packs.span(low, high - low)).bit_count()
                    loaded.open[index] += pack.singles.get(job, 0) - gone
            if pack.id <= self.barrier:
                loaded.held[LIVING] = loaded.full & ~loaded.gone
        else:
            loaded = Loaded(pack, pack.jobs, None)
        if self._turn is not None:
            self._turn.arrived.append(loaded)
        self.packs[loaded.id] = loaded
        self.of_job.update(dict.fromkeys(loaded.jobs, loaded))
        return loaded

    def read(self, pack: Loaded) -> list[Packed]:
        """The jobs of a pack."""
        if pack.read is None:
            if not pack.text:
                [stored] = self.store.packs([pack.id])
                pack.text = stored.body
            pack.read, pack.text = packs.read(pack.text), ""
        return pack.read

    def pack_of(self, job: int) -> Loaded | None:
        """The pack of a job, from the Store if it is not in memory. It stays while it has something to do here."""
        if found := self.of_job.get(job):
            return found
        stored = self.store.pack_of(job)
        if stored is None or stored.id in self.packs:
            return None
        loaded = self._load(stored)
        self._touch(loaded)
        self._file(loaded)
        return loaded

    def lift_bar(self) -> int:
        """Nobody has anything in hand any more from before the restart. Returns how many tokens were in memory so."""
        for place, (single, holder) in list(self.singles.items()):
            if holder == LIVING:  # perhaps it is not due: it is read again when it is
                self.of_job[single.job].alone -= 1
                self._set(place, None)
        released = self.release(LIVING)
        self.barrier = 0
        for lane in self.lanes.values():
            self._rewind(lane)
        return released

    def _rewind(self, lane: _Lane) -> None:
        """Look into the Store from its beginning again. What is in memory is known to be."""
        lane.more, lane.next_rank, lane.spot = True, 0, Spot(0)
        lane.mark = 0
        for pack in lane.packs[:]:
            self._file(pack)

    def rewind_singles(self) -> None:
        """Their due times have changed in the Store: those that wait in memory are read again."""
        for place, (_, holder) in list(self.singles.items()):
            if not holder:
                self._set(place, None)
        for lane in self.lanes.values():
            lane.spot, lane.next_rank = Spot(0), 0

    # ------------------------------------------------------------------------------------------------- what waits

    def next_due(self, upstream: str, now: float) -> float | None:
        """When the next token is due; 0: at once; None: nothing waits."""
        found: list[float] = []
        for which in range(LANES):
            lane = self.lanes[upstream, which]
            if not (lane.waiting or lane.singles):
                self._fill(upstream, which, 1, now)
            if lane.waiting or lane.singles:
                return 0.0
            if lane.next_rank != float("inf"):
                found.append(turns.came(lane.next_rank) / 1e6)
        return min(found, default=None)

    def is_idle(self, upstream: str, now: float) -> bool:
        """Whether nothing of an upstream is due."""
        due = self.next_due(upstream, now)
        return due is None or due > now

    def _fill(self, upstream: str, which: int, limit: int, now: float) -> None:
        """Have so many tokens of a lane in memory, if there are."""
        lane = self.lanes[upstream, which]
        while lane.more and lane.waiting < limit:
            missing = limit - lane.waiting
            found = self.store.fresh(upstream, which, lane.mark, missing)
            for stored in found:
                lane.mark = stored.id
                self._file(self.packs.get(stored.id) or self._load(stored))
            lane.more = sum([each.fresh for each in found]) >= missing
        wanted = 1 if upstream in self.closed else max(limit, WINDOW)
        if lane.waiting < limit and (taken := self.store.take(upstream, which, wanted)):
            self._adopt(lane, taken)
            self._fill(upstream, which, limit, now)
            return
        rank = int(turns.rank(which, now * 1e6))
        while lane.next_rank <= rank and len(lane.singles) < limit:
            rows = self.store.due(upstream, _at_least(lane.spot, which), rank, READ_AT_ONCE, self.barrier)
            for single in rows:
                if (place := (single.job, single.n)) not in self.singles:
                    self._set(place, (single, 0))
            if rows:
                lane.spot = Spot(rows[-1].rank, rows[-1].job, rows[-1].n)
            if len(rows) < READ_AT_ONCE:
                below = int(turns.bounds(which)[1])
                following = self.store.next_rank(upstream, _at_least(lane.spot, which), below, self.barrier)
                lane.next_rank = float("inf") if following is None else following

    def adopt(self, stored: Stored) -> None:
        """A pack is ours from now on, outside its turn."""
        self._adopt(self.lanes[stored.upstream, stored.lane], [stored])

    def _adopt(self, lane: _Lane, taken: Sequence[Stored]) -> None:
        """Packs are ours from now on. Those after the mark are read when their turn comes."""
        for stored in taken:
            if stored.id > lane.mark:
                lane.more = True
            elif stored.id not in self.packs:
                self._file(self._load(stored))
        if any(stored.singles for stored in taken):
            for each in self.lanes.values():  # a replayed one has the lane of those that it was replayed with
                each.spot, each.next_rank = Spot(0), 0

    def share(self, upstream: str) -> None:
        """Let others have what of an upstream is not even in memory: it would wait here while they idle."""
        for which in range(LANES):
            lane = self.lanes[upstream, which]
            if lane.more and lane.waiting >= WINDOW // 2:
                self.store.give(upstream, which, lane.mark, self._at_work(upstream, which))
                lane.more = False
                self.rewind_singles()

    def hand_over(self, upstream: str) -> None:
        """Let others have all of an upstream but what is in hand, and a pack to probe it with: here nothing goes."""
        for which in range(LANES):
            lane = self.lanes[upstream, which]
            kept = self._at_work(upstream, which) or {pack.id for pack in lane.packs[:1]}
            self.store.give(upstream, which, 0, kept)
            for pack in [each for each in lane.packs if each.id not in kept]:
                lane.packs.remove(pack)
                lane.waiting -= pack.filed
                pack.filed = 0
                self._let_go(pack)
            lane.more = False
        self.rewind_singles()

    def _at_work(self, upstream: str, which: int) -> set[int]:
        """The packs of a lane of which somebody has something in hand."""
        return {
            each.id
            for each in self.packs.values()
            if (each.upstream, each.lane) == (upstream, which) and (each.alone or any(each.held.values()))
        }

    def _in_order(self, lane: _Lane, limit: int) -> Iterator[tuple[float, int, Loaded | Place]]:
        """What waits of a lane in memory: when it came, how many tokens, and what it is; at least `limit` tokens."""
        found: list[Iterable[tuple[float, int, Loaded | Place]]] = [
            ((turns.came(rank), 1, (job, n)) for rank, job, n in lane.singles),  # of one job they were first
            ((job_time(pack.id) * 1e6, pack.filed, pack) for pack in lane.packs),
        ]
        for each in heapq.merge(*found, key=lambda each: each[0]):
            if limit <= 0:
                return
            yield each
            limit -= each[1]

    def take(self, upstream: str, limit: int, now: float) -> list[Piece]:
        """Up to `limit` tokens whose turn it is. Nobody has them in hand yet: see `hold`."""
        waiting = []
        for which in range(LANES):
            self._fill(upstream, which, limit, now)
            waiting.append(list(self._in_order(self.lanes[upstream, which], limit)))
        told = [[each[:2] for each in lane] for lane in waiting]
        counts, self.credit[upstream] = turns.pick(told, limit, self.credit[upstream])
        pieces: list[Piece] = []
        for lane, count in zip(waiting, counts):
            for _, size, what in lane:
                if count <= 0:
                    break
                if isinstance(what, Loaded):
                    pieces += self._pieces(what, packs.lowest(what.waiting(), count))
                else:
                    pieces += self._single_piece(what)
                count -= size
        return pieces

    def _pieces(self, pack: Loaded, bits: int) -> list[Piece]:
        jobs, starts, pieces = self.read(pack), pack.starts, []
        for low, high in packs.runs(bits):
            index = packs.job_at(starts, low)
            while low < high:
                start, end, job = starts[index], min(high, starts[index + 1]), jobs[index]
                for run in packs.placed_runs(job, low - start, end - start):
                    pieces.append(Piece(pack, job, run, ((1 << len(run.tokens)) - 1) << low))
                    low += len(run.tokens)
                index += 1
        return pieces

    def _single_piece(self, place: Place) -> list[Piece]:
        single, _ = self.singles[place]
        pack = self.pack_of(single.job)
        if pack is None:
            return []
        job = self.read(pack)[pack.index(single.job)]
        run = Run(single.job, single.n, single.attempts + 1, [job.tokens[job.index_of(single.n)]])
        return [Piece(pack, job, run, 0, single)]

    def probe(self, upstream: str, last_trouble: Callable[[int], float], now: float) -> list[Piece]:
        """One token of a job that has had no trouble, or had it the longest ago: `last_trouble` tells when (0: never).
        Mostly one of the jobs that came last, because those were not tried yet. But every third time one of the others:
        however many jobs cannot be sent, one that can is not missed.
        """
        self.probes[upstream] += 1
        newest = self.probes[upstream] % 3 != 0
        best: tuple[float, int] | None = None
        for which in range(LANES):
            self._fill(upstream, which, 1, now)
            look = self._newest(upstream, which) if newest else self._others(upstream, which)
            for job in islice(look, LOOKED_AT):
                trouble = last_trouble(job)
                if best is None or trouble < best[0]:
                    best = trouble, job
                if not trouble:
                    return self._first_of(job)
        return self._first_of(best[1]) if best else []

    def _waiting_jobs(self, pack: Loaded | Stored) -> list[int]:
        """The jobs of a pack of which tokens wait."""
        loaded = self.packs.get(pack.id)
        bits, sizes = (loaded.waiting() if loaded else 0), None
        if loaded:
            starts = loaded.starts
            jobs: Sequence[int] = loaded.jobs
        else:
            assert isinstance(pack, Stored)
            sizes = packs.heads(pack.body)
            jobs = [job for job, _, _ in sizes]
            starts = [0]
            for _, size, _ in sizes:
                starts.append(starts[-1] + size)
            bits = ((1 << starts[-1]) - 1) & ~pack.gone
        return [
            job for index, job in enumerate(jobs) if bits & packs.span(starts[index], starts[index + 1] - starts[index])
        ]

    def _newest(self, upstream: str, which: int) -> Iterator[int]:
        """Jobs of a lane with tokens that wait, the latest first."""
        singles = ((turns.came(rank), job) for rank, job, _ in reversed(self.lanes[upstream, which].singles))
        merged = heapq.merge(self._newest_packed(upstream, which), singles, key=lambda each: each[0], reverse=True)
        last = 0
        for _, job in merged:
            if job != last:
                yield job
            last = job

    def _newest_packed(self, upstream: str, which: int) -> Iterator[tuple[float, int]]:
        before = 1 << 62
        while found := self.store.newest(upstream, which, before, 4):
            for pack in found:
                before = pack.id
                if pack.id > self.barrier:
                    yield from ((job_time(job) * 1e6, job) for job in reversed(self._waiting_jobs(pack)))

    def _others(self, upstream: str, which: int) -> Iterator[int]:
        """The same, the earliest first, from where the last call stopped, round and round."""
        here = upstream, which
        for start in (self.looked_at.get(here, (0, Spot(0))), (0, Spot(0))):
            self.looked_at[here] = start
            yield from self._others_after(here, *start)

    def _others_after(self, here: tuple[str, int], job: int, spot: Spot) -> Iterator[int]:
        packed = ((job_time(each) * 1e6, each, None) for each in self._packed_after(here, job))
        singles = [(turns.came(row[0]), row[1], Spot(*row)) for row in self.lanes[here].singles if row > tuple(spot)]
        last = 0
        for _, job_found, spot_found in heapq.merge(packed, singles, key=lambda each: each[0]):
            before = self.looked_at[here]
            self.looked_at[here] = (before[0], spot_found) if spot_found else (job_found, before[1])
            if job_found != last:
                yield job_found
            last = job_found

    def _packed_after(self, here: tuple[str, int], job: int) -> Iterator[int]:
        stored = self.store.pack_of(job) if job else None
        after = stored.id - 1 if stored else job
        after = max(after, self.barrier)
        while found := self.store.fresh(*here, after, 4):
            for pack in found:
                after = pack.id
                yield from (each for each in self._waiting_jobs(pack) if each > job)

    def _first_of(self, job: int) -> list[Piece]:
        """The token of a job that waits and has waited longest, so that it is not always the same one."""
        pack = self.pack_of(job)
        if pack is None:
            return []
        index = pack.index(job)
        mine = packs.span(pack.starts[index], pack.starts[index + 1] - pack.starts[index])
        if bits := pack.waiting() & mine:
            return self._pieces(pack, packs.lowest(bits, 1))
        waiting = [
            (single.rank, place) for place, (single, holder) in self.singles.items() if place[0] == job and not holder
        ]
        return self._single_piece(min(waiting)[1]) if waiting else []

    # -------------------------------------------------------------------------------------------------- what is in hand

    def hold(self, pieces: Iterable[Piece], generation: int) -> int:
        """Give what was taken to a generation. Returns how many tokens."""
        together: dict[Loaded, int] = {}
        count = 0
        for pack, _, run, bits, single in pieces:
            size = len(run.tokens)
            count += size
            self.in_hand[generation, pack.upstream] += size
            if single:
                self._touch(pack)
                pack.alone += 1
                self._change((single.job, single.n), (single, generation))
            else:
                together[pack] = together.get(pack, 0) | bits
        for pack, bits in together.items():
            self._touch(pack)
            pack.held[generation] = pack.held.get(generation, 0) | bits
            self._file(pack)
        return count

    def found(
        self, generation: int, living: Collection[int], job: int, n: int, attempt: int, span: int
    ) -> tuple[Loaded | None, int, list[Single], int]:
        """Which of `span` tokens of a job, from place `n` on, a generation has in hand for this attempt: their pack,
        positions in it and Singles; and in whose hand they are, LIVING for what one of the `living` may have.
        """
        pack = self.of_job.get(job)
        if pack is None and job <= self.barrier and generation in living:
            pack = self.pack_of(job)
        if pack is None:
            return None, 0, [], generation
        holder = LIVING if pack.id <= self.barrier and generation in living else generation
        wanted = pack.span(job, n, span)
        bits = wanted & pack.held.get(holder, 0) if attempt == 1 else 0
        if bits == wanted or not (pack.alone or holder == LIVING):
            return pack, bits, [], holder
        if holder == LIVING:
            self._load_living(pack, job)
        singles = []
        for place in range(n, n + span):
            known = self.singles.get((job, place))
            if known and known[1] == holder and known[0].attempts == attempt - 1:
                singles.append(known[0])
        return pack, bits, singles, holder

    def end_whole(self, generation: int, job: int, n: int, size: int) -> tuple[Loaded, int] | None:
        """What nearly always happens: neighbours of a job, all in this generation's hand for the first time, end where
        they are. Returns their pack and the first position; None: it is not that simple, and nothing has changed.
        """
        pack = self.of_job.get(job)
        if pack is None or job in pack.places:
            return None
        index = bisect_left(pack.jobs, job)
        low = pack.starts[index] + n
        bits = ((1 << size) - 1) << low
        held = pack.held.get(generation, 0)
        if held & bits != bits or low + size > pack.starts[index + 1]:
            return None
        self._touch(pack)
        pack.gone |= bits
        pack.held[generation] = held & ~bits
        pack.open[index] -= size
        self.in_hand[generation, pack.upstream] -= size
        return pack, low

    def _load_living(self, pack: Loaded, job: int) -> None:
        """Have those Singles of a job in memory that a living generation may have in hand."""
        for single in self.store.open_singles(job):
            if (place := (job, single.n)) not in self.singles:
                self._touch(pack)
                pack.alone += 1
                self._change(place, (single, LIVING))

    def leave(self, pack: Loaded, holder: int, bits: int) -> None:
        """Positions in somebody's hand (0: that wait) leave their pack."""
        self._touch(pack)
        pack.gone |= bits
        if holder:
            pack.held[holder] &= ~bits
            self.in_hand[holder, pack.upstream] -= bits.bit_count()
        else:
            self._file(pack)

    def end(self, pack: Loaded, job: int, count: int) -> None:
        """So many tokens of a job have ended."""
        self._touch(pack)
        pack.open[pack.index(job)] -= count

    def reopen(self, single: Single, counted: bool) -> bool:
        """A token that had failed is to be sent again. `counted`: its job is among the finished ones that are kept.
        Returns whether its pack is there.
        """
        pack = self.pack_of(single.job)
        if pack is None:
            return False
        if not counted:
            self._uncounted.add(single.job)
        self.end(pack, single.job, -1)
        self.put(single)
        return True

    def give_back(self, pack: Loaded, holder: int, bits: int) -> None:
        """Positions in somebody's hand wait again."""
        self._touch(pack)
        pack.held[holder] &= ~bits
        self.in_hand[holder, pack.upstream] -= bits.bit_count()
        self._file(pack)

    def give_back_single(self, pack: Loaded, holder: int, single: Single) -> None:
        """A Single in somebody's hand waits again, in its old turn."""
        self.drop(pack, holder, single)
        self._change((single.job, single.n), (single, 0))

    def drop(self, pack: Loaded, holder: int, single: Single) -> None:
        """A Single in somebody's hand (0: that waits) is the Store's alone from now on."""
        if holder:
            self._touch(pack)
            pack.alone -= 1
            self.in_hand[holder, pack.upstream] -= 1
        self._change((single.job, single.n), None)

    def keep_in_hand(self, pack: Loaded, holder: int, single: Single) -> None:
        """A token in somebody's hand is a Single from now on, or this one instead of what it was."""
        if (single.job, single.n) not in self.singles:
            self._touch(pack)
            pack.alone += 1
            self.in_hand[holder, pack.upstream] += 1
        self._change((single.job, single.n), (single, holder))

    def put(self, single: Single) -> None:
        """The Store has this open Single now: look for it in time."""
        lane = self._lane_of(single)
        lane.next_rank = min(lane.next_rank, single.rank)
        if (single.rank, single.job, single.n) <= tuple(lane.spot):
            lane.spot = Spot(single.rank, 0, -1)

    def release(self, generation: int) -> int:
        """What a generation has in hand waits again. Returns how many tokens."""
        released = 0
        for pack in list(self.packs.values()):
            released += pack.held.pop(generation, 0).bit_count()
            self._file(pack)
        for place, (single, holder) in list(self.singles.items()):
            if holder == generation:
                self.of_job[single.job].alone -= 1
                self._set(place, (single, 0))
                released += 1
        for key in [key for key in self.in_hand if key[0] == generation]:
            del self.in_hand[key]
        for pack in list(self.packs.values()):
            self._let_go(pack)
        return released

    def waiting_of(self, job: int) -> tuple[Loaded | None, int, list[Single]]:
        """What waits of a job: its pack, positions in it, and Singles, due or not."""
        pack = self.pack_of(job)
        if pack is None:
            return None, 0, []
        index = pack.index(job)
        mine = packs.span(pack.starts[index], pack.starts[index + 1] - pack.starts[index])
        singles = [] if job <= self.barrier else self.store.open_singles(job)
        free = [each for each in singles if not self.singles.get((job, each.n), (each, 0))[1]]
        return pack, pack.waiting() & mine, free

    def places(self, job: int) -> tuple[set[int], set[int]]:
        """The places of a job that somebody has in hand, and those of its Singles that wait for their turn only."""
        sending: set[int] = set()
        queued: set[int] = set()
        if pack := self.of_job.get(job):
            index = pack.index(job)
            start, end = pack.starts[index], pack.starts[index + 1]
            held = pack.full & ~pack.gone & ~pack.waiting() & packs.span(start, end - start)
            places = pack.places.get(job)
            for low, high in packs.runs(held):
                sending |= {places[at - start] if places else at - start for at in range(low, high)}
        for place, (_, holder) in self.singles.items():
            if place[0] == job:
                (sending if holder else queued).add(place[1])
        return sending, queued

    def in_hands_of_all(self, upstream: str) -> int:
        """How many tokens of an upstream all generations together have in hand."""
        return sum(count for (generation, name), count in self.in_hand.items() if generation > 0 and name == upstream)

    def suspects_in_hand(self) -> int:
        """How much of this node's company the suspects of packs with LOSSES are that are in somebody's hand."""
        held = [single for single, holder in self.singles.values() if holder and single.deaths]
        # Their next death is written down already.
        return sum([load(each.deaths - 1) for each in held if self.of_job[each.job].losses >= LOSSES])

    def claimed_tokens(self) -> int:
        """How many tokens all generations together have in hand."""
        return sum(count for (generation, _), count in self.in_hand.items() if generation > 0)

    def deferred(self, upstreams: Iterable[str], most: int) -> Deferred:
        """Tokens that wait to be tried again, of each upstream at most `most`, and when the first is due."""
        found = []
        for upstream in upstreams:
            lanes = [
                (_at_least(self.lanes[upstream, which].spot, which), int(turns.bounds(which)[1]))
                for which in range(LANES)
            ]
            found.append(self.store.deferred(upstream, lanes, most))
        dues = [each.next_due for each in found if each.next_due is not None]
        return Deferred(sum(each.tokens for each in found), min(dues, default=None))


def _at_least(spot: Spot, which: int) -> Spot:
    low = int(turns.bounds(which)[0])
    return spot if spot.rank >= low else Spot(low, 0, -1)


def _difference(pack: Loaded, gone: int, before: Sequence[int], uncounted: Collection[int]) -> Changed:
    """What the Store must know of a pack that had `gone`, and jobs with so many open tokens."""
    opened = jobs = finished = 0
    if pack.open != before:
        for index, (was, now) in enumerate(zip(before, pack.open)):
            if was != now:
                opened += now - was
                if not (was and now):
                    jobs += (now > 0) - (was > 0)
                    size = pack.starts[index + 1] - pack.starts[index]
                    finished += size * ((was > 0) - (now > 0)) if pack.jobs[index] not in uncounted else 0
    fresh = gone.bit_count() - pack.gone.bit_count()
    left = pack.gone if pack.gone != pack.full else 0  # that there is nothing in it any more says it all
    return Changed(pack.id, left, fresh, opened, jobs, finished)
