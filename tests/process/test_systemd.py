"""systemd: what it is told, the sockets that it opens, its watchdog, and the unit files."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kit import FORM, LIMIT, ROOT, Http, Program, Server, dial, eventually, form, stand_still

UNITS = ROOT / "systemd"


class Notified:
    """A notify socket as systemd has one: what arrives there, line by line."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.lines = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            self.lines += self.sock.recv(65536).decode().split("\n")

    def has(self, pattern):
        return eventually(lambda: [line for line in self.lines if re.fullmatch(pattern, line)])


@pytest.fixture
def notified(tmp_path):
    return Notified(tmp_path / "notify")


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told_what_happens(start, sandbox, tmp_path, abstract):
    path = f"\0gocm-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    notified = Notified(path)
    server = start("--metrics-interval", "0.1", environ={"NOTIFY_SOCKET": path.replace("\0", "@")})
    notified.has("READY=1")
    server.send(["a", "gone-b"])
    notified.has("STATUS=pending 0, delivered 1")
    sandbox.mode(status=401)
    for token in "cdefgh":  # more than chance explains, after two that got through
        server.send([token])
    notified.has("STATUS=pending 6, delivered 1; gcm is paused: HTTP 401")
    before = len(notified.lines)
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: "READY=1" in notified.lines[before:])
    assert notified.lines[before] == "RELOADING=1" and notified.lines[before + 1].startswith("MONOTONIC_USEC=")
    for pid in server.children():
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes(), "no child may speak for us"
    assert server.terminate() == 0
    notified.has("STOPPING=1")


@pytest.mark.parametrize("victim", ["state", "sender.*"])
def test_the_watchdog_is_told_until_something_stands_still(start, notified, tmp_path, victim):
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    server = start("--senders", "1", environ=environ)

    def pings():
        return notified.lines.count("WATCHDOG=1")

    eventually(lambda: pings() > 4)
    [pid] = server.children(victim)
    stand_still(pid)
    try:
        if victim == "state":
            assert server.http().ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 503
            server.logged("not told that we live: .*feeder, intake, state stands still")
        else:
            server.logged("not told that we live: sender-1.1, settling by sender-1.1 stands still")
        before = pings()
        server.process.send_signal(signal.SIGHUP)  # it is alive and deals with this, and yet
        server.logged("SIGHUP: keys")
        assert pings() == before
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: pings() > before + 2)


def test_answers_that_are_not_settled_are_told(start, notified, sandbox, tmp_path):
    """The sender turns, the state process is asked for nothing else: but what was answered waits."""
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000"}
    server = start("--senders", "1", environ=environ)
    sandbox.mode(latency=1.0)
    server.send(["a"])
    eventually(lambda: Http(sandbox.port).json("GET", "/sandbox/counts")["in_flight"] == 1)
    [pid] = server.children("state")
    stand_still(pid)
    try:
        server.logged("not told that we live: .*settling by sender-1.1")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert server.settled()["attempts"] == 1


def test_a_watchdog_that_is_another_process_s_is_not_ours(start, notified, tmp_path):
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    server = start(environ=environ)
    notified.has("READY=1")
    server.send(["a"])
    server.settled()
    assert "WATCHDOG=1" not in notified.lines


# ----------------------------------------------------------------------------------------------------------- sockets


class Activated(Program):
    """A GoCM that was handed listening sockets, as sd_listen_fds(3) has it."""

    def __init__(self, sockets, *words, environ=None):
        self.sockets = sockets
        self.environ = {"LISTEN_FDS": str(len(sockets)), **(environ or {})}
        super().__init__(*words, environ=self.environ)

    def command(self, words):
        # The shell keeps its process id over exec, so it can say whom the sockets are for.
        moves = " ".join(f"{3 + n}<&{sock.fileno()}" for n, sock in enumerate(self.sockets))
        script = f'export LISTEN_PID=$$; exec "$@" {moves}'
        return ["bash", "-c", script, "sh", *super().command(words)]

    def inherited(self):
        return [sock.fileno() for sock in self.sockets]


def listening(path=None):
    sock = socket.socket(socket.AF_UNIX) if path else socket.socket()
    sock.bind(path or ("127.0.0.1", 0))
    sock.listen(1024)
    os.set_inheritable(sock.fileno(), True)
    return sock


def test_handed_sockets_are_served_and_their_own_address_is_not_needed(sandbox, key_file, tmp_path):
    tcp, unix = listening(), listening(str(tmp_path / "s"))
    port = tcp.getsockname()[1]
    words = ("--gcm-url", sandbox.url(), "--apikey-file", key_file, "--spool", str(tmp_path / "gocm.db"))
    server = Activated([tcp, unix], *words, "--port", "1")
    try:
        server.logged(f"listens on 127.0.0.1 port {port} and {tmp_path}/s")
        for place in (port, str(tmp_path / "s")):
            assert Http(place).ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 200
        assert server.terminate() == 0 and (tmp_path / "s").exists(), "it is systemd's"
    finally:
        server.kill_group()


def test_no_connection_is_refused_while_it_restarts(sandbox, key_file, tmp_path):
    """Each request, on a connection of its own, is answered with 200, however often the server behind is replaced."""
    tcp = listening()
    words = ("--gcm-url", sandbox.url(), "--apikey-file", key_file, "--spool", str(tmp_path / "gocm.db"))
    ended, answers, problems = threading.Event(), [], []

    def post(k):
        while not ended.is_set():
            try:
                status = Http(tcp.getsockname()[1]).ask("POST", "/gcm/send", form([f"{k}-{len(answers)}"]), FORM)[0]
                answers.append(status)
            except OSError as error:
                problems.append(error)

    server = Activated([tcp], *words)
    clients = [threading.Thread(target=post, args=(k,)) for k in range(4)]
    try:
        for client in clients:
            client.start()
        for _ in range(3):
            wanted = len(answers) + 50
            eventually(lambda wanted=wanted: len(answers) >= wanted or problems)
            assert server.terminate() == 0
            server = Activated([tcp], *words)
        wanted = len(answers) + 50
        eventually(lambda: len(answers) >= wanted or problems)
        ended.set()
        for client in clients:
            client.join(LIMIT)
        assert not problems and set(answers) == {200}
        http = Http(tcp.getsockname()[1])
        eventually(lambda: http.json("GET", "/gcm/report")["pending"] == 0)
        assert http.json("GET", "/gcm/report")["attempts"] == len(answers)
    finally:
        ended.set()
        server.kill_group()


def refuses(port):
    """Whether nobody listens on the port."""
    try:
        dial(port).close()
    except ConnectionError:
        return True
    return False


@pytest.mark.alone
def test_what_came_before_the_end_is_answered_and_nothing_after(start, sandbox):
    """Half a request, and a connection that has not spoken yet, are no reason to refuse anybody."""
    sandbox.mode(silent=True)
    server = start("--drain", "6")
    late = [server.http() for _ in range(50)]
    for kept in late:
        kept.json("GET", "/gcm/report")
    server.send(["a"])
    eventually(lambda: sandbox.received()["in_flight"] == 1)
    request = f"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['Content-Type']}\r\n"
    request = (request + "Content-Length: 19\r\n\r\ntokens=b&payload={}").encode()
    files = f"/proc/{server.process.pid}/fd"
    before = len(os.listdir(files))
    half, silent = dial(server.port), dial(server.port)
    half.sendall(request[:-5])
    eventually(lambda: len(os.listdir(files)) >= before + 2)  # both are accepted
    server.process.send_signal(signal.SIGTERM)
    server.logged("stopping on SIGTERM")
    silent.sendall(request)
    eventually(lambda: refuses(server.port))
    half.sendall(request[-5:])
    for sock in (half, silent):
        answer = sock.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 ") and b"Connection: close" in answer
    answers = []
    eventually(lambda: answers.append(late.pop().ask("POST", "/gcm/send", form(["c"]), FORM)) or answers[-1][0] == 503)
    assert answers[-1][1]["Retry-After"]
    assert server.wait() == 0
    sandbox.mode(silent=False)
    start().settled()
    assert set(sandbox.received()["delivered"]) - {"c"} == {"a", "b"}, "c was taken while others were waited for"


def test_a_handed_socket_that_others_can_reach_needs_a_token(sandbox, key_file):
    sock = socket.socket()
    sock.bind(("0.0.0.0", 0))
    sock.listen()
    os.set_inheritable(sock.fileno(), True)
    server = Activated([sock], "--gcm-url", sandbox.url(), "--apikey-file", key_file, "--spool", ":memory:")
    assert server.wait() == 78 and "that systemd has opened can be reached by other machines" in server.log()


def test_what_is_said_to_be_a_socket_and_is_none_is_told(key_file):
    with open(key_file) as no_socket:
        server = Activated([no_socket], "--apikey-file", key_file, "--spool", ":memory:")
        assert server.wait() == 78 and server.lines == [
            "gocm: LISTEN_FDS: descriptor 3 is no socket: Socket operation on non-socket; see gocm help options"
        ]


def test_a_socket_handed_to_another_process_is_not_ours(start):
    server = start(environ={"LISTEN_FDS": "1", "LISTEN_PID": "1"})
    assert isinstance(server, Server) and server.report()["pending"] == 0


@pytest.mark.alone
@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is not here")
def test_systemd_s_own_tool_hands_us_its_socket(sandbox, key_file, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--gcm-url", sandbox.url(), "--apikey-file", key_file, "--spool", str(tmp_path / "gocm.db")]
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", sys.executable, str(ROOT / "gocm.py"), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd="/")
    try:
        assert "Listening on" in process.stderr.readline()
        assert Http(port).ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


# ------------------------------------------------------------------------------------------------------------- units


ANALYZE = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")


@ANALYZE
def test_the_unit_s_exposure_is_low():
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=12", UNITS / "gocm.service"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and float(re.search(r"exposure level.*: ([0-9.]+)", done.stdout)[1]) <= 1.2


@ANALYZE
def test_the_units_are_sound(tmp_path):
    service = (UNITS / "gocm.service").read_text()
    [command] = re.findall("^ExecStart=(.*)$", service, re.MULTILINE)
    assert command == "/usr/bin/python3 /opt/gocm/gocm.pyz"
    (tmp_path / "gocm.service").write_text(service.replace(command, "/bin/true"))
    shutil.copy(UNITS / "gocm.socket", tmp_path)
    (tmp_path / "gocm.service").chmod(0o644)  # whatever this machine's umask is
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "gocm.service", tmp_path / "gocm.socket"],
        capture_output=True,
        text=True,
    )
    # Of other packages' units, which ours are after, the machine may have odd ones.
    assert not [line for line in done.stderr.splitlines() if "gocm" in line]
