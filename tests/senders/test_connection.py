"""The response reader: reads sound answers as http.client does, in whatever pieces; others end in WireError."""

import http.client
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.senders.connection import MAX_BODY, MAX_HEAD, ResponseReader, WireError

pytestmark = pytest.mark.short


def read(pieces, ends=True):
    reader = ResponseReader()
    for piece in pieces:
        if response := reader.feed(piece):
            return response
    return reader.end() if ends else None


class _Socket:
    def __init__(self, data):
        self.data = data

    def makefile(self, *_):
        return io.BytesIO(self.data)


def read_by_http_client(data):
    response = http.client.HTTPResponse(_Socket(data), method="POST")
    response.begin()
    return response.status, response.read()


def chunked(body, sizes):
    out, at = b"", 0
    for size in sizes:
        piece = body[at : at + size]
        at += size
        if piece:
            out += b"%x\r\n%b\r\n" % (len(piece), piece)
    if body[at:]:
        out += b"%X;ext=1\r\n%b\r\n" % (len(body[at:]), body[at:])
    return out + b"0\r\n"


@st.composite
def answers(draw):
    """(bytes of a sound answer, whether the connection is reusable after it)"""
    status = draw(st.sampled_from([200, 204, 304, 400, 404, 500, 503]))
    body = b"" if status in (204, 304) else draw(st.binary(max_size=60))
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n"]))
    head = interim + b"HTTP/1.1 %d Some Reason\r\nServer: x\r\n" % status
    way = draw(st.sampled_from(["length", "chunked", "trailers", "close"]))
    if status in (204, 304) or way == "length":
        return head + (b"" if status in (204, 304) else b"Content-Length: %d\r\n" % len(body)) + b"\r\n" + body, True
    if way == "close":
        return head + b"\r\n" + body, False
    trailers = b"T: 1\r\n" if way == "trailers" else b""
    sizes = draw(st.lists(st.integers(1, 20), max_size=4))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, sizes) + trailers + b"\r\n", True


@given(answers(), st.data())
def test_sound_answers_in_any_pieces_read_as_http_client_reads_them(answer, data):
    stream, reusable = answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    response = read([stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])])
    assert (response.status, response.body) == read_by_http_client(stream)
    assert response.reusable == reusable
    assert read([stream[i : i + 1] for i in range(len(stream))]) == response


@given(st.binary(max_size=80) | st.builds(lambda a, b: a[0][:b] + b"\xff" + a[0][b:], answers(), st.integers(0, 80)))
def test_any_bytes_end_in_a_response_or_a_wire_error(data):
    try:
        assert 200 <= read([data]).status < 600
    except WireError as error:
        assert str(error) and (not error.silent or not data)


@given(answers(), st.integers(0, 60))
def test_a_cut_answer_is_an_error_or_whole(answer, cut):
    stream, reusable = answer
    if reusable and cut < len(stream):
        try:
            response = read([stream[: -cut or None]])
        except WireError:
            return
        assert cut == 0 or not response.reusable or response.body == b""


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 5000 + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nnocolon\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 100 C\r\n\r\n" * 17,
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 99 No\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
        b"x" * (MAX_HEAD + 1),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_BODY + 1),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 2000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 20000,
    ],
)
def test_refused_without_waiting_for_more(raw):
    with pytest.raises(WireError):
        read([raw], ends=False)


def test_a_header_of_spaces_is_read_once():
    """What tried each of them as the value's end would take a minute, and freeze every request of the sender."""
    raw = b"HTTP/1.1 200 OK\r\nX: a" + b" " * 60_000 + b"a\r\nContent-Length: 0\r\n\r\n"
    assert read([raw]).status == 200


def test_interim_answers_are_passed_over():
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"  # http.client takes these for the answer
    assert read([hints * 2 + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]).status == 200


def test_bytes_after_the_answer_spoil_the_connection():
    assert not read([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n"]).reusable
    assert not read([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"]).reusable
    assert not read([b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"]).reusable


def test_silence_is_told_from_half_an_answer():
    for data, silent in [
        (b"", True),
        (b"H", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
    ]:
        with pytest.raises(WireError) as caught:
            read([data])
        assert caught.value.silent is silent
