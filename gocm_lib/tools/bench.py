"""`gocm bench`: what this machine can do, as CPU time per message and the rates that follow from it.

Starts a server on a new spool, with the sandbox as its upstream; posts messages from another process; and reads from
the operating system what each process of the server has used. CPU per message hardly varies from run to run; rates do,
when other programs share the machine. `floor` and `floor2` are the cost of exchanging the same bytes with the upstream
in a bare loop over non-blocking sockets, by HTTP/1.1 and by HTTP/2: no Python program that writes them can be cheaper.
"""

import contextlib
import http.client
import json
import os
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import gocm_lib
from gocm_lib.config.settings import BenchSettings, Exit, Fatal
from gocm_lib.tools.pretend_answers import PROJECT

START_LIMIT, RUN_LIMIT = 60.0, 900.0  # seconds
SAMPLE = 0.25  # seconds between two looks at the server
PATIENT = ("--upstream-timeout", "3", "--retry-base", "0.5", "--max-attempts", "100")  # with a silent upstream
WARM_UPS = 6  # rounds at most
NUMBER = b"t%08d-"  # of a post: how its tokens begin, and in its message, or like messages would share requests
PAYLOAD = {"title": "Hello", "text": "x" * 90, "id": (NUMBER % 0).decode(), "badge": 7}
TOKEN = "b" * 140  # with its number as long as FCM's tokens are


class Scenario(NamedTuple):
    """What is posted: `posts` posts, each with `lines` messages of their own (0: one message, not as lines) to `tokens`
    tokens, to one upstream; by so many clients, over kept connections or new ones.
    """

    meaning: str
    upstream: str
    posts: int
    tokens: int
    keep_alive: bool = True
    lines: int = 0
    clients: int = 16
    rate: float = 0.0  # posts a second; 0: as many as the clients can

    def in_a_post(self) -> int:
        return self.tokens * max(1, self.lines)


SCENARIOS = {
    "single": Scenario("one-token form posts over 16 kept connections", "fcm", 20_000, 1),
    "single-1": Scenario("the same by a single client", "fcm", 3_000, 1, clients=1),
    "single-4": Scenario("by four clients", "fcm", 6_000, 1, clients=4),
    "single-64": Scenario("by 64 clients", "fcm", 20_000, 1, clients=64),
    "single-gcm": Scenario("by 16 clients, to legacy GCM, which speaks HTTP/1.1", "gcm", 20_000, 1),
    "connect": Scenario("a new connection for each post", "fcm", 6_000, 1, keep_alive=False),
    "rate-100": Scenario("one-token posts, 100 a second", "fcm", 500, 1, rate=100),
    "rate-300": Scenario("300 a second", "fcm", 1_500, 1, rate=300),
    "rate-1000": Scenario("1,000 a second", "fcm", 5_000, 1, rate=1000),
    "rate-3000": Scenario("3,000 a second", "fcm", 12_000, 1, rate=3000),
    "fanout": Scenario("FCM messages to 100 tokens each", "fcm", 200, 100),
    "multicast": Scenario("GCM messages to 1,000 tokens each", "gcm", 200, 1000),
    "bulk": Scenario("500 different one-token messages in a post", "fcm", 40, 1, lines=500),
    "backlog": Scenario("a million tokens, taken while the upstream is silent, then drained", "gcm", 100, 10_000),
    "floor": Scenario("the upstream's requests of `single-gcm` from a bare loop, by HTTP/1.1", "gcm", 20_000, 1),
    "floor2": Scenario("those of `single`, by HTTP/2", "fcm", 20_000, 1),
}


# -------------------------------------------------------------------------------------------------- programs and /proc


class Server:
    """A running GoCM command; its log is a file."""

    def __init__(self, directory: Path, name: str, *words: str) -> None:
        self.log = directory / f"{name}.log"
        self.peaks: dict[str, list[float]] = {}  # MB by process
        home = str(Path(gocm_lib.__file__).parent.parent)  # a directory, or a zip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from gocm_lib.cli import main; raise SystemExit(main())", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("GOCM_")},
                    "PYTHONPATH": home,
                    "STATE_DIRECTORY": str(directory),
                },
            )
        try:
            self.port = int(self._logged(r"listens on \S+ port (\d+)"))
        except BaseException:  # SIGTERM, too: nobody else knows of the process yet
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise

    def _logged(self, pattern: str) -> str:
        deadline = time.monotonic() + START_LIMIT
        while True:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found[1]
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Fatal(f"a part of the bench did not start: {self.log.read_text()[-500:]}", Exit.FAILED)
            time.sleep(0.02)

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role: front, state, senders."""
        found: dict[str, list[int]] = {"front": [self.process.pid], "state": [], "senders": []}
        for name, pid in re.findall(r"front: (state|sender)\S* is process (\d+)", self.log.read_text()):
            found["senders" if name == "sender" else name].append(int(pid))
        return found

    def note_memory(self) -> None:
        """Remember the most memory that each process has had."""
        for part, pids in self.processes().items():
            known = self.peaks.get(part, [0.0] * len(pids))
            self.peaks[part] = [max(before, memory(pid)) for before, pid in zip(known, pids)]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def cpu_used(pid: int) -> float:
    """Microseconds of CPU time that a process has used, in user code and in the kernel: by the clock of
    clock_getcpuclockid(3). /proc/PID/stat counts in hundredths of a second, in which a small run is nothing.
    """
    return time.clock_gettime((~pid << 3) | 2) * 1e6


def spool_server(url: str) -> int | None:
    """The process of the PostgreSQL at this address, if it runs here: the parent of those that serve our database."""
    parts = urlsplit(url)
    wanted = f" {parts.username} {parts.path.strip('/')} ".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (words := (place / "cmdline").read_bytes()).startswith(b"postgres: ") and wanted in words:
                return _figure(r"^PPid:\s+(\d+)", str(place / "status"))
    return None


def cpu_of_tree(pid: int) -> float:
    """Microseconds of CPU time that a process has used, with its children, those that have ended as well."""
    tick = 1e6 / os.sysconf("SC_CLK_TCK")
    waited = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(cpu_used, [pid, *map(int, children)])) + sum(map(int, waited)) * tick


def memory(pid: int) -> float:
    """MB of memory of a process, with its share of shared memory (PSS)."""
    return _figure(r"^Pss:\s+(\d+)", f"/proc/{pid}/smaps_rollup") / 1024


def written(pid: int) -> int:
    """Bytes that a process has caused to be written to disk."""
    return _figure(r"^write_bytes: (\d+)", f"/proc/{pid}/io")


def _figure(pattern: str, path: str) -> int:
    [figure] = re.findall(pattern, Path(path).read_text(), re.M)
    return int(figure)


# ------------------------------------------------------------------------------------------------------------ the load


def body(scenario: Scenario) -> tuple[bytes, bytes]:
    """The content type and body of the first post."""
    tokens = [f"{(NUMBER % 0).decode()}{place:05d}-{TOKEN}" for place in range(scenario.in_a_post())]
    if scenario.lines:
        payloads = ({**PAYLOAD, "badge": place} for place in range(scenario.lines))
        lines = (json.dumps({"tokens": [token], "payload": payload}) for token, payload in zip(tokens, payloads))
        return b"application/x-ndjson", "\n".join(lines).encode()
    if scenario.tokens == 1:
        pairs = [("tokens", tokens[0]), ("payload", json.dumps(PAYLOAD))]
        return b"application/x-www-form-urlencoded", urlencode(pairs).encode()
    return b"application/json", json.dumps({"tokens": tokens, "payload": PAYLOAD}).encode()


def request(scenario: Scenario) -> bytes:
    """The first post. The others differ only in NUMBER."""
    kind, content = body(scenario)
    connection = b"keep-alive" if scenario.keep_alive else b"close"
    head = (
        b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nConnection: %b\r\n"
        b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n"
    )
    return head % (connection, kind, len(content)) + content


class Load:
    """Posts a scenario's messages, in one loop over all connections: `rate` per second, or as fast as possible."""

    def __init__(self, port: int, scenario: Scenario, rate: float | None) -> None:
        self.port = port
        self.scenario = scenario
        self.rate = rate
        self.first = request(scenario)
        self.selector = selectors.DefaultSelector()
        self.began: dict[socket.socket, float] = {}
        self.unsent: dict[socket.socket, bytes] = {}
        self.writing: set[socket.socket] = set()  # that have not yet taken all of what is unsent
        self.partial: dict[socket.socket, bytes] = {}
        self.idle: list[socket.socket] = []
        self.latencies: list[float] = []
        self.refused: Counter[bytes] = Counter()
        self.posted = 0

    def run(self) -> dict[str, Any]:
        idle = self.idle = [self._connect() for _ in range(self.scenario.clients)]
        started = time.monotonic()
        while len(self.latencies) + self.refused.total() < self.scenario.posts:
            now = time.monotonic()
            while idle and self.posted < self.scenario.posts and now >= self._due(started):
                self._post(idle.pop(), now)
            patience = self._due(started) - now if idle and self.posted < self.scenario.posts else 1.0
            for key, _ in self.selector.select(max(0.0, patience)):
                assert isinstance(key.fileobj, socket.socket)
                idle += self._on_ready(key.fileobj)
        seconds = time.monotonic() - started
        return {"seconds": seconds, "latencies": sorted(self.latencies), "refused": dict(self.refused)}

    def _due(self, started: float) -> float:
        return started + self.posted / self.rate if self.rate else 0.0

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ)
        return sock

    def _post(self, sock: socket.socket, now: float) -> None:
        self.began[sock] = now
        self.unsent[sock] = self.first.replace(NUMBER % 0, NUMBER % self.posted)
        self.posted += 1
        self._write(sock)

    def _write(self, sock: socket.socket) -> None:
        data, again = self.unsent[sock], sock in self.writing
        with contextlib.suppress(BlockingIOError):
            data = data[sock.send(data) :]
        self.unsent[sock] = data
        if data and not again:
            self.writing.add(sock)
            self.selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        elif again and not data:
            self.writing.remove(sock)
            self.selector.modify(sock, selectors.EVENT_READ)

    def _on_ready(self, sock: socket.socket) -> list[socket.socket]:
        """Go on with a connection. Returns it, or its successor, if there is nothing to do for it now."""
        if sock in self.idle:  # at a low rate some are never used, and the server closes those
            self.idle.remove(sock)
            return [self._instead_of(sock)]
        if self.unsent[sock]:
            self._write(sock)
            return []
        answer = sock.recv(1 << 20)
        if answer and not answer.endswith(b"\n"):  # a long answer, of which this is not the end
            self.partial[sock] = self.partial.get(sock, b"") + answer
            return []
        answer = self.partial.pop(sock, b"") + answer
        if answer.startswith(b"HTTP/1.1 200 "):
            self.latencies.append(time.monotonic() - self.began[sock])
        else:
            self.refused[answer[9:12]] += 1
        if self.scenario.keep_alive and answer:
            return [sock]
        return [self._instead_of(sock)]

    def _instead_of(self, sock: socket.socket) -> socket.socket:
        """A new connection in the place of a closed one."""
        self.selector.unregister(sock)
        sock.close()
        return self._connect()


def _load(port: int, scenario: Scenario, rate: float | None, pipe: Connection) -> None:
    pipe.send(Load(port, scenario, rate).run())


# ----------------------------------------------------------------------------------------------------------- the floor


def _floor(port: int, ca: str, scenario: Scenario, connections: int, token: str, pipe: Connection) -> None:
    """Exchange a sender's requests over `connections` connections, with as little else as possible."""
    import urllib3  # noqa: F401  (what Upstream needs is loaded before the clock runs)

    from gocm_lib.message.dialects import DIALECTS
    from gocm_lib.message.job import Run, Slice
    from gocm_lib.senders.upstream import Upstream

    scheme = "https" if ca else "http"
    upstream = Upstream(DIALECTS["gcm"], f"{scheme}://127.0.0.1:{port}/gcm/send", ca_file=ca)
    message = json.dumps({"data": PAYLOAD})
    selector, idle = _connected(port, ca, connections, ["http/1.1"])
    requests = []
    for number in range(scenario.posts):
        part = Slice("gcm", "token", message, [Run(1, 0, 1, [f"{number:08d}-floor-{TOKEN}"])], 0, "key=bench")
        requests += [found.http1() for _, found in upstream.requests(part)]
    began, used, done = time.monotonic(), time.process_time(), 0
    while done < scenario.posts:
        while idle and requests:
            idle.pop().send(requests.pop())
        for key, _ in selector.select():
            with contextlib.suppress(ssl.SSLWantReadError):  # a session ticket, say
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj.recv(65536).endswith(b"}"):
                    done += 1
                    idle.append(key.fileobj)
    pipe.send({"seconds": time.monotonic() - began, "cpu": (time.process_time() - used) * 1e6})


def _connected(
    port: int, ca: str, count: int, protocols: list[str]
) -> tuple[selectors.BaseSelector, list[socket.socket]]:
    """Connections to the upstream, and a selector that watches them."""
    context = ssl.create_default_context(cafile=ca) if ca else None
    if context:
        context.set_alpn_protocols(protocols)
    selector, made = selectors.DefaultSelector(), []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        if context:
            sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
        made.append(sock)
    return selector, made


def _floor2(port: int, ca: str, scenario: Scenario, connections: int, token: str, pipe: Connection) -> None:
    """The same by HTTP/2, a hundred streams on each connection; of the answers only the ends are looked at."""
    from gocm_lib.http2 import frames
    from gocm_lib.http2.hpack import plain

    path = f"/v1/projects/{PROJECT}/messages:send"
    head = b"\x83\x87" + plain(":path", path) + plain(":authority", "localhost")  # POST by https
    head += plain("authorization", f"Bearer {token}") + plain("content-type", "application/json")
    data = {name: str(value) for name, value in PAYLOAD.items()}
    bodies = [
        json.dumps({"message": {"data": data, "token": f"{n:08d}-floor-{TOKEN}"}}).encode()
        for n in range(scenario.posts)
    ]
    selector, lines = _connected(port, ca, connections, ["h2"])
    for sock in lines:
        room = frames.word(frames.WINDOW_UPDATE, 0, 1 << 30)  # for all answers
        sock.send(frames.PREFACE + frames.settings({}) + room + frames.frame(frames.SETTINGS, frames.ACK, 0))
    streams, open_, buffers = dict.fromkeys(lines, 1), dict.fromkeys(lines, 0), {sock: b"" for sock in lines}
    began, used, done = time.monotonic(), time.process_time(), 0
    while done < scenario.posts:
        for sock in lines:
            out = []
            while bodies and open_[sock] < 100:
                stream, body = streams[sock], bodies.pop()
                out.append(frames.headers(stream, head, 0) + frames.frame(frames.DATA, frames.END_STREAM, stream, body))
                streams[sock], open_[sock] = stream + 2, open_[sock] + 1
            if out:
                sock.send(b"".join(out))
        time.sleep(0.004)
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            ended, buffers[key.fileobj] = _ends(buffers[key.fileobj] + _all_of(key.fileobj))
            open_[key.fileobj] -= ended
            done += ended
    pipe.send({"seconds": time.monotonic() - began, "cpu": (time.process_time() - used) * 1e6})


def _all_of(sock: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
        while data := sock.recv(65536):
            parts.append(data)
    return b"".join(parts)


def _ends(data: bytes) -> tuple[int, bytes]:
    """How many streams end in these frames, and what is left of them."""
    at = ended = 0
    while at + 9 <= len(data) and at + 9 + (size := int.from_bytes(data[at : at + 3])) <= len(data):
        ended += data[at + 3] < 2 and data[at + 4] & 1
        at += 9 + size
    return ended, data[at:]


# ---------------------------------------------------------------------------------------------------------- the bench


class Bench:
    """A sandbox, and a server for each scenario, in a temporary directory."""

    def __init__(self, settings: BenchSettings, directory: Path) -> None:
        self.settings = settings
        self.directory = directory
        self.context = get_context("spawn")
        self.ca = ""
        words = ["--port", "0", "--latency", str(settings.latency)]
        if not settings.plain:
            self.ca = str(make_certificate(directory))
            words += ["--tls-cert", self.ca, "--tls-key", str(directory / "key.pem")]
        self.sandbox = Server(directory, "sandbox", "sandbox", *words)
        scheme = "http" if settings.plain else "https"
        self.url = f"{scheme}://127.0.0.1:{self.sandbox.port}"

    def ask(self, method: str, path: str, given: Any = None) -> Any:
        """What the sandbox answers, as JSON."""
        import urllib.request

        context = ssl.create_default_context(cafile=self.ca) if self.ca else None
        data = None if given is None else json.dumps(given).encode()
        asked = urllib.request.Request(self.url + path, data, {"Metadata-Flavor": "Google"}, method=method)
        with urllib.request.urlopen(asked, timeout=60, context=context) as answer:
            content = answer.read()
        return json.loads(content) if content.startswith(b"{") else None

    def token(self) -> str:
        """A new access token."""
        found = self.ask("GET", "/computeMetadata/v1/instance/service-accounts/default/token")
        return str(found["access_token"])

    def serve(self, scenario: Scenario, *more: str) -> Server:
        """A server with an empty spool that sends to the sandbox; or on the spool that --spool names."""
        spool = self.settings.spool or str(self.directory / "spool" / "gocm.db")
        words = ["--port", "0", "--spool", spool, "--node", "bench", "--log-level", "debug"]
        words += ["--senders", str(self.settings.senders), "--upstream-ca", self.ca, "--max-pending", "2000000"]
        if scenario.upstream == "gcm":
            key = self.directory / "key"
            key.touch(0o600)
            key.write_text("bench")
            words += ["--gcm-url", self.url + "/gcm/send", "--apikey-file", str(key)]
        else:
            token = self.directory / "token"
            token.write_text(self.token())
            words += ["--fcm-url", self.url, "--fcm-project", PROJECT, "--token-command", f"cat {token}"]
            words += ["--fcm-rate", "0"]
        return Server(self.directory, "server", *words, *more)

    def elsewhere(self, function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
        """Run a function in another process; returns what it sends."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=function, args=(*arguments, theirs))
        process.start()
        theirs.close()
        try:
            while not ours.poll(SAMPLE):
                yield None
            yield ours.recv()
        except EOFError:
            raise Fatal("the bench's own load failed; see above", Exit.FAILED) from None
        finally:
            process.join(5)
            process.kill()

    def floor(self, scenario: Scenario) -> dict[str, Any]:
        bare, connections = (_floor, 512) if scenario.upstream == "gcm" else (_floor2, 10)
        arguments = (self.sandbox.port, self.ca, scenario, min(connections, scenario.posts), self.token())
        found = next(found for found in self.elsewhere(bare, *arguments) if found)
        total = found["cpu"] / scenario.posts
        return {"delivered_per_s": scenario.posts / found["seconds"], "cpu_us": {"total": total}}

    def measure(self, name: str, scenario: Scenario, show: Callable[[str], None]) -> dict[str, Any]:
        """Run a scenario. Returns its figures: CPU time and bytes for each token."""
        self.ask("POST", "/sandbox/reset")
        server = self.serve(scenario, *(PATIENT if name == "backlog" else ()))
        try:
            opened = self.warm_up(server, scenario, show)
            if name == "backlog":
                self.ask("POST", "/sandbox/mode", {"silent": True})
            before = self.look(server)
            load = self.post(server, scenario, scenario.rate or None, show)
            accepted = len(load["latencies"])
            if name == "backlog":
                self.ask("POST", "/sandbox/mode", {"silent": False})
            began = time.monotonic() - (0.0 if name == "backlog" else load["seconds"])
            self.drain(server, show)
            seconds = time.monotonic() - began
            after, counts = self.look(server), self.ask("GET", "/sandbox/counts")
            tokens = accepted * scenario.in_a_post()
            half = {}
            if name == "single":  # how long a client waits when the server is not at its limit
                rate = accepted / load["seconds"] / 2
                quarter = scenario._replace(posts=max(1, scenario.posts // 4))
                half = {"accept_ms_at_half_rate": percentiles(self.post(server, quarter, rate, show)["latencies"])}
                self.drain(server, show)
        finally:
            server.stop()
            shutil.rmtree(self.directory / "spool", ignore_errors=True)
        cpu = {
            part: [(then - now) / max(1, tokens) for (now, _), (then, _) in zip(before[part], after[part])]
            for part in after
        }
        return {
            "accepted_per_s": accepted * max(1, scenario.lines) / load["seconds"],
            "delivered_per_s": tokens / seconds,
            "accept_ms": percentiles(load["latencies"]),
            **half,
            "cpu_us": {**cpu, "total": sum(map(sum, cpu.values()))},
            "written_bytes": (bytes_written(after) - bytes_written(before)) / max(1, tokens),
            "connections": counts["connections"] - opened - 1,  # one was our question
            "pss_mb": server.peaks,
            "refused": {status.decode(): count for status, count in load["refused"].items()},
        }

    def warm_up(self, server: Server, scenario: Scenario, show: Callable[[str], None]) -> int:
        """Have connections made, caches filled and code loaded before counting: until a round opens hardly any
        connection, because a handshake costs as much as ten messages. Returns how many were opened in all.
        """
        part, opened = scenario._replace(posts=max(1, scenario.posts // 2)), 0
        for _ in range(WARM_UPS):
            self.post(server, part, None, show)
            self.drain(server, show)
            before, opened = opened, self.ask("GET", "/sandbox/counts")["connections"]
            if opened - before <= 1 + part.posts * part.in_a_post() // 1000:
                break
        return opened

    def look(self, server: Server) -> dict[str, list[tuple[float, int]]]:
        """CPU time and bytes written of each process so far, and of the spool's server, if that is here."""
        used = {part: [(cpu_used(pid), written(pid)) for pid in pids] for part, pids in server.processes().items()}
        if self.settings.spool and (pid := spool_server(self.settings.spool)):
            used["spool"] = [(cpu_of_tree(pid), 0)]
        return used

    def post(
        self, server: Server, scenario: Scenario, rate: float | None, show: Callable[[str], None]
    ) -> dict[str, Any]:
        """Post a scenario's messages. Returns what the load found."""
        began = time.monotonic()
        for found in self.elsewhere(_load, server.port, scenario, rate):
            server.note_memory()
            if found is not None:
                return dict(found)
            show(f"posting for {time.monotonic() - began:.0f} s")
            if time.monotonic() - began > RUN_LIMIT:
                break
        raise Fatal(f"the load did not end within {RUN_LIMIT:.0f} s", Exit.FAILED)

    def drain(self, server: Server, show: Callable[[str], None]) -> None:
        """Wait until nothing is pending."""
        began = time.monotonic()
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        while time.monotonic() - began < RUN_LIMIT:
            client.request("GET", "/gcm/report")
            report = json.loads(client.getresponse().read())
            if report.get("pending") == 0:
                return
            show(f"{report.get('pending', '?')} messages pending")
            server.note_memory()
            time.sleep(0.05)
        raise Fatal(f"messages were still pending after {RUN_LIMIT:.0f} s", Exit.FAILED)


def bytes_written(looks: Mapping[str, Sequence[tuple[float, int]]]) -> int:
    return sum(count for part in looks.values() for _, count in part)


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 of sorted seconds, in milliseconds."""
    return {
        f"p{share}": latencies[min(len(latencies) - 1, len(latencies) * share // 100)] * 1000 if latencies else 0.0
        for share in (50, 90, 99)
    }


def make_certificate(directory: Path) -> Path:
    """Make a self-signed certificate for 127.0.0.1, and key.pem beside it."""
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", "/CN=gocm bench", "-addext", "subjectAltName=IP:127.0.0.1"]
    words += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "ca.pem")]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise Fatal("a certificate needs the command openssl; without it say --plain", Exit.FAILED) from None
    return directory / "ca.pem"


def _each(form: str, values: Sequence[float]) -> str:
    return "+".join(form.format(value) for value in values)


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("accepted/s", lambda found: f"{found['accepted_per_s']:,.0f}"),
    ("delivered/s", lambda found: f"{found['delivered_per_s']:,.0f}"),
    ("accept ms p50/p90/p99", lambda found: "/".join(f"{wait:.1f}" for wait in found["accept_ms"].values())),
    ("p99 at half rate", lambda found: f"{found['accept_ms_at_half_rate']['p99']:.1f}"),
    ("CPU us", lambda found: f"{found['cpu_us']['total']:.1f}"),
    ("front", lambda found: _each("{:.1f}", found["cpu_us"]["front"])),
    ("state", lambda found: _each("{:.1f}", found["cpu_us"]["state"])),
    ("senders", lambda found: _each("{:.1f}", found["cpu_us"]["senders"])),
    ("spool server", lambda found: _each("{:.1f}", found["cpu_us"]["spool"])),
    ("connections", lambda found: str(found["connections"])),
    ("MB front+state+senders", lambda found: _each("{:.0f}", [mb for part in found["pss_mb"].values() for mb in part])),
    ("bytes written", lambda found: f"{found['written_bytes']:,.0f}"),
)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of all scenarios as a table. What a scenario does not have is left empty."""
    rows = [["scenario", *(title for title, _ in COLUMNS)]]
    for name, found in results.items():
        rows.append([name])
        for _, show in COLUMNS:
            try:
                rows[-1].append(show(found))
            except KeyError:
                rows[-1].append("")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def command(settings: BenchSettings) -> int:
    """`gocm bench`: run the scenarios that are asked for and print a table, or JSON with --json. Raises Fatal."""
    names = settings.scenarios.split(",") if settings.scenarios else list(SCENARIOS)
    for name in names:
        if name not in SCENARIOS:
            raise Fatal(f"--scenarios {name} is not known; there are {', '.join(SCENARIOS)}", topic="bench")
    results: dict[str, Any] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Exit.OK))  # so that what we started is stopped then, too
    try:
        directory = Path(tempfile.mkdtemp(prefix="gocm-bench-", dir=settings.directory or None))
    except OSError as error:
        raise Fatal(f"--directory {settings.directory}: {error.strerror}", topic="bench") from None
    sandbox = None
    try:
        bench = Bench(settings, directory)
        sandbox = bench.sandbox
        for name in names:
            scenario = SCENARIOS[name]
            scenario = scaled(scenario, settings.messages)
            show = _progress(name)
            if name in ("floor", "floor2"):
                results[name] = bench.floor(scenario)
            else:
                results[name] = bench.measure(name, scenario, show)
            show("")
    finally:
        if sandbox:
            sandbox.stop()
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(results, indent=2) if settings.json else table(results))
    return Exit.OK


def scaled(scenario: Scenario, tokens: int) -> Scenario:
    """The scenario with about this many tokens; unchanged when 0."""
    return scenario._replace(posts=max(1, tokens // scenario.in_a_post())) if tokens else scenario


def _progress(name: str) -> Callable[[str], None]:
    """A function that shows on a terminal, in one line, what a scenario is doing."""

    def show(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{name}: {what}" if what else "\r\x1b[K", end="", file=sys.stderr, flush=True)

    return show
