"""The request reader: what it takes, h11 takes and reads alike; what is ambiguous it refuses; pieces do not matter."""

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gocm_lib.front.request import MAX_HEAD, Reader, check_no_body
from gocm_lib.message.bad_request import BadRequest

pytestmark = pytest.mark.short


def read(pieces, max_body=1000):
    """Every request in the pieces, then the status of the refusal if there is one."""
    reader, found = Reader(max_body), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while request := reader.next():
                found.append(request)
    except BadRequest as problem:
        return [*found, problem.status]
    return found


def read_by_h11(data):
    """What an independent implementation makes of one request: method, target, headers, body; None: it refuses."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    body = b""
    try:
        head = connection.next_event()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                return None
            body += event.data
    except h11.RemoteProtocolError:
        return None
    return head.method, head.target, [(n, v) for n, v in head.headers], body


HOST = b"Host: a\r\n"
POST = b"POST /x HTTP/1.1\r\n" + HOST

methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"get", b"G T", b""])
targets = st.sampled_from(
    [b"/", b"/a?b=c", b"http://h/p?q", b"http://h", b"*", b"a", b"/\x01", b"//x", b"/a#b", b"/\xc3"]
)
versions = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.10", b"HTTP/2.0", b"http/1.1", b"HTTP/01.1", b""])
lines = st.one_of(
    st.sampled_from(
        [
            b"Host: a",
            b"Host: b:80",
            b"Host:",
            b"Content-Length: 3",
            b"Content-Length: 0",
            b"Content-Length: +3",
            b"Content-Length : 3",
            b"Content-Length: 3, 3",
            b"Transfer-Encoding: chunked",
            b"X: y",
            b"X : y",
            b" folded",
            b"nocolon",
            b"X:\x0by",
            b"X: \x00",
            b"Connection: close",
            b"Content-Length: 1_0",
            b": v",
            b"X: a\rY: b",
            b"X: a\nContent-Length: 5",
            b"Host: a/b",
            b"Expect: 100-continue",
        ]
    ),
    st.binary(max_size=12),
)
ends = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"])
heads = st.builds(
    lambda m, t, v, rest: m + b" " + t + b" " + v + b"\r\n" + b"".join(a + b for a, b in rest) + b"\r\n",
    methods,
    targets,
    versions,
    st.lists(st.tuples(lines, ends), max_size=5),
)


@settings(max_examples=600)
@given(heads | st.binary(max_size=60), st.binary(max_size=5))
def test_what_we_take_h11_takes_and_reads_alike(head, rest):
    found = read([head + rest])
    if not found or isinstance(found[0], int):
        return
    ours = found[0]
    theirs = read_by_h11(head + ours.body)
    assert theirs is not None
    method, target, headers, body = theirs
    assert (ours.method.encode(), ours.body) == (method, body)
    assert (
        target.endswith((ours.path + ("?" + ours.query if "?" in ours.path + target.decode() else "")).encode())
        or ours.path == "/"
    )
    if target.startswith(b"http:"):  # whose host is in the target
        headers = [(name, value) for name, value in headers if name != b"host"]
        assert target.startswith(b"http://" + ours.headers["host"].encode())
        ours = ours._replace(headers={name: value for name, value in ours.headers.items() if name != "host"})
    assert {name.decode() for name, _ in headers} == set(ours.headers)
    for name, value in headers:
        assert value.decode("latin-1") in ours.headers[name.decode()]


valid = st.builds(
    lambda name, body, close: (
        b"POST /%b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n%b"
        % (name, len(body), b"Connection: close\r\n" if close else b"", body)
    ),
    st.from_regex(rb"[a-z]{0,9}", fullmatch=True),
    st.binary(max_size=40),
    st.booleans(),
)


@given(st.lists(valid, min_size=1, max_size=4).map(b"".join), st.data())
def test_pieces_do_not_matter(stream, data):
    whole = read([stream])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]
    assert read(pieces) == whole == read([stream[i : i + 1] for i in range(len(stream))])
    assert stream.endswith(whole[-1].body)


@pytest.mark.parametrize(
    "raw, status",
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n" + b"x" * MAX_HEAD, 431),  # bare LF never ends a head
        (b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nnocolon\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/01.1\r\nHost: a\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 400),
        (b"\r\nGET / HTTP/1.0\r\n\r\n", 400),
        (POST + b"\r\n", 411),
        (POST + b"Content-Length: +5\r\n\r\n", 400),
        (POST + b"Content-Length: 1_0\r\n\r\n", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: 5,5\r\n\r\n", 400),
        (POST + b"Content-Length: 99999999999\r\n\r\n", 400),
        (POST + b"Content-Length: 0x5\r\n\r\n", 400),
        (POST + b"Content-Length : 5\r\n\r\n", 400),
        (POST + b"Content-Length: \xb2\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"Content-Length: 0\r\nContent-Type: a/b\r\nContent-Type: c/d\r\n\r\n", 400),
        (POST + b"Content-Length: 1001\r\n\r\n", 413),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (POST + b"Expect: 200-maybe\r\nContent-Length: 5\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 64 + b"\r\n", 431),
        (b"GET /" + b"x" * MAX_HEAD + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
        (b"x" * (MAX_HEAD + 1), 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x7fb\r\n\r\n", 400),
        (b"GET http://u@h/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a\xa0b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\x0b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        # By which a proxy in front of us might see another end of a request than we do.
        (POST + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"Transfer-Encoding:\x0bchunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: identity\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400),
        (POST + b"transfer-encoding: chunked\r\nTRANSFER-ENCODING: x\r\n\r\n", 400),
        (POST + b"X: y\r\n\tTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"X: y\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
        (POST + b" Content-Length: 5\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\n", 400),
        (POST + b"Content-Length:\r\n\r\n", 400),
        (POST + b"Content-Length: 5 5\r\n\r\n", 400),
        (POST + b"Content-Length: 5;x\r\n\r\n", 400),
        (POST + b"Content-Length: 5\x00\r\n\r\n", 400),
        (POST + b"Content-Length: 1e1\r\n\r\n", 400),
        (POST + b"Content\x00-Length: 5\r\n\r\n", 400),
        (POST + b"Content_Length: 5\r\n\r\n", 411),
        (POST + b": 5\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 505),
        (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
def test_refusals(raw, status):
    assert read([raw]) == [status]


def test_a_length_over_the_limit_is_refused_before_the_body_comes():
    assert read([POST + b"Content-Length: 1000000\r\n\r\n"]) == [413]


@pytest.mark.parametrize(
    "head, kept",
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, x\r\n", False),
        (b"GET / HTTP/1.0\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n", True),
    ],
)
def test_keep_alive(head, kept):
    assert read([head + b"\r\n"])[0].keep_alive is kept


def test_absolute_form_is_reduced_to_its_path():
    [request] = read([b"GET http://host:80/a?b HTTP/1.1\r\nHost: host:80\r\n\r\n"])
    assert (request.path, request.query) == ("/a", "b")
    [request] = read([b"GET http://evil.example/a HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    assert request.headers["host"] == "evil.example", "Host counts for nothing then"


def test_continue_is_asked_for_once_and_only_when_the_body_is_held_back():
    reader = Reader(100)
    reader.feed(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert reader.next() is None and reader.awaits_continue() and not reader.awaits_continue()
    reader.feed(b"ab")
    assert reader.next().body == b"ab"
    reader.feed(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\na")
    assert reader.next() is None and not reader.awaits_continue()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "rest, refused",
    [
        (b"Content-Length: 1\r\n\r\nx", True),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", True),
        (b"Content-Length: 0\r\n\r\n", False),
        (b"\r\n", False),
    ],
)
def test_a_body_where_none_belongs_is_refused(method, rest, refused):
    [found] = read([method.encode() + b" / HTTP/1.1\r\n" + HOST + rest])
    if refused:
        with pytest.raises(BadRequest):
            check_no_body(found)
    else:
        check_no_body(found)
