"""Who is connected, and who must give way when all places are taken. Module connection has the sockets.

A place costs memory and an open file, and clients that connect and say nothing must not keep others out. The rule is
`leaving_order`, which is pure. Connections that are being served never give way. Of the others, those go first that
were never admitted (no valid token, or nothing asked yet), then idle ones; among these, one of the address with the
most places, the one that has waited longest. A connection with an unread request does not give way: its client would
send the request again, and the message might be sent twice. Exempt from that are clients that keep asking only what
everybody may ask: together they are answered STRANGERS times a second. When all places are being served, a reserve is
left for probes and local sockets, and half of it for addresses that have few places.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from gocm_lib.front.auth import EVERYBODY, Grant
from gocm_lib.process import log

RESERVE = 16  # places, but an eighth of all at most
FEW = 8  # an address has few places if it has less than this part of all
STRANGERS = 200  # requests a second of those who ask on, together
REMEMBERED = 1.0  # seconds for which an order of leaving is good: to find one takes long when there are thousands;
FRESH = 16  # strangers may be too new to be in it, before anybody leaves who was admitted
SMALL = 64 * 1024  # bytes: what a body or an answer may have without being counted
STEP = 256 * 1024  # bytes of a larger body for which room is taken at once
BODIES, ANSWERS = 32 * 1024 * 1024, 64 * 1024 * 1024  # bytes of larger ones that are in work together
TOLD_EVERY = 60.0  # seconds between two lines of the log about the same


class Asker(NamedTuple):
    """The client behind a request: its address ("" on a UNIX socket), what its token is good for, and whether it came
    under Google's name.
    """

    address: str
    grant: Grant = EVERYBODY
    by_google: bool = False

    @property
    def name(self) -> str:
        """The name of its token; "": it has none."""
        return self.grant.name

    @property
    def is_local(self) -> bool:
        """Whether the client came by a UNIX socket: the file's mode says who may, and no browser can."""
        return not self.address

    def __str__(self) -> str:
        return f"{self.address or 'local'}{self.name and f' ({self.name})'}"


class Line(Protocol):
    """A connection, as the gate needs it."""

    def close(self) -> None:
        """End it: its place is another's."""

    def has_unread(self) -> bool:
        """Whether bytes have come that were not read yet."""


class Place:
    """The place of a connection, and what is known of it. The loop's thread changes it; others may read it."""

    __slots__ = ("peer", "line", "since", "admitted", "working", "busy", "served", "probes_only")

    def __init__(self, peer: str, line: Line, now: float, probes_only: bool = False) -> None:
        self.peer = peer  # its address, "" on a UNIX socket
        self.line = line
        self.since = now  # when it was connected, or last answered
        self.admitted = False  # it has asked for something that not everybody may
        self.working = False  # an admitted request is being read, or any is being answered
        self.busy = False  # something of a request has come that is not answered yet
        self.served = 0  # requests answered
        self.probes_only = probes_only  # it is of what is kept for probes

    @property
    def asks_on(self) -> bool:
        """Whether it has been answered, but never asked for more than everybody may."""
        return self.served > 0 and not self.admitted

    def is_busy(self, waiting: bool) -> bool:
        """Whether a request is being read or answered; with `waiting` also whether the first one may still come."""
        return self.busy or (waiting and not self.served)


def leaving_order(places: Iterable[Place], shares: Counter[str]) -> list[Place]:
    """Places that may give way to new connections, who goes first first. `shares`: places by address."""
    waiting = [place for place in places if not place.working]
    return sorted(waiting, key=lambda place: (place.admitted, -shares[place.peer], place.since))


def gives_way(place: Place) -> bool:
    """Whether a place may be given to another connection now."""
    return not place.working and (place.asks_on or not place.line.has_unread())


class Notice:
    """One log line per minute for an event that may happen often: how often it happened, and to whom most."""

    def __init__(self, text: str) -> None:
        """`text` has a place for the count, and one for the most frequent client and its count."""
        self._text = text
        self._counts: Counter[str] = Counter()
        self._told_at = -TOLD_EVERY
        self._lock = threading.Lock()

    def note(self, who: str, now: float) -> str | None:
        """Count the event for a client. Returns the line, if one is due."""
        with self._lock:
            self._counts[who] += 1
            # Kept small, whoever comes from a million addresses: what is left are those that come often.
            if len(self._counts) > 2000:
                self._counts = Counter(dict(self._counts.most_common(1000)))
            if now - self._told_at < TOLD_EVERY:
                return None
            self._told_at = now
            [(most, often)] = self._counts.most_common(1)
            total = self._counts.total()
            self._counts.clear()
        return self._text % (total, f"{often} of {Asker(most)}")


class Budget:
    """Bytes that many requests may have in work together. For the loop's thread only.

    An address may hold as much as it leaves free: alone half of everything, two addresses a third each. So no address
    can take everything, and nobody needs to know beforehand how many addresses there are.
    """

    def __init__(self, most: int) -> None:
        """`most` bytes in all."""
        self.largest = most // 2  # what is larger counts as this
        self._left = most
        self._held: Counter[str] = Counter()  # by address

    def take(self, size: int, address: str) -> int | None:
        """Take this many bytes, at most `largest`. Returns how many to give back; None: there is no room."""
        size = min(size, self.largest)
        if self._held[address] + size > self._left - size:
            return None
        self._left -= size
        self._held[address] += size
        return size

    def give_back(self, size: int, address: str) -> None:
        """These bytes are no longer in work."""
        self._left += size
        self._held[address] -= size
        if not self._held[address]:
            del self._held[address]


class BodyRoom:
    """What a request's body takes of the budget of all bodies."""

    def __init__(self, budget: Budget, address: str) -> None:
        self._budget = budget
        self._address = address
        self._held = 0

    def hold(self, size: int) -> bool:
        """Take room for what has come of a body, so many bytes. False: others hold all of it."""
        if size <= max(self._held, SMALL) or self._held >= self._budget.largest:
            return True
        wanted = min(max(size - self._held, STEP), self._budget.largest - self._held)
        more = self._budget.take(wanted, self._address)
        self._held += more or 0
        return more is not None

    def give_back(self) -> None:
        """The body is no longer in work."""
        if self._held:
            self._budget.give_back(self._held, self._address)
            self._held = 0


class Gate:
    """The connections of all listeners, at most `most`. For the loop's thread, but for `all`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = most - min(RESERVE, most // 8)  # but the reserve
        self.places: set[Place] = set()
        self.closing = False
        self.bodies = Budget(BODIES)
        self.answers = Budget(ANSWERS)
        self._shares: Counter[str] = Counter()
        self._asking: set[Place] = set()  # those who ask on
        self._strangers = 0  # places that were never admitted
        self._order: deque[Place] = deque()  # who leaves next,
        self._ordered_at = float("-inf")  # as it was at this time
        self._lock = threading.Lock()
        self._crowded = Notice(f"all {most} connections are taken: %d gave way or were turned away, %s")
        self._refused = Notice("no good token: refused %d requests, %s")

    def take(self, peer: str, line: Line, now: float) -> Place | None:
        """A place for a new connection; None: there is none."""
        with self._lock:
            place, leaves = self._take(peer, line, now)
        if leaves:
            leaves.line.close()
        if leaves or place is None:
            self._tell(self._crowded.note(leaves.peer if leaves else peer, now))
        return place

    def is_crowded(self, more: int) -> bool:
        """Whether so many more connections would make others give way, or find no place."""
        return len(self.places) + more > self.open

    def _take(self, peer: str, line: Line, now: float) -> tuple[Place | None, Place | None]:
        leaves = None
        if len(self.places) >= self.open:
            leaves = self._next_to_leave(now)
        if leaves:
            self._unseat(leaves)
        if len(self.places) >= self.most:
            return None, leaves
        return self._seat(Place(peer, line, now, self._is_for_probes(peer))), leaves

    def _next_to_leave(self, now: float) -> Place | None:
        for _ in range(2):
            while self._order and now < self._ordered_at + REMEMBERED:
                place = self._order.popleft()
                if place.admitted and now > self._ordered_at and self._strangers > FRESH:
                    break  # those who came since go before it
                if place in self.places and place.since <= self._ordered_at and gives_way(place):
                    return place
            self._order, self._ordered_at = deque(leaving_order(self.places, self._shares)), now
        return None

    def _is_for_probes(self, peer: str) -> bool:
        """Whether the only place left for this address is for a probe."""
        if not peer or len(self.places) < self.open:
            return False
        served = sum(not place.probes_only for place in self.places)
        has_few = self._shares[peer] * FEW < self.open
        return not (has_few and served < (self.open + self.most) // 2)

    def _seat(self, place: Place) -> Place:
        self.places.add(place)
        self._strangers += 1
        self._shares[place.peer] += 1
        return place

    def _unseat(self, place: Place) -> None:
        self.places.discard(place)
        self._strangers -= not place.admitted
        self._asking.discard(place)
        self._shares[place.peer] -= 1
        if not self._shares[place.peer]:
            del self._shares[place.peer]

    def leave(self, place: Place) -> None:
        """A connection has ended."""
        with self._lock:
            if place in self.places:
                self._unseat(place)

    def begin(self, place: Place) -> bool:
        """A request is in work from now on. False: its place was given away, and nobody would hear the answer."""
        if place.working:
            return True  # and so its place is not given away
        place.working = place in self.places
        return place.working

    def admit(self, place: Place) -> None:
        """It has asked for something that not everybody may."""
        if not place.admitted and place in self.places:
            self._strangers -= 1
        place.admitted = True
        self._asking.discard(place)

    def answered(self, place: Place, busy: bool, now: float) -> None:
        """A request was answered. `busy`: something of the next one is here already."""
        place.served += 1
        place.busy, place.since, place.working = busy, now, False
        if place.asks_on and place in self.places:
            self._asking.add(place)

    def strangers_pause(self) -> float:
        """Seconds until a client that keeps asking is heard again."""
        return len(self._asking) / STRANGERS

    def refused(self, peer: str) -> None:
        """A client gave no valid token."""
        self._tell(self._refused.note(peer, time.monotonic()))

    def _tell(self, line: str | None) -> None:
        if line:
            log.logger.warning("%s; see gocm help security", line)

    def all(self) -> Sequence[Place]:
        """All connections."""
        with self._lock:
            return list(self.places)
