"""Places: an upstream's connections in one sender, and where on them the next request goes. No I/O, no clock.

A connection of HTTP/1.1 has one place; one of HTTP/2 as many as the upstream allows, a hundred at most. Of those the
oldest is filled first, then the next: the more answers come at once, the less each of them costs. Spread evenly they
cost two to four times as much. All times are monotonic.
"""

from gocm_lib.http2.client import MOST_STREAMS, OUR_FAULT
from gocm_lib.http2.frames import Code
from gocm_lib.senders.connection import Http1Channel
from gocm_lib.senders.streams import Channel, Http2Channel
from gocm_lib.senders.width import Width

DIALLERS = 16  # dials under way at once; each has a thread
HTTP2_DIALLERS = 2  # each gives a hundred places
IDLE_LIMIT = 30.0  # seconds; we close an idle connection before the upstream does, mostly
LAST_IDLE_LIMIT = 120.0  # seconds, of the last one that speaks HTTP/2; Google closes it after three minutes
DIAL_REST = 0.25  # seconds without dialling after a failure
CALMEST = 60.0  # seconds without dialling at most, where the upstream told us to be calm
BLAMED = 600.0  # seconds within which the upstream ends a second connection by what it calls our fault
OLD, BLAMED_OLD = 600.0, 3600.0  # seconds for which HTTP/1.1 is spoken then, where HTTP/2 does not work
NEVER = float("-inf")


class Places:
    """For the loop's thread only."""

    def __init__(self, most: int, http2: bool) -> None:
        """At most `most` requests in flight; with `http2` it is offered to the upstream."""
        self.most = most
        self.width = Width(most)
        self.in_flight = 0
        self._http2 = http2
        self._spoken = "" if http2 else Http1Channel.protocol  # by the last connection; "": nobody knows yet
        self._streams = MOST_STREAMS  # that we open on a connection
        self._all: dict[Channel, None] = {}
        self._streaming: list[Http2Channel] = []  # the oldest first
        self._at = 0  # in this turn those before it have no room
        self._idle: dict[Channel, float] = {}  # since when; the longest first, the newest is used first
        self._answered: set[Channel] = set()  # connections that have brought an answer
        self._dialling = 0
        self._dial_after = 0.0  # after a failure to connect, so as not to dial again in a tight loop
        self._calm = 0.0  # seconds for which not to dial when the upstream tells us to be calm
        self._blamed_at = NEVER
        self._old_until = NEVER

    @property
    def connected(self) -> int:
        """How many connections there are."""
        return len(self._all)

    @property
    def dialling(self) -> bool:
        """Whether a connection is being made."""
        return self._dialling > 0

    def offers_http2(self, now: float) -> bool:
        """Whether HTTP/2 is offered to the upstream now."""
        return self._http2 and now >= self._old_until

    # ------------------------------------------------------------------------------------------------ where requests go

    def begin_turn(self) -> None:
        """Answers may have made room."""
        self._at = 0

    def find(self, size: int, repeated: bool, now: float) -> Channel | None:
        """The connection for a request whose body has `size` bytes. `repeated`: it was sent before."""
        if self.in_flight >= self.most:
            return None
        if self._streaming and self.offers_http2(now):
            while self._at < len(self._streaming):
                channel = self._streaming[self._at]
                if self.fits(channel, size):
                    return channel
                if size > channel.client.narrow:  # nor will it ever: its settings leave too little room
                    self._old_until = now + OLD
                self._at += 1
        return self._find_http1(repeated)

    def fits(self, channel: Channel, size: int) -> bool:
        """Whether a request whose body has `size` bytes can go on this connection."""
        return self.in_flight < self.most and channel.open < self._streams and channel.takes(size)

    def _find_http1(self, repeated: bool) -> Channel | None:
        """The newest idle connection. When the path turns away new connections, one that has worked; and for a request
        that was turned away before, only such a one, if any is left.
        """
        idle = (
            [channel for channel in self._idle if isinstance(channel, Http1Channel)] if self._streaming else self._idle
        )
        newest = next(reversed(idle), None)
        if newest is None or not self.width.is_narrow:
            return newest
        works = next((channel for channel in idle if channel in self._answered), None)
        if works is None and not (repeated and self.connected > len(self._idle)):
            return newest
        return works

    def take(self, channel: Channel) -> None:
        """A request goes on this connection."""
        self._idle.pop(channel, None)
        self.in_flight += 1

    def give(self, channel: Channel, now: float) -> None:
        """A request on this connection has ended."""
        self.in_flight -= 1
        if not channel.open and not channel.over:
            self._idle[channel] = now

    # ------------------------------------------------------------------------------------------------------ connections

    def dials_wanted(self, waiting: int, fresh: int, now: float) -> int:
        """How many connections to dial now, for requests that wait, of which some need a `fresh` one. They are counted
        as being dialled.
        """
        need = min(waiting, self.most - self.in_flight) + fresh
        if now < self._dial_after or need <= 0:
            return 0
        there = self.connected + self._dialling
        if self.offers_http2(now) and self._spoken != Http1Channel.protocol:
            wanted = self._http2_dials_wanted(need, fresh, there)
        else:
            # No more than there are threads: a dial that queued for one would connect after the need has passed.
            wanted = min(need, DIALLERS) - self._dialling
        if wanted <= 0:
            return 0
        wanted = max(0, min(wanted, self.width.allowed(there, now) - there))
        self._dialling += wanted
        return wanted

    def _http2_dials_wanted(self, need: int, fresh: int, there: int) -> int:
        if not self._spoken:
            return 1 - self._dialling  # whether it has one place or a hundred is seen then
        # Connections that finish what they have, and take nothing more, count for nothing.
        stay = [channel for channel in self._streaming if not channel.client.leaves]
        there -= len(self._streaming) - len(stay)
        each = max(1, min([self._streams, *[channel.client.streams for channel in stay]]))
        room = sum([min(self._streams - channel.open, channel.client.room()) for channel in stay])
        short = need - max(0, room) - self._dialling * each
        wanted = max(-(-short // each), 1 if fresh and not self._dialling else 0)
        # One more than are needed at most, which takes the place of one that retires; and where fewer streams are
        # allowed than Google allows, twice as many.
        most = min(-(-self.most // each), 2 * -(-self.most // MOST_STREAMS)) + 1
        return min(wanted, HTTP2_DIALLERS - self._dialling, most - there)

    def dialled(self, channel: Channel, now: float) -> None:
        """A connection was made."""
        self._dialling -= 1
        self._all[channel] = None
        self._idle[channel] = now
        self._spoken = channel.protocol
        if isinstance(channel, Http2Channel):
            self._streaming.append(channel)

    def dial_failed(self, now: float) -> None:
        """A connection could not be made."""
        self._dialling -= 1
        self._dial_after = now + DIAL_REST
        self.width.note(False, self.connected, now)

    def works(self, channel: Channel, now: float) -> None:
        """A connection has brought an answer."""
        if channel not in self._answered:
            self._answered.add(channel)
            self.width.note(True, self.connected, now)
            if channel.protocol == Http2Channel.protocol:
                self._streams, self._calm = min(MOST_STREAMS, 2 * self._streams), self._calm / 2

    def is_ours(self, channel: Channel) -> bool:
        """Whether a connection is one of these."""
        return channel in self._all

    def lost(self, channel: Channel, now: float) -> None:
        """A connection was closed."""
        del self._all[channel]
        self._idle.pop(channel, None)
        self._answered.discard(channel)
        if isinstance(channel, Http2Channel):
            self._streaming.remove(channel)
        if channel.turned_away:
            self.width.note(False, self.connected, now)

    def told(self, code: int, now: float) -> None:
        """The upstream has ended a connection with this code of HTTP/2."""
        if code == Code.ENHANCE_YOUR_CALM and now < self._dial_after:
            pass  # we are calm already: several connections have ended together
        elif code == Code.ENHANCE_YOUR_CALM:
            self._streams = max(1, self._streams // 2)
            self._calm = min(CALMEST, max(1.0, 2 * self._calm))
            self._dial_after = now + self._calm
        elif code in OUR_FAULT:
            if now - self._blamed_at < BLAMED:
                self.speak_http1(now + BLAMED_OLD)
            self._blamed_at = now

    def speak_http1(self, until: float) -> None:
        """Offer HTTP/2 no more, for a while."""
        self._old_until = max(self._old_until, until)

    def idle_too_long(self, now: float) -> list[Channel]:
        """The connections to close now."""
        return [channel for channel, since in self._idle.items() if since + self._idle_limit(channel) <= now]

    def _idle_limit(self, channel: Channel) -> float:
        return LAST_IDLE_LIMIT if self._streaming == [channel] else IDLE_LIMIT

    def next_moment(self, waiting: int, now: float) -> float:
        """When there is something to do, unless something happens before."""
        found = [since + self._idle_limit(channel) for channel, since in self._idle.items()] if self._idle else []
        # A dial_after in the past asks for nothing: those requests wait for a connection, whose event wakes the loop.
        if waiting and self._dial_after > now:
            found.append(self._dial_after)
        return min(found, default=float("inf"))

    def streams(self) -> list[Http2Channel]:
        """The connections that time does something to: those with something open."""
        return [channel for channel in self._streaming if channel.open]
