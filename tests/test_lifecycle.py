"""Processes die: an idle sender, a busy one, the state process, the front, all of them. Nothing accepted is lost."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from kit import (
    FORM,
    LIMIT,
    Http,
    Program,
    check_ledger,
    eventually,
    four_clients,
    kill,
    post_from_clients,
    stand_still,
)

# What a lifecycle test ends with: every token that was accepted arrived, only `twice` of them more than once, and the
# counters say so.


def arrived(sandbox):
    return set(sandbox.received()["arrived"])


@pytest.mark.parametrize("victims", [1, 2])
def test_an_idle_sender_is_killed(start, sandbox, victims):
    """An idle sender dies holding its queue's lock: a queue that is used again would be stuck for ever."""
    server = start("--senders", "3")
    kill(server.children("sender-1.*")[:victims])
    tokens = [f"t{n}" for n in range(50)]
    for token in tokens:
        server.send([token])
    check_ledger(server, sandbox, tokens)
    eventually(lambda: len(server.children("sender.*")) == 3)


def test_each_sender_in_turn_is_killed_twice_round(start, sandbox):
    server = start("--senders", "2")
    tokens = []
    for turn in range(4):
        live = eventually(lambda: len(found := server.children("sender.*")) == 2 and found)
        os.kill(live[turn % 2], signal.SIGKILL)
        tokens += [f"{turn}-{n}" for n in range(10)]
        for token in tokens[-10:]:
            server.send([token])
        check_ledger(server, sandbox, tokens)


@pytest.mark.parametrize("latency", [3.0, pytest.param(22.0, marks=pytest.mark.slow)])
def test_a_busy_sender_is_killed(start, sandbox, latency):
    """Only what was in its hands may arrive twice; what the others of its generation had in flight does not, however
    long they have to wait for it.
    """
    sandbox.mode(latency=latency)
    # One sender has no place for all of them.
    server = start("--senders", "2", "--upstream-timeout", "25", "--connections", "100")
    tokens = [f"t{n}" for n in range(200)]
    for token in tokens:
        server.send([token])
    in_flight = eventually(lambda: len(found := arrived(sandbox)) == 200 and found)
    os.kill(server.children("sender.*")[0], signal.SIGKILL)
    eventually(lambda: server.report()["pending"] == 0, limit=LIMIT + 2 * latency)
    received = check_ledger(server, sandbox, tokens, twice=in_flight)
    again = sum(times > 1 for times in received["arrived"].values())
    assert 0 < again < 200, "one sender's flights are repeated, the other's are not"


def test_a_large_job_survives_its_sender(start, sandbox):
    sandbox.mode(latency=0.5)
    server = start("--senders", "1")
    tokens = [f"t{n}" for n in range(5000)]
    server.send(tokens)
    eventually(lambda: arrived(sandbox))
    os.kill(server.children("sender.*")[0], signal.SIGKILL)
    check_ledger(server, sandbox, tokens, twice=tokens)


def grows(accepted, by):
    """Return when so many more messages were accepted."""
    wanted = len(accepted) + by
    eventually(lambda: len(accepted) >= wanted)


def test_the_state_process_is_killed(start, sandbox):
    server = start()
    accepted = []
    clients = four_clients(server, 150, accepted)
    for kills in range(1, 4):
        eventually(lambda wanted=100 * kills: len(accepted) > wanted)
        [pid] = eventually(lambda: server.children("state"))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda dead=pid: server.children("state") not in ([], [dead]))
    for client in clients:
        client.join()
    assert len(accepted) == 600, "a restart within the limit is not even noticed by a client"
    check_ledger(server, sandbox, accepted)


def test_the_state_process_is_killed_while_it_starts(start, sandbox, tmp_path):
    """What the last run had in hand is made ready by the next state process, then."""
    sandbox.mode(silent=True)
    server = start()
    server.send(["a", "b"])
    eventually(lambda: arrived(sandbox))
    server.kill_group()
    sandbox.mode(silent=False)
    again = Program(*server.process.args[2:])
    try:
        os.kill(int(again.logged(r"state is process (\d+)")), signal.SIGKILL)
        again.logged("listens on")
        eventually(lambda: set(sandbox.received()["delivered"]) == {"a", "b"})
    finally:
        again.kill_group()


def forkserver_of(server):
    """The process that the children are forked from: it is ours, and they have its command line."""
    found = (Path(f"/proc/{pid}") for pid in server.group())
    parent = str(server.process.pid)
    ours = [path for path in found if path.joinpath("stat").read_text().rpartition(")")[2].split()[1] == parent]
    [pid] = [int(path.name) for path in ours if "forkserver" in path.joinpath("cmdline").read_text()]
    return pid


def test_the_forkserver_is_killed_and_the_next_is_deaf_too(start, sandbox):
    server = start("--senders", "1")
    forkserver = forkserver_of(server)
    before = server.children()
    os.kill(forkserver, signal.SIGKILL)
    eventually(lambda: len(server.children()) == 2 and not set(server.children()) & set(before))
    sandbox.mode(latency=2.0)
    tokens = [f"t{n}" for n in range(8)]
    eventually(lambda: server.http().ask("GET", "/gcm/report")[0] == 200)
    for token in tokens:
        server.send([token], payload=f'{{"to": "{token}"}}')  # like messages would share a request
    eventually(lambda: sandbox.received()["in_flight"] == 8)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.wait() == 0
    check_ledger(start(), sandbox, tokens)


def test_a_state_process_that_stands_still_without_its_forkserver_keeps_no_lock(start, sandbox):
    server = start("--senders", "1")
    [state] = server.children("state")
    forkserver = forkserver_of(server)
    stand_still(state)
    os.kill(forkserver, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{state}").exists())
    eventually(lambda: accepts(server, "a"))
    server.settled()


def accepts(server, token):
    return server.http().ask("POST", "/gcm/send", f"tokens={token}&payload={{}}", FORM)[0] == 200


@pytest.mark.slow
def test_the_state_process_is_killed_ten_times(start, sandbox):
    """So often that its restarts are slowed down: some messages are refused meanwhile, and none is lost."""
    server = start()
    accepted, ended = [], threading.Event()
    clients = four_clients(server, 100_000, accepted, ended)
    dead = []
    for _ in range(10):
        [pid] = eventually(lambda: [pid for pid in server.children("state") if pid not in dead])
        grows(accepted, 50)
        os.kill(pid, signal.SIGKILL)
        dead.append(pid)
    grows(accepted, 50)
    ended.set()
    for client in clients:
        client.join()
    check_promise(server, sandbox, accepted)
    assert len(server.find("the state process died")) == 10


@pytest.mark.slow
def test_a_storm_of_kills(start, sandbox):
    """A random sender is killed every 200 ms for 20 s, while messages come and the upstream takes 200 ms for each. Not
    while all of them only start: five such deaths in a row end a server, which a busy machine would bring about.
    """
    sandbox.mode(latency=0.2)
    server = start("--senders", "3")
    accepted, ended, chance = [], threading.Event(), random.Random(20)
    clients = four_clients(server, 100_000, accepted, ended, every=0.02)
    until, kills = time.monotonic() + 20, 0
    while time.monotonic() < until:
        eventually(lambda: server.http().json("GET", "/api/status")["senders"]["ready"])
        if senders := server.children("sender.*"):
            kill([chance.choice(senders)])
            kills += 1
        ended.wait(0.2)
    ended.set()
    for client in clients:
        client.join()
    sandbox.mode(latency=0)
    failures = check_promise(server, sandbox, accepted, limit=120)
    assert kills >= 15 and len(accepted) > 500
    assert failures <= 2, "innocent tokens were set aside for deaths that were none of theirs"
    eventually(lambda: len(server.children("sender.*")) == 3)


def check_promise(server, sandbox, accepted, limit=60):
    """After deaths that a client cannot see through: each token that was accepted arrived, or is listed as failed; how
    many failed.
    """
    report = eventually(lambda: (report := server.report_or_none()) and report["pending"] == 0 and report, limit)
    received = sandbox.received()
    assert received["requests"] > 0 and accepted, "a ledger that saw nothing proves nothing"
    dead = {entry["token"] for entry in server.http().json("GET", "/gcm/failed?limit=1000")["failed"]}
    missing = set(accepted) - set(received["delivered"]) - dead
    assert not missing, f"{len(missing)} of {len(accepted)} are lost"
    assert len(dead) == report["failures"] and report["canonicals"] == report["notregistered"] == 0
    return report["failures"]


def test_the_front_is_killed_and_its_children_leave(start, sandbox):
    sandbox.mode(latency=0.3)
    server = start()
    tokens = [f"t{n}" for n in range(100)]
    for token in tokens:
        server.send([token])
    children = server.children()
    assert len(children) >= 3
    server.process.kill()
    server.process.wait()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), limit=3.0)
    eventually(lambda: sandbox.received()["in_flight"] == 0)
    in_flight = arrived(sandbox)
    assert server.group() == [] and arrived(sandbox) == in_flight, "nothing more arrives"
    sandbox.mode(latency=0)
    check_ledger(start(), sandbox, tokens, twice=in_flight)


def test_everything_is_killed_at_once(start, sandbox):
    sandbox.mode(latency=0.3)
    server = start()
    os.kill(server.children("sender.*")[0], signal.SIGKILL)
    server.logged("sender-2.2 is process")  # so that the generation that is killed is not the next run's first
    accepted = []
    clients = four_clients(server, 400, accepted)
    eventually(lambda: len(accepted) > 300)
    server.kill_group()
    for client in clients:
        client.join()
    before = sandbox.received()
    assert before["in_flight"] == 0 or eventually(lambda: sandbox.received()["in_flight"] == 0)
    again = start()
    again.settled()
    received = sandbox.received()
    assert set(accepted) <= set(received["delivered"]), "accepted and lost"
    # What a client got no answer for may have been taken all the same: one request for each client.
    assert len(set(received["arrived"]) - set(accepted)) <= len(clients)
    assert {token for token, times in received["arrived"].items() if times > 1} <= set(before["arrived"])
    assert max(received["arrived"].values()) <= 2


def test_sigterm_with_200_in_flight(start, sandbox):
    sandbox.mode(latency=3.0)
    server = start()
    tokens = [f"t{n}" for n in range(200)]
    for token in tokens:
        server.send([token], payload=f'{{"to": "{token}"}}')
    eventually(lambda: sandbox.received()["in_flight"] == 200)
    waiting = [f"w{n}" for n in range(20)]
    server.send(waiting)
    assert server.terminate() == 0
    assert not Path(f"/proc/{server.process.pid}").exists() and not server.children()
    check_ledger(start(), sandbox, tokens + waiting)


def test_sigterm_while_starting_is_not_lost(sandbox, tmp_path):
    for delay in range(0, 60, 5):
        program = Program(
            *("--port", "0", "--spool", str(tmp_path / "s.db"), "--apikey", "k", "--gcm-url", sandbox.url()),
            *("--log-level", "debug"),
        )
        try:
            program.logged("state is process")
            threading.Event().wait(delay / 1000)
            program.process.send_signal(signal.SIGTERM)
            assert program.wait(10) == 0
        finally:
            program.kill_group()


@pytest.mark.parametrize("how", ["five times", "to the whole group", "SIGINT to the whole group"])
def test_sigterm_again_and_to_everybody(start, sandbox, how):
    sandbox.mode(latency=0.5)
    server = start()
    tokens = [f"t{n}" for n in range(50)]
    server.send(tokens)
    eventually(lambda: sandbox.received()["in_flight"])
    if how == "five times":
        for _ in range(5):
            server.process.send_signal(signal.SIGTERM)
    else:
        os.killpg(server.process.pid, signal.SIGINT if "SIGINT" in how else signal.SIGTERM)
    assert server.wait() == 0
    assert not server.find("died")
    check_ledger(start(), sandbox, tokens)


def test_a_hung_upstream_does_not_hold_up_a_stop(start, sandbox):
    sandbox.mode(silent=True)
    server = start("--drain", "0.5")
    server.send(["a"])
    eventually(lambda: sandbox.received()["in_flight"])
    assert server.terminate() == 0
    assert server.find("not done in time")
    sandbox.mode(silent=False)
    check_ledger(start(), sandbox, ["a"], twice=["a"])


@pytest.mark.alone
def test_the_state_process_stands_still(start, sandbox):
    """SIGSTOP: reports and sends are refused within the limit, and go on when it continues."""
    server = start()
    server.send(["a"])
    [pid] = server.children("state")
    stand_still(pid)
    try:
        for method, path, body in [("GET", "/gcm/report", None), ("POST", "/gcm/send", "tokens=b&payload={}")]:
            began = time.monotonic()
            status, headers, _ = server.http().ask(method, path, body, FORM)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert time.monotonic() - began < 4.0, "2 s are promised; this machine may be busy"
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: server.http().ask("GET", "/gcm/report")[0] == 200)
    server.send(["c"])
    server.settled()
    assert {"a", "c"} <= arrived(sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_sender_stands_still(start, sandbox, busy):
    """SIGSTOP: it may hold the queue's lock, so after its lease it is killed and its messages move on."""
    sandbox.mode(latency=0.5 if busy else 0)
    server = start("--senders", "2")
    tokens = [f"t{n}" for n in range(100)]
    if busy:
        server.send(tokens[:50])
        eventually(lambda: arrived(sandbox))
    for pid in server.children("sender.*"):
        stand_still(pid)
    for token in tokens[50:] if busy else tokens:
        server.send([token])
    server.logged("has stood still for .* and is killed", limit=60)
    eventually(lambda: server.report()["pending"] == 0, limit=60)
    check_ledger(server, sandbox, tokens, twice=tokens[:50] if busy else ())


def cpus(pid):
    """The CPUs that each thread of a process may use, by the thread's id."""
    found = {int(path.name): os.sched_getaffinity(int(path.name)) for path in Path(f"/proc/{pid}/task").iterdir()}
    return found, found.pop(pid)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU only")
def test_the_threads_that_serve_share_a_cpu_and_nobody_else_is_bound(start, sandbox):
    server = start()
    everywhere = os.sched_getaffinity(0)
    before = server.children()
    os.kill(forkserver_of(server), signal.SIGKILL)  # the next one, and its children, must not be bound either
    eventually(lambda: len(server.children()) == len(before) and not set(server.children()) & set(before))
    eventually(lambda: server.http().ask("GET", "/gcm/report")[0] == 200)
    server.send(["t"])
    check_ledger(server, sandbox, ["t"])
    threads, main = cpus(server.process.pid)
    bound = {frozenset(allowed) for allowed in threads.values() if len(allowed) == 1}
    assert main == everywhere and len(bound) == 1
    assert sum(len(allowed) == 1 for allowed in threads.values()) >= 3  # intake, feeder, accept
    for child in server.children(".*"):
        threads, main = cpus(child)
        assert all(allowed == everywhere for allowed in [main, *threads.values()])


def test_a_second_instance_is_refused(server, sandbox):
    second = Program("--port", "0", "--spool", server.spool, "--gcm-url", sandbox.url(), "--apikey", "k")
    assert second.wait(5) == 75
    assert second.log().splitlines()[-1] == (
        f"gocm: another GoCM runs on the spool {server.spool}: stop it, or give this one its own --spool; "
        "see gocm help options"
    )
    server.send(["a"])
    server.settled()


def test_reports_survive_a_restart(start, sandbox):
    server = start()
    server.send(["a", "gone-b", "canonical-c"])
    report = server.settled()
    server.kill_group()
    server = start()
    assert server.report() == report
    assert server.http().json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-b"]}


def test_job_ids_grow_over_a_restart(start):
    first = start()
    ids = [first.send(["a"]) for _ in range(3)]
    first.kill_group()
    ids += [start().send(["a"])]
    assert ids == sorted(set(ids))


def test_the_sandbox_beside_the_server(tmp_path):
    server = Program("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", str(tmp_path / "s.db"))
    try:
        front = Http(int(server.logged(r"listens on \S+ port (\d+)")))
        front.ask("POST", "/gcm/send", "tokens=a&payload={}", FORM)
        port = int(server.logged(r"http://127.0.0.1:(\d+)/sandbox/received"))
        eventually(lambda: Http(port).json("GET", "/sandbox/received")["delivered"] == {"a": 1})
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
    finally:
        server.kill_group()


@pytest.mark.slow
def test_five_thousand_messages_with_one_sender(start, sandbox):
    """16 kept-alive clients, a slow upstream: all delivered once, hundreds in flight, connections no more than that."""
    sandbox.mode(latency=0.5)
    server = start("--senders", "1")
    tokens = post_from_clients(server.port, clients=16, messages=5008)
    received = check_ledger(server, sandbox, tokens)
    assert received["peak"] >= 300
    assert received["connections"] <= received["peak"] * 1.1 + 10  # ours, to look at the ledger, among them
