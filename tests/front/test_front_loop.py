"""The front's loop: many clients at once, each answered in its order, whatever it does with its connection."""

import os
import resource
import signal
import socket
import threading
import time

import pytest
from kit import FORM, Http, Raw, dial, eventually, form, memory

POST = b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"


def post(token, payload=b"{}"):
    body = b"tokens=" + token + b"&payload=" + payload
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def get(path):
    return b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_what_is_asked_in_one_go_is_answered_in_its_order(server):
    """Some of it in the loop, some in threads, some after a commit, some with a refusal."""
    asked = [post(b"a"), get(b"/livez"), post(b""), get(b"/gcm/report"), post(b"b"), get(b"/nothing"), get(b"/help")]
    asked += [post(b"&tokens=".join(b"c%0200d" % n for n in range(50))), get(b"/gcm/report/canonical")]
    raw = Raw(server.port).send(b"".join(asked) + get(b"/livez").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    answers = raw.rest().split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [
        *(b"200", b"200", b"400", b"200", b"200", b"404", b"200", b"200", b"200", b"200"),
    ]
    assert answers[0].endswith(b"\r\n\r\nok\n") and b'"attempts"' in answers[3] and b"canonical" in answers[8]
    assert server.settled()["attempts"] == 52


def test_a_thousand_requests_in_one_go_are_answered(server):
    # Posts first: who only asks for what everybody may is made to wait.
    raw = Raw(server.port).send(b"".join(post(b"t%d" % n) for n in range(200)) + get(b"/nothing") * 1000)
    found = b""
    while found.count(b"HTTP/1.1 404 ") < 1000 or found.count(b"ok\n") < 200:
        more = raw.sock.recv(1 << 20)
        assert more
        found += more
    assert server.settled()["attempts"] == 200


def test_who_has_said_all_is_answered_and_who_goes_away_leaves_nothing(server):
    raw = Raw(server.port).send(post(b"a"))
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.rest().endswith(b"ok\n")
    files = f"/proc/{server.process.pid}/fd"
    server.report()  # for which the front connects to the state process
    before = len(os.listdir(files))
    for number in range(200):
        with dial(server.port) as sock:
            sock.sendall((post(b"b"), get(b"/gcm/report"), post(b"c")[:-5], b"")[number % 4])
    eventually(lambda: len(os.listdir(files)) <= before)
    assert server.send(["d"])
    assert server.settled()["pending"] == 0


def test_who_goes_away_before_he_is_told_to_go_on_ends_nobody_else(server):
    """It ended the server: what is put off has no client any more when its turn comes."""
    expects = POST + b"Content-Length: 50\r\nExpect: 100-continue\r\n\r\n"
    for _ in range(50):
        sock = dial(server.port)
        sock.sendall(post(b"a") + expects)
        sock.close()
    assert server.send(["b"]) and server.process.poll() is None


@pytest.mark.parametrize("size", [1, 7, 100])
def test_requests_in_pieces_beside_others(server, size):
    data = post(b"a") * 3
    raws = [Raw(server.port) for _ in range(20)]
    for at in range(0, len(data), size):
        for raw in raws:
            raw.send(data[at : at + size])
    for raw in raws:
        found = b""
        while found.count(b"ok\n") < 3:
            found += raw.sock.recv(65536)
    assert server.settled()["attempts"] == 60


@pytest.mark.alone
def test_thousands_of_idle_clients_cost_no_thread_little_memory_and_nobody_s_time(start):
    count = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * count:
        pytest.skip("too few files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = start("--idle-timeout", "300")
    server.send(["warm"])
    before, threads = memory(server.group()), len(os.listdir(f"/proc/{server.process.pid}/task"))
    kept = []
    try:
        for number in range(count):
            raw = Raw(server.port)
            raw.send(post(b"t%d" % number))
            kept.append(raw)
            if number % 50 == 49:
                for each in kept[-50:]:
                    each.until(b"ok\n")
        assert memory(server.group()) - before < 30, "MB; it is 18"
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) <= threads + 8
        waits = []
        for _ in range(100):
            began = time.monotonic()
            assert Http(server.port).ask("POST", "/gcm/send", form(["new"]), FORM)[0] == 200
            waits.append(time.monotonic() - began)
        assert sorted(waits)[90] < 0.1
        kept[0].send(post(b"again")).until(b"ok\n")
    finally:
        for each in kept:
            each.sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_at_the_limit_the_longest_idle_one_gives_way(start):
    server = start("--max-connections", "40")
    kept = []
    for number in range(60):
        kept.append(Raw(server.port).send(post(b"t%d" % number)))
        kept[-1].until(b"ok\n")
    gone = [number for number, raw in enumerate(kept) if is_closed(raw.sock)]
    assert gone == list(range(len(gone))) and 20 <= len(gone) <= 26, "of 40 a few are kept for probes"


def test_who_has_left_keeps_no_place_from_who_comes_after(start):
    """A proxy that keeps to so many connections closes one before it opens the next."""
    server = start("--max-connections", "40")
    kept = [Raw(server.port).send(post(b"t%d" % number)) for number in range(35)]
    for each in kept:
        each.until(b"ok\n")
    os.kill(server.process.pid, signal.SIGSTOP)
    for number in range(20, 30):
        kept[number].sock.close()
        kept[number] = Raw(server.port).send(post(b"n%d" % number))
    os.kill(server.process.pid, signal.SIGCONT)
    for number in range(20, 30):
        kept[number].until(b"ok\n")
    assert not [number for number, each in enumerate(kept) if is_closed(each.sock)]


def test_without_a_file_to_open_it_waits_and_serves_again(start, temporary):
    """With two listeners it ended: the second one was told to rest twice."""
    server = start(unix=str(temporary / "gocm.sock"))
    assert server.send(["a"])
    kept, pid = Http(server.port), server.process.pid
    assert kept.ask("GET", "/livez")[0] == 200
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(10_000) if number not in used)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.kill(pid, signal.SIGSTOP)
    waiting = [dial(server.port) for _ in range(5)] + [dial(server.place) for _ in range(5)]
    os.kill(pid, signal.SIGCONT)
    for _ in range(20):  # while it tries again and again
        assert kept.ask("GET", "/livez")[0] == 200
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    for sock in waiting:
        sock.sendall(post(b"b").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert sock.makefile("rb").read().endswith(b"ok\n")


def is_closed(sock):
    sock.settimeout(0.05)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False


def test_posts_from_many_threads_are_all_counted(server):
    def go(number):
        http = Http(server.port)
        for n in range(50):
            assert http.ask("POST", "/gcm/send", form([f"t{number}-{n}"]), FORM)[0] == 200

    threads = [threading.Thread(target=go, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.settled()["attempts"] == 1500
    _, _, text = server.http().ask("GET", "/metrics")
    assert b'gocm_requests_total{route="/gcm/send",code="200"} 1500\n' in text
