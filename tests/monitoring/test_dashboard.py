"""What the status page is told: the state in a sentence, what to do about failures, the last ten minutes."""

import os
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, TOKEN, eventually, form, secret

from gocm_lib.help.topics import TOPICS
from gocm_lib.message import outcome
from gocm_lib.monitoring import dashboard
from gocm_lib.monitoring.counters import LATENCY, Histogram
from gocm_lib.monitoring.trend import Point, Sample, Share, points, troubles

short = pytest.mark.short


@short
def test_there_is_advice_for_each_reason_to_fail():
    assert set(dashboard.ADVICE) == set(outcome.FAILURES) and set(outcome.KEPT_FAILURES) < set(outcome.FAILURES)
    assert {advice.topic for advice in dashboard.ADVICE.values()} <= set(TOPICS)


@short
@pytest.mark.parametrize(
    "reasons, notes, said",
    [
        (["no sender is ready", "stopping"], ["x"], "Not working: no sender is ready; stopping."),
        ([], ["upstream gcm is paused: HTTP 401"], "Working, but upstream gcm is paused: HTTP 401."),
        ([], [], "Working, but nobody knows what is pending."),
    ],
)
def test_the_state_in_a_sentence(reasons, notes, said):
    assert dashboard.sentence(reasons, notes, None, 0.0) == said


def test_what_waits_is_said_and_an_upstream_that_is_paused(start, sandbox):
    server = start("--retry-base", "600")
    server.send(["flaky-9-a"])
    told = eventually(lambda: (t := server.http().json("GET", "/api/status"))["totals"]["retries"] and t)
    assert told["status"] == "ok" and re.fullmatch(
        r"Working: 1 token to be sent, 0 a second are going out; 1 token waits to be tried again, the next in \d+ s\.",
        told["sentence"],
    )
    assert told["pending"]["messages"] == 1 and told["pending"]["oldest_seconds"] >= 0 and told["sandbox"] is False
    assert [upstream["name"] for upstream in told["upstreams"]] == ["gcm"], "those that are configured"
    sandbox.mode(status=401)
    server.send(["b"])
    told = eventually(lambda: (t := server.http().json("GET", "/api/status"))["status"] == "degraded" and t)
    assert told["sentence"] == "Working, but upstream gcm is paused: HTTP 401."
    assert told["upstreams"][0]["paused"] == "HTTP 401" and told["upstreams"][0]["answers"]["401"] >= 1


def test_without_the_state_process_the_rest_is_told(server):
    [pid] = server.children("state")
    os.kill(pid, signal.SIGSTOP)
    try:
        told = server.http().json("GET", "/api/status")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert told["status"] == "failing" and "the state process does not answer" in told["sentence"]
    assert told["pending"] is None and told["totals"] is None and told["lists"] is None


def test_the_page_is_one_file_and_asks_nobody_else(server):
    status, headers, page = server.http().ask("GET", "/status")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert server.http().ask("GET", "/")[2] == page
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    text = page.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "http:" not in text and "https:" not in text and " src=" not in text and "style=" not in text
    head = server.http().ask("HEAD", "/status")
    assert head[0] == 200 and head[2] == b"" and head[1]["Content-Length"] == str(len(page))


def test_the_page_asks_for_a_token_as_all_else_does(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    for path in ("/", "/status", "/api/status"):
        status, headers, _ = server.http().ask("GET", path)
        assert status == 401 and 'Basic realm="gocm"' in headers.get_all("WWW-Authenticate"), (
            "a browser asks its user for it"
        )


# ---------------------------------------------------------------------------------------------------------------- time


def counts(**at):
    """Answers by bucket: `b0=3` is three in the first."""
    found = [0.0] * (len(LATENCY) + 1)
    for name, count in at.items():
        found[int(name[1:])] = count
    return found


@short
def test_what_lies_between_two_samples():
    samples = [
        Sample(1000.0, 100, counts(b2=50)),
        Sample(1005.0, 150, counts(b2=100)),
        Sample(1010.0, 150, counts(b2=100)),
        Sample(1020.0, 250, counts(b2=100, b0=10)),
    ]
    assert points(samples) == [
        Point(1005.0, 10.0, pytest.approx(0.15)),
        Point(1010.0, 0.0, None),
        Point(1020.0, 10.0, pytest.approx(0.025)),
    ]
    assert points(samples[:1]) == points([]) == []


QUIET = Sample(1000.0, 0, counts(), 3, {"fcm": Share(1000, 30)}, Share(9, 2))


@short
@pytest.mark.parametrize(
    "later, told",
    [
        ({}, []),
        ({"delivered": 500, "answers": {"fcm": Share(3000, 40)}}, []),  # 5 in a thousand: a good day
        ({"refused": 4}, ["1 post was refused in the last minute"]),
        ({"refused": 2003}, ["2,000 posts were refused in the last minute"]),
        ({"answers": {"fcm": Share(1100, 80)}}, ["upstream fcm answered 50% with 5xx"]),
        ({"answers": {"fcm": Share(1000, 30), "gcm": Share(1, 1)}}, ["upstream gcm answered 100% with 5xx"]),
        ({"feedback": Share(12, 5)}, ["--feedback-url takes nothing"]),
        ({"feedback": Share(13, 5)}, []),  # one was taken
    ],
)
def test_what_went_wrong_is_told(later, told):
    assert troubles([QUIET, QUIET._replace(at=1060.0, **later)]) == told
    assert troubles([QUIET._replace(**later)]) == []


def test_a_post_that_was_refused_is_told_and_forgotten_only_after_a_minute(start):
    server = start("--max-pending", "3", "--retry-base", "600")
    server.send(["flaky-9-a", "flaky-9-b"])
    eventually(lambda: server.http().json("GET", "/api/status")["pending"]["deferred"] == 2)
    eventually(lambda: server.http().json("GET", "/api/status")["trend"]["points"])
    assert server.http().ask("POST", "/gcm/send", form(["c", "d"]), FORM)[0] == 503
    told = eventually(lambda: (t := server.http().json("GET", "/api/status"))["status"] == "degraded" and t)
    assert told["sentence"] == "Working, but 1 post was refused in the last minute."


@short
def test_a_clock_that_was_set_back_and_counters_that_fell_give_no_nonsense():
    [point] = points([Sample(2000.0, 100, counts(b1=5)), Sample(1000.0, 40, counts())])
    assert point.sent == 0.0 and point.latency is None


@short
@given(st.lists(st.sampled_from([0.01, 0.07, 0.15, 0.25, 0.4, 3.0, 100.0]), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_its_value(values, q):
    histogram = Histogram(LATENCY)
    for value in values:
        histogram.observe(value)
    rank = q * len(values)
    exact = sorted(values)[max(0, -int(-rank // 1) - 1)]
    low = max((bound for bound in (0.0, *LATENCY) if bound < exact), default=0.0)
    high = next((bound for bound in LATENCY if bound >= exact), LATENCY[-1])
    assert low <= histogram.quantile(q) <= high or (exact > LATENCY[-1] and histogram.quantile(q) == LATENCY[-1])


@short
def test_no_values_no_quantile():
    assert Histogram(LATENCY).quantile(0.5) is None
