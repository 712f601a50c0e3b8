"""Who waits for the end of a message: is told when it comes, or what is known when its patience ends."""

import contextlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import FORM, accept, claim, eventually, form, new_job, new_state

from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict

short = pytest.mark.short
LATER = Outcome(Verdict.DEFERRED, "x", retry_after=30.0)


def post(server, tokens, wait=10, headers=FORM, **options):
    status, told, body = server.http().ask("POST", f"/gcm/send?wait={wait}", form(tokens, **options), headers)
    return status, told, json.loads(body)


def begin_to_wait(server, patience):
    """A thread that posts and waits, and the list in which its answer will be."""
    found = []
    client = threading.Thread(target=lambda: found.append(post(server, ["a"], patience)))
    client.start()
    return client, found


def test_a_post_that_waits_is_answered_with_what_became_of_it(start, sandbox):
    server = start()
    status, told, found = post(server, ["a", "gone-b"])
    assert status == 200 and found["ended_at"] and found["job"] == told["X-GoCM-Job"]
    assert [each["state"] for each in found["results"]] == ["delivered", "failed"]
    assert found["results"][1]["reason"] == "unregistered"
    assert server.http().json("GET", f"/gcm/jobs/{found['job']}") == found


def test_whose_patience_ends_is_told_what_is_known(start, sandbox):
    sandbox.mode(latency=5.0)
    server = start()
    began = time.monotonic()
    status, _, found = post(server, ["a", "b"], wait=1)
    assert status == 202 and found["ended_at"] is None and found["states"]["sending"] == 2
    assert 1.0 <= time.monotonic() - began < 3.0
    status, _, body = server.http().ask("GET", f"/gcm/jobs/{found['job']}?wait=20")
    assert status == 200 and json.loads(body)["states"]["delivered"] == 2
    assert server.http().ask("GET", f"/gcm/jobs/{found['job']}?wait=20")[0] == 200, "it has ended before"


def test_what_is_tried_again_is_waited_for(start, sandbox):
    server = start()
    status, _, found = post(server, ["flaky-2-a"])
    assert status == 200 and found["results"][0]["attempts"] == 3


@pytest.mark.parametrize(
    "path, said",
    [
        ("/gcm/send?wait=0", "a number from 1 to 30"),
        ("/gcm/send?wait=31", "a number from 1 to 30"),
        ("/gcm/send?wait=1.5", "a number from 1 to 30"),
        ("/gcm/send?wait=1&wait=2", "put it into the body"),
        ("/gcm/send?tokens=a", "put it into the body"),
    ],
)
def test_what_is_no_time_to_wait_is_refused(standing, path, said):
    status, _, body = standing.http().ask("POST", path, form(["a"]), FORM)
    assert status == 400 and said in body.decode()


def test_what_cannot_be_waited_for_is_refused(standing):
    lines = b'{"tokens": ["a"], "payload": {}}\n'
    status, _, body = standing.http().ask("POST", "/gcm/send?wait=5", lines, {"Content-Type": "application/x-ndjson"})
    assert status == 400 and b"wait is for one message" in body
    assert standing.http().ask("GET", "/gcm/jobs/0000000000000001?wait=5")[0] == 404
    assert standing.http().ask("GET", "/gcm/jobs/0000000000000001?wait=5&state=ready")[0] == 400


def test_a_repeated_key_waits_for_the_first_message(start, sandbox):
    sandbox.mode(latency=1.0)
    server = start()
    headers = {**FORM, "Idempotency-Key": "k"}
    job = server.http().ask("POST", "/gcm/send", form(["a"]), headers)[1]["X-GoCM-Job"]
    status, told, found = post(server, ["a"], headers=headers)
    assert (status, found["job"], told["Idempotency-Replayed"]) == (200, job, "true")
    assert post(server, ["b"], headers=headers)[0] == 422


def threads(server):
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def test_many_wait_without_a_thread_each(start, sandbox):
    sandbox.mode(latency=3.0)
    server = start()
    before = threads(server)
    with ThreadPoolExecutor(100) as clients:
        waiting = [clients.submit(post, server, [f"t-{n}"], 20) for n in range(100)]
        eventually(lambda: server.report()["pending"] == 100)
        assert threads(server) <= before + 5
        assert all(each.result()[2]["states"]["delivered"] == 1 for each in waiting)


def test_who_waits_while_the_server_stops_is_told_at_once(start, sandbox):
    sandbox.mode(latency=20.0)
    server = start()
    client, found = begin_to_wait(server, 30)
    eventually(lambda: server.report()["pending"])
    began = time.monotonic()
    server.process.terminate()
    client.join(10)
    assert found[0][0] == 202 and time.monotonic() - began < 5.0


def test_who_waits_is_told_though_the_state_process_dies(start, sandbox):
    sandbox.mode(latency=2.0)
    server = start()
    client, found = begin_to_wait(server, 20)
    eventually(lambda: sandbox.received()["requests"] or server.report()["pending"])
    os.kill(server.children("state")[-1], signal.SIGKILL)
    client.join(30)
    assert found[0][0] == 200 and found[0][2]["states"]["delivered"] == 1


def test_a_state_process_that_stands_still_keeps_nobody_for_ever(start, sandbox):
    sandbox.mode(latency=20.0)
    server = start()
    job = server.send(["a"])
    [state] = server.children("state")
    os.kill(state, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert server.http().ask("GET", f"/gcm/jobs/{job}?wait=1")[0] == 503
        assert time.monotonic() - began < 5.0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state, signal.SIGCONT)


def test_a_client_that_leaves_costs_nothing(start, sandbox):
    sandbox.mode(latency=1.0)
    server = start()
    for n in range(20):
        client = server.http()
        client.connection.request("POST", "/gcm/send?wait=30", form([f"t-{n}"]), FORM)
        client.connection.sock.close()
    server.settled()
    assert post(server, ["a"])[0] == 200
    eventually(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) < 60)
    assert not [line for line in server.lines if "Traceback" in line]


@short
def test_the_state_tells_what_has_ended_and_what_is_asked_for_anyway():
    state = new_state()
    accept(state, [new_job(job << 8, "ab") for job in (1, 2, 3)])
    assert state.ended([1 << 8, 2 << 8], [3 << 8], 10.0).keys() == {3 << 8}
    held = claim(state, room=2)
    assert held.keys() == {(1 << 8, 0), (1 << 8, 1)}
    state.settle(1, [Result("gcm", 1 << 8, 0, 1, DELIVERED), Result("gcm", 1 << 8, 1, 1, LATER)], 1001.0)
    assert state.ended([1 << 8, 2 << 8], [], 10.1) == {}, "a token waits for its next try"
    assert (1 << 8, 1) in claim(state, now=1040.0)
    state.settle(1, [Result("gcm", 1 << 8, 1, 2, DELIVERED)], 1041.0)
    found = state.ended([1 << 8, 2 << 8], [], 10.4)
    assert found.keys() == {1 << 8} and found[1 << 8].states["delivered"] == 2
    assert state.ended([5 << 8], [], 11.0) == {5 << 8: None}, "there is none: nobody waits for that"
