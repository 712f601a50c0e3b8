"""What the tests share: GoCM and its sandbox as real processes on free ports, and waiting for conditions."""

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 30.0  # seconds: far more than anything takes, so that only what never happens fails

hypothesis.settings.register_profile("gocm", deadline=None, print_blob=True)
hypothesis.settings.load_profile("gocm")


def eventually(condition, limit=LIMIT, every=0.02):
    """The first true value of condition(), which must come within the limit."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"never true: {condition}"
        time.sleep(every)


def stand_still(pid):
    """SIGSTOP a process, and return when it has stopped: the signal takes its time."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def memory(pids):
    """MB that these processes have for themselves or share among each other (PSS)."""
    rows = (row.split() for pid in pids for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(row[1]) for row in rows if row[0] == "Pss:") / 1024


STARTED = []  # every Program, so that none outlives the tests, however they end


class Program:
    """A GoCM command as a process in a group of its own; its log is read while it runs. `files` is its ulimit -n."""

    def __init__(self, *words, environ=None, files=None, stdout=False):
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        self.process = subprocess.Popen(
            self.command(words),
            pass_fds=self.inherited(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
            preexec_fn=limit,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("GOCM_")}, **(environ or {})},
        )
        STARTED.append(self)
        self.lines = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def command(self, words):
        """How it is started."""
        return [sys.executable, str(ROOT / "gocm.py"), *words]

    def inherited(self):
        """The descriptors that it is to have beside the usual three."""
        return []

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def printed(self):
        """What it has printed; it must have ended."""
        return self.process.stdout.read()

    def log(self):
        return "\n".join(self.lines)

    def find(self, pattern):
        return re.findall(pattern, self.log())

    def logged(self, pattern, limit=LIMIT):
        """The last match of the pattern in the log, waited for."""

        def look():
            assert self.process.poll() is None or self.find(pattern), f"it ended:\n{self.log()}"
            return self.find(pattern)

        return eventually(look, limit)[-1]

    def wait(self, limit=LIMIT):
        """Its exit code, and its whole log read."""
        code = self.process.wait(limit)
        self._reading.join(2)
        return code

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def group(self):
        """Process ids of all that belongs to it."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                found += [pid] if os.getpgid(pid) == self.process.pid else []
        return found

    def kill_group(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


def dial(place, source="127.0.0.1"):
    """A connection to a port on this machine, from an address of it, or to a UNIX socket."""
    if isinstance(place, int):
        return socket.create_connection(("127.0.0.1", place), LIMIT, (source, 0))
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LIMIT)
    sock.connect(place)
    return sock


class Connection(http.client.HTTPConnection):
    """One whose way to the server is ours to choose."""

    def connect(self):
        self.sock = self.wrap(dial(self.place))


class Http:
    """A kept-alive client of a port on this machine, or of a UNIX socket."""

    def __init__(self, place, wrap=lambda sock: sock):
        self.connection = Connection("localhost", place if isinstance(place, int) else 0)
        self.connection.place, self.connection.wrap = place, wrap

    def ask(self, method, path, body=None, headers=None):
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def json(self, method, path, body=None):
        status, _, answer = self.ask(method, path, None if body is None else json.dumps(body))
        assert status == 200, answer
        return json.loads(answer) if answer.startswith(b"{") else answer


def form(tokens, payload='{"a":1}', **options):
    pairs = [("tokens", token) for token in tokens] + [("payload", payload), *options.items()]
    return urllib.parse.urlencode(pairs)


def told(snapshot):
    """The counters that the original has, without what came later."""
    return {
        name: snapshot.counters[name] for name in ("attempts", "failures", "canonicals", "notregistered", "dropped")
    }


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Sandbox(Program):
    def __init__(self, *words):
        super().__init__("sandbox", "--port", "0", *words)
        self.port = int(self.logged(r"listens on \S+ port (\d+)"))

    def received(self):
        return Http(self.port).json("GET", "/sandbox/received")

    def mode(self, **fields):
        Http(self.port).json("POST", "/sandbox/mode", fields)

    def url(self, scheme="http"):
        return f"{scheme}://127.0.0.1:{self.port}/gcm/send"


class Server(Program):
    """A GoCM server on a free port, quick to retry."""

    def __init__(self, spool, *words, environ=None, files=None, unix=""):
        words = (*words, "--socket", unix) if unix else words
        super().__init__(
            *("--port", "0", "--spool", str(spool), "--log-level", "debug", "--retry-base", "0.05", *words),
            environ=environ,
            files=files,
        )
        self.spool = str(spool)
        self.port = int(self.logged(r"gocm \S+ listens on \S+ port (\d+)"))
        self.place = unix or self.port

    def http(self):
        return Http(self.place)

    def send(self, tokens, payload='{"a":1}', client=None, **options):
        """Post a message and return its job id."""
        status, headers, body = (client or self.http()).ask("POST", "/gcm/send", form(tokens, payload, **options), FORM)
        assert (status, body) == (200, b"ok\n"), (status, body)
        return headers["X-GoCM-Job"]

    def report(self):
        return self.http().json("GET", "/gcm/report")

    def report_or_none(self):
        """The report, or None where the server cannot say just now."""
        status, _, answer = self.http().ask("GET", "/gcm/report")
        return json.loads(answer) if status == 200 else None

    def settled(self):
        """The report once nothing is pending."""
        return eventually(lambda: (report := self.report())["pending"] == 0 and report)

    def children(self, name=r"\S+"):
        """Process ids of children whose name matches, those that still run, the newest last."""
        return [int(pid) for pid in self.find(rf"front: {name} is process (\d+)") if Path(f"/proc/{pid}").exists()]


class Unread(Server):
    """A server whose log is read only while it `is_read`."""

    def __init__(self, *words):
        self.is_read = threading.Event()
        self.is_read.set()
        super().__init__(*words)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self.is_read.wait()


class Upstream:
    """A socket server that gives each connection to a function (sock, number of the connection)."""

    def __init__(self, behave):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        self.requests = []
        self.behave = behave
        threading.Thread(target=self._run, daemon=True).start()

    def url(self):
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}/gcm/send"

    def _run(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True).start()

    def _serve(self, sock, number):
        with sock:
            try:
                self.behave(self, sock, number)
            except OSError:
                pass

    def read(self, sock):
        """The tokens of the next request on the connection; None at its end."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return None
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += sock.recv(65536)
        tokens = json.loads(body)["registration_ids"]
        self.requests.append((head, tokens))
        return tokens


def answer(tokens, results=None):
    body = json.dumps({"results": results if results is not None else [{"message_id": "1"}] * len(tokens)}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.fixture
def sandbox():
    program = Sandbox()
    yield program
    program.kill_group()


@pytest.fixture
def run(tmp_path):
    """A function that starts a server on the test's spool with the words given."""
    running = []

    def start_server(*words, **how):
        running.append(Server(tmp_path / "spool" / "gocm.db", *words, **how))
        return running[-1]

    yield start_server
    for program in running:
        program.kill_group()


@pytest.fixture(scope="session")
def key_file(tmp_path_factory):
    """A file that holds an API key."""
    path = tmp_path_factory.mktemp("key") / "apikey"
    path.touch(0o600)
    path.write_text("k")
    return str(path)


@pytest.fixture
def start(sandbox, run, key_file):
    """A function that starts a server sending legacy GCM to the test's sandbox, or to `url`."""
    words = ("--apikey-file", key_file)
    return lambda *more, url=None, **how: run("--gcm-url", url or sandbox.url(), *words, *more, **how)


@pytest.fixture
def start_fcm(sandbox, run):
    """A function that starts a server sending FCM v1 to the test's sandbox."""
    host = f"127.0.0.1:{sandbox.port}"
    return lambda *words: run("--fcm-url", f"http://{host}", "--fcm-metadata", "--metadata-host", host, *words)


@pytest.fixture
def temporary():
    """A directory for temporary files with a short name: that of a socket in it must not be long."""
    with tempfile.TemporaryDirectory(prefix="t-") as place:
        yield Path(place)


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def authority(tmp_path):
    """An authority whose certificate is in ca.pem."""
    import trustme

    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return made


@pytest.fixture
def upstream():
    made = []

    def make(behave):
        made.append(Upstream(behave))
        return made[-1]

    yield make
    for each in made:
        each.listener.close()


def pytest_sessionfinish():
    for program in STARTED:
        program.kill_group()


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")  # the tests' own clients are left to the end
    config.addinivalue_line("markers", "slow: takes over five seconds")
    config.addinivalue_line("markers", "short: the short suite, run on every Python")
