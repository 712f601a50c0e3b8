"""What operators watch: /metrics, health, Graphite and StatsD."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import Carbon, eventually, stand_still
from prometheus_client.parser import text_string_to_metric_families

from gocm_lib.message.outcome import FAILURES, RETRIES
from gocm_lib.monitoring import counters, health, metrics
from gocm_lib.monitoring.collector import CAUSES, Collector
from gocm_lib.monitoring.counters import CODES, LATENCY, Counters, Histogram
from gocm_lib.monitoring.health import Abilities
from gocm_lib.monitoring.metrics import METRICS, Sample
from gocm_lib.state.client import Client

short = pytest.mark.short


def scrape(server):
    """Every series, by (name, labels), as Prometheus's own parser reads it."""
    status, headers, body = server.http().ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(body.decode()))
    kinds = {metric.name: metric.kind for metric in METRICS}
    assert {family.name + "_total" * (family.type == "counter"): family.type for family in families} == kinds
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_every_series_is_there_from_the_start(server):
    series = scrape(server)
    for upstream in ("gcm", "fcm"):
        assert all(series["gocm_send_failures_total", *sorted((upstream, reason))] == 0 for reason in FAILURES)
        assert all(series["gocm_retries_total", *sorted((upstream, cause))] == 0 for cause in RETRIES)
        assert all(series["gocm_upstream_responses_total", *sorted((upstream, code))] == 0 for code in CODES)
        assert series["gocm_upstream_request_duration_seconds_count", upstream] == 0
        assert series["gocm_upstream_paused_until_timestamp_seconds", upstream] == 0
    assert all(("gocm_rejected_total", cause) in series for cause in CAUSES.values())
    assert series["gocm_requests_total", *sorted(("/gcm/send", "200"))] == 0
    assert series["gocm_state_up",] == 1 and series["gocm_senders",] >= 1
    assert series["gocm_restarts_total", "sender"] == 0


def test_the_figures_of_some_messages(start, sandbox):
    server = start("--max-attempts", "2")
    tokens = ["a", "canonical-b", "gone-c", "invalid-d", "mismatch-e", "flaky-1-f", "flaky-9-g", "error-Odd-h"]
    server.send(tokens)
    server.settled()
    series = scrape(server)
    counted = {
        ("gocm_messages_accepted_total", "gcm"): 1,
        ("gocm_tokens_accepted_total", "gcm"): 8,
        ("gocm_send_attempts_total", "gcm"): 8,
        ("gocm_tokens_delivered_total", "gcm"): 3,
        ("gocm_tokens_unregistered_total", "gcm"): 1,
        ("gocm_canonical_ids_total", "gcm"): 1,
        ("gocm_retries_total", "gcm", "token"): 2,
        ("gocm_report_entries", "canonical"): 1,
        ("gocm_report_entries", "notregistered"): 1,
        ("gocm_queue_wait_seconds_count",): 8,
        ("gocm_pending",): 0,
        ("gocm_spool_tokens", "failed"): 1,
        ("gocm_spool_tokens", "ready"): 0,
        ("gocm_spool_oldest_seconds",): 0,
    }
    assert {name: series[name] for name in counted} == counted
    failures = {reason: series["gocm_send_failures_total", *sorted(("gcm", reason))] for reason in FAILURES}
    assert {reason: count for reason, count in failures.items() if count} == {
        "unregistered": 1,
        "invalid_token": 1,
        "wrong_sender": 1,
        "rejected": 1,
        "attempts": 1,
    }
    assert sum(failures.values()) == server.report()["failures"] == 5
    asked = sandbox.received()["requests"]
    assert series["gocm_upstream_responses_total", "200", "gcm"] == asked
    assert series["gocm_upstream_request_duration_seconds_count", "gcm"] == asked
    assert series["gocm_last_success_timestamp_seconds", "gcm"] > 1e9
    assert series["process_open_fds",] > 5 and series["process_resident_memory_bytes",] > 1e6
    assert not any(token in str(series) for token in tokens[1:])


def test_counts_survive_the_death_of_those_who_counted(start, sandbox):
    server = start("--senders", "1")
    server.send([f"t{n}" for n in range(20_000)])  # for the least time that Linux tells of
    server.settled()
    before = scrape(server)
    os.kill(server.children("sender.*")[0], signal.SIGKILL)
    eventually(lambda: scrape(server)["gocm_restarts_total", "sender"] == 1)
    eventually(lambda: scrape(server)["gocm_senders",] == 1)
    after = scrape(server)
    assert after["gocm_process_cpu_seconds_total", "sender"] >= before["gocm_process_cpu_seconds_total", "sender"] > 0
    name = "gocm_upstream_responses_total", "200", "gcm"
    assert after[name] == before[name] > 0
    server.send(["again"])
    server.settled()
    assert scrape(server)[name] == before[name] + 1
    os.kill(server.children("state")[0], signal.SIGKILL)
    eventually(lambda: server.report_or_none())
    assert eventually(lambda: scrape(server).get(("gocm_tokens_delivered_total", "gcm"))) == 20_001


def test_without_the_state_process_the_rest_is_told(server):
    [state] = server.children("state")
    stand_still(state)
    try:
        series = scrape(server)
        assert series["gocm_state_up",] == 0 and ("gocm_pending",) not in series
        status, _, body = server.http().ask("GET", "/readyz")
        assert status == 503 and json.loads(body) == {
            "status": "failing",
            "reasons": ["the state process does not answer: nothing can be kept"],
        }
        assert server.http().ask("GET", "/livez")[0] == 200, "for a while"
        assert sum(scrape(server)["gocm_rejected_total", cause] for cause in CAUSES.values()) == 0, (
            "a probe is no refusal"
        )
    finally:
        os.kill(state, signal.SIGCONT)
    eventually(lambda: server.http().ask("GET", "/readyz")[0] == 200)


def test_a_paused_upstream_is_a_note_and_a_full_spool_a_reason(start, sandbox):
    sandbox.mode(status=401)
    server = start("--max-pending", "2")
    server.send(["a"])
    told = eventually(lambda: (found := server.http().json("GET", "/readyz"))["status"] == "degraded" and found)
    assert told["notes"] == ["upstream gcm is paused: HTTP 401"]
    assert scrape(server)["gocm_upstream_paused_until_timestamp_seconds", "gcm"] > 1e9
    assert eventually(lambda: scrape(server)["gocm_spool_oldest_seconds",] > 0.1)
    server.send(["b"])
    status, _, body = server.http().ask("GET", "/readyz")
    assert status == 503 and "2 tokens are pending" in json.loads(body)["reasons"][0]
    assert server.http().ask("HEAD", "/readyz")[0] == 503


@short
@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"stopping": True}, "stopping"),
        ({"state_answers": False}, "state process"),
        ({"not_kept": "no socket"}, "cannot be kept: no socket"),
        ({"refusing": "the disk is full"}, "refused: the disk is full"),
        ({"senders": 0}, "no sender"),
        ({"without_token": ["fcm"], "upstreams": 1}, "no access token for fcm"),
        ({"without_token": ["fcm"], "upstreams": 2}, ""),
    ],
)
def test_why_it_is_not_ready(change, words):
    able = Abilities(False, True, "", "", 2, [], 2)._replace(**change)
    reasons = health.unready(able)
    assert (len(reasons) == 1 and words in reasons[0]) if words else not reasons


@short
def test_what_has_not_moved_is_stuck():
    assert health.stuck({"feeder": 100.0, "intake": 80.0, "accept": 55.1}, 100.0) == []
    assert health.stuck({"feeder": 100.0, "intake": 54.0, "accept": 50.0}, 100.0) == ["accept", "intake"]


# ---------------------------------------------------------------------------------------------------------- counting


@short
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=50))
def test_a_histogram_counts_each_value_once(values):
    histogram = Histogram(LATENCY)
    for value, times in values:
        histogram.observe(value, times)
    everything = [value for value, times in values for _ in range(times)]
    assert sum(histogram.counts) == len(everything)
    assert histogram.counts[0] == sum(value <= LATENCY[0] for value in everything)
    assert histogram.counts[-1] == sum(value > LATENCY[-1] for value in everything)


@short
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b"]), st.sampled_from([0, 200, 418, 503]))))
def test_meters_add_up(events):
    cells = [[0.0] * counters.cells(2) for _ in range(3)]
    meters = [Counters(each, ["a", "b"]) for each in cells]
    for now, (which, upstream, status) in enumerate(events, 1):
        if status:
            meters[which].answered(upstream, status, 0.25, float(now))
        else:
            meters[which].unanswered(upstream)
    found = counters.read(counters.add_up([counters.parts(each, ["a", "b"]) for each in cells], ["a", "b"]))
    for name, traffic in found.items():
        mine = [status for _, upstream, status in events if upstream == name]
        assert traffic.codes["200"] == mine.count(200) and traffic.codes["503"] == mine.count(503)
        assert traffic.codes["other"] == mine.count(418) and traffic.codes["none"] == mine.count(0)
        assert sum(traffic.latency.counts) == len(mine) - mine.count(0)
        successes = [now for now, (_, upstream, status) in enumerate(events, 1) if (upstream, status) == (name, 200)]
        assert traffic.succeeded_at == max(successes, default=0)


def test_the_time_of_processes_that_are_gone_still_counts():
    collector = Collector()
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def used():
        return collector.figures(Client("/nowhere", b"", 0.1), dict).processes["sender"].cpu

    collector.child_started("sender-1.1", burn.pid)
    try:
        before = eventually(lambda: (cpu := used()) >= 0.1 and cpu)
    finally:
        burn.kill()
        burn.wait()
    collector.child_ended("sender", "sender-1.1", died=True)
    assert used() == used() >= before, "and once only"


# -------------------------------------------------------------------------------------------------- Graphite and StatsD


def test_graphite_gets_the_figures_and_may_be_away(start):
    carbon = Carbon()
    server = start("--graphite", f"127.0.0.1:{carbon.port}", "--metrics-prefix", "my.gocm", "--metrics-interval", "0.1")
    server.send(["a", "gone-b"])
    eventually(lambda: 2.0 in carbon.values("my.gocm.attempts"))
    carbon.close()
    server.logged("figures do not reach graphite")
    server.send(["c"])
    server.settled()
    assert scrape(server)["gocm_export_failures_total", "graphite"] >= 1
    again = Carbon(carbon.port)
    eventually(lambda: 3.0 in again.values("my.gocm.attempts"))
    server.logged("figures reach graphite again")
    assert len(server.find("figures do not reach graphite")) == 1, "told once"
    assert again.values("my.gocm.send_failures_total.gcm.unregistered")[-1] == 1
    assert again.values("my.gocm.pending")[-1] == 0
    _path, value, when = again.lines[-1].split()
    assert float(value) >= 0 and int(when) > 1e9
    again.close()


def test_statsd_gets_what_was_added(start):
    collector = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    collector.bind(("127.0.0.1", 0))
    collector.settimeout(20)
    port = collector.getsockname()[1]
    before = start()
    before.send(["told", "before"])
    before.settled()
    before.terminate()
    server = start("--statsd", f"127.0.0.1:{port}", "--metrics-interval", "0.1")
    for n in range(3):
        server.send(["a", f"gone-{n}"])
    sums, gauges = {}, {}

    def take():
        datagram = collector.recv(65536)
        assert len(datagram) <= metrics.DATAGRAM
        for line in datagram.decode().split("\n"):
            name, _, rest = line.partition(":")
            value, _, kind = rest.partition("|")
            if kind == "c":
                sums[name] = sums.get(name, 0) + float(value)
            else:
                assert kind == "g"
                gauges[name] = float(value)
        return sums.get("gocm.attempts") == 6 and sums.get("gocm.notregistered") == 3

    eventually(take, every=0)
    [state] = server.children("state")
    stand_still(state)
    gauges.clear()
    eventually(lambda: take() and gauges.get("gocm.state_up") == 0, every=0)
    os.kill(state, signal.SIGCONT)
    eventually(lambda: take() and gauges.get("gocm.state_up") == 1, every=0)
    collector.close()
    server.logged("figures do not reach statsd")
    collector = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    collector.bind(("127.0.0.1", port))
    collector.settimeout(20)
    server.send(["b"])
    while sums["gocm.attempts"] == 6:
        take()
    assert sums["gocm.attempts"] == 7, "nothing is told twice"
    collector.close()


@short
@given(
    st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["counter", "gauge"]), st.integers(0, 9)), max_size=60),
    st.integers(0, 9),
)
def test_datagrams_hold_every_line_whole(wanted, before):
    samples = [Sample(f"{n}-" + "x" * size, kind, value) for n, (size, kind, value) in enumerate(wanted)]
    datagrams = metrics.statsd(samples, {sample.path: before for sample in samples})
    assert all(len(datagram) <= metrics.DATAGRAM for datagram in datagrams)
    lines = b"\n".join(datagrams).decode().split("\n") if datagrams else []
    told = {path: (value, value - before if value >= before else value) for path, _, value in samples}
    assert lines == [
        f"{path}:{value if kind == 'gauge' else told[path][1]}|{kind[0]}"
        for path, kind, value in samples
        if kind == "gauge" or told[path][1]
    ]
