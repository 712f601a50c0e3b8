"""The HTTP front over real sockets: the contract's bytes, bad input, slow clients, many clients."""

import json
import select
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from kit import CONTINUED, FORM, Http, Raw, eventually, form, holds, memory

EMPTY_REPORT = b'{"attempts":0,"failures":0,"pending":0,"canonicals":0,"notregistered":0}'


def post(body=b"tokens=a&payload={}", extra=b"", version=b"1.1", path=b"/gcm/send"):
    return (
        b"POST %b HTTP/%b\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: %d\r\n%b\r\n%b" % (path, version, len(body), extra, body)
    )


@pytest.fixture(scope="module", params=["tcp", "unix"])
def shared(request, tmp_path_factory, key_file):
    """A sandbox and a server that tests share which leave nothing behind but counts: over TCP, over a UNIX socket."""
    from kit import Sandbox, Server

    unix = str(tmp_path_factory.mktemp("socket") / "gocm.sock") if request.param == "unix" else ""

    sandbox = Sandbox()
    server = Server(
        tmp_path_factory.mktemp("shared") / "gocm.db",
        "--gcm-url",
        sandbox.url(),
        "--apikey-file",
        key_file,
        "--head-timeout",
        "0.6",
        "--idle-timeout",
        "1.5",
        "--max-body",
        "600000",
        unix=unix,
    )
    yield server
    for program in (server, sandbox):
        program.kill_group()


@pytest.fixture
def raw(shared):
    return Raw(shared.place)


# ------------------------------------------------------------------------------------------------- the contract


@pytest.mark.short
def test_the_original_s_session_byte_for_byte(server, sandbox):
    http = server.http()
    assert http.ask("GET", "/gcm/report")[2] == EMPTY_REPORT
    assert http.ask("GET", "/gcm/report/")[2] == EMPTY_REPORT  # as the original's README asks
    assert http.ask("GET", "/gcm/report/canonical")[2] == b'{"canonical_replacements":null}'
    assert http.ask("GET", "/gcm/report/notregistered")[2] == b'{"tokens":null}'
    status, headers, body = http.ask("POST", "/gcm/send", form(["a", "canonical-b&<c>", "gone-d", "invalid-e"]), FORM)
    assert (status, body, headers["Content-Type"], headers["Content-Length"]) == (200, b"ok\n", "text/html", "3")
    assert len(headers["X-GoCM-Job"]) == 16
    server.settled()
    assert http.ask("GET", "/gcm/report")[2] == (
        b'{"attempts":4,"failures":2,"pending":0,"canonicals":1,"notregistered":1}'
    )
    assert http.ask("GET", "/gcm/report/canonical")[2] == (
        rb'{"canonical_replacements":[{"original":"canonical-b\u0026\u003cc\u003e","canonical":"new-b\u0026\u003cc\u003e"}]}'
    )
    assert http.ask("GET", "/gcm/report/notregistered")[2] == b'{"tokens":["gone-d"]}'
    assert http.ask("GET", "/gcm/report/canonical")[2] == b'{"canonical_replacements":null}'
    assert http.ask("GET", "/gcm/report/notregistered")[2] == b'{"tokens":null}'
    assert sandbox.received()["last"] == {
        "registration_ids": ["a", "canonical-b&<c>", "gone-d", "invalid-e"],
        "data": {"a": 1},
    }


@pytest.mark.short
def test_json_and_options_arrive_as_given(server, sandbox):
    body = {
        "tokens": ["a", "é"],
        "payload": {"x": {"y": [1, None, "ü"]}},
        "collapse_key": "k",
        "time_to_live": 60,
        "priority": "high",
        "dry_run": True,
        "notification": {"title": "T"},
        "restricted_package_name": "p",
    }
    status, _, answer = server.http().ask("POST", "/gcm/send", json.dumps(body), {"Content-Type": "application/json"})
    assert (status, answer) == (200, b"ok\n")
    server.settled()
    expected = {**body, "registration_ids": body["tokens"], "data": body["payload"]}
    del expected["tokens"], expected["payload"]
    assert sandbox.received()["last"] == expected


LINES = {"Content-Type": "application/x-ndjson"}


def test_many_messages_in_one_body(server, sandbox):
    """Each line is a message of its own; a bad one does not lose the good ones."""
    lines = [
        {"tokens": ["a", "gone-b"], "payload": {"n": 1}},
        {"tokens": [], "payload": {}},
        {"tokens": ["c"], "payload": {"n": 3}, "priority": "high"},
        {"tokens": ["d"], "payload": {}, "upstream": "nowhere"},
    ]
    body = "\n".join([*map(json.dumps, lines), "garbage", json.dumps({"tokens": ["e"], "payload": {"n": 6}}), ""])
    status, headers, answer = server.http().ask("POST", "/gcm/send", body, LINES)
    assert (status, headers["Content-Type"]) == (200, "application/x-ndjson")
    told = [json.loads(line) for line in answer.splitlines()]
    assert [line["status"] for line in told] == [200, 400, 200, 400, 400, 200]
    assert [line.get("field") for line in told] == [None, "tokens", None, "upstream", "", None]
    assert len({line["job"] for line in told if "job" in line}) == 3
    assert server.settled() == {"attempts": 4, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 1}
    assert set(sandbox.received()["delivered"]) == {"a", "c", "e"}


def test_a_body_of_bad_lines_is_bad(shared):
    status, _, answer = shared.http().ask("POST", "/gcm/send", "{}\n[]", LINES)
    assert status == 400 and len(answer.splitlines()) == 2
    assert shared.http().ask("POST", "/gcm/send", "", LINES)[0] == 400


def test_lines_beyond_the_limits_are_refused_and_the_others_kept(start, sandbox):
    sandbox.mode(silent=True)
    server = start("--max-pending", "3", "--max-tokens", "10")
    line = json.dumps({"tokens": ["a", "b"], "payload": {}})
    status, headers, answer = server.http().ask("POST", "/gcm/send", f"{line}\n{line}\n", LINES)
    told = [json.loads(line) for line in answer.splitlines()]
    assert status == 200 and [line["status"] for line in told] == [200, 413]  # of 3 tokens 1 was left
    status, headers, answer = server.http().ask("POST", "/gcm/send", line, LINES)
    assert status == 503 and int(headers["Retry-After"]) == json.loads(answer)["retry_after"]


def test_more_than_a_thousand_tokens_are_split_not_dropped(server, sandbox):
    server.send([f"t{n}" for n in range(2500)])
    assert server.settled()["attempts"] == 2500
    received = sandbox.received()
    assert received["requests"] >= 3 and len(received["arrived"]) == 2500 and set(received["arrived"].values()) == {1}


def test_duplicate_tokens_keep_their_own_results(server, sandbox):
    server.send(["gone-a", "b", "gone-a"])
    assert server.settled()["notregistered"] == 2
    assert server.http().json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-a"]}, "in the list once"
    assert sandbox.received()["arrived"] == {"gone-a": 2, "b": 1}


def test_lists_can_be_looked_at_and_read_in_pages(server):
    server.send([f"gone-{n}" for n in range(5)])
    server.settled()
    http, path, every = server.http(), "/gcm/report/notregistered", [f"gone-{n}" for n in range(5)]
    assert http.json("GET", path + "?peek=1") == {"tokens": every}
    assert http.ask("HEAD", path)[2] == b""
    status, headers, body = http.ask("GET", path + "?ack=0&limit=2")
    assert (status, json.loads(body)) == (200, {"tokens": every[:2]})
    assert json.loads(http.ask("GET", path + "?ack=0&limit=2")[2]) == {"tokens": every[:2]}, "not acknowledged yet"
    status, headers, body = http.ask("GET", f"{path}?ack={headers['GoCM-Cursor']}&limit=2")
    assert json.loads(body) == {"tokens": every[2:4]}
    assert http.json("GET", path) == {"tokens": every[2:]}
    assert http.json("GET", path) == {"tokens": None}
    status, headers, _ = http.ask("GET", path + "?ack=3")
    assert headers["GoCM-Cursor"] == "3"
    server.send(["gone-5"])
    server.settled()
    assert http.ask("GET", path + "?ack=7")[0] == 400, "of another list, or made up: what is here was not read"
    assert http.json("GET", path) == {"tokens": ["gone-5"]}


@pytest.mark.parametrize(
    "query, field",
    [
        ("peek=1&ack=1", "ack"),
        ("ack=x", "ack"),
        ("ack=-1", "ack"),
        ("ack=4000000", "ack"),
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("what=1", "what"),
        ("ack=1&ack=1", ""),
        ("%zz", ""),
        ("ack=" + "9" * 19, "ack"),
    ],
)
def test_bad_queries_are_refused(shared, query, field):
    status, _, body = shared.http().ask("GET", "/gcm/report/canonical?" + query)
    assert status == 400 and json.loads(body)["field"] == field


def test_two_readers_are_not_given_the_same_entry(server):
    server.send([f"gone-{n}" for n in range(500)])
    server.settled()
    found = []
    readers = [
        threading.Thread(
            target=lambda: found.extend(server.http().json("GET", "/gcm/report/notregistered?limit=50")["tokens"] or [])
        )
        for _ in range(12)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(found) == sorted(f"gone-{n}" for n in range(500))


# ------------------------------------------------------------------------------------------------------ bad input


BAD = [
    (b"", 400, "tokens"),
    (b"payload={}", 400, "tokens"),
    (b"tokens=&payload={}", 400, "tokens"),
    (b"tokens=" + b"a" * 4097 + b"&payload={}", 400, "tokens"),
    (b"tokens=a%0Ab&payload={}", 400, "tokens"),
    (b"tokens=a", 400, "payload"),
    (b"tokens=a&payload=", 400, "payload"),
    (b"tokens=a&payload={", 400, "payload"),
    (b"tokens=a&payload=7", 400, "payload"),
    (b"tokens=a&payload={}&payload={}", 400, "payload"),
    (b'tokens=a&payload={"a":"' + b"x" * 4096 + b'"}', 400, "payload"),
    (b"tokens=%zz&payload={}", 400, "tokens"),
    (b"tokens=%ff&payload={}", 400, "tokens"),
    (b"tokens=a\0&payload={}", 400, ""),
    (b"tokens=a&payload=" + b"[" * 100_000, 400, "payload"),
    (b"&" * 500_000, 413, ""),
    (b"a" * 600_001, 413, "content-length"),
]


@pytest.mark.alone
@pytest.mark.parametrize("body, status, field", BAD, ids=range(len(BAD)))
def test_bad_bodies_are_refused_at_once_and_counted_nowhere(shared, body, status, field):
    before = shared.report()
    began = time.monotonic()
    found, headers, answer = shared.http().ask("POST", "/gcm/send", body, FORM)
    took = time.monotonic() - began
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert json.loads(answer)["field"] == field and json.loads(answer)["error"] and answer.count(b"\n") == 1
    assert took < 2.0, "100 ms is the aim; this machine may be busy"
    assert shared.report() == before
    assert "Traceback" not in shared.log()


def test_a_wrong_content_type_is_told(shared):
    status, _, body = shared.http().ask("POST", "/gcm/send", "tokens=a&payload={}", {"Content-Type": "text/plain"})
    assert status == 415 and json.loads(body)["field"] == "Content-Type"


@pytest.mark.parametrize(
    "method, path, status, allow",
    [
        ("GET", "/index.html", 404, None),
        ("POST", "/", 405, "GET, HEAD"),
        ("POST", "/gcm", 404, None),
        ("GET", "/gcm/send", 405, "POST"),
        ("POST", "/gcm/report", 405, "GET, HEAD"),
        ("DELETE", "/gcm/report/canonical", 405, "GET, HEAD"),
        ("GET", "//gcm/report", 404, None),
        ("GET", "/gcm/report/canonical/", 404, None),
        ("GET", "/gcm%2freport", 404, None),
    ],
)
def test_routes_are_exact(shared, method, path, status, allow):
    found, headers, body = shared.http().ask(method, path, "" if method == "POST" else None)
    assert (found, headers["Allow"]) == (status, allow) and json.loads(body)["error"]


# --------------------------------------------------------------------------------------------- the wire, byte by byte


def test_pipelined_requests_are_answered_in_order(raw):
    raw.send(
        b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n"
        + post(b"tokens=")
        + b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
        + b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    answers = raw.rest().split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"400", b"404", b"200"]
    assert b"Connection: keep-alive" in answers[0] and b"Connection: close" in answers[3]


def test_hundreds_pipelined(raw):
    threading.Thread(
        target=raw.send,
        args=(b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400 + b"GET /gcm/report HTTP/1.0\r\n\r\n",),
    ).start()
    assert raw.rest().count(b"HTTP/1.1 200 OK") == 401


def test_keep_alive_on_1_0(raw):
    raw.send(b"GET /gcm/report HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").until(b"}")
    raw.send(b"GET /gcm/report HTTP/1.0\r\n\r\n")
    assert b"Connection: close" in raw.rest()


def test_a_request_in_single_bytes(raw):
    for byte in post(b"tokens=", version=b"1.0"):
        raw.send(bytes([byte]))
    assert raw.rest().startswith(b"HTTP/1.1 400 ")


def test_a_head_gives_the_length_but_no_body(raw):
    raw.send(b"HEAD /gcm/report HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = raw.rest()
    assert b"Content-Length: " in answer and answer.endswith(b"\r\n\r\n")


def test_continue_comes_only_for_what_will_be_read(raw, shared):
    held = post(b"tokens=", extra=b"Expect: 100-continue\r\n")
    raw.send(held[:-7]).until(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert b"HTTP/1.1 400" in raw.send(held[-7:]).until(b"}\n")
    refused = post(b"tokens=", extra=b"Expect: 100-continue\r\n", path=b"/nowhere")[:-7]
    assert Raw(shared.place).send(refused).rest().startswith(b"HTTP/1.1 404 ")


def test_a_body_over_the_limit_is_refused_before_it_is_read(raw):
    raw.send(post(b"", extra=b"X: y\r\n").replace(b"Content-Length: 0", b"Content-Length: 600001"))
    assert raw.until(b"}\n").startswith(b"HTTP/1.1 413 ")


def test_a_refusal_reaches_a_client_that_is_still_writing(raw):
    raw.send(b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
    select.select([raw.sock], [], [], 20)  # the answer is there, and this client goes on all the same
    for _ in range(30):
        raw.send(b"x" * 100_000)
    assert raw.rest().startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60 + b"\r\n\r\n",
        b"\0" * 20_000,
        b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
    ],
)
def test_garbage_is_answered_and_closed(raw, data):
    assert raw.send(data).rest().startswith(b"HTTP/1.1 4")


def test_after_a_refusal_nothing_more_is_read_from_that_connection(raw):
    smuggled = post(b"0\r\n\r\n", extra=b"Transfer-Encoding: chunked\r\n")
    raw.send(smuggled + b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert raw.rest().count(b"HTTP/1.1 ") == 1


# ------------------------------------------------------------------------------------- slow, silent, many clients


@pytest.mark.parametrize("start, drip", [(b"", b"X"), (post(b"x" * 3000)[:-3000], b"x")], ids=["head", "body"])
def test_a_dripping_client_is_cut_off(raw, start, drip):
    raw.send(start)
    raw.sock.settimeout(0.05)
    answer, began = b"", time.monotonic()
    while b"}\n" not in answer:
        assert time.monotonic() - began < 10
        try:
            raw.send(drip)
            answer += raw.sock.recv(65536)
        except TimeoutError:
            pass
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed_without_a_word(raw, shared):
    assert raw.rest() == b""
    assert Raw(shared.place).send(b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n").rest().count(b"HTTP/1.1") == 1


def test_connections_over_the_cap_are_turned_away_and_the_rest_served(start):
    server = start("--max-connections", "5")
    holding = [Raw(server.port) for _ in range(5)]
    for client in holding:  # each is being served: it has begun to send what may be sent
        client.send(post(extra=b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")[0] + b"\r\n\r\n").until(CONTINUED)
    answer = Raw(server.port).rest()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in answer
    holding[0].send(b"tokens=a&payload={}").until(b"ok\n")
    holding.pop().sock.close()

    def served():
        try:
            return Http(server.port).ask("GET", "/gcm/report")[0] == 200
        except OSError:
            return False

    eventually(served)


def threads(server):
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


@pytest.mark.slow
def test_thousands_of_resets_and_silent_clients(start, sandbox):
    """Each costs a thread at most, and for a bounded time; those who have something to say are served all along."""
    server = start("--max-connections", "200", "--head-timeout", "1", "--idle-timeout", "1")
    server.send(["warm"])
    before, memory_before = threads(server), memory(server.group())
    for n in range(5000):
        rude = socket.create_connection(("127.0.0.1", server.port))
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        if n % 2:
            rude.send(b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\ntok")
        rude.close()
    silent = []
    for _ in range(2000):
        silent.append(socket.create_connection(("127.0.0.1", server.port)))
        assert threads(server) <= before + 210  # a thread that is done is still seen for a moment
    eventually(lambda: accepted(server, "after"))
    for each in silent:
        each.close()
    eventually(lambda: threads(server) <= before + 10)
    assert memory(server.group()) < memory_before + 20
    assert not server.find("Traceback") and server.settled()["attempts"] == 2
    assert set(sandbox.received()["delivered"]) == {"warm", "after"}


def test_a_client_that_does_not_read_is_let_go(start):
    server = start("--head-timeout", "1", "--idle-timeout", "1")
    for part in range(3):  # 9 MB: more than the sockets' buffers hold
        server.send([f"gone-{part}-{n}-{'x' * 3000}" for n in range(1000)])
    server.settled()
    deaf = socket.create_connection(("127.0.0.1", server.port))
    deaf.sendall(b"GET /gcm/report/notregistered?peek=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert holds(server, deaf)
    eventually(lambda: not holds(server, deaf))
    assert deaf.recv(12) == b"HTTP/1.1 200", "it was being answered"
    assert server.http().ask("GET", "/gcm/report")[0] == 200


def accepted(server, token):
    """Whether a message was taken, of a client that may be turned away."""
    try:
        return server.http().ask("POST", "/gcm/send", form([token]), FORM)[0] == 200
    except OSError:
        return False


def test_a_half_closed_client_gets_its_answer(raw):
    raw.send(b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n")
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.rest().startswith(b"HTTP/1.1 200 ")


def test_half_a_request_and_a_half_close_end_at_once(raw):
    began = time.monotonic()
    raw.send(post()[:-3])
    raw.sock.shutdown(socket.SHUT_WR)
    assert b"200 OK" not in raw.rest() and time.monotonic() - began < 5


def test_ten_megabytes_of_separators(start):
    server = start("--max-body", str(20_000_000))
    before = memory(server.group())
    began = time.monotonic()
    status, _, body = server.http().ask("POST", "/gcm/send", b"&" * 10_000_000, FORM)
    assert status == 413 and "fields" in json.loads(body)["error"]
    assert time.monotonic() - began < 5
    assert memory(server.group()) < before + 60, "the body itself, and not what splitting it would make"


def test_a_reader_who_goes_away_loses_nothing(server):
    """A list is cleared after it was written: who hangs up before has not got it."""
    for part in range(3):  # 8 MB: more than the sockets' buffers hold, and no more than a page
        server.send([f"gone-{part}-{n}-{'x' * 2700}" for n in range(1000)])
    server.settled()
    rude = socket.socket()
    rude.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    rude.connect(("127.0.0.1", server.port))
    rude.sendall(b"GET /gcm/report/notregistered HTTP/1.1\r\nHost: localhost\r\n\r\n")
    rude.recv(10)
    rude.close()
    found = eventually(lambda: server.http().ask("GET", "/gcm/report/notregistered"))
    assert len(json.loads(found[2])["tokens"]) == 3000


@pytest.mark.parametrize(
    "path, status, field",
    [
        ("/gcm/jobs/", 400, "job"),
        ("/gcm/jobs/17", 400, "job"),
        ("/gcm/jobs/000000000000000G", 400, "job"),
        ("/gcm/jobs/0000000000000000", 400, "job"),
        ("/gcm/jobs/ffffffffffffffff", 400, "job"),
        ("/gcm/jobs/0000000000000001/x", 400, "job"),
        ("/gcm/jobs/%30000000000000001", 400, "job"),
        ("/gcm/jobs/0000000000000001?limit=0", 400, "limit"),
        ("/gcm/jobs/0000000000000001?after=x", 400, "after"),
        ("/gcm/jobs/0000000000000001?state=lost", 400, "state"),
        ("/gcm/jobs/0000000000000001?job=1", 400, "job"),
        ("/gcm/jobs/0000000000000001", 404, "job"),
        ("/gcm/jobs", 400, "tag"),
        ("/gcm/jobs?tag=a+b", 400, "tag"),
        ("/gcm/jobs?tag=a&scheduled=1", 400, "tag"),
    ],
)
def test_bad_questions_about_a_job(shared, path, status, field):
    got, _, answer = shared.http().ask("GET", path)
    assert (got, json.loads(answer)["field"]) == (status, field), answer


@pytest.mark.parametrize("path, status", [("/gcm/report", 400), ("/gcm/report/notregistered", 400), ("/gcm/send", 405)])
@pytest.mark.parametrize("body", [b"Content-Length: 1\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_a_get_with_a_body_gets_nothing(server, path, status, body):
    server.send(["gone-a"])
    server.settled()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode() + body)
        assert sock.makefile("rb").readline().split()[1] == str(status).encode()
    assert server.http().json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": ["gone-a"]}, "nothing was taken"
