"""This gateway among the others on a spool: it joins, renews its lease, rescues what others left behind, and leaves.

A node may work on its packs while its lease lasts. All times of leases are the server's, so clocks of machines are not
compared; a node counts how long it may still work by its own monotonic clock, from before it asked. The epoch in its
row goes up when somebody else ends its lease, or it joins anew: who comes with an old one has nothing any more.

    LEASE        so long a node may work that has not been heard of
    HOLD before its end its senders send nothing more, until it is renewed
    at its end the state process ends, and the next one joins anew
    after its end any node that has held its own lease for all that time takes the packs away, and they are nobody's

So after an outage of the server nobody rescues anybody: all come back, and each goes on with what it had.
"""

import contextlib
import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from gocm_lib import __version__
from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.message.job import NODE_BITS, NODES
from gocm_lib.process import log
from gocm_lib.state.contract import Count, Hold
from gocm_lib.state.postgres import schema
from gocm_lib.state.postgres.database import Row, connect, reason
from gocm_lib.state.postgres.report import FOLD, GAUGES
from gocm_lib.state.postgres.spool import within
from gocm_lib.state.store import OPEN
from gocm_lib.state.turns import LANES

LEASE, BEAT, HOLD = 15.0, 3.0, 4.0  # seconds
LOOK = 0.25  # seconds between two looks at our own lease
FOLD_EVERY = 5.0  # seconds
FORGOTTEN_AFTER = "1 day"  # since a node was heard of, when nothing of its is left
RESCUED_AT_ONCE = 5000  # packs, so that nobody waits long for their rows
CLOCK_TOLERANCE = 5.0  # seconds that a machine's clock may differ from the server's: due times are compared with it
TOLD_EVERY = 60.0  # seconds between two lines about the same

_TAKE_NUMBER = """
INSERT INTO node (id, name, epoch, run, machine, version, format, lease)
SELECT min(free), %(name)s, 1, %(run)s, %(machine)s, %(version)s, %(format)s, now() + %(lease)s * interval '1 second'
FROM generate_series(1, %(most)s) AS free WHERE NOT EXISTS (SELECT 1 FROM node WHERE id = free)
HAVING min(free) IS NOT NULL RETURNING id, epoch, false
"""
_TAKE_OVER = """
WITH before AS (SELECT id AS own, fenced AS was, run <> %(run)s AND NOT departed AS died
    FROM node WHERE name = %(name)s FOR UPDATE),
us AS (UPDATE node SET epoch = epoch + 1, run = %(run)s, machine = %(machine)s, version = %(version)s,
    format = %(format)s, joined = now(), fenced = false, departed = false, slowed = '{}',
    lease = now() + %(lease)s * interval '1 second'
    FROM before WHERE id = own AND (lease < now() OR run = %(run)s OR machine = %(machine)s)
    RETURNING id, epoch, was, died),
lost AS (UPDATE pack SET losses = losses + 1 FROM us WHERE died AND pack.node = us.id AND NOT done)
SELECT id, epoch, was FROM us
"""
_BEAT = """
UPDATE node SET lease = now() + %(lease)s * interval '1 second', slowed = %(slowed)s
WHERE id = %(id)s AND epoch = %(epoch)s RETURNING extract(epoch FROM clock_timestamp())::float8
"""
# All in one query: an idle node is to cost the server little.
_NEWS = f"""
SELECT (SELECT coalesce(json_agg(json_build_array(id, name, lease > now(), version, fenced, departed,
            lease <= now() AND EXISTS (SELECT 1 FROM pack WHERE pack.node = node.id AND NOT done), slowed)
            ORDER BY id), '[]')
        FROM node),
    (SELECT coalesce(json_agg(json_build_array(upstream, lane)), '[]')
        FROM unnest(%(upstreams)s::text[]) AS upstream, generate_series(0, {LANES - 1}) AS lane
        WHERE EXISTS (SELECT 1 FROM pack WHERE node = 0 AND NOT done AND pack.upstream = upstream.upstream
                      AND pack.lane = lane.lane)),
    (SELECT coalesce(json_agg(json_build_array(name, upstream, reason, value)), '[]')
        FROM (SELECT name, upstream, reason, sum(value) AS value FROM
                (SELECT * FROM counter UNION ALL SELECT * FROM tally) AS sides
              WHERE node <> %(id)s AND name = ANY(%(names)s::text[]) GROUP BY 1, 2, 3) AS sums),
    EXISTS (SELECT 1 FROM tally),
    (SELECT coalesce(json_agg(job), '[]') FROM cancelled),
    (SELECT coalesce(json_agg(json_build_array(upstream, since, name)), '[]') FROM hold),
    (SELECT coalesce(min(due), 'infinity') FROM later)
"""
# Names may be new each time, as those of containers are; numbers are few.
_FORGET_NODES = f"""
DELETE FROM node WHERE lease < now() - interval '{FORGOTTEN_AFTER}' AND NOT EXISTS
    (SELECT 1 FROM pack WHERE pack.node = node.id AND NOT done)
"""
_FENCE = """
UPDATE node SET epoch = epoch + 1, fenced = true
WHERE id IN (SELECT id FROM node WHERE lease < now() AND NOT fenced FOR UPDATE SKIP LOCKED) RETURNING name
"""
_RESCUE = f"""
WITH gone AS (SELECT id, departed FROM node WHERE fenced AND lease < now() FOR SHARE SKIP LOCKED),
left_behind AS (SELECT pack.id, (NOT departed)::int AS lost FROM pack JOIN gone ON pack.node = gone.id WHERE NOT done
    ORDER BY pack.id LIMIT %s FOR UPDATE OF pack SKIP LOCKED),
rescued AS (UPDATE pack SET node = 0, losses = losses + lost FROM left_behind WHERE pack.id = left_behind.id
    RETURNING pack.id, last),
singles AS (UPDATE single SET node = 0 FROM rescued
    WHERE {within("rescued")} AND state = {OPEN})
SELECT count(*) FROM rescued
"""


class Member(NamedTuple):
    """A node as another sees it: whether its lease lasts, its version, whether somebody has taken note that it is gone,
    whether it has left by itself, whether there are packs that it left behind, and the rates to which it slowed down,
    by upstream, with the times.
    """

    id: int
    name: str
    alive: bool
    version: str
    fenced: bool
    departed: bool
    behind: bool
    slowed: Mapping[str, Sequence[float]] = {}


class News(NamedTuple):
    """What a beat brought: all nodes, upstreams and lanes of which there are packs that are nobody's, how much of
    everything the other nodes have counted (report.GAUGES), whether anything was tallied that is not folded, jobs that
    somebody wants to have cancelled, upstreams that somebody holds, and when the next pack is due that waits for its
    time.
    """

    nodes: Sequence[Member] = ()
    pool: frozenset[tuple[str, int]] = frozenset()
    others: Mapping[Count, int] = {}
    tallied: bool = False
    orders: Sequence[int] = ()
    held: Mapping[str, Hold] = {}
    due: float = math.inf

    @property
    def alive(self) -> int:
        """How many nodes work."""
        return sum(each.alive for each in self.nodes)


class Identity(NamedTuple):
    """Who we are: the node's name, a word for this run of the gateway, and the machine, with the lock that proves that
    no other gateway of this name runs on it ("": there is no proof).
    """

    name: str
    run: str
    machine: str


def identify(name: str, run: str, directory: str) -> Identity:
    """Who we are, with a lock in this directory that is held until this process ends. Raises Fatal when another gateway
    of this name runs here.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = os.path.join(directory, f"node-{name}.lock")
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Fatal(f"another GoCM runs here as node {name}: stop it, or give --node", Exit.SPOOL_IN_USE) from None
    except OSError:
        return Identity(name, run, "")  # then only the end of its lease says that our predecessor is gone
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = os.fstat(held)
    return Identity(name, run, f"{boot.read_text().strip() if boot.exists() else ''} {here.st_dev} {here.st_ino}")


class Me(NamedTuple):
    """The number of our node and its epoch; and whether others rescued what it had, before we joined again."""

    number: int
    epoch: int
    rescued: bool


def join(address: str, who: Identity, wait: Callable[[float], None]) -> Me:
    """Become a node, or again the one that we were. Waits, by `wait`, for the lease of another one of this name to end.
    Raises Fatal and psycopg.Error.
    """
    values = {**who._asdict(), "version": __version__, "format": schema.FORMAT, "lease": LEASE, "most": NODES}
    told = False
    with contextlib.closing(connect(address)) as connection:
        while True:
            known = connection.execute("SELECT 1 FROM node WHERE name = %s", (who.name,)).fetchone()
            try:
                found = connection.execute(_TAKE_OVER if known else _TAKE_NUMBER, values).fetchone()
            except psycopg.errors.UniqueViolation:
                continue  # somebody else joins at this moment
            if found:
                return Me(*found)
            if not known:
                raise Fatal(f"the spool has {NODES} nodes: those that are gone are forgotten after a day", Exit.CONFIG)
            if not told:
                log.logger.warning("another node has the name %s: waiting until its lease ends", who.name)
                told = True
            wait(1.0)


def _nobody(reason: str) -> None:
    log.logger.error("%s", reason)


class Membership:
    """Keeps our lease, and brings news. The first are there when it is made, which raises psycopg.Error."""

    def __init__(self, address: str, me: Me, upstreams: Sequence[str]) -> None:
        self.number, self.epoch, self.rescued = me
        self.news = News()
        self._address = address
        self._upstreams = list(upstreams)
        self._connection: psycopg.Connection[Row] | None = None
        self._held_until = time.monotonic() + LEASE
        self._held_since = time.monotonic()
        self._folded_at = 0.0
        self._told: dict[str, float] = {}
        self._slowed: Mapping[str, Sequence[float]] = {}
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._cell: MutableSequence[float] = [0.0, 0.0]
        self._give_up: Callable[[str], None] = _nobody
        self._waits = True
        self._beat()

    def start(self, cell: MutableSequence[float], give_up: Callable[[str], None], waits: bool) -> None:
        """Go on by ourselves. `cell` gets the time until which our senders may send, and the time in the id of the last
        job that was committed, for the next state process to look at; with `waits` nobody may send before `resume`, for
        there are senders that have what others rescued. When our lease is over, and what was ours may be another's,
        `give_up` is told why.
        """
        self._cell, self._give_up, self._waits = cell, give_up, waits
        self._allow()
        threading.Thread(target=self._run, name="lease", daemon=True).start()
        threading.Thread(target=self._watch, name="lease watch", daemon=True).start()

    def serve(self, upstreams: Collection[str]) -> None:
        """We send to these upstreams."""
        self._upstreams = list(upstreams)

    def learn(self, **changed: Any) -> None:
        """We have changed what the news are about: know it at once. A beat of this moment may not have seen it, so that
        it is forgotten until the next one.
        """
        self.news = self.news._replace(**changed)

    def _allow(self) -> None:
        self._cell[0] = 0.0 if self._waits else self._held_until - HOLD

    def resume(self) -> None:
        """Those senders have ended."""
        self._waits = False
        self._allow()

    def tell_slowed(self, rates: Mapping[str, float]) -> None:
        """Have the others know at once to which rates we slowed down."""
        now = time.time()
        self._slowed = {**self._slowed, **{upstream: (rate, now) for upstream, rate in rates.items()}}
        self._wake.set()

    def committed(self, job: int) -> None:
        """All up to this job of ours is committed."""
        self._cell[1] = job >> NODE_BITS  # of which a float keeps every digit

    def stop(self) -> None:
        """Leave: what is ours waits for no lease."""
        self._stopped.set()
        self._wake.set()
        with contextlib.suppress(psycopg.Error), contextlib.closing(connect(self._address)) as connection:
            connection.execute(
                "UPDATE node SET lease = now(), departed = true WHERE id = %s AND epoch = %s", (self.number, self.epoch)
            )
        self._hang_up()

    @property
    def is_first(self) -> bool:
        """Whether we are the one who keeps house for all. For a moment two may think so."""
        return next((each.id for each in self.news.nodes if each.alive), self.number) == self.number

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait(BEAT)
            self._wake.clear()
            while not self._stopped.is_set():
                try:
                    self._beat()
                    break
                except psycopg.Error as error:
                    self._tell("beat", "the spool's server cannot be asked: %s", reason(error))
                    self._hang_up()
                    time.sleep(0.5)

    def _watch(self) -> None:
        """Notice the end of our lease: a process that stood still knows it from its clock only."""
        while not self._stopped.wait(LOOK):
            if (now := time.monotonic()) > self._held_until:
                silent = LEASE + now - self._held_until
                self._give_up(f"the spool's server was not reached for {silent:.0f} s: our lease is over")

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _beat(self) -> None:
        if self._connection is None:
            # What a beat writes need not wait for a standby: where there is none, messages wait, and we go on.
            self._connection = connect(self._address, "local")
        asked = time.monotonic()
        values: dict[str, object] = {"id": self.number, "epoch": self.epoch, "lease": LEASE}
        values["slowed"] = Jsonb(self._slowed)
        row = self._connection.execute(_BEAT, values).fetchone()
        if row is None:
            self._give_up("another node has ended our lease: we were silent for too long, or somebody has our name")
            return
        if asked > self._held_until:
            self._held_since = asked
        self._held_until = asked + LEASE
        self._allow()
        self._check_clock(row[0] - (time.time() - (time.monotonic() - asked) / 2))
        self._look()
        if any(each.behind or not (each.alive or each.fenced) for each in self.news.nodes) and self._rescue(asked):
            self._look()
        stale = self.news.tallied or not all(each.alive for each in self.news.nodes)
        if self.is_first and stale and asked >= self._folded_at + FOLD_EVERY:
            self._folded_at = asked
            for statement in (*FOLD, _FORGET_NODES):
                self._connection.execute(statement)

    def _look(self) -> None:
        assert self._connection
        values = {"id": self.number, "upstreams": self._upstreams, "names": list(GAUGES)}
        [[nodes, pool, others, tallied, orders, held, due]] = self._connection.execute(_NEWS, values)
        sums = {Count(*names): int(value) for *names, value in others}
        self.news = News(
            [Member(*each) for each in nodes],
            frozenset((name, lane) for name, lane in pool),
            sums,
            tallied,
            orders,
            {upstream: Hold(since, name) for upstream, since, name in held},
            float(due),
        )

    def _check_clock(self, ahead: float) -> None:
        if abs(ahead) > CLOCK_TOLERANCE:
            self._tell("clock", "this machine's clock is %.0f s off the spool server's: set it (NTP)", ahead)

    def _rescue(self, now: float) -> bool:
        """Make nobody's what dead nodes have, if we have held our own lease for as long as one lasts. Whether there was
        anything.
        """
        assert self._connection
        if now < self._held_since + LEASE:
            return False
        for (name,) in self._connection.execute(_FENCE):
            log.logger.warning("node %s is not there any more: what it had is sent by others", name)
        [[rescued]] = self._connection.execute(_RESCUE, (RESCUED_AT_ONCE,))
        if rescued:
            log.logger.warning("%d packs of nodes that are gone are anybody's now", rescued)
        return bool(rescued)

    def _tell(self, what: str, line: str, *words: object) -> None:
        now = time.monotonic()
        if now >= self._told.get(what, -TOLD_EVERY) + TOLD_EVERY:
            self._told[what] = now
            log.logger.error(line, *words)
