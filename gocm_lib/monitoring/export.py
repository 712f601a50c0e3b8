"""Exports the figures: to Graphite, to StatsD, and as a status line to systemd. One owner, one thread.

Promises that a collector that is away, slow or silent costs only a count and one line in the log, and that the next
sending has whatever StatsD is known to have missed.
"""

import os
import socket
import threading
import time
from collections.abc import Callable

from gocm_lib.config.settings import Settings
from gocm_lib.monitoring import metrics
from gocm_lib.monitoring.collector import Collector, Expiry, Figures
from gocm_lib.monitoring.metrics import Sample
from gocm_lib.process import log
from gocm_lib.process.systemd import Systemd
from gocm_lib.state.client import Client

PATIENCE = 5.0  # seconds for a collector to connect and to read


class Exporter:
    """Owned by Front. Sends all figures every `--metrics-interval` seconds."""

    def __init__(
        self, settings: Settings, collector: Collector, client: Client, expiry: Expiry, systemd: Systemd
    ) -> None:
        """Made before anything is served, so that nothing is counted twice or not at all."""
        self._settings = settings
        self._collector = collector
        self._client = client
        self._expiry = expiry
        self._systemd = systemd
        # What StatsD was told of each counter; what was counted before this run is not news to it.
        self._before = _counters(metrics.samples(collector.figures(client, expiry), settings.metrics_prefix))
        self._failing: set[str] = set()
        self._status = ""

    def start(self) -> None:
        """Send from now on, in a thread of its own."""
        threading.Thread(target=self._run, name="exporter", daemon=True).start()

    def _run(self) -> None:
        while True:
            figures = self._collector.figures(self._client, self._expiry)
            self._tell_systemd(figures)
            samples = metrics.samples(figures, self._settings.metrics_prefix)
            if self._settings.graphite:
                self._try("graphite", self._to_graphite, samples)
            if self._settings.statsd:
                self._try("statsd", self._to_statsd, samples)
            time.sleep(self._settings.metrics_interval)

    def _try(self, to: str, send: Callable[[list[Sample]], None], samples: list[Sample]) -> None:
        try:
            send(samples)
        except (OSError, UnicodeError) as error:  # the latter of a host name that can be none
            self._collector.export_failures[to] += 1
            if to not in self._failing:
                log.logger.warning(
                    "figures do not reach %s: %s; see gocm help watching", to, getattr(error, "strerror", None) or error
                )
            self._failing.add(to)
            return
        if to in self._failing:
            log.logger.info("figures reach %s again", to)
        self._failing.discard(to)

    def _to_graphite(self, samples: list[Sample]) -> None:
        # A connection each time: what comes back after a restart of the collector needs no care then.
        with socket.create_connection(_address(self._settings.graphite), PATIENCE) as sock:
            sock.sendall(metrics.graphite(samples, time.time()))
            sock.shutdown(socket.SHUT_WR)

    def _to_statsd(self, samples: list[Sample]) -> None:
        host, port = _address(self._settings.statsd)
        [family, kind, protocol, _, address], *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(address)  # so that nobody being there is told to us
            for datagram in metrics.statsd(samples, self._before):
                sock.send(datagram)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # of the last one
                raise OSError(error, os.strerror(error))
        # Those that are missing, while the state process is away, are still what they were.
        self._before |= _counters(samples)

    def _tell_systemd(self, figures: Figures) -> None:
        snapshot = figures.snapshot
        status = "the state process does not answer"
        if snapshot:
            status = f"pending {snapshot.pending}, delivered {snapshot.counters['delivered']}"
            status += "".join(f"; {name} is paused: {reason}" for name, reason in snapshot.pause_reasons.items())
        if status != self._status:
            self._systemd.notify(f"STATUS={log.one_line(status)}")
        self._status = status


def _counters(samples: list[Sample]) -> dict[str, float]:
    return {path: value for path, kind, value in samples if kind == "counter"}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
