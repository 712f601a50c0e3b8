"""Failed tokens: listed in pages, sent again, forgotten."""

import json
import os
import re
import signal
import time

import pytest
from kit import ALL, FORM, accept, claim, ends, eventually, form, new_job, new_state, output, secret, stand_still

from gocm_lib.front import query
from gocm_lib.front.auth import EVERYBODY
from gocm_lib.message.outcome import Outcome, Result, Verdict

short = pytest.mark.short
BUSY = Outcome(Verdict.PUT_OFF, "Unavailable")


def failing(start, sandbox, tokens, **options):
    """A server on which these tokens have failed after one attempt, and their job."""
    server = start("--max-attempts", "1")
    job = server.send(tokens, **options)
    server.settled()
    return server, job


def failed(server, query=""):
    return server.http().json("GET", "/gcm/failed" + query)


def post(server, what, body):
    status, _, answer = server.http().ask("POST", f"/gcm/failed/{what}", body, FORM)
    return status, json.loads(answer)


def test_one_that_failed_is_listed_and_sent_again(start, sandbox):
    server, job = failing(start, sandbox, ["a", "flaky-1-b", "gone-c"])
    [entry] = failed(server)["failed"]
    assert entry.pop("failed_at") > 1e9
    assert entry == {
        "job": job,
        "n": 1,
        "token": "flaky-1-b",
        "upstream": "gcm",
        "reason": "attempts",
        "detail": "Unavailable, attempt 1 of 1",
        "attempts": 1,
    }
    assert failed(server) == failed(server), "looking changes nothing"
    assert post(server, "replay", f"job={job}") == (200, {"replayed": 1, "left": False})
    server.settled()
    assert failed(server) == {"failed": [], "next": None}
    assert sandbox.received()["delivered"]["flaky-1-b"] == 1
    assert 'gocm_tokens_replayed_total{upstream="gcm"} 1\n' in server.http().ask("GET", "/metrics")[2].decode()


def test_through_a_restart_and_in_pages(start, sandbox):
    server, job = failing(start, sandbox, [f"flaky-1-{n}" for n in range(7)])
    other = server.send(["flaky-1-x"], payload='{"b":2}')
    server.settled()
    server.kill_group()
    server = start("--max-attempts", "1")
    found, query = [], "?limit=3"
    while page := failed(server, query)["failed"]:
        assert len(page) <= 3
        found += [(entry["job"], entry["n"]) for entry in page]
        query = f"?limit=3&after={page[-1]['job']}.{page[-1]['n']}"
    assert found == [(job, n) for n in range(7)] + [(other, 0)]
    assert [entry["job"] for entry in failed(server, f"?job={other}")["failed"]] == [other]
    assert len(failed(server, "?upstream=gcm&reason=attempts&older=0")["failed"]) == 8
    for none in ("?upstream=fcm", "?reason=expired", "?older=3600"):
        assert failed(server, none) == {"failed": [], "next": None}
    assert post(server, "discard", f"job={other}") == (200, {"discarded": 1, "left": False})
    assert post(server, "replay", "all=1") == (200, {"replayed": 7, "left": False})
    eventually(lambda: len(sandbox.received()["delivered"]) == 7)
    assert post(server, "replay", "all=1")[0] == 404, "nothing is left"


def test_from_the_command_line(start, sandbox, tmp_path):
    path = secret(tmp_path / "tokens", "0123456789abcdef\n")
    server = start("--max-attempts", "1", "--auth-token-file", path)
    headers = {**FORM, "Authorization": "Bearer 0123456789abcdef"}
    assert server.http().ask("POST", "/gcm/send", form(["flaky-1-a", "flaky-9-b"]), headers)[0] == 200
    there = ("--to", f"http://127.0.0.1:{server.port}", "--auth-token-file", path)

    def listed(*more):
        code, printed = output("failed", "list", *there, *more)
        assert code == 0
        return printed.splitlines()

    eventually(lambda: len(listed()) == 2)
    assert re.fullmatch(r"[\d-]+ [\d:]+\t[0-9a-f]{16}\t0\tgcm\tattempts\tflaky-1-a\tUnavailable, .*", listed()[0])
    assert [json.loads(line)["token"] for line in listed("--json")] == ["flaky-1-a", "flaky-9-b"]
    assert listed("--reason", "expired") == []
    assert output("failed", "replay", *there, "--reason", "attempts") == (0, "2 replayed\n")
    eventually(lambda: [line.split("\t")[5] for line in listed()] == ["flaky-9-b"])
    assert output("failed", "discard", *there, "--all") == (0, "1 discarded\n")
    assert ends("failed", "discard", *there, "--all") == (1, ["gocm: no failed token is so"])
    assert ends("failed", "replay", *there) == (1, ["gocm: say which: job, reason, upstream, by, older, or all=1"])
    assert ends("failed", "list", *there[:2]) == (1, ["gocm: a token is needed: Authorization: Bearer TOKEN"])
    assert ends("failed", "wipe")[0] == 2 and ends("failed", "list", "--to", "http://example.org")[0] == 78
    server.terminate()
    [line] = ends("failed", "list", *there)[1]
    assert line.startswith(f"gocm: no GoCM answers at http://127.0.0.1:{server.port}: Connection refused")


def test_from_the_command_line_by_a_socket(start, tmp_path):
    server = start(unix=str(tmp_path / "s"))
    assert output("failed", "list", "--to", server.place) == (0, "")


@pytest.mark.parametrize(
    "method, path, body, status, field",
    [
        ("GET", "?limit=0", None, 400, "limit"),
        ("GET", "?limit=10001", None, 400, "limit"),
        ("GET", "?after=x", None, 400, "after"),
        ("GET", "?after=0000000000000000.", None, 400, "after"),
        ("GET", "?after=ffffffffffffffff.0", None, 400, "after"),
        ("GET", "?job=1", None, 400, "job"),
        ("GET", "?job=ffffffffffffffff", None, 400, "job"),
        ("GET", "?reason=unregistered", None, 400, "reason"),
        ("GET", "?upstream=apns", None, 400, "upstream"),
        ("GET", "?older=-1", None, 400, "older"),
        ("GET", "?what=1", None, 400, "what"),
        ("POST", "/replay", "", 400, "all"),
        ("POST", "/replay", "all=0", 400, "all"),
        ("POST", "/replay", "all=1&reason=attempts", 400, "all"),
        ("POST", "/discard", "reason=", 400, "reason"),
        ("POST", "/discard", "job=nothing", 400, "job"),
        ("POST", "/discard", "%ff=1", 400, ""),
        ("POST", "/replay?all=1", "all=1", 400, ""),
        ("POST", "/replay", "all=1", 404, ""),
        ("GET", "/replay", None, 405, ""),
    ],
)
def test_bad_input_is_told(standing, method, path, body, status, field):
    found, _, answer = standing.http().ask(method, "/gcm/failed" + path, body, FORM if body is not None else {})
    assert (found, json.loads(answer)["field"]) == (status, field) and json.loads(answer)["error"]


def test_no_page_of_another_site_replays(start, sandbox):
    server, _ = failing(start, sandbox, ["flaky-1-a"])
    foreign = {**FORM, "Origin": "http://evil.example"}
    assert server.http().ask("POST", "/gcm/failed/discard", "all=1", foreign)[0] == 403
    assert server.http().ask("POST", "/gcm/failed/discard", "all=1", {"Content-Type": "application/json"})[0] == 415
    assert len(failed(server)["failed"]) == 1


@pytest.mark.parametrize("what", ["replay", "discard"])
def test_a_count_that_was_lost_is_not_told_as_none(start, sandbox, what):
    server, _ = failing(start, sandbox, ["flaky-1-a", "b"])
    [pid] = server.children("state")
    stand_still(pid)
    try:
        status, answer = post(server, what, "all=1")
        assert status == 503 and answer["error"].startswith("0 ") and "the count was lost" in answer["error"]
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: post(server, what, "all=1")[0] in (200, 404))
    assert not failed(server)["failed"]


@short
def test_no_more_is_replayed_than_there_is_room_for():
    state = new_state()
    state.policy = state.policy._replace(max_attempts=1)
    state.keeping = state.keeping._replace(limits=state.keeping.limits._replace(pending=3))
    accept(state, [new_job(1, ["a", "b", "c"])])
    state.settle(1, [Result("gcm", *place, 1, BUSY) for place in claim(state)], 1000.0)
    accept(state, [new_job(2, ["d"])])
    assert state.replay(ALL, 1001.0) == 2 and state.replay(ALL, 1001.0) == 0
    assert state.snapshot().tokens == 3 and state.snapshot().failed == 1


@short
def test_all_that_failed_is_asked_for_also_after_the_clock_was_set_back():
    state = new_state()
    accept(state, [new_job(1, ["a"], life=50.0)])
    claim(state, now=time.time() + 1e6)
    assert len(state.failed(query.which({"all": "1"}, EVERYBODY, ["gcm"], time.time()), (0, -1), 9)) == 1
    assert state.failed(query.which({"older": "0"}, EVERYBODY, ["gcm"], time.time()), (0, -1), 9) == []


@short
def test_what_is_replayed_starts_anew():
    state = new_state()
    accept(state, [new_job(1, ["a"], life=50.0), new_job(2, ["b"], life=50.0)])
    assert claim(state, now=1060.0) == {} and state.snapshot().failed == 2
    assert [each.failure for each in state.failed(ALL, (0, -1), 9)] == ["expired", "expired"]
    assert state.failed(ALL._replace(before=1060.0), (0, -1), 9) == []
    assert state.replay(ALL._replace(job=2), 2000.0) == 1 and state.snapshot().pending == 1
    assert claim(state, now=2049.0)[2, 0].attempt == 1, "its whole life is before it"
    assert state.snapshot().oldest == 2000.0
