"""places and pool: where the next request goes, and what is dialled. Connections are stand-ins: these decide only."""

import pytest

from gocm_lib.http2.client import MOST_STREAMS, Again
from gocm_lib.http2.frames import Code
from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import Verdict
from gocm_lib.senders import places as module
from gocm_lib.senders.connection import Http1Channel, Request, RequestHead, WireError
from gocm_lib.senders.places import BLAMED_OLD, HTTP2_DIALLERS, IDLE_LIMIT, LAST_IDLE_LIMIT, OLD, Places
from gocm_lib.senders.pool import STARVED, TRIES, Flight, Pool
from gocm_lib.senders.streams import Http2Channel

pytestmark = pytest.mark.short


class Streaming(Http2Channel):
    """A connection of HTTP/2 with as many places as a test says."""

    def __init__(self, streams=MOST_STREAMS, narrow=65_535):
        self.streams, self.narrow, self.begun, self.is_over = streams, narrow, 0, False
        self.client = self
        self.exchanges, self.leaves = 0, False

    open = property(lambda self: self.begun)
    over = property(lambda self: self.is_over)

    def room(self):
        return max(0, self.streams - self.begun)

    def takes(self, size):
        return self.room() > 0 and size <= self.narrow


class Single(Http1Channel):
    """A connection of HTTP/1.1."""

    def __init__(self):
        self.begun, self.over, self.exchanges, self.turned_away = 0, False, 0, False

    open = property(lambda self: self.begun)

    def takes(self, size):
        return not self.begun


def connect(places, channel, now=0.0):
    places._dialling += 1
    places.dialled(channel, now)
    return channel


def fill(places, count, size=100, now=0.0):
    """Begin this many requests; returns how many found a place."""
    places.begin_turn()
    for number in range(count):
        channel = places.find(size, False, now)
        if channel is None:
            return number
        places.take(channel)
        channel.begun += 1
    return count


def end(places, channel, count=1, now=0.0):
    for _ in range(count):
        channel.begun -= 1
        places.give(channel, now)


def test_one_connection_is_filled_before_the_next():
    places = Places(1000, True)
    channels = [connect(places, Streaming()) for _ in range(3)]
    assert fill(places, 250) == 250
    assert [channel.begun for channel in channels] == [100, 100, 50]
    end(places, channels[0], 30)
    assert fill(places, 40) == 40
    assert [channel.begun for channel in channels] == [100, 100, 60]


def test_no_more_are_in_flight_than_allowed():
    places = Places(130, True)
    connect(places, Streaming())
    connect(places, Streaming())
    assert fill(places, 200) == 130 == places.in_flight


def test_the_first_dial_tells_what_is_spoken_and_only_then_the_others_follow():
    places = Places(1000, True)
    assert places.dials_wanted(950, 0, 0.0) == 1
    assert places.dials_wanted(950, 0, 0.0) == 0, "a hundred dials would be for one need"
    places.dialled(Streaming(), 0.0)
    assert places.dials_wanted(950, 0, 0.0) == HTTP2_DIALLERS
    old = Places(1000, True)
    assert old.dials_wanted(950, 0, 0.0) == 1
    old.dialled(Single(), 0.0)
    assert old.dials_wanted(950, 0, 0.0) == module.DIALLERS


def test_as_many_connections_are_dialled_as_hold_the_requests():
    places = Places(1000, True)
    connect(places, Streaming())
    for waiting, wanted in ((100, 0), (101, 1), (200, 1), (201, 2), (900, 2)):
        fresh = Places(1000, True)
        connect(fresh, Streaming())
        assert fresh.dials_wanted(waiting, 0, 0.0) == wanted, waiting
    assert places.dials_wanted(0, 3, 0.0) == 1, "requests that must go on a fresh one"
    full = Places(1000, True)
    for _ in range(11):
        connect(full, Streaming(streams=0))
    assert full.dials_wanted(500, 0, 0.0) == HTTP2_DIALLERS, "of one place each, then"
    full.dialled(Streaming(streams=0), 0.0)
    full.dialled(Streaming(streams=0), 0.0)
    for _ in range(8):
        connect(full, Streaming(streams=0))
    assert full.dials_wanted(500, 0, 0.0) == 0, "not without an end"
    few = Places(300, True)
    for _ in range(4):
        connect(few, Streaming()).begun = 100
    assert few.dials_wanted(300, 0, 0.0) == 0, "one more than needed, at most"


def test_connections_that_leave_take_no_other_s_place():
    places = Places(20, True)
    for _ in range(2):
        connect(places, Streaming(streams=0)).leaves = True
    assert places.dials_wanted(3, 0, 0.0) == 1


def test_calm_is_kept_when_asked_for_and_ends_slowly():
    places = Places(1000, True)
    connect(places, Streaming())
    now = 0.0
    for wait, streams in ((1.0, 50), (2.0, 25), (4.0, 12)):
        for _ in range(5):  # connections that end together
            places.told(Code.ENHANCE_YOUR_CALM, now)
        assert places._dial_after == now + wait and places._streams == streams
        now = places._dial_after
    for _ in range(10):
        places.told(Code.ENHANCE_YOUR_CALM, now)
        now = places._dial_after
    assert now - module.CALMEST < now and places._streams == 1
    assert fill(places, 10) == 1
    places.told(Code.ENHANCE_YOUR_CALM, now)
    assert places.dials_wanted(10, 0, now + 59.0) == 0 and places.dials_wanted(10, 0, now + 61.0) > 0
    for _ in range(7):
        places.works(Streaming(), now + 100.0)
    assert places._streams == MOST_STREAMS


def test_a_second_connection_that_ends_by_our_fault_means_http1():
    places = Places(1000, True)
    places.told(Code.PROTOCOL_ERROR, 0.0)
    assert places.offers_http2(1.0)
    places.told(Code.COMPRESSION_ERROR, module.BLAMED + 1)
    assert places.offers_http2(module.BLAMED + 2), "long after the first"
    places.told(Code.PROTOCOL_ERROR, module.BLAMED + 3)
    assert not places.offers_http2(module.BLAMED + 2 + BLAMED_OLD)
    assert places.offers_http2(module.BLAMED + 4 + BLAMED_OLD)
    for code in (Code.NO_ERROR, Code.INTERNAL_ERROR, Code.ENHANCE_YOUR_CALM):
        quiet = Places(1000, True)
        quiet.told(code, 0.0)
        quiet.told(code, 1.0)
        assert quiet.offers_http2(2.0)


def test_while_http1_is_spoken_streams_are_left_alone():
    places = Places(1000, True)
    streaming, single = connect(places, Streaming()), connect(places, Single())
    assert fill(places, 1) and (streaming.begun, single.begun) == (1, 0)
    places.speak_http1(OLD)
    assert fill(places, 2, now=1.0) == 1 and (streaming.begun, single.begun) == (1, 1)
    assert places.dials_wanted(5, 0, 1.0) == 5


def test_a_request_larger_than_the_window_will_ever_be_goes_by_http1():
    places = Places(1000, True)
    connect(places, Streaming(narrow=50))
    assert fill(places, 1, size=51, now=1.0) == 0 and not places.offers_http2(2.0)


def test_the_last_connection_of_http2_is_kept_longer():
    places = Places(1000, True)
    first, second = connect(places, Streaming()), connect(places, Streaming())
    assert places.idle_too_long(IDLE_LIMIT) == [first, second] or places.idle_too_long(IDLE_LIMIT) == [first, second]
    places.lost(second, IDLE_LIMIT)
    assert places.idle_too_long(LAST_IDLE_LIMIT - 1) == []
    assert places.next_moment(0, 0.0) == LAST_IDLE_LIMIT
    assert places.idle_too_long(LAST_IDLE_LIMIT) == [first]


class UpstreamOfHttp2:
    http2 = True


def flight(job=1):
    part = Slice("fcm", "token", "{}", [Run(job, 0, 1, ("t",))], 0, "a")
    return Flight(part, Request(RequestHead(b"", ()), b"{}"))


def lost(again, old=False):
    return WireError("x", again=again, old=old)


def test_what_was_not_looked_at_goes_first_again_but_not_for_ever():
    pool = Pool(UpstreamOfHttp2(), 100)
    first, other = flight(), flight(2)
    pool.add([other])
    for _ in range(TRIES):
        assert pool.again(first, None, lost(Again.FREELY), 0.0)
        assert pool._waiting.popleft() is first
    assert not pool.again(first, None, lost(Again.FREELY), 0.0)
    assert list(pool._waiting) == [other]


def test_what_was_most_likely_not_looked_at_goes_once_more_on_a_fresh_connection():
    pool = Pool(UpstreamOfHttp2(), 100)
    flights = [flight() for _ in range(3)]
    channel = Streaming()
    assert all(pool.again(each, channel, lost(Again.ONCE), 0.0) for each in flights)
    assert len(pool) == 0 and pool.dials_wanted(0.0) == 1
    assert list(pool.dialled(Streaming(), 0.0, True)) == [], "it is finishing"
    fresh, begun = Streaming(streams=2), []
    for each in pool.dialled(fresh, 0.0, False):
        fresh.begun += 1
        begun.append(each)
    assert begun == flights[:2], "no more than it takes"
    assert not pool.again(flights[0], channel, lost(Again.ONCE), 0.0), "only once"
    assert not pool.again(flight(), channel, lost(Again.NO), 0.0)


def test_one_that_lets_us_begin_nothing_is_away():
    pool = Pool(UpstreamOfHttp2(), 100)
    pool.add([flight()])
    connect(pool.places, Streaming(streams=0))
    pool.places._dial_after = 1e9
    assert pool.starved(0.0) == [] and pool.starved(STARVED - 1) == []
    assert pool.next_moment(0.0) == STARVED
    assert len(pool.starved(STARVED)) == 1
    assert pool.refusal(STARVED).verdict is Verdict.UNREACHABLE
    pool.add([flight()])
    assert pool.starved(100.0) == [] and pool.starved(100.0 + STARVED - 1) == [], "it begins anew"
