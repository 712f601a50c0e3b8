"""Messages that make senders die: they are found and set aside, and nothing else is."""

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import ALL, LIMIT, accept, answer, claim, eventually, new_job, new_state, told

from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.message.suspect import COMPANY, FATAL, UNREST, InFlight, unrest
from gocm_lib.process import restarts
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.generation import LEASE, stands_still
from gocm_lib.senders.quarantine import Quarantine
from gocm_lib.state.contract import BEFORE_ALL
from gocm_lib.state.packs import heads

short = pytest.mark.short

# --------------------------------------------------------------------------------------------------------- the rules


def part(job, deaths, count=1):
    return Slice("gcm", "token", "{}", [Run(job, 0, 1, [f"{job}-{n}" for n in range(count)])], deaths)


@short
@given(st.lists(st.integers(1, 2), max_size=100), st.lists(st.booleans(), max_size=400), st.integers(0, 3))
def test_suspects_fly_in_small_company_and_each_gets_its_turn(suspects, steps, others):
    quarantine, flying, landed = Quarantine(), [], []
    for job, deaths in enumerate(suspects, 1):
        quarantine.hold(part(job, deaths), part(job, deaths))
    for land_an_other in [*steps, *[True] * (3 + 2 * len(suspects))]:
        held = quarantine.blocks_others
        admitted = quarantine.admit(others + len(flying))
        flying += admitted
        assert len(flying) <= COMPANY
        if any(flight.deaths == FATAL - 1 for flight in flying):
            assert len(flying) == 1 and others == 0, "who was there at two deaths flies alone,"
            assert held or (admitted and quarantine.blocks_others), "and nothing takes off beside it"
        if land_an_other:
            others = max(0, others - 1)
            for flight in flying:
                quarantine.done(flight)
            landed, flying = landed + flying, []
    assert [flight.job for flight in landed] == list(range(1, len(suspects) + 1))
    assert not quarantine and not quarantine.blocks_others


@short
def test_a_hundred_suspects_fly_thirty_two_at_a_time():
    quarantine = Quarantine()
    for job in range(100):
        quarantine.hold(part(job, 1), job)
    assert quarantine.admit(500) == list(range(COMPANY)) and quarantine.admit(500) == []
    quarantine.done(part(5, 1))
    assert quarantine.admit(500) == [COMPANY] and not quarantine.blocks_others


@short
def test_an_upstream_s_suspects_can_be_given_up():
    quarantine = Quarantine()
    for job, name in enumerate(["gcm", "fcm", "gcm"]):
        quarantine.hold(part(job, 2)._replace(upstream=name), job)
    assert quarantine.give_up("gcm") == [0, 2] and quarantine.admit(0) == [1]


@short
@given(
    st.lists(
        st.dictionaries(
            st.integers(1, 10**15), st.lists(st.integers(1, 1000), min_size=1, max_size=3), min_size=1, max_size=3
        ),
        max_size=10,
    ),
    st.data(),
)
def test_the_black_box_holds_what_is_in_the_air(flights, data):
    """Of each flight its tokens, and none of those between them."""
    cells, in_flight = [0] * 500, {}
    crash_log = CrashLog(cells)
    for flight in [*flights, *flights[:3]]:
        runs = [
            Run(job, place * 5000, 1, ["t"] * count)
            for job, counts in flight.items()
            for place, count in enumerate(counts)
        ]
        if len(in_flight) > 5:
            landing = data.draw(st.sampled_from(sorted(in_flight)))
            crash_log.end(landing)
            del in_flight[landing]
        places = tuple(crash_log.begin(part(1, 0)._replace(runs=runs)))
        in_flight[places] = [InFlight(run.job, run.first, run.first + len(run.tokens) - 1) for run in runs]
    assert sorted(CrashLog.read(cells)) == sorted(entry for entries in in_flight.values() for entry in entries)


@short
@given(st.lists(st.floats(0, 100), max_size=6), st.floats(0, 200))
def test_no_message_explains_more_deaths_than_are_fatal(deaths, now):
    lately = [death for death in deaths if now - UNREST < death <= now]
    assert unrest(deaths, now) == (len(lately) >= FATAL)


@short
@given(st.lists(st.floats(0, 100), max_size=12), st.floats(100, 200))
def test_starts_rest_only_after_many_deaths_lately(deaths, now):
    many = sum(now - death < restarts.WINDOW for death in deaths) > restarts.DEATHS
    assert restarts.restart_delay(deaths, now) == (restarts.REST if many else 0.0)


@short
@given(st.floats(0, 1000), st.floats(0, 1000))
def test_a_lease_ends_once(moved_at, passed):
    assert stands_still(moved_at, moved_at + passed) == (moved_at + passed - moved_at > LEASE)


# --------------------------------------------------------------------------------------------------------- the state


def deaths(state):
    """Which tokens there are, as (job, n), and how many deaths are held against each."""
    found = {}
    for (body,) in state.store.db.execute("SELECT text FROM body").fetchall():
        for job, _, _ in heads(body):
            fates = state.status(job, "", -1, 2000).fates
            found |= {(job, fate.n): 0 for fate in fates if fate.state in ("ready", "deferred", "sending")}
    singles = state.store.db.execute("SELECT job, n, deaths FROM single WHERE state = 0").fetchall()
    return found | {(job, n): count for job, n, count in singles}


def take(state, generation):
    """All that is due, in the hands of a new generation."""
    state.begin(generation)
    return claim(state, generation)


def die(state, generation, flights, now):
    """A sender of the generation dies with these flights, which ends its generation; how many tokens were set aside."""
    set_aside = state.record_crash(generation, f"sender-{generation}.1", flights, now)
    state.release(generation)
    return set_aside


@short
def test_a_token_that_ends_its_sender_is_set_aside_alone():
    state = new_state()
    accept(state, [new_job(1, ["poison"]), new_job(2, [f"t{n}" for n in range(50)])])
    for generation in (1, 2):
        assert len(take(state, generation)) == 51
        assert die(state, generation, [InFlight(1, 0, 0), InFlight(2, 0, 49)], 1000.0 + generation) == 0
        assert set(deaths(state).values()) == {generation}
    assert len(take(state, 3)) == 51
    assert die(state, 3, [InFlight(1, 0, 0)], 1003.0) == 1
    assert state.snapshot().counters["failures"] == 1 and state.snapshot().pending == 1
    [failed] = state.failed(ALL, BEFORE_ALL, 9)
    assert (failed.token, failed.attempts, failed.reason) == ("poison", 0, "its sender died 3 times")
    assert len(take(state, 4)) == 50


@short
def test_in_company_nobody_is_set_aside():
    state = new_state()
    accept(state, [new_job(1, ["a"]), new_job(2, ["b"])])
    for generation in range(1, 6):
        take(state, generation)
        assert die(state, generation, [InFlight(1, 0, 0), InFlight(2, 0, 0)], 1000.0 * generation) == 0
    assert deaths(state) == {(1, 0): FATAL - 1, (2, 0): FATAL - 1}


@short
def test_a_death_that_is_told_again_counts_once():
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    claim(state)
    for _ in range(5):
        state.record_crash(1, "sender-1.1", [InFlight(1, 0, 0)], 1000.0)
    assert deaths(state) == {(1, 0): 1}


@short
def test_a_death_counts_once_for_a_token_however_it_was_noted():
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(10)])])
    claim(state)
    assert die(state, 1, [InFlight(1, 0, 9), InFlight(1, 2, 5), InFlight(1, 4, 4)], 1000.0) == 0
    assert set(deaths(state).values()) == {1}
    take(state, 2)
    die(state, 2, [InFlight(1, 4, 4), InFlight(1, 4, 6)], 1020.0)
    take(state, 3)
    assert die(state, 3, [InFlight(1, 4, 4), InFlight(1, 4, 6), InFlight(1, 4, 9)], 1040.0) == 3
    assert state.snapshot().pending == 1 and state.snapshot().tokens == 7 and state.snapshot().failed == 3


@short
def test_the_runs_of_one_request_are_no_company_to_each_other():
    """A multicast of retries has gaps; alone in flight it is set aside all the same."""
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(5)])])
    for generation in (1, 2):
        take(state, generation)
        assert die(state, generation, [InFlight(1, 0, 0), InFlight(1, 2, 2)], 1000.0 + 20 * generation) == 0
    take(state, 3)
    assert die(state, 3, [InFlight(1, 0, 0), InFlight(1, 2, 2)], 1060.0) == 2


@short
def test_what_came_to_ground_is_innocent():
    state = new_state()
    accept(state, [new_job(1, ["flaky"])])
    claim(state)
    die(state, 1, [InFlight(1, 0, 0)], 1000.0)
    [place] = take(state, 2)
    state.settle(2, [Result("gcm", *place, 1, Outcome(Verdict.DEFERRED, "x"))], 1000.0)
    assert deaths(state) == {(1, 0): 0}


@short
def test_nobody_is_set_aside_while_senders_die_of_something_else():
    """Killed with a token alone in flight, by whoever kills all the others too."""
    state = new_state()
    accept(state, [new_job(1, ["a"])])
    for generation in range(1, 40):
        now = 1000.0 + generation / 5
        take(state, generation)
        state.record_crash(generation, f"sender-{generation}.2", [], now)
        assert die(state, generation, [InFlight(1, 0, 0)], now) == 0
    assert take(state, 50)
    assert die(state, 50, [InFlight(1, 0, 0)], now + UNREST + 1) == 1, "but when all the others live"


@short
def test_two_poisonous_tokens_do_not_shield_each_other():
    state = new_state()
    accept(state, [new_job(1, ["a"]), new_job(2, ["b"])])
    now, set_aside, generation = 1000.0, 0, 0
    while set_aside < 2:
        generation, now = generation + 1, now + 1.0
        take(state, generation)
        suspects = deaths(state)
        # In one sender the first that may fly alone does; before that they fly together.
        alone = [place for place, count in suspects.items() if count == FATAL - 1]
        flights = [InFlight(job, n, n) for job, n in (alone[:1] or suspects)]
        set_aside += die(state, generation, flights, now)
        assert generation < 20, "found within seconds"
    assert state.snapshot().pending == 0


@short
def test_a_message_with_two_poisonous_tokens_is_set_aside_whole():
    """Else each of its thousands of tokens would cost a sender, or three."""
    state = new_state()
    accept(state, [new_job(1, [f"t{n}" for n in range(1000)]), new_job(2, ["innocent"])])
    now, generation, set_aside = 1000.0, 0, []
    while len(set_aside) < 2:
        generation, now = generation + 1, now + 20.0
        take(state, generation)
        waiting = sorted(deaths(state))
        if count := die(state, generation, [InFlight(1, waiting[0][1], waiting[0][1])], now):
            set_aside.append(count)
    assert set_aside == [1, 999] and generation == 2 * FATAL
    assert list(deaths(state)) == [(2, 0)] and state.snapshot().pending == 1
    assert told(state.snapshot()) == {
        "attempts": 2,
        "failures": 1000,
        "canonicals": 0,
        "notregistered": 0,
        "dropped": 0,
    }


@short
def test_delivered_before_the_death_was_told():
    state = new_state()
    accept(state, [new_job(1, ["a", "b"])])
    claim(state)
    state.settle(1, [Result("gcm", 1, 0, 1, DELIVERED)], 1000.0)
    die(state, 1, [InFlight(1, 0, 1)], 1000.0)
    assert deaths(state) == {(1, 1): 1}


# ----------------------------------------------------------------------------------------------------- real processes


def owner(sock):
    """The process at the other end of a connection on this machine."""
    _host, port = sock.getpeername()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [f"0100007F:{port:04X}", f"0100007F:{sock.getsockname()[1]:04X}"]  # a port may have other connections
    [inode] = [row[9] for row in rows if row[1:3] == ends and row[9] != "0"]
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == f"socket:[{inode}]":
                return int(descriptor.parts[2])
        except OSError:
            pass  # it is gone already
    return None


def test_a_message_that_kills_its_sender_is_set_aside_after_three_deaths(start, upstream):
    seen, poisoned = [], threading.Event()

    def behave(up, sock, number):
        while tokens := up.read(sock):
            seen.extend(tokens)
            if "poison" in tokens:
                poisoned.set()
                os.kill(owner(sock), signal.SIGKILL)
                return
            poisoned.wait(LIMIT)  # so that a hundred are in flight when the poison comes
            sock.sendall(answer(tokens))

    server = start("--senders", "2", "--max-attempts", "2", url=upstream(behave).url())
    innocent = [f"t{n}" for n in range(200)]
    for token in [*innocent[:100], "poison", *innocent[100:]]:
        server.send([token])
    report = server.settled()
    assert report == {"attempts": 201, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 0}
    assert seen.count("poison") == FATAL
    assert set(seen) == {"poison", *innocent}
    assert server.logged("not delivered: its sender died 3 times: 1 tokens")
    [failed] = server.http().json("GET", "/gcm/failed")["failed"]
    assert (failed["token"], failed["detail"]) == ("poison", "its sender died 3 times")
    eventually(lambda: len(server.children("sender.*")) == 2)
