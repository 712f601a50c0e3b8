"""What several test files share: programs that are started, clients, states, and what they say."""

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import pytest

from gocm_lib.message.assertion import AUDIENCES
from gocm_lib.message.job import Job
from gocm_lib.message.retry import Policy
from gocm_lib.state.admission import Keeping, Limits
from gocm_lib.state.contract import Which
from gocm_lib.state.pace import start_pace
from gocm_lib.state.packs import pack
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.state import State

ROOT = Path(__file__).parent.parent


LIMIT = 30.0  # seconds: far more than anything takes, so that only what never happens fails


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


def kill(pids):
    """SIGKILL to these processes, of which some may end by themselves when others do: a generation ends as a whole."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def dial(place, source=""):
    """A connection to a port on this machine, from an address of it if one is given, or to a UNIX socket."""
    if isinstance(place, int):
        # Without one the kernel chooses our port when it knows theirs: else, once nobody listens there any more, it may
        # choose the very same, and the connection leads to itself.
        return socket.create_connection(("127.0.0.1", place), LIMIT, (source, 0) if source else None)
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


def free_port():
    """A port that nobody has, for programs that cannot pick one."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


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
    """The sandbox as a process. One that a test has finished with is used again: starts are dear."""

    idle = []

    @classmethod
    def take(cls):
        """One without options that is as if just started."""
        while cls.idle:
            if (program := cls.idle.pop()).process.poll() is None:
                return program.emptied()
        return cls()

    def leave(self):
        """Nobody needs it any more."""
        self.idle.append(self)

    def emptied(self):
        """Itself, having forgotten what it has received and how it was to behave."""
        # Asked first, so that it has read whatever killed servers have sent it.
        Http(self.port).json("GET", "/sandbox/counts")
        assert Http(self.port).ask("POST", "/sandbox/reset")[0] == 200
        return self

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
        """The report once nothing is pending. A state process that has much to settle may not answer at once."""
        return eventually(lambda: (report := self.report_or_none()) and report["pending"] == 0 and report)

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


def jwt(key, alg="RS256", kid="", **claims):
    """An assertion of the account me@x, or whose the claims say, that is signed with a key (RFC 7523)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    now = int(time.time())
    said = {"iss": "me@x", "aud": AUDIENCES[0], "iat": now, "exp": now + 3600} | claims
    parts = ({"alg": alg, "typ": "JWT", **({"kid": kid} if kid else {})}, said)
    signed = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    signature = key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return signed + "." + base64.urlsafe_b64encode(signature).decode().rstrip("=")


@contextlib.contextmanager
def serving(server):
    """A socketserver's server, while it serves. It looks often whether it is to stop: half a second is its default."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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


def _client(port, tokens, accepted):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for token in tokens:
            body = b"tokens=%b&payload=%%7B%%22a%%22%%3A%%22%b%%22%%7D" % (token.encode(), token.encode())
            sock.sendall(
                b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            answer = sock.recv(65536)
            if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"ok\n")):
                return
            accepted.append(token)


def post_from_clients(port, clients, messages):
    """The tokens that were accepted, of `messages` posted by so many clients at once."""
    accepted = []
    threads = [
        threading.Thread(target=_client, args=(port, [f"t{k}-{n}" for n in range(messages // clients)], accepted))
        for k in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return accepted


def secret(path, text="x" * 20, mode=0o600):
    """A file with this mode from the first moment."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, mode))
    os.chmod(path, mode)
    Path(path).write_text(text)
    return str(path)


def ends(*words, environ=None):
    """(exit code, the lines on stderr) of a command that must end by itself within two seconds."""
    with tempfile.TemporaryDirectory(prefix="t-") as place:  # what others have left is told where it is found
        program = Program(*words, environ={"TMPDIR": place, **(environ or {})})
        try:
            return program.wait(10), program.lines
        finally:
            program.kill_group()


def output(*words):
    """(exit code, what it prints) of a command that ends by itself."""
    program = Program(*words, stdout=True)
    try:
        return program.wait(20), program.printed()
    finally:
        program.kill_group()


TOKEN, OTHER = "0123456789abcdef", "fedcba9876543210"


def issue(authority, tmp_path, **how):
    """A certificate for this machine, in tls.pem and key.pem."""
    secret(tmp_path / "key.pem")
    issued = authority.issue_cert("127.0.0.1", "localhost", **how)
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(tmp_path / "tls.pem"), append=number > 0)


def https(server, tmp_path):
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    return Http(server.port, lambda sock: context.wrap_socket(sock, server_hostname="localhost"))


class Raw:
    """A client that writes and reads bytes."""

    def __init__(self, place, source=""):
        self.sock = dial(place, source)

    def send(self, data):
        self.sock.sendall(data)
        return self

    def until(self, end):
        """What arrives up to and with `end`."""
        data = b""
        while not data.endswith(end):
            piece = self.sock.recv(1)
            assert piece, f"closed after {data!r}"
            data += piece
        return data

    def rest(self):
        """What arrives until the server closes."""
        data = b""
        while piece := self.sock.recv(65536):
            data += piece
        return data


CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n"


def holds(server, sock):
    """Whether the server has its end of a connection open."""
    ends = [f"{port:04X}" for port in (server.port, sock.getsockname()[1])]
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any([row[1][-4:], row[2][-4:]] == ends and row[3] == "01" for row in rows)  # 01: established


POLICY = Policy(10.0, 100.0, 3)


KEEPING = Keeping(
    Limits(10**9, 1 << 50, 0),
    failed_age=1e9,
    max_failed=10**9,
    max_report=10**9,
    keep_jobs=1e9,
    max_kept=10**9,
    max_keys=10**9,
)


def paces(*upstreams):
    return {name: start_pace(1e6, 0.0) for name in upstreams}


def new_state(path=":memory:", upstreams=("gcm",), keeping=KEEPING):
    return keep(open_spool(path, upstreams, keeping), upstreams, keeping)


# The suite asks the same of a State on any Store: with TESTED_STORE=postgres of one in PostgreSQL.
IN_POSTGRES = os.environ.get("TESTED_STORE") == "postgres"
of_sqlite = pytest.mark.skipif(IN_POSTGRES, reason="looks at SQLite's own ways")


def open_spool(path, upstreams, keeping):
    """A Store in the file at a path, or on a new spool that is nowhere else."""
    if IN_POSTGRES and path == ":memory:":
        from postgres import empty_store

        return empty_store(keeping, upstreams)
    return SqliteStore.open(str(path), keeping)


def keep(store, upstreams=("gcm",), keeping=KEEPING, living=()):
    """A State on a store."""
    return State(store, POLICY, keeping, paces(*upstreams), draw=lambda: 0.5, living=living)


def succeed(state, keeping=KEEPING, upstreams=("gcm",), living=()):
    """What a state process makes of the spool of one that has ended, while these generations live."""
    store = state.store
    again = (store.db, store.disk) if isinstance(store, SqliteStore) else (store.db, store.member)
    return keep(type(store)(*again, keeping), upstreams, keeping, living)


def accept(state, jobs):
    """What became of jobs that are not kept, by their ids."""
    return state.accept(pack(jobs)).not_kept


def tally(state):
    """How much the state says there is."""
    totals = state.store.totals
    return {
        "jobs": totals.jobs,
        "tokens": totals.tokens,
        "failed": totals.failed,
        "over": totals.over,
        "finished": totals.finished,
    }


def open_tokens(state):
    """How many tokens of each upstream are to be sent still."""
    return dict(state.store.totals.open)


def new_job(job_id, tokens, now=1000.0, life=10_000.0, upstream="gcm"):
    return Job(job_id, upstream, "token", tuple(tokens), '{"data":{"a":1}}', now, now + life)


batches = itertools.count(1)


def claim(state, generation=1, now=1000.0, room=100, batch=None):
    in_hand_limits, ready = dict.fromkeys(state.pacing.standings, room), dict.fromkeys(state.pacing.standings, 0.0)
    slices, *_ = state.claim(generation, batch or next(batches), in_hand_limits, ready, now, 0.0)
    return tokens_of(slices)


class Token(NamedTuple):
    token: str
    attempt: int


def tokens_of(slices):
    """The tokens of slices, by job and place in it."""
    return {
        (run.job, n): Token(token, run.attempt)
        for claimed in slices
        for run in claimed.runs
        for n, token in enumerate(run.tokens, run.first)
    }


def check_ledger(server, sandbox, accepted, twice=frozenset()):
    report = server.settled()
    received = sandbox.received()
    assert received["requests"] > 0, "a ledger that saw nothing proves nothing"
    missing = set(accepted) - set(received["delivered"])
    assert not missing, f"{len(missing)} of {len(accepted)} never arrived"
    assert set(received["arrived"]) == set(accepted)
    assert {token for token, times in received["arrived"].items() if times > 1} <= set(twice)
    assert report == {"attempts": len(accepted), "failures": 0, "pending": 0, "canonicals": 0, "notregistered": 0}
    return received


def keep_sending(server, tokens, accepted, ended, every):
    """Post one-token messages until told otherwise; remember which were accepted."""
    client = server.http()
    for token in tokens:
        if ended.wait(every):
            return
        try:
            server.send([token], client=client)
            accepted.append(token)
        except (AssertionError, OSError):  # 503, or nobody there: not accepted, so nothing is owed
            client = server.http()


def four_clients(server, messages, accepted, ended=None, every=0.0):
    """Four threads that each send so many messages, or until `ended` is set, with so many seconds between two."""
    ended = ended or threading.Event()
    clients = []
    for k in range(4):
        tokens = [f"{k}-{n}" for n in range(messages)]
        clients.append(threading.Thread(target=keep_sending, args=(server, tokens, accepted, ended, every)))
        clients[-1].start()
    return clients


README = (ROOT / "README.md").read_text()


def block(kind, text=README):
    """The lines of the first fenced block of this kind in a text; none where there is none."""
    found = re.search(rf"```{kind}\n(.*?)\n```", text, re.DOTALL)
    return found[1].splitlines() if found else []


class Carbon:
    """Takes Graphite's lines."""

    def __init__(self, port=0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.lines = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, sock.makefile() as lines:
                self.lines += list(lines)

    def values(self, path):
        return [float(line.split()[1]) for line in self.lines if line.startswith(path + " ")]

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


ALL = Which(0, "", "", float("inf"))
