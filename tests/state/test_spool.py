"""The spool and the report against a dict: no token lost, none in two hands, every count exact."""

import itertools
import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from kit import (
    ALL,
    IN_POSTGRES,
    KEEPING,
    POLICY,
    ROOT,
    accept,
    batches,
    claim,
    new_job,
    new_state,
    of_sqlite,
    open_tokens,
    paces,
    succeed,
    tally,
    tokens_of,
    told,
)

from gocm_lib.config.settings import Fatal
from gocm_lib.help.topics import source
from gocm_lib.message.outcome import DELIVERED, FIRST_ANSWERS, Outcome, Result, Verdict
from gocm_lib.state import backlog
from gocm_lib.state.contract import (
    BEFORE_ALL,
    COUNTERS,
    STATES,
    Broken,
    Cancelled,
    Full,
    Known,
    Passing,
    Past,
    Status,
    Which,
)
from gocm_lib.state.packs import pack
from gocm_lib.state.sqlite import database
from gocm_lib.state.sqlite.database import DiskSpace
from gocm_lib.state.sqlite.spool import TOGETHER
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.state import State
from gocm_lib.state.store import FAILED

pytestmark = pytest.mark.short


def after_trouble(outcome):
    """A State that has just heard of trouble, so that the next at 1000.0 is the upstream's."""
    state = new_state()
    accept(state, [new_job(999, ["first"], now=999.0, life=1.0)])
    state.settle(1, [Result("gcm", *place, 1, outcome) for place in claim(state, now=999.4)], 999.4)
    return state


class Model(RuleBasedStateMachine):
    """Two generations, jobs of some tokens, every verb in every order, each repeated at will."""

    in_hand = Bundle("in_hand")

    @initialize(window=st.sampled_from([0, 3, backlog.WINDOW]))
    def begin(self, window):
        self.window, backlog.WINDOW = backlog.WINDOW, window
        self.state, self.now, self.last = new_state(), 1000.0, 0
        self.generation = 1
        self.state.begin(1)
        self.waiting = {}  # (job, n) -> attempts, for READY
        self.held = {}  # (job, n) -> (generation, attempt)
        self.failed = set()
        self.over = {}  # (job, n) -> its failure, "" if it was delivered
        self.sizes = {}  # job -> how many tokens
        self.marked = set()  # what was on its way when it was cancelled
        self.finished = {}  # job -> when the last of them ended
        self.whole = set()  # finished jobs of which nothing was forgotten, or more is to be
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.lists = {"canonical": [], "notregistered": []}
        self.seen = 0  # the last answer of which what went straight through was received
        self.living = set()  # generations that the state process before had given something
        self.barrier = 0  # up to this job nothing is given to anybody while they live
        self.due_at = {}  # job -> when it is to be sent, if that was said
        self.stopped = False  # whether somebody holds the upstream

    def come(self, counts, express=False, later=0.0):
        """Jobs with so many tokens, counted, which are to be sent so many seconds later."""
        jobs = []
        for count in counts:
            self.last += 1
            made = new_job(self.last, [f"{self.last}-{n}" for n in range(count)], self.now + later)
            jobs.append(made._replace(express=express, send_at=self.now + later if later else 0.0, tag="all"))
            if later:
                self.due_at[self.last] = self.now + later
            self.sizes[self.last] = count
            self.counters["accepted_messages"] += 1
            self.counters["accepted_tokens"] += count
        return jobs

    @rule(
        counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        twice=st.booleans(),
        express=st.booleans(),
        later=st.sampled_from([0.0, 0.0, 5.0, 90.0]),
    )
    def accept(self, counts, twice, express, later):
        jobs = self.come(counts, express, later)
        for _ in range(1 + twice):
            assert accept(self.state, jobs) == {}
        self.waiting.update({(job.id, n): 0 for job in jobs for n in range(len(job.tokens))})

    @rule(target=in_hand, counts=st.lists(st.integers(1, 4), min_size=1, max_size=3), lost=st.booleans())
    def accept_straight(self, counts, lost):
        """Nobody is overtaken; and when the answer is lost, what went straight through waits for its turn."""
        due = [place for place in self.waiting if self.is_due(place)]
        jobs = self.come(counts)
        places = {(job.id, n): 0 for job in jobs for n in range(len(job.tokens))}
        accepted = self.state.accept(pack(jobs), self.seen)
        assert accepted.not_kept == {}
        if not accepted.gone:
            self.waiting.update(places)
            return multiple()
        assert not due and accepted.generation >= self.generation and accepted.generation not in self.living
        assert not self.stopped
        assert set(accepted.gone) == {job.id for job in jobs}
        if lost:
            self.state.accept([], self.seen)
            self.waiting.update(places)
            return multiple()
        self.seen = accepted.number
        self.held.update({place: (accepted.generation, 1) for place in places})
        return multiple(*places)

    def teardown(self):
        backlog.WINDOW = self.window

    @rule(counts=st.lists(st.integers(1, 4), min_size=1, max_size=3), place=in_hand, straight=st.booleans())
    def fail_a_turn(self, counts, place, straight):
        """Nothing of it has happened, whatever it was made of."""
        generation, attempt = self.held.get(place, (self.generation, 1))
        last = self.last
        outcomes = [DELIVERED, Outcome(Verdict.DEFERRED, "closed", answered=False), Outcome(Verdict.REJECTED, "no")]
        with pytest.raises(Full), self.state.turn():
            for outcome in outcomes:
                jobs = [new_job(last := last + 1, ["x"] * count, self.now) for count in counts]
                self.state.accept(pack(jobs), self.seen if straight else None)
                self.state.settle(generation, [Result("gcm", *place, attempt, outcome)], self.now)
            raise Full("the disk is full")
        self.state.pacing.pauses.clear()

    def is_due(self, place):
        """Whether what waits could go now."""
        status = self.state.status(place[0], "", place[1] - 1, 1)
        [fate] = status.fates
        waits = (fate.state == "deferred" and fate.at > self.now) or place[0] in self.scheduled()
        return place[0] > self.barrier and not waits and not self.stopped

    def scheduled(self):
        return {each.job for each in self.state.jobs("", 0, 1000)}

    @rule(which=st.integers(0, 9))
    def cancel(self, which):
        """What waits has ended; what is on its way is not tried again."""
        job = sorted(self.sizes)[which % len(self.sizes)] if self.sizes else 1
        if 0 < job <= self.barrier:
            with pytest.raises(Passing):
                self.state.cancel(job, self.now)
            return
        waiting = [place for place in self.waiting if place[0] == job]
        flying = [place for place in self.held if place[0] == job]
        done = self.state.cancel(job, self.now)
        if not isinstance(done, Cancelled):
            assert not waiting and not flying and done == (Past() if self.sizes else None)
            return
        assert done == Cancelled(len(waiting), len(flying))
        for place in waiting:
            self.stop(place)
        self.marked |= set(flying)

    def stop(self, place):
        """It was cancelled."""
        self.waiting.pop(place, None)
        self.counters["cancelled"] += 1
        self.end(place, "cancelled")

    @rule(by=st.sampled_from(["", "ops"]))
    def hold_or_let_go(self, by):
        if self.stopped:
            assert self.state.let_go("gcm") and not self.state.let_go("gcm")
        else:
            self.state.hold("gcm", by, self.now)
        self.stopped = not self.stopped

    @rule(clean=st.booleans())
    def restart(self, clean):
        """The state process is killed, with all others if it is `clean`."""
        self.generation += 1
        if clean:
            self.living, self.barrier = set(), 0
            for place, (_, attempt) in self.held.items():
                self.waiting[place] = attempt - 1
            self.held.clear()
        else:
            self.living |= {generation for generation, _ in self.held.values()} | {self.generation - 1}
            self.barrier = self.last
        self.state = succeed(self.state, living=self.living)
        self.state.begin(self.generation)

    @rule()
    def the_living_end(self):
        for generation in sorted(self.living):
            self.state.release(generation)
            for place in [place for place, held in self.held.items() if held[0] == generation]:
                self.waiting[place] = self.held.pop(place)[1] - 1
        self.living, self.barrier = set(), 0

    @rule(target=in_hand, room=st.sampled_from([0, 1, 2, 3, 6, 100]), older=st.booleans(), lost=st.booleans())
    def claim(self, room, older, lost):
        generation = self.generation - older
        batch = next(batches)
        taken = claim(self.state, generation, self.now, room, batch)
        if lost and taken:  # the answer was: it is asked again
            assert claim(self.state, generation, self.now, room, batch) == taken
        assert not (older and taken)
        assert all(job > self.barrier and self.due_at.get(job, 0.0) <= self.now for job, _ in taken)
        assert not (self.stopped and taken)
        holds = sum(held[0] == generation for held in self.held.values())
        assert len(taken) <= max(0, room - holds)
        assert not taken.keys() & self.marked
        for place in sorted(self.marked & self.waiting.keys()):
            if self.state.status(place[0], "", place[1] - 1, 1).fates[0].state == "cancelled":
                self.stop(place)
        for place, token in taken.items():
            assert token.attempt == self.waiting.pop(place) + 1 and token.token == f"{place[0]}-{place[1]}"
            self.held[place] = generation, token.attempt
        return multiple(*taken)

    @rule(
        place=in_hand,
        twice=st.booleans(),
        by=st.sampled_from([0, 1]),
        outcome=st.sampled_from(
            [
                DELIVERED,
                Outcome(Verdict.DELIVERED, canonical="new"),
                Outcome(Verdict.DEFERRED, "closed", answered=False),  # which counts, whatever others were answered
                Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"),
                Outcome(Verdict.REJECTED, "no"),
                Outcome(Verdict.UNREACHABLE, "refused"),
            ]
        ),
    )
    def settle(self, place, twice, by, outcome):
        generation, attempt = self.held.get(place, (self.generation, 1))
        if generation + by in self.living:
            by = 0  # those are believed what they say, and speak only of what they have
        results = [Result("gcm", *place, attempt, outcome)] * (1 + twice)
        self.state.settle(generation + by, results, self.now)
        self.state.pacing.pauses.clear()
        if by or place not in self.held:
            return
        del self.held[place]
        if outcome.verdict is Verdict.UNREACHABLE and place in self.marked:
            self.stop(place)
            return
        if outcome.verdict is Verdict.UNREACHABLE:
            self.waiting[place] = attempt - 1
            self.counters["retries"] = self.state.snapshot().counters["retries"]  # it depends on what others met
            return
        self.counters["attempts"] += attempt == 1
        if outcome.verdict is Verdict.DEFERRED and place in self.marked:
            self.stop(place)
            return
        if outcome.verdict is Verdict.DEFERRED and attempt < POLICY.max_attempts:
            self.waiting[place] = attempt
            self.counters["retries"] += 1
            return
        token = f"{place[0]}-{place[1]}"
        self.end(place, {Verdict.DEFERRED: None, Verdict.DELIVERED: ""}.get(outcome.verdict, "failed"))
        if outcome.verdict is Verdict.DELIVERED:
            self.counters["delivered"] += 1
            if outcome.canonical:
                self.counters["canonicals"] += 1
                self.lists["canonical"].append((token, "new"))
            return
        self.counters["failures"] += 1
        if outcome.verdict is Verdict.UNREGISTERED:
            self.counters["notregistered"] += 1
            self.lists["notregistered"].append((token, False))

    def end(self, place, failure):
        if failure is None:
            self.failed.add(place)
        else:
            self.over[place] = failure
        if not any(job == place[0] for job, _ in (*self.waiting, *self.held)):
            self.finished[place[0]] = self.now
            self.whole.add(place[0])

    def known(self, place, span):
        """How many neighbours a settle may be about. After a restart those that live are believed what they say, and
        speak only of what they have.
        """
        job, n = place
        theirs = [self.held.get((job, at)) == self.held.get(place) for at in range(n, n + span)]
        return span if job > self.barrier or all(theirs) else theirs.index(False) or 1

    @rule(place=in_hand, span=st.integers(2, 4), twice=st.booleans())
    def deliver_neighbours(self, place, span, twice):
        """What is not in hand for this attempt is passed over, in the middle of a span, too."""
        generation, attempt = self.held.get(place, (self.generation, 1))
        span = self.known(place, span)
        for _ in range(1 + twice):
            self.state.settle(generation, [Result("gcm", *place, attempt, DELIVERED, span)], self.now)
        for n in range(place[1], place[1] + span):
            if self.held.get((place[0], n)) == (generation, attempt):
                del self.held[place[0], n]
                self.counters["attempts"] += attempt == 1
                self.counters["delivered"] += 1
                self.end((place[0], n), "")

    @rule(place=in_hand, span=st.integers(2, 4))
    def lose_neighbours(self, place, span):
        generation, attempt = self.held.get(place, (self.generation, 1))
        span = self.known(place, span)
        gone = Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered")
        self.state.settle(generation, [Result("gcm", *place, attempt, gone, span)], self.now)
        for n in range(place[1], place[1] + span):
            if self.held.get((place[0], n)) == (generation, attempt):
                del self.held[place[0], n]
                self.counters["attempts"] += attempt == 1
                self.counters["failures"] += 1
                self.end((place[0], n), "failed")
                self.counters["notregistered"] += 1
                self.lists["notregistered"].append((f"{place[0]}-{n}", False))

    @rule(place=consumes(in_hand))
    def new_generation(self, place):
        self.generation += 1
        self.state.begin(self.generation)
        released = self.state.release(self.generation - 1)
        gone = [held for held, (generation, _) in self.held.items() if generation == self.generation - 1]
        assert released == len(gone) or self.generation - 1 in self.living
        self.living.discard(self.generation - 1)
        self.barrier = self.barrier if self.living else 0
        for held in gone:
            self.waiting[held] = self.held.pop(held)[1] - 1

    @rule()
    def replay(self):
        assert self.state.replay(Which(0, "", "", self.now + 1), self.now) == len(self.failed)
        self.waiting.update(dict.fromkeys(self.failed, 0))
        self.counters["replayed"] += len(self.failed)
        for job, _ in self.failed:
            self.finished.pop(job, None)
            self.whole.discard(job)
        self.failed.clear()

    @rule()
    def discard(self):
        assert self.state.discard(Which(0, "", "", self.now + 1)) == len(self.failed)
        self.over.update(dict.fromkeys(self.failed, "failed"))
        self.whole |= {job for job, _ in self.failed} & self.finished.keys()
        self.failed.clear()

    @rule(age=st.sampled_from([0.0, 10.0]), most=st.sampled_from([0, 3, 1000]))
    def forget(self, age, most):
        before, self.whole = self.whole, set()
        self.state.store.forget_jobs(self.now - age, most)
        for job in sorted(before, key=lambda job: self.finished[job]):
            if not self.is_forgotten(job):
                self.whole.add(job)
                continue
            for place in [place for place in self.over if place[0] == job]:
                del self.over[place]
        gone = before - self.whole
        excess = sum(self.sizes[job] for job in before) - most
        late = sorted((self.finished[job], job) for job in gone if self.finished[job] > self.now - age)
        early = sum(self.sizes[job] for job in gone) - sum(self.sizes[job] for _, job in late)
        # Those of one pack go one after the other, the last one because there was one too many before it.
        assert early + sum(self.sizes[job] for _, job in late[:-1]) < max(1, excess) or not late
        assert all(self.finished[job] > self.now - age - TOGETHER for job in self.whole)
        assert not self.whole or self.kept() <= max(most, 0)

    def is_forgotten(self, job):
        """Whether there is nothing of a job but failed tokens that it is kept for."""
        status = self.state.status(job, "", -1, 10)
        if isinstance(status, Past):
            return True
        places = [(job, fate.n) for fate in status.fates]
        marked = {
            (job, each.n) for each in self.state.store.rows.singles(job, job) if each.state == FAILED and each.waits
        }
        return set(places) <= self.failed and marked == set(places)

    def kept(self):
        """With how many tokens the finished jobs came; those of jobs that are open are no reason to forget these."""
        return sum(self.sizes[job] for job in self.whole)

    @rule(seconds=st.sampled_from([0.5, 60.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(which=st.sampled_from(["canonical", "notregistered"]), limit=st.integers(1, 3), twice=st.booleans())
    def read_list(self, which, limit, twice):
        page = self.state.page(which, 0, limit)
        assert [entry[1:] for entry in page] == self.lists[which][:limit]
        if page:
            for _ in range(1 + twice):
                self.state.forget(which, page[-1][0])
            del self.lists[which][:limit]

    @invariant()
    def nothing_is_lost_and_counts_are_exact(self):
        found = {"ready": {}, "sending": {}, "failed": {}, "over": {}}
        for job in self.sizes:
            status = self.state.status(job, "", -1, 10)
            for fate in status.fates if isinstance(status, Status) else ():
                which = {"deferred": "ready", "delivered": "over", "cancelled": "over"}.get(fate.state, fate.state)
                failed = which == "failed" and (job, fate.n) in self.failed
                found["over" if which == "failed" and not failed else which][job, fate.n] = fate
        barred = {
            place: attempt - 1
            for place, (_, attempt) in self.held.items()
            if place[0] <= self.barrier and place not in found["sending"]  # who may have it is not known
        }
        assert {place: fate.attempts for place, fate in found["ready"].items() if place not in barred} == {
            place: attempts for place, attempts in self.waiting.items() if place not in found["sending"]
        }
        assert found["sending"].keys() | barred.keys() >= self.held.keys()
        assert found["sending"].keys() == self.held.keys() or self.barrier
        assert found["failed"].keys() == self.failed == {(e.job, e.n) for e in self.state.failed(ALL, BEFORE_ALL, 1000)}
        assert {place: fate.failure != "" for place, fate in found["over"].items()} == {
            place: bool(failure) for place, failure in self.over.items()
        }
        waiting = len(self.waiting) + len(self.held)
        assert open_tokens(self.state).get("gcm", 0) == waiting
        counted = {"tokens": waiting, "failed": len(self.failed), "over": len(self.over), "finished": self.kept()}
        snapshot = self.state.snapshot()
        assert tally(self.state) == counted | {"jobs": snapshot.pending}
        assert tally(self.state) == tally(succeed(self.state))
        assert snapshot.counters == self.counters
        assert snapshot.pending == len({job for job, _ in (*self.waiting, *self.held)})
        open_jobs = {job for job, _ in (*self.waiting, *self.held)}
        jobs = open_jobs | {job for job, _ in (*self.failed, *self.over)}
        late = open_jobs - self.scheduled()
        assert (self.state.store.oldest() is None) == (not late)
        assert set(snapshot.held_upstreams) == ({"gcm"} if self.stopped else set())
        for each in self.state.jobs("all", 0, 1000):
            told = each.pending + each.delivered + each.failed + each.cancelled
            assert told == each.size or each.job not in open_jobs
            mine = [place for place in (*self.waiting, *self.held) if place[0] == each.job]
            assert each.pending == len(mine)
        for job, size in self.sizes.items():
            status = self.state.status(job, "", -1, 10)
            assert isinstance(status, Past) == (job not in jobs)
            if job in jobs:
                assert status.size == size and (status.finished == 0) == (job in open_jobs)
                assert status.states == {state: sum(fate.state == state for fate in status.fates) for state in STATES}
        for generation in (self.generation - 1, self.generation):
            assert (
                self.state.backlog.in_hand[generation, "gcm"]
                == sum(held[0] == generation for held in self.held.values())
                or generation in self.living
            )


Model.TestCase.settings = settings(max_examples=20 if IN_POSTGRES else 150, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


def straight(state, jobs, seen):
    """What a state answers to the intake, of a generation that is fed and has room."""
    state.claim(1, next(batches), {"gcm": 100}, {"gcm": 0.0}, 1000.0, 0.0)
    return state.accept(pack(jobs), seen)


def test_what_is_refused_or_known_does_not_go_straight_through():
    """The first of a pack is, so what is kept is another pack than the one that came."""
    state = new_state(keeping=KEEPING._replace(limits=KEEPING.limits._replace(pending=3)))
    keyed = new_job(1, ["a"])._replace(key=(b"k" * 16, b"b" * 16))
    assert straight(state, [keyed], 0).gone == [1]
    number = state.straight
    again = keyed._replace(id=2)
    answer = straight(state, [again, new_job(3, ["b"]), new_job(4, ["c", "d"])], number)
    assert answer.not_kept[2] == Known(1) and answer.not_kept[4].status == 503 and answer.gone == [3]
    assert set(tokens_of(state.claim(1, next(batches), {"gcm": 100}, {"gcm": 0.0}, 1000.0, 0.0)[0])) == set()
    state.accept([], number)
    assert set(claim(state)) == {(3, 0)}, "nobody had that answer: it waits for its turn"


def test_what_was_released_is_not_taken_back():
    """The answer was lost, and meanwhile the generation has ended."""
    state = new_state()
    assert straight(state, [new_job(1, ["a"])], 0).gone == [1]
    state.release(1)
    assert set(claim(state, 2)) == {(1, 0)}
    state.accept([], 0)
    assert claim(state, 2) == {} and state.backlog.in_hand[2, "gcm"] == 1


def test_what_was_read_in_a_turn_that_failed_is_read_again(monkeypatch):
    monkeypatch.setattr(backlog, "WINDOW", 0)
    state = new_state()
    assert straight(state, [new_job(1, ["a"])], 0).gone == [1]
    with pytest.raises(Full), state.turn():
        accept(state, [new_job(2, ["b"])])
        state.accept(pack([new_job(3, ["c"])]), state.straight)  # it looks whether anything waits
        raise Full
    assert claim(state) == {}, "nothing was kept"
    accept(state, [new_job(2, ["b"])])
    assert set(claim(state)) == {(2, 0)}
    state = new_state()
    assert straight(state, [new_job(1, ["a"])], 0).gone == [1]
    accept(state, [new_job(2, ["b"])])
    with pytest.raises(Full), state.turn():
        state.accept(pack([new_job(3, ["c"])]), state.straight)
        raise Full
    assert set(claim(state)) == {(2, 0)}, "what was kept before, and read in the meantime, is there"


def test_what_waits_behind_the_bar_is_not_due_because_it_is_lifted():
    """A neighbour of it was settled by a sender that lived on when the state process died."""
    state = new_state()
    accept(state, [new_job(1, ["a", "b", "c"])])
    claim(state)
    later = Outcome(Verdict.PUT_OFF, "x", retry_after=30.0)
    state.settle(1, [Result("gcm", 1, 0, 1, later)], 1000.0)
    state = succeed(state, living=[1])
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED, 2)], 1001.0)
    assert claim(state, 2, now=1002.0) == {} and state.snapshot().counters["delivered"] == 1
    state.release(1)
    assert set(claim(state, 2, now=1002.0)) == {(1, 2)}, "what the sender had and said nothing of"
    assert set(claim(state, 2, now=1040.0)) == {(1, 0)}


def test_a_deferred_token_waits_for_its_time_and_keeps_its_attempts():
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    assert claim(state)[1, 0].attempt == 1
    state.settle(1, [Result("gcm", 1, 0, 1, Outcome(Verdict.DEFERRED, "x", retry_after=30.0))], 1000.0)
    assert claim(state, now=1029.0) == {}
    assert claim(state, now=1040.0)[1, 0].attempt == 2


def test_what_grew_too_old_is_set_aside_not_sent():
    state = new_state()
    accept(state, [new_job(1, ["a", "b"], life=50.0)])
    assert claim(state, now=1050.0) == {}
    assert state.snapshot().pending == 0
    assert state.snapshot().failed == 2
    assert state.snapshot().counters["failures"] == 2 and state.snapshot().counters["attempts"] == 0


def test_a_paused_upstream_is_probed_with_one_token_and_comes_back():
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized")
    state = after_trouble(refused)
    accept(state, [new_job(1, ["a", "b", "c"])])
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    assert claim(state, now=1001.0) == {}
    [probe] = claim(state, now=1002.2)
    assert claim(state, now=1003.0) == {}, "one probe at a time"
    state.settle(1, [Result("gcm", *probe, 1, refused)], 1003.0)
    assert claim(state, now=1006.0) == {}, "the pause has doubled"
    [probe] = claim(state, now=1007.2)
    state.settle(1, [Result("gcm", *probe, 1, DELIVERED)], 1007.2)
    assert len(claim(state, now=1009.0)) == 2
    assert told(state.snapshot()) == {
        "attempts": 1,
        "failures": 1,  # the one before
        "canonicals": 0,
        "notregistered": 0,
        "dropped": 0,
    }


def test_a_pause_of_one_upstream_does_not_hold_up_another():
    state = new_state(upstreams=("gcm", "other"))
    accept(state, [new_job(1, ["a"])])
    refused = Outcome(Verdict.UNREACHABLE, "refused")
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    accept(state, [new_job(2, ["b"], upstream="other")])
    assert list(claim(state, now=1000.0)) == [(2, 0)]


def test_a_retry_takes_its_turn_when_it_is_due():
    state = new_state()
    accept(state, [new_job(1, [f"old{n}" for n in range(4)])])
    for (job, n), token in claim(state).items():
        state.settle(
            1, [Result("gcm", job, n, token.attempt, Outcome(Verdict.DEFERRED, "x", retry_after=50.0))], 1000.0
        )
    state.pacing.pauses.clear()
    early, late = int(1010e6), int(2000e6)
    accept(state, [new_job(early, ["a", "b"], now=1010.0)])
    accept(state, [new_job(late, ["c", "d"], now=2000.0)])
    order = [job for room in range(1, 9) for job, _ in claim(state, now=3000.0, room=room)]
    assert order == [early] * 2 + [1] * 4 + [late] * 2


def test_a_small_job_does_not_wait_for_a_large_one():
    state = new_state()
    accept(state, [new_job(job, [f"{job}-{n}" for n in range(1000)]) for job in range(1, 11)])
    assert {job for job, _ in claim(state, room=2000)} == {1, 2}, "in the order of their arrival"
    accept(state, [new_job(20, ["small"]), new_job(21, [f"u{n}" for n in range(50)])])
    taken = claim(state, room=2200)
    assert (20, 0) in taken and sum(job == 21 for job, _ in taken) == 50, "with the next claim"
    assert {job for job, _ in taken} == {3, 20, 21}, "and the rest is the oldest's"


def test_a_flood_of_small_jobs_leaves_half_to_the_large_ones():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(5000)])])
    ids, served = itertools.count(2), 0
    for turn in range(1, 11):
        accept(state, [new_job(next(ids), ["x"]) for _ in range(1000)])
        served += sum(job == 1 for job, _ in claim(state, room=1000 * turn))
    assert served == 5000


@pytest.mark.parametrize("waits", [0, 500])
def test_what_was_in_hand_before_a_restart_is_not_behind_what_comes_after(waits):
    state = new_state()
    for job in range(1, 41):
        accept(state, [new_job(job, [f"{job}-{n}" for n in range(100)])])
        held = claim(state, room=100)
        state.settle(1, [Result("gcm", *place, 1, DELIVERED) for place in held], 1000.0)
    accept(state, [new_job(50, ["a", "b"])])
    assert len(claim(state, room=2)) == 2
    if waits:
        accept(state, [new_job(51, [f"w{n}" for n in range(waits)])])
    state = succeed(state)
    state.start(1000.0)
    accept(state, [new_job(job, ["c"]) for job in range(60, 70)])
    large = {(51, 0), (51, 1)} if waits else set()
    assert set(claim(state, 2, room=2 + len(large))) == {(50, 0), (50, 1)} | large, "and large ones keep half"


def test_an_upstream_has_room_of_its_own():
    state = new_state(upstreams=("gcm", "other"))
    accept(state, [new_job(1, [f"t{n}" for n in range(50)]), new_job(2, ["b"], upstream="other")])
    assert len(claim(state, room=10)) == 11


def test_a_rejected_message_is_not_sent_to_the_rest_of_its_job():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(100)])])
    bad = Outcome(Verdict.REJECTED, "bad payload", rejects_message=True, cause="bad_message")
    held = claim(state, room=4)
    state.settle(1, [Result("gcm", *place, 1, bad) for place in list(held)[:2]], 1000.0)
    assert state.snapshot().counters["failures"] == 2, "two may be chance"
    state.settle(1, [Result("gcm", *place, 1, bad) for place in [*list(held)[2:], *claim(state, room=3)]], 1000.0)
    assert told(state.snapshot()) == {
        "attempts": 5,
        "failures": 100,
        "canonicals": 0,
        "notregistered": 0,
        "dropped": 0,
    }
    accept(state, [new_job(2, ["u"])])
    assert set(claim(state)) == {(2, 0)}


def test_a_settle_repeated_is_no_second_answer():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(50)])])
    bad = Outcome(Verdict.REJECTED, "bad payload", rejects_message=True, cause="bad_message")
    results = [Result("gcm", *place, 1, bad) for place in claim(state, room=2)]
    for _ in range(3):
        state.settle(1, results, 1000.0)
    assert state.snapshot().counters["failures"] == 2 and len(claim(state)) == 48


def test_a_message_that_was_found_sound_is_never_stopped():
    """Only what one platform refuses, say, comes to those tokens alone, however many of them stand together."""
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(50)])])
    bad = Outcome(Verdict.REJECTED, "bad payload", rejects_message=True, cause="bad_message")
    [first] = claim(state, room=1)
    state.settle(1, [Result("gcm", *first, 1, DELIVERED)], 1000.0)
    state.settle(1, [Result("gcm", *place, 1, bad) for place in claim(state, room=10)], 1000.0)
    assert state.snapshot().counters["failures"] == 10 and len(claim(state)) == 39


def test_what_was_held_back_for_a_bad_message_is_not_counted_as_tried():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(20)])])
    bad, back = Outcome(Verdict.REJECTED, "bad", rejects_message=True), Outcome(Verdict.RETURNED)
    places = list(claim(state))
    for place in places[:3]:  # one at a time, as at a low rate
        state.settle(1, [Result("gcm", *place, 1, bad)], 1000.0)
    state.settle(1, [Result("gcm", *place, 1, back) for place in places[3:]], 1000.0)
    assert told(state.snapshot()) == {
        "attempts": 3,
        "failures": 20,
        "canonicals": 0,
        "notregistered": 0,
        "dropped": 0,
    }
    assert state.snapshot().pending == 0


def test_a_token_with_an_odd_answer_does_not_keep_the_others_waiting():
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 403")
    state = after_trouble(refused)
    accept(state, [new_job(1, ["poison"])])
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    accept(state, [new_job(2, ["good"], now=1001.0)])
    assert list(claim(state, now=1002.05)) == [(2, 0)], "the probe is the other token"


def test_tokens_that_failed_together_are_probed_by_turns_of_their_messages():
    """The first message is odd, all of it: the second must not wait until each of its tokens was tried again."""
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 403")
    state = after_trouble(refused)
    accept(state, [new_job(1, [f"odd{n}" for n in range(50)]), new_job(2, ["good"])])
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    now, probes = 1000.0, []
    while (2, 0) not in probes:
        now += 400.0
        [probe] = claim(state, now=now)
        probes.append(probe)
        state.settle(1, [Result("gcm", *probe, 1, DELIVERED if probe == (2, 0) else refused)], now)
    assert probes == [(2, 0)] and not state.snapshot().pause_reasons
    assert list(claim(state, now=now)) == [(1, n) for n in range(50)], "at once: nothing has to wait for a pause"


@pytest.mark.parametrize("wanted", [1, 250, 500, 750, 999])
def test_the_probe_is_found_among_hundreds_that_had_trouble_later(wanted):
    state = new_state()
    accept(state, [new_job(n, [f"t{n}"]) for n in range(1, 1000)])
    probes: list[int] = []
    while wanted not in probes:
        state.backlog.begin()
        [piece] = state.backlog.probe("gcm", lambda job: 1.0 if job == wanted else 2.0, 1000.0)
        probes.append(piece.run.job)
        assert len(probes) <= 30


def test_what_was_given_back_goes_as_soon_as_the_upstream_is_well():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(5)])])
    away = Outcome(Verdict.UNREACHABLE, "refused")
    now, probe = 1000.0, list(claim(state))
    for _ in range(8):
        state.settle(1, [Result("gcm", *place, 1, away) for place in probe], now)
        now += 31.0
        probe = list(claim(state, now=now))
        assert len(probe) == 1
    state.settle(1, [Result("gcm", *probe[0], 1, DELIVERED)], now)
    assert len(claim(state, now=now)) == 4 and state.snapshot().counters["attempts"] == 1


def test_a_newer_credential_ends_a_pause_for_the_old_one():
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized")
    state = after_trouble(refused)
    accept(state, [new_job(1, ["a"])])
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    accept(state, [new_job(2, ["b"])])
    assert state.claim(1, next(batches), {"gcm": 10}, {"gcm": 999.0}, 1000.5, 0.0)[0] == []
    assert state.claim(1, next(batches), {"gcm": 10}, {"gcm": 1000.4}, 1000.5, 0.0)[0] != []


def test_a_new_credential_that_is_refused_too_does_not_lengthen_the_pause_by_itself():
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized")
    state = after_trouble(refused)
    accept(state, [new_job(1, ["a", "b"])])

    def probe(now, since):
        slices, *_ = state.claim(1, next(batches), {"gcm": 10}, {"gcm": since}, now, 0.0)
        state.settle(1, [Result("gcm", *place, 1, refused) for place in tokens_of(slices)], now)
        return len(tokens_of(slices)), state.pacing.pauses["gcm"].until - now

    assert probe(1000.0, 0.0) == (2, 2.0)
    assert probe(1001.0, 1000.5) == (1, 2.0), "at once, and then the same pause again"
    assert probe(1002.0, 1000.5) == (0, 1.0)
    assert probe(1003.0, 1000.5) == (1, 4.0)


def test_a_settle_repeated_late_does_not_touch_the_next_attempt():
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    [place] = claim(state)
    deferred = [Result("gcm", *place, 1, Outcome(Verdict.DEFERRED, "x"))]
    state.settle(1, deferred, 1000.0)
    assert claim(state, now=2000.0)[place].attempt == 2
    state.settle(1, deferred, 2000.0)
    state.settle(1, [Result("gcm", *place, 1, DELIVERED)], 2000.0)
    assert claim(state, now=9000.0) == {} and state.snapshot().counters["attempts"] == 1
    state.settle(1, [Result("gcm", *place, 2, DELIVERED)], 2000.0)
    assert state.snapshot().pending == 0


def test_a_connection_without_an_answer_does_not_end_a_pause():
    refused = Outcome(Verdict.UPSTREAM_CONFIG, "HTTP 401", cause="unauthorized")
    state = after_trouble(refused)
    accept(state, [new_job(1, ["a", "b"])])
    state.settle(1, [Result("gcm", *place, 1, refused) for place in claim(state)], 1000.0)
    [probe] = claim(state, now=1002.2)
    silent = Outcome(Verdict.DEFERRED, "no answer in time", answered=False, cause="timeout")
    state.settle(1, [Result("gcm", *probe, 1, silent)], 1002.2)
    assert claim(state, now=1004.0) == {} and len(claim(state, now=1004.5)) == 1


def test_a_claim_that_comes_late_takes_nothing():
    """A call that was given up may still be carried out, after the feeder has gone on: its answer reaches nobody."""
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    assert claim(state, batch=1001) and claim(state, batch=1002) == {}
    accept(state, [new_job(2, ["b"]), new_job(3, ["c"])])
    second = claim(state, room=2, batch=1002)
    assert second and claim(state, batch=1001) == {}
    assert claim(state, batch=1002) == second, "its answer was lost"
    assert set(claim(state, batch=1003)) == {(3, 0)}


def test_what_cannot_be_tidied_keeps_nobody_from_sending(tmp_path):
    state = new_state(tmp_path / "s.db", keeping=KEEPING._replace(failed_age=1.0))
    state.store.db.execute("PRAGMA busy_timeout = 0")
    accept(state, [new_job(1, ["a"], life=1.0)])
    assert claim(state, now=1002.0) == {} and tally(state)["failed"] == 1
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert claim(state, now=1010.0) == {}
    other.execute("ROLLBACK")
    claim(state, now=1020.0)
    assert tally(state)["failed"] == 0


def test_a_release_ends_the_claims_of_its_generation():
    """One may still come: of a feeder that gave up waiting for this process while it stood still."""
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    claim(state)
    assert state.release(1) == 1
    assert claim(state, 1) == {} and list(claim(state, 2)) == [(1, 0)]


@of_sqlite
def test_a_failed_commit_is_no_answer():
    """It is settled again, and what was heard once counts once."""
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(50)])])
    bad = Outcome(Verdict.REJECTED, "bad payload", rejects_message=True, cause="bad_message")
    [place] = claim(state, room=1)
    state.store.db.execute(
        "CREATE TEMP TRIGGER full BEFORE INSERT ON main.counter BEGIN SELECT raise(ABORT, 'no'); END"
    )
    for _ in range(FIRST_ANSWERS - 1):
        with pytest.raises(Broken):
            state.settle(1, [Result("gcm", *place, 1, bad)], 1000.0)
    state.store.db.execute("DROP TRIGGER full")
    state.settle(1, [Result("gcm", *place, 1, bad)], 1000.0)
    assert state.snapshot().counters["failures"] == 1 and tally(state)["tokens"] == 49


def test_a_clock_that_was_set_back_is_told_once():
    state = new_state()
    accept(state, [new_job(1, ["a"], now=10 * DAY, life=1e9)])
    state.start(9 * DAY)
    later = Outcome(Verdict.DEFERRED, "x", retry_after=30.0)
    state.settle(1, [Result("gcm", *place, 1, later) for place in claim(state, now=9 * DAY)], 9 * DAY)
    due = state.backlog.next_due("gcm", 9 * DAY + 1)
    assert due >= 9 * DAY + 30
    for _ in range(3):
        state = succeed(state)
        state.start(9 * DAY + 1)
        assert state.backlog.next_due("gcm", 9 * DAY + 1) == due, "at the next starts it is due as it was told"


DAY = 86400.0


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("since", [0.0, DAY / 2], ids=["just now", "half a day after the last message"])
def test_a_clock_set_back_by_a_day_delays_nothing_for_long(restarted, since):
    state = new_state()
    minted = int(1e6 * 10 * DAY)
    accept(state, [new_job(minted + n, ["a"], now=10 * DAY, life=1e9) for n in range(4)])
    now = 10 * DAY + since
    later = Outcome(Verdict.DEFERRED, "x", retry_after=30.0)
    for place in list(claim(state, now=now))[:2]:
        state.settle(1, [Result("gcm", *place, 1, later)], now)
    state.pacing.pauses.clear()
    state.release(1)
    if restarted:
        state = succeed(state)
        state.start(now - DAY)
    state.begin(2)
    at_once = {job - minted for job, _ in claim(state, 2, now=now - DAY)}
    assert at_once >= {2, 3}, "fresh ones are due at once"
    soon = {job - minted for job, _ in claim(state, 2, now=now - DAY + 40)}
    assert at_once | soon == {0, 1, 2, 3}, "and the others soon"


def test_a_clock_set_forward_sends_what_has_not_expired():
    state = new_state()
    accept(state, [new_job(1, ["a"], life=2 * DAY), new_job(2, ["b"], life=DAY)])
    assert list(claim(state, now=1000.0 + DAY)) == [(1, 0)]
    assert state.snapshot().counters["failures"] == 1


def test_all_is_there_after_a_crash(tmp_path):
    state = new_state(tmp_path / "s.db")
    accept(state, [new_job(1, ["a", "gone"]), new_job(2, ["c"])])
    claim(state)
    state.settle(
        1, [Result("gcm", 1, 1, 1, Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered"))], 1000.0
    )
    # No close: a second connection sees what a restart after SIGKILL would.
    db = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    again = State(SqliteStore(db, DiskSpace(str(tmp_path / "s.db")), KEEPING), POLICY, KEEPING, paces("gcm"))
    assert set(claim(again)) == {(1, 0), (2, 0)}
    assert again.snapshot().counters["notregistered"] == 1 and again.page("notregistered", 0, -1) == [
        (1, "gone", False)
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, so root")
def test_a_spool_that_others_own_or_may_read_is_refused(tmp_path):
    path = tmp_path / "s.db"
    code = "import sys; from gocm_lib.state.sqlite import database; database.open_spool(sys.argv[1])"

    def opened():
        found = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
        return found.stderr.strip().splitlines()[-1:]

    assert opened() == []
    assert {stat.S_IMODE(os.stat(each).st_mode) for each in tmp_path.iterdir()} == {0o600}
    os.chmod(path, 0o604)
    assert "chmod o=" in opened()[0]
    os.chmod(path, 0o600)
    for suffix in ("-wal", "-shm", ".lock", ".reserve"):
        beside = Path(f"{path}{suffix}")
        beside.unlink(missing_ok=True)
        beside.touch(0o600)
        os.chmod(beside, 0o644)
        assert f"{suffix}, and tokens are in it: chmod o=" in opened()[0]
        beside.unlink()
        beside.symlink_to("elsewhere")
        assert "no regular file" in opened()[0]
        beside.unlink()
    assert opened() == []
    os.chown(path, 12345, -1)
    assert "belongs to user 12345" in opened()[0]


SWAP = """\
import os, sys
from gocm_lib.state.sqlite import database

def swap(event, arguments):
    # As whoever may rename there can do, just before SQLite opens it.
    path = sys.argv[1] + sys.argv[2]
    if event == "sqlite3.connect" and os.fspath(arguments[0]) == path:
        os.rename(path, path + ".away")
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))
        os.chown(path, 12345, -1)

sys.addaudithook(swap)
database.open_spool(sys.argv[1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, so root")
def test_a_file_that_somebody_puts_in_its_place_is_refused(tmp_path):
    words = [sys.executable, "-c", SWAP, str(tmp_path / "s.db"), ".new"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "user 12345 puts other files in the place of" in found.stderr


def test_nothing_is_made_where_somebody_has_put_a_link(tmp_path):
    """In a directory where others may write, else, he would have us write wherever we may."""
    for suffix in (".lock", ".new", ".reserve"):
        place = tmp_path / suffix
        place.mkdir()
        (place / f"s.db{suffix}").symlink_to(place / "elsewhere")
        try:
            _, held = database.open_spool(str(place / "s.db"))
            database.DiskSpace(str(place / "s.db")).keep_reserve(0)
            os.close(held)
        except Fatal:
            pass
        assert not (place / "elsewhere").exists(), suffix


def test_what_is_forgotten_is_overwritten(tmp_path):
    state = new_state(tmp_path / "s.db", keeping=KEEPING._replace(keep_jobs=0.0))
    accept(state, [new_job(1, ["very-secret-token"] * 50)])
    for place in claim(state):
        state.settle(1, [Result("gcm", *place, 1, DELIVERED)], 1000.0)
    state._tidy(2000.0)
    state.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found = subprocess.run(["grep", "-c", "very-secret", str(tmp_path / "s.db")], capture_output=True, text=True)
    assert found.stdout == "0\n"


def test_what_the_help_looks_up_is_there(tmp_path):
    [query] = re.findall(r"sqlite3 gocm.db '(select.*?)'", source("limits"))
    state = new_state(tmp_path / "s.db")
    accept(state, [new_job(1, ["a", "b"])])
    [row] = state.store.db.execute(query).fetchall()
    assert row[-1].endswith("\na\nb")


def test_what_waits_to_be_tried_again_is_counted_to_a_limit():
    state = new_state(upstreams=("gcm", "fcm"))
    assert state.snapshot().deferred == (0, None)
    accept(state, [new_job(1, ["a", "b", "c", "d"]), new_job(2, ["e"], upstream="fcm")])
    for job, n in claim(state):
        upstream, wait = ("gcm", 30.0 + n) if job == 1 else ("fcm", 40.0)
        state.settle(1, [Result(upstream, job, n, 1, Outcome(Verdict.PUT_OFF, "x", retry_after=wait))], 1000.0)
    found = [(each.due_at,) for each in state.store.rows.singles(0, 1 << 60) if each.waits]
    assert state.snapshot().deferred == (len(found), min(due for (due,) in found)) and len(found) == 5
    assert state.backlog.deferred(["gcm", "fcm"], 2) == (3, min(due for (due,) in found)), (
        "two of one, one of the other"
    )
