"""A wave of unregistered tokens is told before anybody deletes them: the rule, the lists, and a server in one."""

import json

import pytest
from kit import accept, claim, eventually, kill, new_job, new_state, output

from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict
from gocm_lib.state.store import Finish
from gocm_lib.state.waves import BEFORE, BUCKET, RECENT, Tally, Watch, is_wave

short = pytest.mark.short
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@short
@pytest.mark.parametrize(
    "recent, before, expected",
    [
        ((100, 51), (0, 0), True),
        ((99, 99), (0, 0), False),  # too few to say anything
        ((100, 50), (0, 0), False),  # half, not more
        ((1000, 501), (10_000, 100), True),  # 1 % a day
        ((1000, 501), (10_000, 501), True),  # 5.01 %, and ten times that
        ((1000, 501), (10_000, 502), False),
        ((1000, 890), (10_000, 890), True),
        ((1000, 889), (10_000, 890), False),
        ((1000, 1000), (10_000, 1001), False),  # who has more than 10 % a day can have no wave
        ((1_000_000, 600_000), (1, 0), True),
    ],
)
def test_what_a_wave_is(recent, before, expected):
    assert is_wave(Tally(*recent), Tally(*before)) is expected


def watched(*heard):
    watch = Watch()
    for now, answers, unregistered, first in heard:
        watch.hear(Tally(answers, unregistered), first, now)
    return watch


@short
def test_it_begins_and_ends():
    watch = watched((1000.0, 500, 5, 3))
    assert not watch.look(1000.0) and not watch.since
    watch.hear(Tally(100, 100), 8, 90_000.0)
    watch.hear(Tally(100, 100), 108, 90_050.0)
    assert watch.look(90_050.0) and watch.since == 90_050.0
    assert not watch.look(90_051.0), "it is told once"
    assert watch.first(90_051.0) == 8 and watch.recent(90_051.0) == Tally(200, 200)
    assert watch.look(90_050.0 + RECENT * BUCKET) and not watch.since
    assert watch.first(90_050.0 + RECENT * BUCKET) == 0


@short
def test_it_does_not_begin_and_end_with_each_answer():
    watch = watched((1.0, 100, 51, 1))
    assert watch.look(1.0)
    for answers, unregistered, over in ((40, 0, False), (40, 0, False), (23, 0, False), (1, 0, True), (100, 53, False)):
        watch.hear(Tally(answers, unregistered), 0, 1.0)
        assert watch.look(1.0) is over, (answers, watch.recent(1.0))


@short
def test_the_day_before_is_the_usual():
    day = 87_000.0  # a day, and the ten minutes
    for share, since, expected in ((10, 0.0, False), (1, 0.0, True), (10, day, True)):  # a day later it is forgotten
        watch = watched((0.0, 1000, share * 10, 0), (700.0 + since, 200, 150, 1))
        assert watch.look(700.0 + since) is expected


@short
def test_a_clock_that_was_set_back_loses_nothing():
    watch = watched((5000.0, 60, 60, 1), (100.0, 60, 60, 61))
    assert watch.recent(100.0) == watch.recent(5000.0) == Tally(120, 120)
    assert watch.look(100.0)


@short
def test_what_is_held_back_is_moved_and_counted():
    report = new_state().store

    def listed(*entry):
        report.finish(Finish(1.0, unregistered=[entry]))

    listed("a", "fcm", False, False)
    first = report.newest_entry("notregistered") + 1
    listed("b", "fcm", False, False)
    listed("c", "gcm", False, False)
    listed("b", "fcm", False, False)  # it is there already
    report.mark("fcm", first, True)
    listed("d", "fcm", True, True)
    listed("a", "fcm", True, True)
    assert [entry[1:] for entry in report.page("notregistered", 0, 9, "")] == [("a", False), ("c", False)]
    assert (report.totals.listed["notregistered"], report.totals.listed["held"]) == (2, 3)
    assert report.forget("notregistered", first, "")
    assert report.release_held(2) == 2 and report.release_held(2) == 1 and report.release_held(2) == 0
    assert [entry[1:] for entry in report.page("notregistered", first, 9, "")] == [
        ("c", False), ("b", True), ("d", True), ("a", True)]  # fmt: skip
    assert (report.totals.listed["notregistered"], report.totals.listed["held"]) == (4, 0)
    report.mark("fcm", 1, True)
    assert report.totals.listed["held"] == 0, "what was released is not held back again"
    report.mark("gcm", 1, False)
    assert all(entry.wave for entry in report.page("notregistered", 0, 9, ""))
    listed("e", "fcm", False, False)
    report.mark("fcm", 1, True)
    assert report.discard_held(9) == 1 and report.discard_held(9) == 0
    assert [entry.token for entry in report.page("notregistered", 0, 9, "")] == ["c", "b", "d", "a"]
    assert (report.totals.listed["notregistered"], report.totals.listed["held"]) == (4, 0)


# ------------------------------------------------------------------------------------------------------- a server


def gone(server, first, last):
    server.send([f"gone-{n}" for n in range(first, last)])


@pytest.fixture
def path():
    return "/gcm/report/notregistered"


def test_it_is_told_everywhere(start_fcm, path):
    server = start_fcm()
    http = server.http()
    gone(server, 0, 30)
    eventually(lambda: server.report()["notregistered"] == 30)
    assert http.json("GET", path + "?peek=1") == {"tokens": [f"gone-{n}" for n in range(30)]}
    gone(server, 30, 160)
    server.logged("upstream fcm: [0-9]+ of the last [0-9]+ answers say that a token is unregistered")
    eventually(lambda: server.report()["notregistered"] == 160)
    told = http.json("GET", path + "?peek=1")
    assert told["wave"] is True and set(told["in_wave"]) == set(told["tokens"]) and len(told["tokens"]) == 160
    shown = http.json("GET", "/api/status")
    assert list(shown["lists"]["notregistered"]["waves"]) == ["fcm"] and "unregistered than usual" in shown["sentence"]
    metrics = http.ask("GET", "/metrics")[2].decode()
    assert 'gocm_unregistered_wave{upstream="fcm"} 1' in metrics
    assert 'gocm_unregistered_wave{upstream="gcm"} 0' in metrics
    assert http.json("GET", path) == {"tokens": told["tokens"]}, "the plain list is as it was"


def test_it_is_held_back_until_somebody_says_so(start_fcm, path):
    server = start_fcm("--hold-waves")
    http = server.http()
    gone(server, 0, 150)
    server.logged("they are held back")
    server.send(["a"])
    eventually(lambda: server.report()["notregistered"] == 150)
    cursor = http.ask("GET", path + "?peek=1")[1]["GoCM-Cursor"]
    assert http.json("GET", path) == {"tokens": None}
    assert "gocm_report_held 150" in http.ask("GET", "/metrics")[2].decode()
    kill(server.children("state"))
    eventually(lambda: http.ask("GET", path + "?peek=1")[0] == 200)
    assert http.json("GET", path) == {"tokens": None}, "over a restart, too"
    for form, status in (("all=2", 400), ("", 400), ("which=1", 400)):
        assert http.ask("POST", "/gcm/feedback/release", form, FORM)[0] == status
    assert json.loads(http.ask("POST", "/gcm/feedback/release", "all=1", FORM)[2]) == {"released": 150}
    server.logged("audit: .* released 150 entries that were held back")
    told = http.json("GET", f"{path}?ack={cursor}")  # who reads by a cursor gets them, too
    assert len(told["tokens"]) == 150
    assert json.loads(http.ask("POST", "/gcm/feedback/release", "all=1", FORM)[2]) == {"released": 0}


def test_a_wave_goes_on_over_restarts(start_fcm, path):
    """What comes after the state process, or all of us, was killed in the middle of a wave is held back, too."""
    server = start_fcm("--hold-waves")
    gone(server, 0, 150)
    server.logged("they are held back")
    eventually(lambda: server.report()["notregistered"] == 150)
    kill(server.children("state"))
    eventually(lambda: server.report_or_none())
    gone(server, 150, 190)
    eventually(lambda: (server.report_or_none() or {}).get("notregistered") == 190)
    assert server.http().json("GET", path) == {"tokens": None}
    server.kill_group()
    again = start_fcm("--hold-waves")
    gone(again, 190, 230)
    eventually(lambda: again.report()["notregistered"] == 230)
    assert again.http().json("GET", path) == {"tokens": None}
    assert "gocm_report_held 230" in again.http().ask("GET", "/metrics")[2].decode()


@short
def test_what_was_kept_of_it_is_a_day_and_what_was_heard():
    state = new_state()
    for minute in range(1500):
        now = (minute + 1) * BUCKET
        for n in (1, 2):
            job = minute * 10 + n
            accept(state, [new_job(job, [f"t{job}"], now=now)])
            [taken] = claim(state, now=now)
            gone = Outcome(Verdict.UNREGISTERED, "r", cause="unregistered") if n == 2 else DELIVERED
            state.settle(1, [Result("gcm", taken[0], taken[1], 1, gone)], now)
    kept = state.store.answers("gcm")
    assert [each.number for each in kept] == list(range(1501 - RECENT - BEFORE, 1501))
    assert all(each.tally == Tally(2, 1) and each.first for each in kept)
    assert Watch(kept).recent(1500 * BUCKET) == state.waves["gcm"].recent(1500 * BUCKET) == Tally(20, 10)


def test_what_is_held_back_can_be_forgotten(start_fcm, path):
    server = start_fcm("--hold-waves")
    gone(server, 0, 150)
    server.logged("they are held back")
    http = server.http()
    eventually(lambda: server.report()["notregistered"] == 150)
    there = ("--to", f"http://127.0.0.1:{server.port}")
    assert output("feedback", "discard", *there) == (0, "150 discarded\n")
    assert output("feedback", "release", *there) == (0, "0 released\n")
    assert output("feedback", "keep", *there)[0] == 2
    assert http.json("GET", path) == {"tokens": None}
    assert "gocm_report_held 0" in http.ask("GET", "/metrics")[2].decode()
