"""Bad days of an upstream, simulated: whose trouble it is, how fast it is sent to, and what becomes of the messages."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from simulation import (
    BROKEN,
    INTERNAL,
    NOT_FOUND,
    QUOTA,
    SILENT,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNREACHABLE,
    Arrival,
    Simulation,
    Upstream,
    stream,
)

from gocm_lib.message.outcome import DELIVERED
from gocm_lib.message.retry import Policy

HASTY = Policy(1.0, 20.0, 5)  # so that what is given up is given up within minutes
KINDS = {"503": UNAVAILABLE, "500": INTERNAL, "429": QUOTA, "404": NOT_FOUND, "401": UNAUTHORIZED, "broken": BROKEN}


def kinds(*names):
    return pytest.mark.parametrize("kind", [KINDS[name] for name in names or KINDS], ids=names or KINDS)


# ------------------------------------------------------------------------------------------- trouble that everybody has


@kinds("503", "500", "429", "404", "401")
def test_what_everybody_has_ends_no_message(kind):
    sim = Simulation(Upstream(bad=[(0, 300)], trouble=kind), [Arrival(n / 10, (f"good-{n}",)) for n in range(200)])
    sim.run(900)
    assert not sim.set_aside() and len(sim.delivered) == 200 and set(sim.times.values()) == {1}


def test_it_ends_by_its_time_to_live():
    sim = Simulation(Upstream(bad=[(0, 300)]), [Arrival(0, ("good-1",), life=100.0)]).run(200)
    assert sim.set_aside().keys() == {"good-1"} and "too old" in sim.set_aside()["good-1"]


def test_what_may_have_been_taken_counts_and_only_probes_are_sent_meanwhile():
    sim = Simulation(Upstream(bad=[(10, 300)], trouble=BROKEN), stream(10, 60)).run(300)
    assert sim.asks(20, 300) < 40
    lone = Simulation(Upstream(bad=[(0, 9999)], trouble=SILENT), stream(1, 1)).run(1200)
    assert len(lone.asked) == 5 and "attempt 5 of 5" in lone.set_aside()["good-0.0-0"]


@kinds("503", "429", "404")
def test_a_dead_upstream_is_asked_seldom_and_by_different_jobs(kind):
    sim = Simulation(Upstream(bad=[(20, 9999)], trouble=kind), stream(20, 60)).run(1500)
    late = [job for at, job in sim.asked if at > 900]
    assert len(late) <= 600 / 30 + 1 and len(set(late)) == len(late)


@kinds("503", "500", "429")
@pytest.mark.parametrize("seconds", [7, 30, 90])
def test_it_goes_on_within_five_seconds_of_the_return(kind, seconds):
    sim = Simulation(Upstream(bad=[(20, 20 + seconds)], trouble=kind), stream(50, 150)).run(170)
    back = 20 + seconds
    assert min(ended.at for ended in sim.delivered.values() if ended.at > 21) < back + 5.2
    assert sim.rate(back + 12, back + 32) >= 49


def test_an_upstream_that_cannot_be_reached_is_asked_again_within_five_seconds():
    sim = Simulation(Upstream(bad=[(20, 80)], trouble=UNREACHABLE), stream(50, 100)).run(150)
    assert min(ended.at for ended in sim.delivered.values() if ended.at > 21) < 85.2 and not sim.set_aside()


def test_odd_jobs_do_not_hide_the_return():
    """The next probe is rather one of whose answers nothing is known."""
    arrivals = [*stream(2, 3, "odd-"), Arrival(5.0, ("good-1",)), *stream(1, 3, begin=20.0)]
    sim = Simulation(Upstream(bad=[(10, 140)]), arrivals).run(180)
    assert min(ended.at for ended in sim.delivered.values() if ended.at > 11) < 140 + 14


@kinds("503", "404", "429")
def test_a_dead_upstream_is_asked_seldom_where_all_that_waits_is_odd(kind):
    upstream = Upstream(odd=kind)
    sim = Simulation(upstream, stream(10, 10, "odd-") + stream(1, 200), policy=Policy(10.0, 20.0, 100)).run(200)
    upstream.bad = [(200, 9999)]
    sim.run(2000)
    assert len(sim.state.pacing.standings["fcm"].odd) == 100
    assert sim.asks(1600, 2200) <= 600 / 30 + 1


@kinds("503", "404", "429")
@pytest.mark.parametrize("good, odd", [(1.0, 2.0), (2.0, 1.0)], ids=["good first", "odd first"])
def test_hundreds_of_odd_jobs_do_not_hide_the_return(kind, good, odd):
    """Nobody has been tried yet when the upstream goes: the probes take the newest and the oldest in turns."""
    arrivals = [Arrival(good, (f"good-{n}",)) for n in range(30)] + [Arrival(odd, (f"odd-{n}",)) for n in range(300)]
    sim = Simulation(Upstream(bad=[(0, 60)], odd=kind), stream(2, 1) + arrivals).run(90)
    assert len(sim.delivered) == 32


@kinds("503", "404", "429")
def test_jobs_known_to_be_odd_do_not_hide_the_return(kind):
    """Those that were in flight when the upstream went are found among hundreds that nobody takes."""
    arrivals = stream(10, 30, "odd-") + stream(10, 100, begin=0.05)
    sim = Simulation(Upstream(bad=[(100, 160)], odd=kind), arrivals, policy=Policy(5.0, 10.0, 1000)).run(220)
    assert len(sim.delivered) == 1000


@kinds("503", "404", "429")
def test_flapping_ends_no_message(kind):
    sim = Simulation(Upstream(bad=lambda at: at % 20 >= 10, trouble=kind), stream(20, 300)).run(900)
    assert not sim.set_aside() and len(sim.delivered) == 6000


# --------------------------------------------------------------------------------------------- trouble that one job has


@kinds()
def test_odd_jobs_delay_nobody(kind):
    sim = Simulation(Upstream(odd=kind), stream(100, 60) + stream(2, 5, "odd-")).run(70)
    waits = sim.waits()
    assert len(sim.delivered) == 6000 and waits[int(len(waits) * 0.99)] < 3.1


@kinds("503", "404", "401")
def test_odd_jobs_end_with_the_answer_for_a_reason(kind):
    sim = Simulation(Upstream(odd=kind), stream(20, 120) + stream(2, 5, "odd-"), policy=HASTY).run(120)
    aside = sim.set_aside()
    assert len(aside) == 10 and all(reason == f"{kind.reason}, attempt 5 of 5" for reason in aside.values())


@kinds("404", "401", "503")
def test_odd_jobs_before_a_good_one_delay_it_for_a_moment(kind):
    odd = [Arrival(n / 10, (f"odd-{n}",)) for n in range(5)]
    sim = Simulation(Upstream(odd=kind), [*odd, Arrival(1.0, ("good-1",)), Arrival(60.0, ("good-2",))]).run(120)
    assert max(sim.waits()) < 6 and len(sim.delivered) == 2


@kinds("404", "401", "503", "429")
def test_one_odd_job_alone_pauses_nobody_once_it_is_known(kind):
    sim = Simulation(Upstream(odd=kind), [Arrival(0.0, ("odd-1",)), Arrival(5.0, ("good-1",))]).run(10)
    for _ in range(600):
        assert not sim.run(0.2).state.pacing.pauses
    assert len(sim.asked) > 3 and len(sim.delivered) == 1


@kinds("404", "503")
def test_many_odd_jobs_that_are_alone_delay_the_next_for_seconds(kind):
    arrivals = [*stream(2, 10, "odd-"), *stream(5, 60), *stream(0.05, 60, begin=180.0)]
    sim = Simulation(Upstream(odd=kind), arrivals, policy=Policy(1.0, 5.0, 1000)).run(300)
    assert len(sim.delivered) == 303 and max(sim.waits()) < 8


@kinds("404", "503")
def test_with_a_few_messages_a_minute_they_end_too(kind):
    sim = Simulation(Upstream(odd=kind), stream(0.1, 4000) + stream(1, 3, "odd-")).run(4000)
    assert len(sim.set_aside()) == 3 and max(sim.waits()) < 6


def test_a_lone_job_waits_for_the_upstream():
    sim = Simulation(Upstream(bad=[(0, 3600)]), stream(1, 1)).run(3640)
    assert sim.delivered["good-0.0-0"].at < 3632


@kinds("503", "404")
@pytest.mark.parametrize("share", [0.45, 0.7])
def test_an_upstream_that_refuses_many_ends_no_message(kind, share):
    """A load balancer with some bad servers behind it."""
    sim = Simulation(Upstream(sporadic=[(kind, share)]), stream(20, 50), policy=HASTY).run(650)
    assert not sim.set_aside() and len(sim.delivered) == 1000


@kinds("404", "401")
def test_refusals_say_nothing_about_the_pace(kind):
    sim = Simulation(Upstream(odd=kind), stream(100, 60) + stream(30, 60, "odd-"), limit=1000.0)
    rates = [sim.run(1).state.pacing.standings["fcm"].pace.rate for _ in range(60)]
    assert rates == sorted(rates) and rates[-1] > 980, "it was never cut"


@kinds("503", "429", "404")
def test_an_odd_job_of_many_tokens_delays_nobody(kind):
    arrivals = [*stream(2, 60), Arrival(20.0, tuple(f"odd-{n}" for n in range(300)))]
    sim = Simulation(Upstream(odd=kind), arrivals).run(70)
    assert len(sim.delivered) == 120 and max(sim.waits()) < 3.1


# ----------------------------------------------------------------------------------------------------------- how fast


@kinds("503", "500", "broken")
def test_a_few_sporadic_errors_cost_nobody_anything(kind):
    sim = Simulation(Upstream(sporadic=[(kind, 0.05)]), stream(300, 40, begin=20.0), limit=1000.0).run(60)
    assert sim.rate(25, 60) >= 0.95 * 300 and sim.late(1.5) <= 0.055 * 12_000
    assert sim.state.pacing.standings["fcm"].pace.rate > 980, "the pace is what it would have been"


@pytest.mark.parametrize("kind, capacity", [(UNAVAILABLE, 20), (QUOTA, 20), (UNAVAILABLE, 200), (QUOTA, 500)])
def test_a_capacity_is_used_and_little_refused(kind, capacity):
    upstream = Upstream(capacity=capacity, refusal=kind)
    sim = Simulation(upstream, stream(2 * capacity, 70), limit=3.0 * capacity, tick=0.02).run(45)
    assert sim.rate(30, 45) >= 0.9 * capacity and sim.refused(30, 45) <= 0.2
    upstream.capacity = 0
    sim.run(25)
    assert sim.rate(60, 70) >= 1.9 * capacity and not sim.set_aside()


def test_a_capacity_of_five_thousand():
    upstream = Upstream(capacity=5000, refusal=QUOTA)
    sim = Simulation(upstream, [Arrival(0.0, tuple(f"good-{n}" for n in range(300_000)))], limit=100_000.0).run(33)
    assert sim.rate(30, 33) >= 0.9 * 5000 and sim.refused(30, 33) <= 0.2


def test_a_device_that_has_too_much_slows_nobody_else():
    busy = [Arrival(n / 4, ("busy-1",)) for n in range(240)]
    sim = Simulation(Upstream(device_quota=30.0), stream(100, 60) + busy).run(70)
    assert len(sim.waits()) == 6000 and max(sim.waits()) < 0.5
    told = sum(outcome is not DELIVERED for _, outcome in sim.answers)
    assert told < 30 and sim.times["busy-1"] >= 45 and not sim.set_aside()


def test_a_device_that_has_too_much_is_asked_more_seldom_each_time():
    sim = Simulation(Upstream(device_quota=2.0), [Arrival(0.0, ("busy-1",))] * 20).run(900)
    assert sum(outcome is not DELIVERED for _, outcome in sim.answers) <= 40 and not sim.set_aside()


# --------------------------------------------------------------------------------------------------------- all of it


@given(
    odd=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    kind=st.sampled_from(list(KINDS.values())),
    sporadic=st.floats(0.0, 0.05),
    struck=st.sampled_from([UNAVAILABLE, INTERNAL, BROKEN]),
    capacity=st.sampled_from([0.0, 20.0]),
    trouble=st.sampled_from([UNAVAILABLE, QUOTA, NOT_FOUND, UNREACHABLE]),
    bad=st.sampled_from([[], [(30, 60)], [(30, 40), (50, 60), (70, 80)]]),
    latency=st.sampled_from([0.02, 0.1, 1.0]),
    rate=st.sampled_from([0.2, 5.0, 30.0]),
    large=st.integers(0, 300),
    seed=st.integers(0, 1000),
)
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_no_token_that_the_upstream_takes_is_given_up_or_forgotten(
    odd, kind, sporadic, struck, capacity, trouble, bad, latency, rate, large, seed
):  # fmt: skip
    upstream = Upstream(
        latency=latency, sporadic=[(struck, sporadic)], capacity=capacity, bad=bad, trouble=trouble, odd=kind, seed=seed
    )
    arrivals = stream(rate * (1 - odd), 90) + stream(rate * odd, 90, "odd-")
    if large:
        arrivals.append(Arrival(10.0, tuple(f"good-large-{n}" for n in range(large))))
    # Who waits with hundreds that nobody takes, and nobody else, is found as fast as probes go, one in 30 s at last.
    later = stream(1 / 60, 7000, "later-", begin=120.0)
    sim = Simulation(upstream, arrivals + later, policy=HASTY, seed=seed).run(90)
    upstream.capacity, upstream.sporadic = 0.0, ()
    good = {token for arrival in arrivals for token in arrival.tokens if token.startswith("good-")}
    while not good <= sim.delivered.keys() and sim.now < 7200:
        sim.run(30)
    assert good <= sim.delivered.keys(), f"{good - sim.delivered.keys()}, {sim.set_aside()}"
