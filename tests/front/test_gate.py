"""gate: who gets a connection's place, and who gives way."""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from kit import CONTINUED, FORM, TOKEN, Http, Raw, eventually, holds, https, issue, memory, secret

from gocm_lib.front.gate import RESERVE, Budget, Gate, Notice, Place, gives_way, leaving_order

short = pytest.mark.short


class Line:
    """One that is hung up by a function."""

    def __init__(self, close=lambda: None, unread=False):
        self.close = close
        self.unread = unread

    def has_unread(self):
        return self.unread


def place(peer, since, admitted=False, working=False, unread=False):
    found = Place(peer, Line(unread=unread), since)
    found.admitted, found.working = admitted, working
    return found


@short
def test_who_gives_way():
    working = place("a", 0, admitted=True, working=True)
    idle, idle_of_many = place("b", 1, admitted=True), place("a", 2, admitted=True)
    stranger, stranger_of_many = place("c", 3), place("a", 4)
    shares = Counter(a=3, b=1, c=1)
    among = [working, idle, idle_of_many, stranger, stranger_of_many]
    assert leaving_order(among, shares) == [stranger_of_many, stranger, idle_of_many, idle]
    older, newer = place("a", 5), place("a", 6)
    assert leaving_order([newer, older], shares) == [older, newer]
    assert gives_way(older) and not gives_way(working)
    unread = place("a", 4, unread=True)
    assert not gives_way(unread), "its request has come"
    unread.served = 1
    assert gives_way(unread), "but not of one that only asks what everybody may"


@short
def test_what_is_served_is_not_cut_off_and_the_reserve_is_for_probes_and_local_sockets():
    gate, hung_up = Gate(256), []

    def take(peer, working=True):
        found = gate.take(peer, Line(lambda: hung_up.append(found)), 0.0)
        if found:
            found.working = found.admitted = working
        return found

    served = [take("10.0.0.1") for _ in range(256 - RESERVE)]
    assert all(each and not each.probes_only for each in served)
    assert take("10.0.0.1").probes_only, "it has all other places"
    assert not take("10.0.0.2").probes_only, "it has few"
    assert not take("").probes_only
    rest = [take("10.0.0.1") for _ in range(RESERVE - 3)]
    assert all(each.probes_only for each in rest) and take("10.0.0.1") is None and not hung_up
    served[7].working = False
    newcomer = take("10.0.0.3")
    assert hung_up == [served[7]] and not newcomer.probes_only
    assert not gate.begin(served[7]) and gate.begin(newcomer), "nobody would hear the answer"
    gate.leave(served[7])
    for each in [*served[:7], *served[8:], newcomer, *rest]:
        gate.leave(each)
    assert len(gate.all()) == 3


@short
def test_a_few_connections_have_no_reserve():
    gate = Gate(5)
    assert all(gate.take("a", Line(), 0.0) for _ in range(5))


@short
def test_a_notice_is_one_line_a_minute_and_names_who_did_most():
    notice = Notice("%d times, %s")
    assert notice.note("a", 0.0) == "1 times, 1 of a"
    assert [notice.note("b", second) for second in range(1, 60)] == [None] * 59
    assert notice.note("a", 60.0) == "60 times, 59 of b"
    for n in range(10_000):
        notice.note(f"{n}", 61.0)
        notice.note("", 61.0)
    assert notice.note("", 120.0).endswith(" of local")


def silent(server, count):
    """So many connections that say nothing."""
    return [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]


def test_those_who_say_nothing_keep_nobody_out(start, tmp_path, temporary):
    words = ("--auth-token-file", secret(tmp_path / "tokens", TOKEN), "--max-connections", "40")
    server = start(*words, "--head-timeout", "3", unix=str(temporary / "gocm.sock"))
    good = {"Authorization": f"Bearer {TOKEN}"}
    old = Http(server.port)
    assert old.ask("GET", "/gcm/report", headers=good)[0] == 200
    held, began = silent(server, 200), time.monotonic()
    assert old.ask("GET", "/gcm/report", headers=good)[0] == 200, "who was admitted stays"
    for _ in range(20):
        assert Http(server.port).ask("GET", "/livez")[0] == 200
        assert Http(server.port).ask("GET", "/gcm/report", headers=good)[0] == 200
        assert server.http().ask("GET", "/gcm/report", headers=good)[0] == 200
    server.logged(r"all 40 connections are taken: \d+ gave way or were turned away, \d+ of 127.0.0.1")
    eventually(lambda: not any(holds(server, each) for each in held[-40:]))
    assert time.monotonic() - began < 60, "the head's time, not the idle time"
    assert old.ask("GET", "/gcm/report", headers=good)[0] == 200
    assert len(server.find("connections are taken")) == 1


def test_strangers_who_ask_what_everybody_may_get_no_better_place(start, tmp_path):
    words = ("--auth-token-file", secret(tmp_path / "tokens", TOKEN), "--max-connections", "40")
    server = start(*words, "--head-timeout", "3")
    for _ in range(60):
        Raw(server.port).send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").until(b"}\n")
    code, headers, _ = Http(server.port).ask("GET", "/gcm/report", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (code, headers["Keep-Alive"]) == (200, "timeout=75")
    assert Http(server.port).ask("GET", "/livez")[1]["Keep-Alive"] == "timeout=3"


def test_where_all_are_being_served_probes_and_the_local_socket_still_are(start, temporary):
    server = start("--max-connections", "100", unix=str(temporary / "gocm.sock"))
    slow = [Raw(server.port) for _ in range(88)]
    for each in slow:
        each.send(
            b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            b"Content-Length: 19\r\nExpect: 100-continue\r\n\r\n"
        ).until(CONTINUED)
    for _ in range(10):
        assert Http(server.port).ask("GET", "/livez")[0] == 200
        code, headers, _ = Http(server.port).ask("GET", "/gcm/report")
        assert code == 503 and headers["Retry-After"] and headers["Connection"] == "close"
        assert server.http().ask("GET", "/gcm/report")[0] == 200
    for each in slow:
        each.send(b"tokens=a&payload={}").until(b"ok\n")
    assert Http(server.port).ask("GET", "/gcm/report")[0] == 200


def test_guesses_of_tokens_are_told_once_a_minute(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    for n in range(50):
        raw = Raw(server.port)
        raw.send(b"GET /gcm/report HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hunter2-%d\r\n\r\n" % n * 3)
        assert raw.rest().count(b"HTTP/1.1 401 ") == 1, "one guess a connection"
    told = "no good token: refused 1 requests, 1 of 127.0.0.1; see gocm help security"
    assert server.find("no good token: .*") == [told]
    assert "hunter2" not in server.log()


def test_every_answer_tells_browsers_to_make_nothing_of_it(server):
    http = server.http()
    for path in ("/gcm/report", "/livez", "/nothing", "/metrics", "/status", "/gcm/report/canonical?peek=1"):
        headers = http.ask("GET", path)[1]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert b"nosniff" in Raw(server.port).send(b"garbage\r\n\r\n").rest()


@short
def test_a_budget_is_for_all_together_and_nobody_takes_all():
    budget = Budget(120)
    assert budget.take(1000, "a") == 60, "what is larger counts as half"
    assert budget.take(1, "a") is None
    assert budget.take(30, "b") == 30, "an address may hold as much as it leaves free"
    assert budget.take(1, "b") is None and budget.take(15, "c") == 15
    assert budget.take(40, "d") is None
    budget.give_back(60, "a")
    budget.give_back(30, "b")
    assert budget.take(40, "d") == 40


def test_large_bodies_that_never_end_keep_nobody_elses_out(server):
    head = b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4194304\r\n\r\ntokens=a&sound="
    drips = [Raw(server.port, "127.0.0.2").send(head) for _ in range(12)]
    for drip in drips:
        with contextlib.suppress(ConnectionError):  # refused, for there is no room for it
            drip.send(b"x" * 4_190_000)
    whole = b'{"tokens":["a"],"payload":{"k":"v"}' + b" " * 4_000_000 + b"}"
    status, _, told = server.http().ask("POST", "/gcm/send", whole, {"Content-Type": "application/json"})
    assert status == 200, told
    refused = select.poll()
    for drip in drips:
        refused.register(drip.sock, select.POLLIN)
    eventually(lambda: len(refused.poll(0)) >= 8)  # of 32 MiB half is for four


@pytest.mark.alone
def test_strangers_who_go_on_asking_keep_nobody_from_being_answered(start, tmp_path):
    """A hundred threads that all want the interpreter: a newcomer got no answer in 8 seconds."""
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    ended = threading.Event()

    def go_on(number):
        client = Raw(server.port, f"127.0.1.{number}")
        with contextlib.suppress(OSError):
            while not ended.is_set():
                client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
                client.sock.recv(65536)

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(1, 101)]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(place.is_alive() for place in threads) == 100)
    before = cpu(server.process.pid)
    for _ in range(20):
        began = time.monotonic()
        assert Raw(server.port).send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").until(b"}\n")
        assert time.monotonic() - began < 2.0
    used = cpu(server.process.pid) - before
    ended.set()
    server.terminate()
    for thread in threads:
        thread.join()
    assert used < 2.0, "seconds of CPU; 200 requests a second"


@pytest.mark.alone
def test_small_bodies_that_cost_much_keep_nobody_from_being_answered(server):
    body = b'{"tokens":["a"],"message":{"x":[' + b"{}," * 19_000 + b"{}]}}"
    ended = threading.Event()

    def go_on(number):
        http = Http(server.port)
        while not ended.is_set():
            http.ask("POST", "/gcm/send", body, {"Content-Type": "application/json"})

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    waits = []
    for _ in range(20):
        began = time.monotonic()
        assert server.http().ask("GET", "/livez")[0] == 200
        waits.append(time.monotonic() - began)
    ended.set()
    for thread in threads:
        thread.join()
    assert max(waits) < 2.0, waits


FAT = b'{"tokens":["a"],"message":{"x":[' + b"{}," * 1_300_000 + b"{}]}}"
LINES = b'{"tokens":["a"],"message":{"x":[' + b"1," * 190 + b"1]}}\n"


@pytest.mark.alone
def test_large_bodies_that_become_much_larger_cost_neither_memory_nor_time(server):
    """24 of them took 1.2 GB and half a minute."""
    server.send(["warm"])
    before, used = memory(server.group()), cpu(server.process.pid)
    answers = []

    def post(body, kind):
        http = Http(server.port)
        answers.append(http.ask("POST", "/gcm/send", body, {"Content-Type": kind})[0])

    bodies = [(FAT, "application/json")] * 24 + [(LINES * 9900, "application/x-ndjson")] * 8
    threads = [threading.Thread(target=post, args=each) for each in bodies]
    for thread in threads:
        thread.start()
    most = 0.0
    while any(thread.is_alive() for thread in threads):
        most = max(most, memory(server.group()))
    assert set(answers) <= {413, 503} and 413 in answers
    assert most - before < 250, "MB; what is being read, and no objects"
    assert cpu(server.process.pid) - used < 12.0, "seconds"
    assert server.http().ask("GET", "/readyz")[0] == 200


def cpu(pid):
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.alone
def test_slow_readers_of_large_pages_hold_little_and_nobody_up(start):
    server = start("--max-attempts", "1")
    for part in range(5):
        server.send([f"gone-{part}-{n}-{'x' * 4000}" for n in range(1000)])
    eventually(lambda: server.report()["notregistered"] == 5000)
    before, slow = memory(server.group()), []
    for _ in range(30):
        slow.append(Raw(server.port).send(b"GET /gcm/report/notregistered?peek=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    for _ in range(20):
        assert server.http().ask("GET", "/readyz")[0] == 200
        assert server.send([f"t{time.monotonic()}"])
    assert memory(server.group()) - before < 120, "MB; 20 MB each, when pages had no end"
    status, _headers, body = server.http().ask("GET", "/gcm/report/canonical?peek=1")
    assert (status, body) == (200, b'{"canonical_replacements":null}'), "small ones need nothing"


def test_a_page_has_so_many_bytes_and_the_next_one_goes_on(start):
    server = start("--max-attempts", "1")
    for part in range(10):
        server.send([f"gone-{part}-{n}-{'x' * 4000}" for n in range(300)])
        server.send([f"flaky-9-{part}-{n}-{'x' * 4000}" for n in range(300)])
    eventually(lambda: server.report()["pending"] == 0)
    http = server.http()
    first = http.json("GET", "/gcm/report/notregistered")["tokens"]
    second = http.json("GET", "/gcm/report/notregistered")["tokens"]
    assert 1000 < len(first) < 2500 and len({*first, *second}) == len(first) + len(second) == 3000
    found, after = [], ""
    while page := (answer := http.json("GET", f"/gcm/failed?limit=10000{after}"))["failed"]:
        assert len(page) < 2500
        found += [(entry["job"], entry["n"]) for entry in page]
        after = f"&after={answer['next']}"
    assert len(set(found)) == len(found) == 3000
    _status, _, body = http.ask("POST", "/gcm/failed/discard", "all=1", FORM)
    assert json.loads(body) == {"discarded": 3000, "left": False}


def test_those_who_say_nothing_keep_nobody_out_of_tls(start, authority, tmp_path):
    """They have not even greeted."""
    issue(authority, tmp_path)
    files = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start(*files, "--max-connections", "40", "--head-timeout", "20")
    held, began = silent(server, 100), time.monotonic()
    for _ in range(10):
        assert https(server, tmp_path).ask("GET", "/livez")[0] == 200
    assert time.monotonic() - began < 15 and len(held) == 100, "seconds; before they had to go by themselves"


@pytest.mark.parametrize("path", ["/gcm/failed/discard", "/gcm/failed/replay", "/gcm/report/canonical/ack"])
def test_a_short_form_is_short(server, path):
    """4 MiB of % cost seconds and hundreds of MB."""
    raw = Raw(server.port).send(
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n" % path.encode()
        + b"Content-Length: 4000000\r\n\r\n"
    )
    assert raw.rest().startswith(b"HTTP/1.1 413 "), "by its head alone"
    status, _, _ = server.http().ask("POST", path, b"all=" + b"%" * 5000, FORM)
    assert status == 413


@short
def test_the_reserve_holds_where_places_change_hands():
    gate = Gate(64)
    for _ in range(56):
        gate.take("stranger", Line(), 0.0).working = True

    def take(peer, now):
        found = gate.take(peer, Line(lambda: gate.leave(found)), now)
        return found

    assert all(take("stranger", float(n)).probes_only for n in range(50)), "they come and go in the reserve"
    assert not take("", 50.0).probes_only and not take("friend", 51.0).probes_only
    assert take("stranger", 52.0).probes_only


def test_what_has_not_come_of_a_body_takes_no_room(server):
    head = b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\nExpect: 100-continue\r\n\r\n"
    held = [Raw(server.port) for _ in range(12)]
    for each in held:
        each.send(head).until(CONTINUED)
    body = json.dumps({"tokens": [f"t{n}-{'x' * 100}" for n in range(5000)], "payload": {}})
    assert server.http().ask("POST", "/gcm/send", body, {"Content-Type": "application/json"})[0] == 200


def test_many_who_probe_are_told_the_truth(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    found, ended = Counter(), threading.Event()

    def probe():
        http = Http(server.port)
        while not ended.is_set():
            found[http.ask("GET", "/readyz")[0]] += 1

    threads = [threading.Thread(target=probe) for _ in range(60)]
    for thread in threads:
        thread.start()
    eventually(lambda: found.total() > 2000)
    ended.set()
    for thread in threads:
        thread.join()
    assert set(found) == {200}
