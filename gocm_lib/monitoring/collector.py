"""What the front process knows of everything: which parts move, what clients asked, what senders have counted.

Whoever does a thing notes it here, in whole verbs. It is read for /metrics, /readyz, Graphite and systemd's watchdog.
Everything here belongs to this run and ends with it; what must survive is counted in the spool (module report).
"""

import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gocm_lib.message.dialects import DIALECTS
from gocm_lib.monitoring import counters
from gocm_lib.monitoring.counters import Histogram
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import Snapshot

# Why a request was turned down, by its status: the causes are few, so that somebody can watch them.
CAUSES = {
    400: "bad_request",
    401: "unauthorized",
    403: "foreign_site",
    404: "no_such_path",
    405: "wrong_method",
    408: "too_slow",
    410: "forgotten",
    411: "no_length",
    413: "too_large",
    415: "wrong_type",
    417: "bad_request",
    421: "wrong_host",
    422: "key_reused",
    429: "over_rate",
    431: "too_large",
    500: "internal",
    503: "busy",
    505: "bad_request",
    507: "no_room",
}
EXPORTS = ("graphite", "statsd")
KINDS = ("state", "sender", "sandbox")  # of children


# When each upstream's credential ends, in seconds since 1970: never (inf) for a key, None when no token is good.
Expiry = Callable[[], Mapping[str, float | None]]


class ProcessFigures(NamedTuple):
    """CPU seconds used so far, and bytes of memory."""

    cpu: float
    memory: float


class Figures(NamedTuple):
    """Everything there is to tell, of about one moment. `snapshot` is None while the state process does not answer."""

    now: float
    started_at: float
    snapshot: Snapshot | None
    upstreams: dict[str, counters.Answers]
    token_expiry: Mapping[str, float | None]  # of each configured upstream; inf: never, None: there is no token
    queue_wait: Histogram
    requests: dict[tuple[str, int], int]
    durations: dict[str, Histogram]
    rejected: dict[str, int]
    senders: int  # that are ready
    restarts: dict[str, int]
    processes: dict[str, ProcessFigures]  # by kind
    files: int
    max_files: int
    certificate_end: float | None  # when that of --tls-cert ends; None: there is none
    lines_dropped: int  # of all logs
    export_failures: dict[str, int]
    feedback: dict[str, int]  # requests of the webhook, by how they ended


class Collector:
    """One for each run, in the front process, for all its threads."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.pulses: dict[str, float] = {}  # when each part last moved
        self.restarts: Counter[str] = Counter()  # of children, by kind
        self.rejected: Counter[str] = Counter()  # requests, by cause
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.durations: dict[str, Histogram] = {}  # by route
        self.queue_wait = Histogram(counters.WAIT)
        self.lines_dropped = 0  # of our children's logs
        self.certificate_end: float | None = None  # of --tls-cert
        self.export_failures: Counter[str] = Counter()
        self.feedback = {"taken": 0, "failed": 0}  # requests of the webhook
        self.processes: dict[str, int] = {"front": os.getpid()}
        self.senders: set[str] = set()  # that are ready
        self.nodes = 1  # how many share the spool, as far as we have heard
        self._upstreams = list(DIALECTS)  # that there are, or were
        self._cells: dict[str, tuple[Sequence[float], Sequence[str]]] = {}  # of senders that may still count
        self._ended: counters.Parts = {}  # what those counted that are gone
        self._read: dict[tuple[str, int], ProcessFigures] = {}  # of processes, when they were last looked at
        self._ended_cpu: dict[str, ProcessFigures] = {}  # of those that are gone, by kind
        self._counting = threading.Lock()

    # ------------------------------------------------------------------------------------------------ what happened

    def move(self, part: str, at: float | None = None) -> None:
        """A part has moved: now, or last at that time (monotonic)."""
        self.pulses[part] = time.monotonic() if at is None else at

    def sender_moves(self, name: str, at: float, settled_at: float) -> None:
        """A sender last moved `at` this time; at `settled_at` it had nothing left to settle."""
        self.pulses |= {name: at, _settling(name): settled_at}

    def still(self, part: str) -> None:
        """A part has ended, and need not move any more."""
        self.pulses.pop(part, None)

    def expect(self, routes: Iterable[str]) -> None:
        """These routes exist: their counts are there from the start, as 0."""
        for route in (*routes, "other"):
            self.requests[route, 200] = 0
            self.durations[route] = Histogram(counters.REQUEST)

    def answered(self, route: str, status: int, seconds: float, refused: bool) -> None:
        """A request to a route was answered after this many seconds. `refused`: it was turned down. One thread calls
        this: a lock would cost as much as all the rest.
        """
        self.requests[route, status] += 1
        self.durations[route].observe(seconds)
        if refused:
            self.rejected[CAUSES.get(status, "bad_request")] += 1

    def fed_back(self, taken: bool) -> None:
        """The webhook made a request. `taken`: the application took it."""
        self.feedback["taken" if taken else "failed"] += 1

    def child_started(self, name: str, pid: int) -> None:
        """A child was started."""
        with self._counting:
            self.processes[name] = pid

    def serve(self, upstreams: Iterable[str]) -> None:
        """There are these upstreams: their figures are there, as 0 at first."""
        self._upstreams = list(dict.fromkeys((*self._upstreams, *upstreams)))

    def counts_in(self, name: str, cells: Sequence[float], upstreams: Sequence[str]) -> None:
        """A sender counts what these upstreams answer in these cells (module counters)."""
        with self._counting:
            self._cells[name] = cells, upstreams

    def child_ready(self, kind: str, name: str) -> None:
        """A child can do its work."""
        if kind == "sender":
            with self._counting:
                self.senders.add(name)

    def leaves(self, name: str) -> None:
        """A sender finishes what it has in hand, and takes nothing more."""
        with self._counting:
            self.senders.discard(name)
            self._sender_is_still(name)

    def child_ended(self, kind: str, name: str, died: bool) -> None:
        """A child has ended; what it counted stays."""
        with self._counting:
            self.processes.pop(name, None)
            self._sender_is_still(name)
            self.senders.discard(name)
            self.restarts[kind] += died
            if name in self._cells:
                last = counters.ended(counters.parts(*self._cells.pop(name)))
                self._ended = counters.add_up([self._ended, last], ())

    def _sender_is_still(self, name: str) -> None:
        self.pulses.pop(name, None)
        self.pulses.pop(_settling(name), None)

    # ------------------------------------------------------------------------------------------------- what there is

    def _read_processes(self) -> list[tuple[str, ProcessFigures]]:
        """The figures of running processes by name, and, by kind, those of ended processes as last seen: otherwise the
        sum of a kind would fall.
        """
        with self._counting:
            running = list(self.processes.items())
        found = {each: read_process(each[1]) for each in running}
        with self._counting:
            # Those of now: another thread may have looked meanwhile, and each is to be counted once.
            alive = self.processes.items()
            self._read |= {each: figures for each, figures in found.items() if figures and each in alive}
            for each in [each for each in self._read if each not in alive]:
                kind, gone = each[0].partition("-")[0], self._read.pop(each)
                so_far = self._ended_cpu.get(kind, ProcessFigures(0.0, 0.0))
                self._ended_cpu[kind] = ProcessFigures(so_far.cpu + gone.cpu, 0.0)
            return [*self._ended_cpu.items(), *((name, figures) for (name, _), figures in self._read.items())]

    def figures(self, client: Client, expiry: Expiry) -> Figures:
        """All figures. Asks the state process for its own."""
        try:
            snapshot = client.snapshot()
        except StateUnavailable:
            snapshot = None
        if snapshot and snapshot.nodes:
            self.nodes = max(1, sum([each.alive for each in snapshot.nodes]))
        with self._counting:
            running = [counters.parts(*each) for each in self._cells.values()]
            counted = counters.add_up([self._ended, *running], self._upstreams)
            durations = {route: Histogram(h.bounds, h.counts, h.total) for route, h in self.durations.items()}
            requests = dict(self.requests)
            rejected = {cause: self.rejected[cause] for cause in dict.fromkeys(CAUSES.values())}
        return Figures(
            now=time.time(),
            started_at=self.started_at,
            snapshot=snapshot,
            upstreams=counters.read(counted),
            token_expiry=expiry(),
            queue_wait=self.queue_wait,
            requests=requests,
            durations=durations,
            rejected=rejected,
            senders=len(self.senders),
            restarts={kind: self.restarts[kind] for kind in KINDS},
            processes=_by_kind(self._read_processes()),
            files=open_files(),
            max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            certificate_end=self.certificate_end,
            lines_dropped=self.lines_dropped + log.dropped(),
            export_failures={to: self.export_failures[to] for to in EXPORTS},
            feedback=dict(self.feedback),
        )


def _settling(sender: str) -> str:
    return f"settling by {sender}"


def _by_kind(read: Iterable[tuple[str, ProcessFigures]]) -> dict[str, ProcessFigures]:
    """The figures of all processes of each kind added up, because generations of senders come and go."""
    found: dict[str, ProcessFigures] = {}
    for name, figures in read:
        kind = name.partition("-")[0]
        so_far = found.get(kind, ProcessFigures(0.0, 0.0))
        found[kind] = ProcessFigures(so_far.cpu + figures.cpu, so_far.memory + figures.memory)
    return found


def read_process(pid: int) -> ProcessFigures | None:
    """A process's figures from /proc (proc(5)); None when it has ended, or there is no /proc."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    ticks = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return ProcessFigures(ticks, float(pages * resource.getpagesize()))


def open_files() -> int:
    """How many files this process has open; 0 where that cannot be known."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
