"""The front: everything that clients talk to, made, wired, changed by SIGHUP and stopped as one.

Owned by the supervisor, in its main thread. Promises that a taken port and unusable files are reported before any child
is started, and that an unusable change changes nothing.
"""

import datetime
import os
import ssl
import time
from collections.abc import Callable

from gocm_lib.config import values
from gocm_lib.config.settings import NO_HOST, Fatal, Settings
from gocm_lib.front import auth, google, google_door, google_files, listener, server
from gocm_lib.front.endings import ASKED_AGAIN, Endings
from gocm_lib.front.gate import Gate
from gocm_lib.front.handlers import Authorization, Handlers
from gocm_lib.front.intake import LIMIT as intake_limit
from gocm_lib.front.intake import Intake, Put
from gocm_lib.front.listener import Listener
from gocm_lib.front.loop import Loop
from gocm_lib.front.routes import ROUTES
from gocm_lib.front.server import Server
from gocm_lib.front.webhook import Webhook
from gocm_lib.monitoring.collector import Collector, Expiry
from gocm_lib.monitoring.export import Exporter
from gocm_lib.monitoring.trend import Trend
from gocm_lib.process import log
from gocm_lib.process.bell import Bell
from gocm_lib.process.systemd import Systemd
from gocm_lib.state.client import Client, LoopClient

DOOR_LIFE = datetime.timedelta(days=365)  # of its authority: who trusts it in production cannot be told every month
CERTIFICATE_LOOK, CERTIFICATE_SOON = 86400.0, 14 * 86400.0  # seconds: how often its end is looked at; when it is told

Clients = Callable[..., Client]  # makes a client of the state process, with a time limit in seconds if one is given


class Front:
    """The listeners and what serves them. Made first, so that a taken port is told at once; `serve` comes last."""

    def __init__(
        self,
        settings: Settings,
        clients: Clients,
        for_loops: Callable[[Callable[[], None], float], LoopClient],
        collector: Collector,
        systemd: Systemd,
    ) -> None:
        """Listen. `for_loops` makes a client for a loop, with the function that wakes it and a time limit. Raises Fatal
        when the files of tokens, secrets or TLS are unusable, or a socket cannot be made.
        """
        self._clients, self._for_loops = clients, for_loops
        self._collector = collector
        self._systemd = systemd
        self._servers: list[Server] = []
        self._loop: Loop | None = None
        self._next_look = 0.0  # when our certificate's end is looked at next (monotonic)
        auth.read_policy(settings)
        self._webhook = Webhook(settings, clients(), collector) if settings.feedback_url else None
        self._tls = _tls(settings) if settings.tls_cert else None
        self._door_tls: ssl.SSLContext | None = None
        self._door: list[Listener] = []
        self.listeners: list[Listener] = []
        self._listen(settings)  # last: what it makes stays when anything fails after it

    def _listen(self, settings: Settings) -> None:
        """Make the sockets, unless systemd has opened them. Raises Fatal."""
        self.listeners = [listener.inherited(sock) for sock in self._systemd.sockets]
        if self.listeners:
            log.logger.info("systemd has opened the sockets: --host and --port are not used")
        self._check_open(settings)
        if settings.door_google:
            self._open_door(settings)
        if not self.listeners and settings.host != NO_HOST:
            self.listeners = listener.tcp(settings.host, settings.port)
        if settings.socket:
            mode, group = settings.socket_mode, settings.socket_group
            self.listeners.append(listener.unix(settings.socket, mode, group))

    def _open_door(self, settings: Settings) -> None:
        """Listen under Google's name. Raises Fatal."""
        if settings.host == NO_HOST:
            raise Fatal("--door-google needs an address: give a --host", topic="google")
        self._door = listener.tcp(settings.host, settings.door_google_port)
        google_door.check_no_loop(settings, self._door[0].sock.getsockname()[1])
        self._door_tls = self._renew_door(settings)
        places = " and ".join(map(str, self._door))
        log.logger.info("under Google's name on %s; what leads there is in %s", places, settings.door_google)

    def _renew_door(self, settings: Settings) -> ssl.SSLContext:
        """What serves under Google's name, by the authority in its folder, which is made anew where that ends or is
        gone; what programs need to trust it is in the folder then. Raises Fatal.
        """
        port = self._door[0].sock.getsockname()[1]
        tls = google.serve_as(settings.door_google, datetime.datetime.now(datetime.UTC), DOOR_LIFE)
        tls.set_alpn_protocols(["h2", "http/1.1"])
        google_files.write(settings.door_google, port, port, os.environ, sandbox=False)
        return tls

    def _check_open(self, settings: Settings) -> None:
        """Raise Fatal when everybody could send by a socket that systemd has opened."""
        for each in self.listeners:
            if not each.is_local:
                values.check_open(settings, each.host, f"the socket on {each} that systemd has opened")

    def serve(
        self, settings: Settings, newest_job: int, expiry: Expiry, authorization: Authorization, put: Put
    ) -> None:
        """Answer clients from now on. `newest_job` is the highest job id on disk; `expiry` tells when each upstream's
        credential ends, `authorization` what it is; `put` puts slices into the queue of a generation.
        """
        bell = Bell()
        intake = Intake(self._for_loops(bell.ring, intake_limit), newest_job, self._collector, put)
        trend = Trend(self._collector, self._clients(), expiry)
        asking, probing = self._clients(), self._clients()
        handlers = Handlers(settings, intake, asking, probing, expiry, self._collector, trend, authorization)
        self._collector.expect(route.path for route in ROUTES)
        gate = Gate(settings.max_connections)
        self._servers = [Server(each, handlers, gate, None if each.is_local else self._tls) for each in self.listeners]
        self._servers += [Server(each, handlers, gate, self._door_tls, google=True) for each in self._door]
        exporter = Exporter(settings, self._collector, self._clients(), expiry, self._systemd)
        endings = Endings(self._for_loops(bell.ring, ASKED_AGAIN))
        self._loop = Loop(self._servers, handlers, gate, intake, endings, bell)
        for each in self._servers:
            each.watcher = self._loop
        self._loop.start()
        exporter.start()
        trend.start()
        if self._webhook:
            self._webhook.start()

    def follow(self, before: Settings, settings: Settings) -> None:
        """Apply changed settings. Raises Fatal, and keeps to the settings `before`, when they cannot be used."""
        if bool(settings.tls_cert) != bool(before.tls_cert):
            raise Fatal("--tls-cert given or taken away needs a restart")
        self._check_open(settings)
        tls = _tls(settings) if settings.tls_cert else None
        door = self._renew_door(settings) if settings.door_google else None
        self._servers[0].handlers.follow(settings)
        for each in self._servers:
            each.tls = door if each.google else None if each.listener.is_local else tls
        self._next_look = 0.0

    def look_at_certificate(self, settings: Settings) -> None:
        """Once a day note when our certificates end, and warn when that is soon."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + CERTIFICATE_LOOK
        if settings.tls_cert:
            self._collector.certificate_end = ends = listener.certificate_end(settings.tls_cert)
            _tell_end("the certificate of --tls-cert", ends, "security")
        if settings.door_google:
            authority = os.path.join(settings.door_google, google.AUTHORITY)
            _tell_end("the authority of --door-google", listener.certificate_end(authority), "google")

    def stop(self, patience: float) -> None:
        """Accept nothing more. Returns when no request is in work, after `patience` seconds at most."""
        if self._loop:
            server.stop(self._servers, self._loop.stop_accepting, patience)

    def remove(self) -> None:
        """Remove the sockets' files."""
        for each in (*self.listeners, *self._door):
            each.remove()


def _tell_end(what: str, ends: float | None, topic: str) -> None:
    """Warn when a certificate ends soon."""
    now = time.time()
    if ends is not None and ends - now < CERTIFICATE_SOON:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
        log.logger.warning("%s %s %s; see gocm help %s", what, "has ended" if ends < now else "ends", when, topic)


def _tls(settings: Settings) -> ssl.SSLContext:
    return listener.tls_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
