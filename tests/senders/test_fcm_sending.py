"""FCM v1 end to end against the sandbox: what a bad payload, a quota, a wrong project do to the tokens."""

import json

import pytest
from kit import eventually


def test_a_session(start_fcm, sandbox):
    server = start_fcm()
    server.send(["a", "gone-b", "invalid-c", "mismatch-d", "flaky-2-e"], payload='{"n":1,"o":{"x":null}}')
    assert server.settled() == {"attempts": 5, "failures": 3, "pending": 0, "canonicals": 0, "notregistered": 1}
    assert server.http().json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-b"]}
    received = sandbox.received()
    assert received["delivered"] == {"a": 1, "flaky-2-e": 1}
    assert received["last"]["message"]["data"] == {"n": "1", "o": '{"x":null}'}


@pytest.mark.parametrize("given, target", [
    ({"topic": "news"}, {"topic": "news"}), ({"condition": "'a' in topics"}, {"condition": "'a' in topics"}),
    ({"fid": "f1"}, {"fid": "f1"})])  # fmt: skip
def test_other_targets(start_fcm, sandbox, given, target):
    server = start_fcm()
    body = {"payload": {"a": "b"}, "dry_run": True, **given}
    status, _, answer = server.http().ask("POST", "/gcm/send", json.dumps(body), {"Content-Type": "application/json"})
    assert (status, answer) == (200, b"ok\n")
    server.settled()
    assert sandbox.received()["last"] == {"validate_only": True, "message": {"data": {"a": "b"}, **target}}


def test_a_bad_payload_stops_its_job_and_no_other(start_fcm, sandbox):
    server = start_fcm()
    sandbox.mode(answer="too_big")
    server.send([f"t{n}" for n in range(3000)])
    assert server.settled()["failures"] == 3000
    asked = sandbox.received()["requests"]
    assert asked <= 64, "not sent a thousand times"
    assert server.http().json("GET", "/gcm/report/notregistered") == {"tokens": None}
    sandbox.mode(answer="")
    server.send([f"u{n}" for n in range(300)])
    server.settled()
    assert sandbox.received()["requests"] == asked + 300


def test_invalid_tokens_do_not_stop_their_job(start_fcm, sandbox):
    server = start_fcm()
    server.send([f"invalid-{n}" for n in range(50)] + ["a"])
    assert server.settled()["failures"] == 50
    assert sandbox.received()["delivered"] == {"a": 1}


@pytest.mark.parametrize("answer", ["permission_denied", "not_found_page", "not_found_json"])
def test_a_wrong_project_pauses_and_recovers_with_nothing_lost(start_fcm, sandbox, answer):
    server = start_fcm()
    sandbox.mode(answer=answer)
    server.send([f"t{n}" for n in range(200)])
    server.logged("upstream fcm is paused for 2 s: HTTP 40[34]")
    assert server.report() == {"attempts": 0, "failures": 0, "pending": 1, "canonicals": 0, "notregistered": 0}
    sandbox.mode(answer="")
    assert server.settled() == {"attempts": 200, "failures": 0, "pending": 0, "canonicals": 0, "notregistered": 0}
    assert len(sandbox.received()["delivered"]) == 200


@pytest.mark.parametrize("answer", ["unavailable", "internal", "bad_gateway", "quota_retry_info"])
def test_what_passes_is_sent_again(start_fcm, sandbox, answer):
    server = start_fcm("--max-attempts", "50")
    sandbox.mode(answer=answer)
    server.send(["a"])
    eventually(lambda: sandbox.received()["arrived"].get("a", 0) >= 2)
    sandbox.mode(answer="")
    assert server.settled()["failures"] == 0


def test_a_429_slows_the_whole_upstream_and_it_recovers(start_fcm, sandbox):
    sandbox.mode(capacity=20, refusal="quota_project", retry_after=1)
    server = start_fcm("--max-attempts", "1")
    server.send([f"t{n}" for n in range(300)])
    server.logged(r"upstream fcm refuses \d+ %: slowing down to \d+/s")
    sandbox.mode(capacity=0)
    assert server.settled()["failures"] == 0
    assert len(sandbox.received()["delivered"]) == 300


@pytest.mark.slow
def test_the_quota_is_kept_in_every_second(start_fcm, sandbox):
    server = start_fcm("--fcm-rate", "60000", "--senders", "2")
    server.send([f"t{n}" for n in range(1500)])
    eventually(lambda: server.report()["pending"] == 0, limit=60)
    seconds = sandbox.received()["seconds"]
    assert sum(seconds.values()) == 1500
    assert max(seconds.values()) <= 1100 and len(seconds) >= 5, "it ramps up, smoothly"


@pytest.mark.slow
def test_a_small_job_overtakes_a_large_one(start_fcm, sandbox):
    sandbox.mode(latency=0.2)
    server = start_fcm("--fcm-rate", "0")
    server.send([f"t{n}" for n in range(40_000)])
    eventually(lambda: sandbox.received()["arrived"])
    server.send(["small"])
    received = eventually(lambda: "small" in (received := sandbox.received())["delivered"] and received)
    assert len(received["arrived"]) < 20_000, "it went between those of the large one"
    assert server.settled()["attempts"] == 40_001
