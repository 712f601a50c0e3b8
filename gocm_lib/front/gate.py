"""Who is connected, and who must give way when all places are taken. Module server has the sockets.

A place costs a thread, so there are few, and clients that connect and say nothing must not keep others out. The rule is
`gives_way`, which is pure. Connections that are being served never give way. Of the others, those go first that were
never admitted (no valid token, or nothing asked yet), then idle ones; among these, one of the address with the most
places, the one that has waited longest. A connection with an unread request does not give way: its client would send
the request again, and the message might be sent twice. Exempt from that are clients that keep asking only what
everybody may ask: together they are answered STRANGERS times a second. When all places are being served, a reserve is
left for probes and local sockets, and half of it for addresses that have few places.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from gocm_lib.process import log

RESERVE = 16  # places, but an eighth of all at most
FEW = 8  # an address has few places if it has less than this part of all
LEAVING = 16  # connections that gave way and whose threads have not noticed yet
STRANGERS = 200  # requests a second of those who ask on, together: each is a thread that the interpreter must run
SMALL = 64 * 1024  # bytes: what a body or an answer may have without being counted
BODIES, ANSWERS = 32 * 1024 * 1024, 64 * 1024 * 1024  # bytes of larger ones that are in work together
PATIENCE = 1.0  # seconds that a body waits for room. An answer waits no time: it is there already, and takes memory
TOLD_EVERY = 60.0  # seconds between two lines of the log about the same


class Asker(NamedTuple):
    """The client behind a request: its address ("" on a UNIX socket). When tokens get names, the name will be here."""

    address: str

    @property
    def is_local(self) -> bool:
        """Whether the client came by a UNIX socket: the file's mode says who may, and no browser can."""
        return not self.address

    def __str__(self) -> str:
        return self.address or "local"


class Line(Protocol):
    """A connection, as other threads than its own may use it."""

    def hang_up(self) -> None:
        """End it."""

    def has_unread(self) -> bool:
        """Whether bytes have come that the connection's thread has not read yet."""


class Place:
    """The place of a connection, and what is known of it. Its own thread changes it; others read it to find one that
    gives way.
    """

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


def gives_way(places: Iterable[Place], shares: Counter[str]) -> Place | None:
    """The place that gives way to a new connection; None when all are being served. `shares`: places by address."""
    # Each is looked at once: its own thread may change it meanwhile.
    waiting = [(place.admitted, -shares[place.peer], place.since, place) for place in places if not place.working]
    waiting.sort(key=lambda row: row[:3])
    return next((place for *_, place in waiting if place.asks_on or not place.line.has_unread()), None)


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
    """Bytes that many requests may have in work together.

    An address may hold as much as it leaves free: alone half of everything, two addresses a third each. So no address
    can take everything, and nobody needs to know beforehand how many addresses there are.
    """

    def __init__(self, most: int, patience: float) -> None:
        """`most` bytes in all. A request that finds no room waits for `patience` seconds."""
        self.largest = most // 2  # what is larger counts as this
        self._patience = patience
        self._left = most
        self._held: Counter[str] = Counter()  # by address
        self._changed = threading.Condition()

    def take(self, size: int, address: str) -> int | None:
        """Take this many bytes, at most `largest`. Returns how many to give back; None: there was no room."""
        size = min(size, self.largest)
        with self._changed:
            if not self._changed.wait_for(lambda: self._held[address] + size <= self._left - size, self._patience):
                return None
            self._left -= size
            self._held[address] += size
        return size

    def give_back(self, size: int, address: str) -> None:
        """These bytes are no longer in work."""
        with self._changed:
            self._left += size
            self._held[address] -= size
            if not self._held[address]:
                del self._held[address]
            self._changed.notify_all()


class Gate:
    """The connections of all listeners, at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = most - min(RESERVE, most // 8)  # but the reserve
        self.places: set[Place] = set()
        self.closing = False
        self.bodies = Budget(BODIES, PATIENCE)
        self.answers = Budget(ANSWERS, 0.0)
        self._shares: Counter[str] = Counter()
        self._leaving = 0
        self._lock = threading.Lock()
        self._crowded = Notice(f"all {most} connections are taken: %d gave way or were turned away, %s")
        self._refused = Notice("no good token: refused %d requests, %s")

    def take(self, peer: str, line: Line, now: float) -> Place | None:
        """A place for a new connection; None: there is none."""
        with self._lock:
            place, leaves = self._take(peer, line, now)
        if leaves:
            leaves.line.hang_up()
        if leaves or place is None:
            self._tell(self._crowded.note(leaves.peer if leaves else peer, now))
        return place

    def _take(self, peer: str, line: Line, now: float) -> tuple[Place | None, Place | None]:
        leaves = None
        if len(self.places) >= self.open and self._leaving < LEAVING:
            leaves = gives_way(self.places, self._shares)
        if leaves:
            self._unseat(leaves)
            self._leaving += 1
        if len(self.places) >= self.most:
            return None, leaves
        return self._seat(Place(peer, line, now, self._is_for_probes(peer))), leaves

    def _is_for_probes(self, peer: str) -> bool:
        """Whether the only place left for this address is for a probe."""
        if not peer or len(self.places) < self.open:
            return False
        served = sum(not place.probes_only for place in self.places)
        has_few = self._shares[peer] * FEW < self.open
        return not (has_few and served < (self.open + self.most) // 2)

    def _seat(self, place: Place) -> Place:
        self.places.add(place)
        self._shares[place.peer] += 1
        return place

    def _unseat(self, place: Place) -> None:
        self.places.discard(place)
        self._shares[place.peer] -= 1
        if not self._shares[place.peer]:
            del self._shares[place.peer]

    def leave(self, place: Place) -> None:
        """A connection has ended."""
        with self._lock:
            if place in self.places:
                self._unseat(place)
            else:
                self._leaving -= 1

    def begin(self, place: Place) -> bool:
        """A request is in work from now on. False: its place was given away, and nobody would hear the answer."""
        if place.working:
            return True  # and so its place is not given away
        with self._lock:
            place.working = place in self.places
            return place.working

    def strangers_pause(self) -> float:
        """Seconds until a client that keeps asking is heard again."""
        return sum(place.asks_on for place in self.all()) / STRANGERS

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
