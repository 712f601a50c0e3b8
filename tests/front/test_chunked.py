"""Bodies in chunks: what is taken, h11 takes and reads alike; all else is refused; real clients send them."""

import json
import shutil
import socket
import subprocess

import h11
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from kit import Http, eventually

from gocm_lib.front.chunked import BYTES_A_CHUNK, FREE_CHUNKS, LONGEST_LINE, LONGEST_TRAILERS
from gocm_lib.front.request import Reader
from gocm_lib.message.bad_request import BadRequest

short = pytest.mark.short
HEAD = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"


def read(stream, most=1000, cuts=()):
    """The bodies and paths of the requests in a stream, then the status of the refusal if there is one."""
    reader, found = Reader(most), []
    ends = [*cuts, len(stream)]
    try:
        for start, end in zip([0, *cuts], ends):
            reader.feed(stream[start:end])
            while request := reader.next():
                found.append((request.path, request.body))
    except BadRequest as problem:
        found.append(problem.status)
    return found


def by_h11(stream):
    """The body that an independent implementation reads, and what it leaves; None: it refuses, or waits for more."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(stream)
    body = b""
    try:
        connection.next_event()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                return None
            body += bytes(event.data)
    except h11.RemoteProtocolError:
        return None
    return body, bytes(connection.trailing_data[0])


pieces = st.lists(st.binary(min_size=1, max_size=30), max_size=5)
extensions = st.sampled_from([b"", b";a=b", b"; a", b';a="b"'])
trailers = st.lists(st.sampled_from([b"X: y", b"Trailer-Field:"]), max_size=2)


def chunked(parts, extension=b"", trailing=(), upper=False):
    size = b"%X" if upper else b"%x"
    body = b"".join(size % len(part) + extension + b"\r\n" + part + b"\r\n" for part in parts)
    return body + b"0\r\n" + b"".join(line + b"\r\n" for line in trailing) + b"\r\n"


@short
@given(pieces, extensions, trailers, st.booleans(), st.data())
def test_what_is_sent_is_read_however_it_is_cut(parts, extension, trailing, upper, data):
    stream = HEAD + chunked(parts, extension, trailing, upper) + NEXT
    whole = [("/x", b"".join(parts)), ("/next", b"")]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    assert read(stream) == whole == read(stream, cuts=cuts) == read(stream, cuts=range(1, len(stream)))


@short
@given(pieces, st.data())
def test_what_is_taken_h11_takes_and_reads_alike(parts, data):
    """A chunked body in which some bytes were changed, taken out or put in."""
    body = bytearray(chunked(parts, data.draw(extensions), data.draw(trailers)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b"\r\n", b"\n", b"\r", b"0", b"5", b" ", b";", b"x", b"-", b"+", b"\0", b"0x1"])
        )
    found = read(HEAD + bytes(body))
    if found and found[0] not in (400, 413, 431):
        theirs = by_h11(HEAD + bytes(body))
        assert theirs is not None and theirs[0] == found[0][1]


@short
@pytest.mark.parametrize(
    "body, status",
    [
        (b"5\r\nhelloX", 400),  # longer than it says
        (b"5\r\nhello\n0\r\n\r\n", 400),
        (b"5\nhello\r\n0\r\n\r\n" + b"x" * LONGEST_LINE, 400),
        (b"+5\r\nhello\r\n0\r\n\r\n", 400),
        (b"-1\r\n", 400),
        (b" 5\r\nhello\r\n", 400),
        (b"5 \r\nhello\r\n", 400),
        (b"5 ;a\r\nhello\r\n", 400),  # which RFC 9112 would take, and h11 does not
        (b"0x5\r\nhello\r\n", 400),
        (b"\r\nhello", 400),
        (b"g\r\n", 400),
        (b"123456789\r\n", 400),
        (b"5;a\x00\r\nhello", 400),
        (b"5;a\rb\r\nhello", 400),
        (b"5" + b";" * LONGEST_LINE + b"\r\n", 400),
        (b"3e9\r\n", 413),  # 1001: known before it comes
        (b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n", 413),
        (b"0\r\nno trailer\r\n\r\n", 400),
        (b"0\r\nX : y\r\n\r\n", 400),
        (b"0\r\n" + b"X: yyyyyyyyyyyyyyyyyyyy\r\n" * (LONGEST_TRAILERS // 20), 431),
    ],
)
def test_refusals(body, status):
    assert read(HEAD + body) == [status]
    assert read(HEAD + body, cuts=range(1, len(HEAD + body))) == [status], "as soon as it is known"


@short
def test_many_small_chunks_are_too_many():
    good = chunked([b"x"] * (FREE_CHUNKS // 2) + [b"y" * 4 * BYTES_A_CHUNK] * 9000)
    assert len(read(HEAD + good, 10**6)) == 1
    assert read(HEAD + chunked([b"x"] * (2 * FREE_CHUNKS)), 10**6) == [400]


# ---------------------------------------------------------------------------------------------------- through a server


def test_an_upload_by_curl_requests_and_node(start, sandbox):
    server = start()
    url, message = f"http://127.0.0.1:{server.port}/gcm/send", {"payload": {"a": "1"}}
    taken = []
    if shutil.which("curl"):
        words = ["curl", "-s", "-T", "-", "-X", "POST", "-H", "Content-Type: application/json", url]
        body = json.dumps({**message, "tokens": ["by-curl"]})
        assert subprocess.run(words, input=body, capture_output=True, text=True, timeout=20).stdout == "ok\n"
        taken.append("by-curl")
    parts = (part.encode() for part in ("tokens=by-", "requests&payload=", "%7B%22a%22:%221%22%7D"))
    answer = requests.post(url, data=parts, headers={"Content-Type": "application/x-www-form-urlencoded"}, timeout=20)
    assert (answer.status_code, answer.text) == (200, "ok\n")
    taken.append("by-requests")
    if shutil.which("node"):
        script = f"""
            const request = require("http").request("{url}", {{method: "POST",
              headers: {{"Content-Type": "application/json"}}}}, answer => answer.pipe(process.stdout));
            for (const part of {json.dumps(json.dumps({**message, "tokens": ["by-node"]}))}) request.write(part);
            request.end();
        """
        assert subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=20).stdout == "ok\n"
        taken.append("by-node")
    eventually(lambda: server.report()["pending"] == 0)
    assert sorted(sandbox.received()["delivered"]) == sorted(taken)


def test_it_is_bounded_and_goes_on(start):
    server = start("--max-body", "2000")
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        route = b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(route + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        body = json.dumps({"tokens": ["a"], "payload": {}}).encode()
        sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + NEXT.replace(b"Host: a", b"Host: localhost"))
        answers = b""
        while answers.count(b"HTTP/1.1") < 2:
            answers += sock.recv(10_000)
        assert b" 200 OK" in answers and b" 404 Not Found" in answers, "the next request begins where it ends"
        sock.sendall(route + b"Transfer-Encoding: chunked\r\n\r\n7d1\r\n")
        assert b" 413 " in sock.recv(10_000)
    small = b"POST /gcm/failed/discard HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for pieces in ([small + b"4000\r\n"], [small, b"4000\r\n"]):  # a short form's limit holds, too
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            for piece in pieces:
                sock.sendall(piece)
            assert b" 413 " in sock.recv(10_000)
    assert Http(server.port).json("GET", "/readyz") == {"status": "ok"}


def test_who_drips_chunks_is_not_waited_for(start):
    server = start("--head-timeout", "0.5")
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(HEAD.replace(b"/x", b"/gcm/send").replace(b"Host: a", b"Host: localhost") + b"5\r\nhe")
        assert b" 408 " in sock.recv(10_000)
