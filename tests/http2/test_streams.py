"""Both ends of HTTP/2 against the library that others use, in memory, with the bytes cut anywhere."""

import struct

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gocm_lib.http2 import frames
from gocm_lib.http2.client import MOST_STREAMS, PING_LIMIT, RETIRE, SILENCE, Again, Answer, Client, Lost
from gocm_lib.http2.frames import Code
from gocm_lib.http2.hpack import Encoder, plain
from gocm_lib.http2.peer import STOCK
from gocm_lib.http2.server import IDLE_LIMIT, RESETS, STUCK_LIMIT, Server

pytestmark = pytest.mark.short

HEAD = ((":method", "POST"), (":scheme", "https"), (":path", "/send"), (":authority", "a"), ("authorization", "x" * 99))
OK = [(":status", "200"), ("content-type", "application/json")]


def taken(end):
    """What an end wants to send."""
    data, end.out[:] = bytes(end.out), b""
    return data


def pieces(data, cuts):
    """The data cut at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [part for a, b in zip([0, *places], [*places, len(data)]) if (part := data[a:b])]


def told(connection, given):
    """The library's settings, with some others from the very beginning."""
    values = {h2.settings.SettingCodes[name]: value for name, value in given.items()}
    return h2.settings.Settings(connection.config.client_side, {**dict(connection.local_settings), **values})


class Them:
    """The library's server at the other end of our Client."""

    def __init__(self, **given):
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.connection.local_settings = told(self.connection, given)
        self.connection.initiate_connection()
        self.bodies = {}
        self.client = Client(0.0)
        self.events = []
        self.now = 0.0

    def pump(self, cuts=()):
        """Exchange everything; returns what ended at our end."""
        found = []
        while True:
            theirs = self.connection.data_to_send()
            for piece in pieces(theirs, cuts):
                found += self.client.receive(piece, self.now)
            ours = taken(self.client)
            for piece in pieces(ours, cuts):
                self.events += self.connection.receive_data(piece)
            if not theirs and not ours:
                return found

    def requests(self):
        """The requests that have come whole: stream to body."""
        for event in self.events:
            if isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        ended = [event.stream_id for event in self.events if isinstance(event, h2.events.StreamEnded)]
        self.events.clear()
        return ended

    def raw(self, *parts):
        """These bytes come, whatever the library would have sent."""
        return self.client.receive(b"".join(parts), self.now)


def met(**given):
    them = Them(**given)
    assert them.pump() == [] and them.client.greeted
    return them


@settings(max_examples=60, deadline=None)
@given(
    bodies=st.lists(st.binary(max_size=400), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 5000), max_size=12),
    table=st.sampled_from([0, 64, 4096]),
    streams=st.integers(1, 40),
    answers=st.lists(
        st.tuples(st.sampled_from(["200", "404", "503"]), st.binary(max_size=300)), min_size=30, max_size=30
    ),
)
def test_requests_arrive_whole_and_answers_come_back_to_theirs(bodies, cuts, table, streams, answers):
    them = Them(HEADER_TABLE_SIZE=table, MAX_CONCURRENT_STREAMS=streams)
    them.pump(cuts)
    left, ended, sent = list(enumerate(bodies)), {}, {}
    while len(ended) < len(bodies):
        while left and them.client.takes(len(left[0][1])):
            key, body = left.pop(0)
            them.client.request(key, HEAD, body, 0.0)
            sent[2 * len(sent) + 1] = key
        assert them.client.open <= streams
        found = them.pump(cuts)
        for stream in them.requests():
            assert them.bodies.get(stream, b"") == bodies[sent[stream]]
            status, body = answers[sent[stream]]
            them.connection.send_headers(stream, [(":status", status), ("x", status * 9)])
            them.connection.send_data(stream, body[:100])
            them.connection.send_data(stream, body[100:], end_stream=True)
        found += them.pump(cuts)
        for event in found:
            assert event == Answer(event.key, int(answers[event.key][0]), event.headers, answers[event.key][1])
            assert event.headers == {"x": answers[event.key][0] * 9}
            ended[event.key] = event
    assert not them.client.open and not them.client.over


def begin(them, *keys):
    for key in keys:
        them.client.request(key, HEAD, b"{}", them.now)
    found = them.pump()
    them.requests()
    return found


def test_never_more_than_a_hundred_streams_and_never_half_a_body():
    them = met(MAX_CONCURRENT_STREAMS=1000)
    for key in range(MOST_STREAMS):
        assert them.client.takes(2)
        begin(them, key)
    assert not them.client.takes(2) and them.client.room() == 0
    narrow = met(INITIAL_WINDOW_SIZE=10)
    assert narrow.client.takes(10) and not narrow.client.takes(11) and narrow.client.narrow == 10


def test_without_room_in_the_connection_s_window_nothing_is_begun():
    them = met(MAX_CONCURRENT_STREAMS=100)
    size = 10_000
    for key in range(6):
        assert them.client.takes(size)
        them.client.request(key, HEAD, b"x" * size, 0.0)
    them.pump()
    assert not them.client.takes(size) and not them.client.takes(10) and them.client.room() == 0
    them.requests()  # the library makes room
    them.pump()
    assert them.client.takes(size)


def test_a_refused_stream_may_go_again_and_the_limit_sinks_for_a_while():
    them = met()
    begin(them, "a", "b", "c")
    them.connection.reset_stream(3, h2.errors.ErrorCodes.REFUSED_STREAM)
    [lost] = them.pump()
    assert (lost.key, lost.again) == ("b", Again.FREELY) and them.client.room() == 0 and them.client.refusals == 1
    them.client.tick(1.5)
    assert them.client.room() == 1


@pytest.mark.parametrize(
    "code, again, old",
    [(8, Again.NO, False), (2, Again.NO, False), (1, Again.NO, False), (13, Again.FREELY, True), (99, Again.NO, False)],
)
def test_resets(code, again, old):
    them = met()
    begin(them, "a")
    assert them.raw(frames.word(frames.RST_STREAM, 1, code)) == [
        Lost("a", "reset: " + frames.name(code), again, "connection", old)
    ]
    assert them.raw(frames.word(frames.RST_STREAM, 1, code)) == [], "a second word about it means nothing"


@pytest.mark.parametrize("code", [0, 1, 11, 4711])
def test_what_a_goaway_does_not_cover_goes_again_and_the_rest_is_awaited(code):
    them = met()
    begin(them, "a", "b", "c")
    lost = them.raw(frames.frame(frames.GOAWAY, 0, 0, (3).to_bytes(4) + code.to_bytes(4) + b"bye"))
    assert [(each.key, each.again) for each in lost] == [("c", Again.FREELY)]
    assert them.client.goaways == [(code, f"{frames.name(code)} bye")] and them.client.room() == 0
    them.connection.send_headers(1, OK, end_stream=True)
    [answer] = them.pump()
    assert answer.key == "a" and not them.client.over
    [last] = them.client.end("connection closed")
    assert last == Lost("b", f"connection closed after GOAWAY {frames.name(code)} bye", Again.NO)


def test_what_a_server_says_in_words_of_its_own_is_not_repeated():
    for text, shown in ((b"server_shutting_down", "NO_ERROR server_shutting_down"), (b"Bearer ya29.x", "NO_ERROR")):
        them = met()
        them.raw(frames.frame(frames.GOAWAY, 0, 0, bytes(8) + text))
        assert them.client.goaways == [(0, shown)]
    them = met()
    them.raw(frames.frame(frames.GOAWAY, 0, 0, bytes(8) + b"t" * 140))
    assert them.client.goaways == [(0, "NO_ERROR")], "it is as long as a token"


def test_two_goaways_as_google_says_them():
    them = met()
    begin(them, "a", "b")
    assert them.raw(frames.goaway(2**31 - 1, Code.NO_ERROR, "")) == []
    assert [each.key for each in them.raw(frames.goaway(1, Code.NO_ERROR, ""))] == ["b"]
    them.connection.send_headers(1, OK, end_stream=True)
    them.pump()
    assert them.client.over


def test_an_end_just_as_we_wrote_allows_one_more_try():
    them = met()
    begin(them, "a", "b")
    assert {each.again for each in them.client.end("closed")} == {Again.ONCE}
    them = met()
    begin(them, "a", "b")
    them.connection.send_headers(1, OK)
    them.pump()
    assert {each.again for each in them.client.end("closed")} == {Again.NO}


def test_silence_is_asked_about_once_and_then_the_connection_is_given_up():
    them = met()
    assert them.client.tick(100.0) == [] and taken(them.client) == b"", "not while it is idle: Google counts PINGs"
    begin(them, "a")
    them.client._read_at = them.client._opened_at = 0.0
    assert them.client.next_moment() == SILENCE
    them.client.tick(SILENCE + 0.1)
    ping = taken(them.client)
    assert ping[3] == frames.PING
    them.client.tick(SILENCE + 1)
    assert taken(them.client) == b""
    them.now = SILENCE + 2
    them.events += them.connection.receive_data(ping)
    assert them.pump() == [] and them.client.tick(SILENCE + 3) == []
    them.client.tick(2 * SILENCE + 3)
    [lost] = them.client.tick(2 * SILENCE + 4 + PING_LIMIT)
    assert lost == Lost("a", "no answer to a PING", Again.NO, "timeout") and them.client.over


def test_it_retires_before_the_server_ends_it():
    them = met()
    begin(them, "a")
    them.client._peer._ack_by = None
    them.client.tick(RETIRE + 1)
    assert them.client.room() == 0 and not them.client.over
    them.connection.send_headers(1, OK, end_stream=True)
    assert len(them.pump()) == 1 and them.client.over


def test_settings_that_are_not_acknowledged_end_it():
    client = Client(0.0)
    client.receive(frames.settings({}), 0.0)
    client.tick(11.0)
    assert client.over and Code.SETTINGS_TIMEOUT.to_bytes(4) in client.out


def head(stream, *fields, flags=0):
    return frames.headers(stream, b"".join(plain(*each) for each in fields), flags)


END = frames.END_STREAM
ODD_ANSWERS = {
    "no status": head(1, ("x", "y")),
    "two statuses": head(1, (":status", "200"), (":status", "200")),
    "a status of letters": head(1, (":status", "2x0")),
    "a status that is none": head(1, (":status", "999")),
    "another pseudo field": head(1, (":status", "200"), (":path", "/")),
    "upper case": head(1, (":status", "200"), ("X-Y", "z")),
    "a connection's field": head(1, (":status", "200"), ("connection", "close")),
    "a line break": head(1, (":status", "200"), ("x", "a\r\nb")),
    "101": head(1, (":status", "101")),
    "an interim answer at the end": head(1, (":status", "100"), flags=END),
    "17 interim answers": b"".join([head(1, (":status", "103"))] * 17),
    "DATA before the head": frames.frame(frames.DATA, END, 1, b"x"),
    "another length": head(1, (":status", "200"), ("content-length", "2")) + frames.frame(frames.DATA, END, 1, b"x"),
    "trailers that go on": head(1, (":status", "200")) + head(1, ("x", "y")),
    "trailers with a status": head(1, (":status", "200")) + head(1, (":status", "200"), flags=END),
    "too many fields": head(1, (":status", "200"), *[("a", "b")] * 200),
    "a window that grows by nothing": frames.word(frames.WINDOW_UPDATE, 1, 0),
    "a window that grows too much": frames.word(frames.WINDOW_UPDATE, 1, 2**31 - 1),
    "an endless answer": head(1, (":status", "200")) + frames.frame(frames.DATA, 0, 1, b"x" * 16_384) * 65,
}


@pytest.mark.parametrize("data", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_odd_answer_costs_its_own_stream_only(data):
    them = met()
    begin(them, "a", "b")
    [lost] = them.raw(data)
    assert (lost.key, lost.again, lost.cause) == ("a", Again.NO, "odd_answer")
    assert taken(them.client)[-13:-4] == frames.word(frames.RST_STREAM, 1, 0)[:9]
    [answer] = them.raw(head(3, (":status", "204"), flags=END))
    assert answer.key == "b" and not them.client.over


GOOD_ANSWERS = {
    "interim ones before": head(1, (":status", "103"), ("x", "y")) + head(1, (":status", "200"), flags=END),
    "trailers": head(1, (":status", "200")) + head(1, ("x", "y"), flags=END),
    "padding": head(1, (":status", "200")) + frames.frame(frames.DATA, END | frames.PADDED, 1, b"\x02ok\0\0"),
    "an empty DATA at its end": head(1, (":status", "200"))
    + frames.frame(frames.DATA, 0, 1, b"ok")
    + frames.frame(frames.DATA, END, 1),
    "priority": frames.frame(frames.HEADERS, 0x25, 1, b"\0\0\0\x03\x10\x88"),
    "continuations": frames.frame(frames.HEADERS, END, 1, b"\x88")
    + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, plain("x", "y")),
    "frames that nobody knows": frames.frame(77, 0xFF, 1, b"?") + head(1, (":status", "200"), flags=END),
    "an origin's frame": frames.frame(0xC, 0, 0, b"") + head(1, (":status", "200"), flags=END),
}


@pytest.mark.parametrize("data", GOOD_ANSWERS.values(), ids=GOOD_ANSWERS)
def test_what_is_allowed_is_understood(data):
    if data[3] == 77:
        data = frames.frame(77, 0xFF, 0, b"?") + data[10:]
    them = met()
    begin(them, "a")
    assert [(each.key, each.status) for each in them.raw(data)] == [("a", 200)]


FAULTS = {
    "a frame that is too long": (b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", Code.FRAME_SIZE_ERROR),
    "DATA on no stream": (frames.frame(frames.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
    "an even stream": (head(2, (":status", "200")), Code.PROTOCOL_ERROR),
    "a stream that was not begun": (head(5, (":status", "200")), Code.PROTOCOL_ERROR),
    "a push": (frames.frame(frames.PUSH_PROMISE, 4, 1, b"\0\0\0\x02\x88"), Code.PROTOCOL_ERROR),
    "pushes wanted": (frames.settings({2: 1}), Code.PROTOCOL_ERROR),
    "a window out of bounds": (frames.settings({4: 2**31}), Code.FLOW_CONTROL_ERROR),
    "a frame size out of bounds": (frames.settings({5: 1}), Code.PROTOCOL_ERROR),
    "SETTINGS on a stream": (frames.frame(frames.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "SETTINGS cut off": (frames.frame(frames.SETTINGS, 0, 0, b"12345"), Code.FRAME_SIZE_ERROR),
    "an ACK with something in it": (frames.frame(frames.SETTINGS, 1, 0, b"123456"), Code.FRAME_SIZE_ERROR),
    "33 SETTINGS": (frames.frame(frames.SETTINGS, 0, 0, struct.pack(">HI", 9, 9) * 33), Code.ENHANCE_YOUR_CALM),
    "a PING cut off": (frames.frame(frames.PING, 0, 0, b"1234567"), Code.FRAME_SIZE_ERROR),
    "a GOAWAY cut off": (frames.frame(frames.GOAWAY, 0, 0, b"1234567"), Code.FRAME_SIZE_ERROR),
    "a window that grows by nothing": (frames.word(frames.WINDOW_UPDATE, 0, 0), Code.PROTOCOL_ERROR),
    "a window that grows too much": (frames.word(frames.WINDOW_UPDATE, 0, 2**31 - 1), Code.FLOW_CONTROL_ERROR),
    "padding that is too long": (frames.frame(frames.DATA, 8, 1, b"\x01"), Code.PROTOCOL_ERROR),
    "something between a block's frames": (
        frames.frame(frames.HEADERS, 0, 1, b"\x88") + frames.frame(frames.PING, 0, 0, b"12345678"),
        Code.PROTOCOL_ERROR,
    ),
    "a block that goes on from none": (frames.frame(frames.CONTINUATION, 4, 1, b"\x88"), Code.PROTOCOL_ERROR),
    "an endless block": (
        frames.frame(frames.HEADERS, 0, 1, b"\x88") + frames.frame(frames.CONTINUATION, 0, 1, b"") * 9,
        Code.ENHANCE_YOUR_CALM,
    ),
    "a huge block": (
        frames.frame(frames.HEADERS, 0, 1, b"\x88") + frames.frame(frames.CONTINUATION, 0, 1, b"x" * 16_384) * 4,
        Code.ENHANCE_YOUR_CALM,
    ),
    "no HPACK": (frames.frame(frames.HEADERS, 4, 1, b"\xff"), Code.COMPRESSION_ERROR),
    "a flood of PINGs": (frames.frame(frames.PING, 0, 0, b"12345678") * (STOCK + 20), Code.ENHANCE_YOUR_CALM),
    "a flood of SETTINGS": (frames.settings({}) * (STOCK + 20), Code.ENHANCE_YOUR_CALM),
    "a flood of empty DATA": (
        head(1, (":status", "200")) + frames.frame(frames.DATA, 0, 1) * (STOCK + 20),
        Code.ENHANCE_YOUR_CALM,
    ),
    "a flood of unknown frames": (frames.frame(99, 0, 0) * (STOCK + 20), Code.ENHANCE_YOUR_CALM),
    "a flood of windows": (frames.word(frames.WINDOW_UPDATE, 1, 1) * (STOCK + 20), Code.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize("data, code", FAULTS.values(), ids=FAULTS)
def test_a_server_that_breaks_the_rules_is_left_and_only_the_guilty_stream_is_counted(data, code):
    them = met()
    begin(them, "a", "b")
    lost = them.raw(data)
    assert them.client.over and {each.key for each in lost} == {"a", "b"}
    assert next(each for each in lost if each.key == "b").again is Again.ONCE
    assert taken(them.client).rpartition(b"broken")[2].find(code.to_bytes(4)) >= 0
    assert them.raw(data) == [], "nothing more is read"


def test_two_window_updates_for_each_answer_are_no_flood():
    """As haproxy sends them."""
    them = met()
    for key in range(2 * STOCK):
        them.client.request(key, HEAD, b"", 0.0)
        taken(them.client)
        stream = 2 * key + 1
        found = them.raw(
            frames.word(frames.WINDOW_UPDATE, 0, 2),
            frames.word(frames.WINDOW_UPDATE, stream, 2),
            head(stream, (":status", "200"), flags=END),
        )
        assert [each.key for each in found] == [key]


def test_many_cancelled_streams_with_no_word_from_the_server_end_its_use():
    them = met()
    begin(them, *range(30))
    for key in range(20):
        them.client.cancel(key, 0.0)
    assert not them.client.leaves
    them.client.cancel(20, 0.0)
    assert them.client.leaves


# ------------------------------------------------------------------------------------------------------- our server


class Us:
    """Our Server at the other end of the library's client."""

    def __init__(self, **given):
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.connection.local_settings = told(self.connection, given)
        self.connection.initiate_connection()
        self.server = Server(0.0, 1 << 20)
        self.events = []

    def pump(self, cuts=(), answer=None):
        while True:
            ours = self.connection.data_to_send()
            for piece in pieces(ours, cuts):
                for request in self.server.receive(piece, 0.0):
                    if answer:
                        self.server.answer(request.stream, *answer(request))
            theirs = taken(self.server)
            for piece in pieces(theirs, cuts):
                self.events += self.connection.receive_data(piece)
            if not ours and not theirs:
                return

    def ask(self, body, *more):
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, [*HEAD, *more], end_stream=not body)
        if body:
            self.connection.send_data(stream, body, end_stream=True)
        return stream


@settings(max_examples=40, deadline=None)
@given(
    bodies=st.lists(st.binary(max_size=2000), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 9000), max_size=12),
    window=st.sampled_from([50, 1000, 65_535]),
    sizes=st.lists(st.integers(0, 2000), min_size=20, max_size=20),
)
def test_our_server_answers_the_library_s_client(bodies, cuts, window, sizes):
    us = Us(INITIAL_WINDOW_SIZE=window)
    us.pump(cuts)
    streams = {us.ask(body): number for number, body in enumerate(bodies)}
    seen, got, ended = {}, {}, set()

    def answer(request):
        seen[request.stream] = request
        return 200, [("content-type", "text/plain")], b"z" * sizes[streams[request.stream]]

    while len(ended) < len(bodies):
        us.pump(cuts, answer)
        for event in us.events:
            if isinstance(event, h2.events.DataReceived):
                got[event.stream_id] = got.get(event.stream_id, 0) + len(event.data)
                us.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                ended.add(event.stream_id)
            assert not isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated))
        us.events.clear()
    for stream, number in streams.items():
        assert seen[stream].body == bodies[number] and seen[stream].headers["host"] == "a"
        assert got.get(stream, 0) == sizes[number]
    assert us.server.open == 0


def greeted(**given):
    server = Server(0.0, 1 << 20, **given)
    assert server.receive(frames.PREFACE + frames.settings({}), 0.0) == []
    assert taken(server)[3] == frames.SETTINGS, "its SETTINGS come first"
    return server


POST = [(":method", "POST"), (":scheme", "https:"), (":path", "/x"), (":authority", "h")]


def test_as_the_sdk_for_node_asks():
    server = greeted()
    [found] = server.receive(head(1, *POST, flags=END), 0.0)
    assert (found.method, found.path, found.headers) == ("POST", "/x", {"host": "h"})


ODD_REQUESTS = {
    "no method": head(1, *POST[1:], flags=END),
    "no path": head(1, *POST[:2], POST[3], flags=END),
    "an empty path": head(1, *POST[:2], (":path", ""), flags=END),
    "two paths": head(1, *POST, (":path", "/"), flags=END),
    "a status": head(1, *POST, (":status", "200"), flags=END),
    "a pseudo field behind others": head(1, *POST[1:], ("x", "y"), POST[0], flags=END),
    "upper case": head(1, *POST, ("X", "y"), flags=END),
    "a connection's field": head(1, *POST, ("transfer-encoding", "chunked"), flags=END),
    "te that is no trailers": head(1, *POST, ("te", "gzip"), flags=END),
    "another length": head(1, *POST, ("content-length", "2")) + frames.frame(frames.DATA, END, 1, b"x"),
    "a length that is none": head(1, *POST, ("content-length", "-1"), flags=END),
    "trailers that go on": head(1, *POST) + head(1, ("x", "y")),
    "trailers with a path": head(1, *POST) + head(1, (":path", "/"), flags=END),
    "too many fields": head(1, *POST, *[("a", "b")] * 200, flags=END),
    "a window that grows by nothing": head(1, *POST) + frames.word(frames.WINDOW_UPDATE, 1, 0),
    "DATA behind the end": head(1, *POST, flags=END) + frames.frame(frames.DATA, END, 1, b"x"),
}


@pytest.mark.parametrize("data", ODD_REQUESTS.values(), ids=ODD_REQUESTS)
def test_a_malformed_request_is_reset_and_the_others_go_on(data):
    server = greeted()
    server.receive(data, 0.0)
    assert frames.word(frames.RST_STREAM, 1, 0)[:9] in taken(server) and not server.over
    [found] = server.receive(head(3, *POST, flags=END), 0.0)
    assert found.stream == 3


def test_more_streams_than_allowed_are_refused_one_by_one():
    server = greeted(streams=3)
    found = [request for stream in (1, 3, 5, 7) for request in server.receive(head(stream, *POST, flags=END), 0.0)]
    assert len(found) == 3 and frames.word(frames.RST_STREAM, 7, Code.REFUSED_STREAM) in taken(server)


@pytest.mark.parametrize(
    "name",
    [
        *("a frame that is too long", "an even stream", "33 SETTINGS", "an endless block", "a huge block", "no HPACK"),
        *("a flood of PINGs", "a flood of SETTINGS", "a flood of unknown frames", "something between a block's frames"),
    ],
)
def test_a_client_that_breaks_the_rules_is_left(name):
    data, code = FAULTS[name]
    server = greeted()
    server.receive(data, 0.0)
    assert server.over and code.to_bytes(4) in taken(server)
    assert server.receive(head(1, *POST, flags=END), 0.0) == []


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", frames.PREFACE + head(1, *POST), frames.PREFACE + b"x" * 99]
)
def test_who_does_not_greet_is_left(data):
    server = Server(0.0, 1 << 20)
    server.receive(data, 0.0)
    assert server.over


def test_rapid_resets_are_counted_whoever_makes_them():
    """CVE-2023-44487, and CVE-2025-8671, where the client has us reset them."""
    for provoke in (frames.RST_STREAM, frames.WINDOW_UPDATE):
        server = greeted()
        for number in range(RESETS + 1):
            assert not server.over
            stream = 2 * number + 1
            server.receive(head(stream, *POST) + frames.word(provoke, stream, 0), 0.0)
        assert server.over and Code.ENHANCE_YOUR_CALM.to_bytes(4) in taken(server)


def test_silence_and_answers_that_nobody_takes_end_a_connection():
    server = greeted()
    server.receive(frames.frame(frames.SETTINGS, frames.ACK, 0), 0.0)
    server.tick(IDLE_LIMIT - 1)
    assert not server.over
    server.tick(IDLE_LIMIT + 1)
    assert server.over and b"session_timed_out" in server.out
    server = greeted()
    server.receive(frames.settings({4: 0}) + frames.frame(frames.SETTINGS, frames.ACK, 0), 0.0)
    server.receive(head(1, *POST, flags=END), 0.0)
    server.answer(1, 200, [], b"x")
    server.tick(STUCK_LIMIT - 1)
    assert not server.over
    server.tick(STUCK_LIMIT + 1)
    assert server.over
    mute = Server(0.0, 1 << 20)
    mute.tick(11.0)
    assert mute.over


def test_a_goaway_lets_finish_what_it_covers():
    server = greeted()
    server.receive(head(1, *POST, flags=END) + head(3, *POST, flags=END), 0.0)
    server.leave(1, Code.NO_ERROR, "server_shutting_down")
    assert server.open == 1 and not server.over
    # What was on its way is not looked at, and no fault.
    assert (
        server.receive(head(5, *POST) + frames.frame(frames.DATA, END, 5, b"x") + head(7, *POST, flags=END), 0.0) == []
    )
    server.answer(1, 200, [], b"ok")
    assert server.over and b"ok" in server.out


def test_a_head_longer_than_a_frame_goes_in_several():
    block = Encoder().encode([("x", "".join(chr(33 + n % 90) for n in range(40_000)))])
    reader = frames.FrameReader()
    [found] = reader.feed(frames.headers(1, block, END))
    assert found.payload == block and found.flags & END
