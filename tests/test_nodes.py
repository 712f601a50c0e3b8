"""Whole gateways on one PostgreSQL: what an operator sees when one of the parts dies, stands still or is away."""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from kit import FORM, ROOT, Http, Sandbox, Server, eventually, form

psycopg = pytest.importorskip("psycopg")

import trustme  # noqa: E402
from postgres import Network, Pair, Postgres  # noqa: E402

LEASE = 15.0  # seconds
LIMIT = 60  # seconds until what was interrupted has ended
LOAD_LIMIT = 5  # seconds that a client of the load waits for an answer


@pytest.fixture(scope="module")
def careful():
    """A PostgreSQL that keeps what it says."""
    server = Postgres(fsync=True)
    yield server
    server.close()


@pytest.fixture
def fleet(careful, tmp_path):
    made = Fleet(careful, careful.spool(), tmp_path)
    yield made
    made.end()


OPERATOR = "operator-0123456789"


class Fleet:
    """Nodes on a spool, all of which send to one sandbox. What was accepted is remembered."""

    def __init__(self, server, address, place):
        self.server, self.address, self.place = server, address, place
        self.sandbox = Sandbox("--any-token")
        self.nodes = []
        self.kept = threading.local()
        self.accepted = []
        self.refused = Counter()
        self.gaps = []  # seconds between two accepted posts, where there was trouble

    def start(self, name, *words, **environ):
        """A node. One of a name that ran before is on the same machine."""
        node = Server(
            self.address,
            *("--fcm-url", f"http://127.0.0.1:{self.sandbox.port}", "--fcm-project", "sandbox-project"),
            *("--token-command", "echo ya29.pretend", "--fcm-rate", "0", "--node", name, *words),
            environ={"STATE_DIRECTORY": str(self.place / name), **environ},
        )
        self.nodes.append(node)
        return node

    def post(self, node, count=100, size=10):
        """Post messages; those that are not taken are noted."""
        for _ in range(count):
            tokens = [f"{len(self.accepted):06}-{n}-{time.monotonic_ns()}" for n in range(size)]
            status = self.try_to_post(node, tokens)
            if status == 200:
                self.accepted += tokens
            else:
                self.refused[status] += 1

    def try_to_post(self, node, tokens, limit=LIMIT):
        """The status of the answer; 0: there was none. Each thread keeps its connections."""
        kept = self.kept.__dict__.setdefault(node.port, None)
        try:
            if kept is None:
                kept = http.client.HTTPConnection("127.0.0.1", node.port, timeout=limit)
            kept.request("POST", "/gcm/send", form(tokens), FORM)
            answer = kept.getresponse()
            answer.read()
            self.kept.__dict__[node.port] = kept
            return answer.status
        except (OSError, http.client.HTTPException):
            kept.close()
            self.kept.__dict__[node.port] = None
            return 0

    def post_until_taken(self, node):
        """What is not answered may have been taken: each try is another message."""

        def taken():
            token = f"again-{time.monotonic_ns()}"
            if self.try_to_post(node, [token], 10) == 200:
                self.accepted.append(token)
                return True
            return False

        eventually(taken, LIMIT)

    def more(self, count=40):
        """Go on when so many more were accepted."""
        wanted = len(self.accepted) + count
        eventually(lambda: len(self.accepted) >= wanted, LIMIT)

    @contextlib.contextmanager
    def load(self, *nodes, rate=80, clients=4):
        """Post one message of one token so often a second, to these nodes in turn, while this block runs. A single
        function gives the nodes of the moment.
        """
        ended, lock, numbers = threading.Event(), threading.Lock(), itertools.count()
        last = time.monotonic()

        def go_on():
            nonlocal last
            due = time.monotonic()
            while not ended.is_set():
                those = nodes[0]() if callable(nodes[0]) else nodes
                number = next(numbers)
                token = f"load-{number:07}-{os.getpid()}"
                status = self.try_to_post(those[number % len(those)], [token], LOAD_LIMIT)
                with lock:
                    if status == 200:
                        self.accepted.append(token)
                        now = time.monotonic()
                        self.gaps.append(now - last)
                        last = now
                    else:
                        self.refused[status] += 1
                due = max(due + clients / rate, time.monotonic() - 1.0)
                time.sleep(max(0.0, due - time.monotonic()))

        threads = [threading.Thread(target=go_on) for _ in range(clients)]
        for each in threads:
            each.start()
        try:
            yield
        finally:
            ended.set()
            for each in threads:
                each.join()

    def check(self, node, twice):
        """All that was accepted is delivered, `twice` at most so many, and the report is exact."""

        def ended():
            report = node.report_or_none()
            return report and report["pending"] == 0 and report

        report = eventually(ended, LIMIT)
        delivered = Counter(self.sandbox.received()["delivered"])
        assert not set(self.accepted) - set(delivered), "lost"
        again = sum(count > 1 for count in delivered.values())
        assert again <= twice, f"{again} of {len(delivered)} were delivered twice"
        # A post whose answer was lost may have been kept, too.
        assert report["attempts"] == len(delivered) >= len(self.accepted)
        return report

    def end(self):
        for node in self.nodes:
            node.kill_group()
        self.sandbox.kill_group()


def gocm(*words, **environ):
    command = [sys.executable, str(ROOT / "gocm.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


# ------------------------------------------------------------------------------------------------------------ one face


def names_of(node):
    return [each["name"] for each in node.http().json("GET", "/api/status")["nodes"]]


def test_two_nodes_are_one_to_who_asks(fleet):
    one, two = fleet.start("one"), fleet.start("two")
    job = one.send(["a", "gone-1"])
    two.send(["b", "gone-2"])
    for node in (one, two):
        assert node.settled()["attempts"] == 4
        assert eventually(lambda node=node: node.http().json("GET", f"/gcm/jobs/{job}"))["states"]["delivered"] == 1
        status, _, answer = node.http().ask("GET", "/gcm/report/notregistered?peek=1")
        assert status == 200 and all(f'"gone-{n}"'.encode() in answer for n in (1, 2)), answer
        names = eventually(lambda node=node: len(found := names_of(node)) == 2 and found)
        assert names == ["one", "two"], "heard of with the next beat"
        assert b'gocm_nodes{state="alive"} 2' in node.http().ask("GET", "/metrics")[2]
    told = gocm("spool", "nodes", "--spool", fleet.address).stdout
    assert "one\talive" in told and "two\talive" in told


def test_who_may_send_so_fast_may_do_so_at_all_nodes_together(fleet, tmp_path):
    """And what is said at one goes for all: an upstream is held, messages with a tag are cancelled."""
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"shop-token-0123456789 name=shop rate=20/s\n{OPERATOR} name=ops\n")
    one, two = (fleet.start(name, "--auth-token-file", str(tokens)) for name in ("one", "two"))

    def ask(node, token, method, path, body=None):
        return node.http().ask(method, path, body, {"Authorization": f"Bearer {token}", **(FORM if body else {})})

    for node in (one, two):
        eventually(lambda node=node: b'gocm_nodes{state="alive"} 2' in ask(node, OPERATOR, "GET", "/metrics")[2])
    taken, end = 0, time.monotonic() + 5
    while time.monotonic() < end:
        for node in (one, two):
            taken += ask(node, "shop-token-0123456789", "POST", "/gcm/send", form(["a"], tag="spring"))[0] == 200
    assert 70 <= taken <= 140, "some 20 a second, and a second's worth"
    assert ask(one, OPERATOR, "POST", "/gcm/upstreams/fcm/hold", "")[0] == 200
    eventually(lambda: b"is held since" in ask(two, OPERATOR, "GET", "/readyz")[2])
    for node in (one, two):
        held = [f"held-{node.port}-{n}" for n in range(50)]
        assert ask(node, OPERATOR, "POST", "/gcm/send", form(held, tag="summer"))[0] == 200
    answer = json.loads(ask(two, OPERATOR, "POST", "/gcm/jobs/cancel", "tag=summer")[2])
    assert answer["jobs"] == 2 and answer["cancelled"] + 50 * answer["elsewhere"] == 100
    counted = ("GET", "/gcm/jobs?tag=summer")
    eventually(lambda: {j["cancelled"] for j in json.loads(ask(one, OPERATOR, *counted)[2])["jobs"]} == {50})
    assert ask(two, OPERATOR, "POST", "/gcm/upstreams/fcm/resume", "")[0] == 200
    eventually(lambda: json.loads(ask(one, OPERATOR, "GET", "/gcm/report")[2])["pending"] == 0)
    assert not [token for token in fleet.sandbox.received()["delivered"] if token.startswith("held-")]


def test_a_spool_is_made_checked_and_used_by_a_role_that_owns_nothing(careful, tmp_path):
    with contextlib.closing(psycopg.connect(careful.address(), autocommit=True)) as db:
        db.execute("CREATE DATABASE fresh")
        db.execute("CREATE ROLE gocm LOGIN")
    owner = careful.address("fresh")
    user = owner.replace("owner@", "gocm@")
    assert "there is no spool" in gocm("spool", "check", "--spool", owner).stdout
    assert gocm("check-config", "--sandbox", "--spool", user).returncode == 78
    done = gocm("--sandbox", "--sandbox-port", "0", "--port", "0", "--spool", user, STATE_DIRECTORY=str(tmp_path))
    assert done.returncode == 78 and "gocm spool init" in done.stderr
    made = gocm("spool", "init", "--spool", owner, "--grant", "gocm")
    assert made.returncode == 0 and "an empty spool is made" in made.stdout, made.stderr
    assert gocm("check-config", "--sandbox", "--spool", user).returncode == 0
    again = gocm("spool", "init", "--spool", owner, "--grant", "gocm")
    assert again.returncode == 0 and "there already" in again.stdout
    checked = gocm("spool", "check", "--spool", user)
    assert checked.returncode == 0 and "good: what is answered with ok is on the server's disk" in checked.stdout
    weak = gocm("spool", "check", "--spool", user, "--spool-durable", "standby")
    assert weak.returncode == 1 and "synchronous_standby_names" in weak.stdout
    place = {"STATE_DIRECTORY": str(tmp_path)}
    server = Server(user, "--sandbox", "--sandbox-port", "0", environ=place)
    try:
        server.send(["a"])
        assert server.settled()["attempts"] == 1
        second = gocm("--sandbox", "--sandbox-port", "0", "--port", "0", "--spool", user, **place)
        assert second.returncode == 75 and "another GoCM runs here as node" in second.stderr
    finally:
        server.kill_group()


def test_what_spool_commands_cannot_do_is_said(careful, tmp_path):
    with contextlib.closing(psycopg.connect(careful.address(), autocommit=True)) as db:
        db.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
        db.execute("CREATE DATABASE bare")
    made = gocm("spool", "init", "--spool", careful.address("latin"))
    assert made.returncode == 78 and "LATIN1, not UTF8" in made.stderr
    bare = careful.address("bare")
    for action in ("nodes", "upgrade"):
        done = gocm("spool", action, "--spool", bare)
        assert done.returncode == 78 and "gocm spool init" in done.stderr
    spool = tmp_path / "gocm.db"
    server = Server(spool, "--sandbox", "--sandbox-port", "0")
    server.send(["a"])
    server.settled()
    server.process.terminate()
    server.process.wait(30)
    copy = tmp_path / "copy.db"
    shutil.copy(spool, copy)
    done = gocm("spool", "move", spool, bare)
    assert done.returncode == 78 and "gocm spool init" in done.stderr
    there = careful.spool()
    assert gocm("spool", "move", spool, there).returncode == 0
    done = gocm("spool", "move", copy, there)
    assert (
        done.returncode == 78 and "messages of that file already" in done.stderr and "begin it again" not in done.stderr
    )
    os.rename(copy, spool)
    assert "gocm.db.moved2" in gocm("spool", "move", spool, careful.spool()).stdout
    listed = gocm("spool", "nodes", "--spool", there).stdout
    assert listed.splitlines()[0].split("\t")[:3] == ["number", "name", "is"]


def test_a_password_is_in_a_file_and_in_no_log(careful, tmp_path):
    with contextlib.closing(psycopg.connect(careful.address(), autocommit=True)) as db:
        db.execute("CREATE ROLE secretive LOGIN SUPERUSER PASSWORD 'hush-hush'")
    address = careful.spool().replace("owner@", "secretive:hush-hush@")
    refused = gocm("--sandbox", "--spool", address, STATE_DIRECTORY=str(tmp_path))
    assert refused.returncode == 78 and "--spool-file" in refused.stderr and "hush" not in refused.stderr
    file = tmp_path / "spool"
    file.touch(0o600)
    file.write_text(address + "\n")
    words = ("--sandbox", "--sandbox-port", "0", "--port", "0", "--spool-file", str(file), "--log-level", "debug")
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "gocm.py"), *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path / "state")},
    )
    lines = []
    for line in program.stderr:
        lines.append(line)
        if "listens on" in line:
            break
    command = Path(f"/proc/{program.pid}/cmdline").read_text()
    program.terminate()
    lines.append(program.communicate(timeout=30)[1])
    assert program.returncode == 0, lines
    assert "secretive@" in "".join(lines) and "hush" not in "".join(lines) + command
    assert "hush" not in gocm("print-config", *words[:-2]).stdout


@pytest.mark.parametrize(
    "address, said",
    [
        ("postgresql://a@/none?host=/nowhere", "cannot be reached"),
        ("postgresql://a@127.0.0.1:1/none", "cannot be reached"),
        ("postgresql://a@db.example.org/x?sslmode=require", "verify-full"),
        ("postgresql://a@db.example.org", "postgresql://USER@HOST/DATABASE"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(address, said, tmp_path):
    checked = gocm("check-config", "--sandbox", "--spool", address)
    assert checked.returncode and said in checked.stderr
    done = gocm("--sandbox", "--sandbox-port", "0", "--port", "0", "--spool", address, STATE_DIRECTORY=str(tmp_path))
    assert done.returncode in (73, 78) and said in done.stderr


# -------------------------------------------------------------------------------------------------- a node is gone


def test_what_a_killed_node_had_is_sent_by_the_other(fleet):
    one, two = fleet.start("one"), fleet.start("two")
    fleet.sandbox.mode(latency=5)
    fleet.post(one, 200)
    os.killpg(one.process.pid, signal.SIGKILL)
    began = time.monotonic()
    fleet.sandbox.mode(latency=0)
    fleet.check(two, twice=2000)
    assert time.monotonic() - began < LEASE + 5 + 3


def test_a_node_that_is_killed_and_started_again_waits_for_nothing(fleet):
    one = fleet.start("one")
    fleet.sandbox.mode(latency=5)
    fleet.post(one, 50)
    os.killpg(one.process.pid, signal.SIGKILL)
    fleet.sandbox.mode(latency=0)
    began = time.monotonic()
    fleet.check(fleet.start("one"), twice=500)
    assert time.monotonic() - began < LEASE / 2


def test_all_nodes_are_killed_and_one_comes_back(fleet):
    one, two = fleet.start("one"), fleet.start("two")
    fleet.sandbox.mode(latency=5)
    fleet.post(one, 50)
    fleet.post(two, 50)
    for node in (one, two):
        os.killpg(node.process.pid, signal.SIGKILL)
    fleet.sandbox.mode(latency=0)
    fleet.check(fleet.start("one"), twice=1000)


def test_a_node_that_stood_still_finds_its_lease_ended(fleet):
    """What waited in its senders is another node's: only what was in the air may come twice."""
    one, two = fleet.start("one", "--connections", "10", "--senders", "2"), fleet.start("two")
    fleet.sandbox.mode(latency=2)
    fleet.post(one, 100)
    os.killpg(one.process.pid, signal.SIGSTOP)
    try:
        fleet.sandbox.mode(latency=0)
        eventually(lambda: two.report_or_none() and two.report()["pending"] == 0, LIMIT)
    finally:
        os.killpg(one.process.pid, signal.SIGCONT)
    fleet.check(two, twice=20)
    eventually(lambda: "our lease" in one.log(), LIMIT)
    fleet.post_until_taken(one)
    fleet.check(one, twice=20)


def test_a_state_process_that_is_killed_is_followed_by_one_of_the_same_node(fleet):
    one = fleet.start("one")
    with fleet.load(one):
        fleet.more()
        os.kill(one.children("state")[-1], signal.SIGKILL)
        fleet.more()
    fleet.check(one, twice=0)


# ---------------------------------------------------------------------------------------------- the server is gone


@pytest.mark.parametrize("how", ["immediate", "kill"])
def test_a_server_that_comes_back_has_all_that_was_answered(fleet, how):
    one, two = fleet.start("one"), fleet.start("two")
    with fleet.load(one, two):
        fleet.more()
        for _ in range(2):
            fleet.server.kill() if how == "kill" else fleet.server.stop()
            fleet.server.start()
            fleet.more(100)
    fleet.check(one, twice=0)
    assert max(fleet.gaps) < 20, "seconds, beside other tests"


def test_a_promoted_standby_has_all_that_was_answered(tmp_path):
    pair = Pair()
    fleet = Fleet(pair, pair.spool(), tmp_path)
    try:
        one, two = (fleet.start(name, "--spool-durable", "standby") for name in ("one", "two"))
        with fleet.load(one, two):
            fleet.more()
            pair.fail_over()
            promoted = time.monotonic()
            pair.stand_by()  # until there is one again nothing is committed
            fleet.post_until_taken(one)
            took = time.monotonic() - promoted
            fleet.more()
        fleet.check(one, twice=0)
        assert took < 25, "seconds, beside other tests"
    finally:
        fleet.end()
        pair.close()


def test_while_the_server_is_away_nothing_is_taken_and_nothing_lost(fleet):
    one = fleet.start("one")
    fleet.post(one, 20)
    fleet.server.stop()
    try:
        assert eventually(lambda: fleet.try_to_post(one, ["x"]) == 503)
        status, _, answer = Http(one.port).ask("GET", "/readyz")
        assert status == 503, answer
        time.sleep(LEASE + 1)  # so long it is away: the lease ends
    finally:
        fleet.server.start()
    fleet.post_until_taken(one)
    fleet.check(one, twice=0)


@pytest.mark.parametrize("seconds", [6, 20], ids=["back in time", "its lease is over"])
def test_a_link_that_goes_down_without_a_word(tmp_path, seconds):
    network = Network()
    server = Postgres(fsync=True, network=network)
    address = server.by_tls(trustme.CA(), server.spool())
    fleet = Fleet(server, address, tmp_path)
    try:
        one = fleet.start("one")
        with fleet.load(one, rate=40):
            fleet.more()
            network.cut()
            began = time.monotonic()
            eventually(lambda: fleet.try_to_post(one, [f"no-{time.monotonic_ns()}"], 10) == 503)
            assert time.monotonic() - began < 10, "seconds until it is told"
            time.sleep(max(0.0, seconds - (time.monotonic() - began)))
            network.mend()
            fleet.post_until_taken(one)
            fleet.more()
        fleet.check(one, twice=0)
    finally:
        fleet.end()
        server.close()
        network.close()


def test_random_faults_lose_nothing():
    """Longer and faster: python tests/faults.py."""
    import faults

    found = faults.run(seed=int(time.time()), minutes=0.5, rate=50, tell=print)
    assert found["lost"] == 0 and found["counters are exact"], found
    assert found["twice"] <= found["in the air of the killed, at most"], found
