"""gocm sandbox exec: a command for which the sandbox is Google, and how both end."""

import base64
import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kit import LIMIT, ROOT, Upstream, dial, eventually, kill
from trustme import CA

from gocm_lib.front import google_variables
from gocm_lib.tools import record
from gocm_lib.tools.pretend_answers import ANSWERS, Answer
from gocm_lib.tools.received import Message

EXEC = [sys.executable, str(ROOT / "gocm.py"), "sandbox", "exec"]
SEND = """
import json, os, sys, requests
def send(token):
    answer = requests.post("https://fcm.googleapis.com/v1/projects/my-app/messages:send",
                           json={"message": {"token": token}}, headers={"Authorization": "Bearer any"})
    return answer.status_code
"""
root = pytest.mark.skipif(os.getuid() != 0, reason="takes root, to mount something of its own")


class Run:
    """A run of a command in a sandbox, with a temporary folder of its own."""

    def __init__(self, folder, *words, environ=None, how=(), **more):
        self.folder = folder / "tmp"
        self.folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*how, *EXEC, *words],
            env={**os.environ, "TMPDIR": str(self.folder), **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **more,
        )

    def line(self):
        """The next line that the command prints."""
        return self.process.stdout.readline().rstrip("\n")

    def ended(self, well=True):
        """The exit code; what the command has printed; what there was to say. Nothing is left."""
        try:
            printed, said = self.process.communicate(timeout=LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        eventually(lambda: not list(self.folder.iterdir()) and not self.processes())
        assert not well or "Traceback" not in said, said
        return self.process.returncode, printed, said

    def processes(self):
        """Those that have the temporary folder in their environment."""
        found = []
        for each in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if f"TMPDIR={self.folder}\0" in Path(f"/proc/{each}/environ").read_text(errors="replace"):
                    found.append(int(each))
        return found

    def sandbox(self):
        """The sandbox's process."""
        [found] = [pid for pid in self.processes() if os.getsid(pid) == pid != self.process.pid]
        return found


def python(code):
    return ("--", sys.executable, "-uc", SEND + code)


def test_a_command_is_led_to_the_sandbox_and_ends_as_it_ends(tmp_path):
    code, printed, said = Run(tmp_path, *python('print(send("phone-1"), send("gone-1")); sys.exit(7)')).ended()
    assert (code, printed) == (7, "200 404\n")
    assert said == "gocm: the sandbox was sent 2 messages to 2 tokens or topics, 1 refused (1 UNREGISTERED)\n"
    assert Run(tmp_path, "--", "true").ended()[0] == 0


def test_what_was_received_is_kept_whatever_resets_come_between(tmp_path):
    reset = 'requests.post(os.environ["GOCM_SANDBOX"] + "/sandbox/reset"); '
    program = (
        'send("a"); ' + reset + 'send("b"); print(requests.get(os.environ["GOCM_SANDBOX"] + "/sandbox/messages").text)'
    )
    run = Run(tmp_path, "--received", str(tmp_path / "kept"), *python(program))
    code, printed, said = run.ended()
    assert code == 0 and "2 messages" in said
    assert [each["message"]["message"]["token"] for each in json.loads(printed)["messages"]] == ["b"]
    kept = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines()]
    assert [each["message"]["message"]["token"] for each in kept] == ["a", "b"]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600


def test_other_hosts_are_refused_and_told(tmp_path):
    code, _, said = Run(tmp_path, "--", "curl", "-sS", "https://example.org/").ended()
    assert code == 56 and "response 403" in said
    assert said.endswith("1 connection to other hosts refused (1 example.org): --pass lets them through\n")


@pytest.mark.parametrize(
    "words, code, told",
    [
        (("--", "/no/such"), 127, "/no/such cannot be run"),
        (("--", "/etc"), 126, "/etc cannot be run"),
        (("--", ""), 127, "cannot be run: it has no name"),
        (("--",), 2, "say which command"),
        (("pytest", "-q"), 2, "put -- before the command"),
        (("--received", "/no/such/file", "--", "true"), 73, "--received /no/such/file cannot be written"),
        (("--latency", "soon", "--", "true"), 78, "--latency"),
    ],
)
def test_what_cannot_be_run_is_told(tmp_path, words, code, told):
    ended = Run(tmp_path, *words).ended()
    assert ended[0] == code and told in ended[2] and len(ended[2].splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- endings


TELLS = """
import signal, time
def told(number, frame):
    print("told", number)
    sys.exit(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, told)
print("ready")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(tmp_path, number):
    run = Run(tmp_path, *python(TELLS))
    assert run.line() == "ready"
    run.process.send_signal(number)
    code, printed, said = run.ended()
    assert (code, printed) == (number, f"told {int(number)}\n") and "0 messages" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_it_is_ended_by_what_ended_the_command(tmp_path, number):
    run = Run(tmp_path, "--", "sh", "-c", f"ulimit -c 0; kill -{int(number)} $$")
    code, _, said = run.ended()
    assert code == -number and "0 messages" in said


def test_a_terminal_interrupts_the_command_once(tmp_path):
    """As the terminal tells all of its foreground, what we passed on would be a second time."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TMPDIR"] = str(tmp_path)
        times = "import signal, time; n = []; signal.signal(2, lambda *_: n.append(1)); print('ready'); "
        times += "[time.sleep(0.1) for _ in range(100) if not n]; time.sleep(0.5); print('times', len(n))"
        os.execv(EXEC[0], [*EXEC, "--", sys.executable, "-uc", times])
    said = ""
    with contextlib.suppress(OSError):  # it is closed at the other end
        while more := os.read(terminal, 1000).decode():
            said += more
            if said.endswith("ready\r\n"):
                os.write(terminal, b"\x03")
    assert os.waitpid(pid, 0)[1] == 0 and "times 1" in said and "0 messages" in said
    assert not list(tmp_path.iterdir())


def test_what_is_sent_to_the_group_reaches_the_command_once(tmp_path):
    """A runner that ends a job sends its signal to all of it; pytest takes a second one for impatience."""
    counts = "import os, signal, time; n = []; signal.signal(2, lambda *_: n.append(1)); print(os.getpgrp()); "
    counts += "[time.sleep(0.1) for _ in range(100) if not n]; time.sleep(0.5); print('times', len(n))"
    run = Run(tmp_path, "--", sys.executable, "-uc", counts)
    # Two that come at the same moment may be one, so that counting alone would not tell.
    assert int(run.line()) != run.process.pid
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ended()[1] == "times 1\n"


def test_one_that_is_stopped_hears_all_the_same(tmp_path):
    run = Run(tmp_path, "--", "sh", "-c", "echo ready; kill -STOP $$; exit 4")
    assert run.line() == "ready"
    run.process.send_signal(signal.SIGTERM)
    assert run.ended()[0] == -signal.SIGTERM


def test_a_hang_up_is_passed_on_by_the_leader_of_a_session(tmp_path):
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TMPDIR"] = str(tmp_path)
        os.execv(EXEC[0], [*EXEC, "--", "sh", "-c", "echo ready; exec sleep 60"])
    said = ""
    while "ready" not in said:
        said += os.read(terminal, 1000).decode()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGHUP
    assert not list(tmp_path.iterdir())


def test_what_the_command_leaves_in_the_background_is_ended(tmp_path):
    for sleep in ("sleep 60", "setsid sleep 60", "sh -c 'trap : TERM; sleep 60; sleep 60'"):
        code, _, said = Run(tmp_path, "--", "sh", "-c", f"{sleep} >/dev/null 2>&1 & exit 5").ended()
        assert code == 5 and "0 messages" in said


def test_killed_while_it_starts_it_leaves_nothing(tmp_path):
    for moment in (0.1, 0.15, 0.2, 0.25, 0.3):
        run = Run(tmp_path, "--", "sleep", "60")
        time.sleep(moment)  # of its start; every one must do
        run.process.kill()
        assert run.ended()[0] == -signal.SIGKILL


def test_a_hang_up_in_the_first_moments_is_not_lost(tmp_path):
    for moment in (0.03, 0.06, 0.1, 0.15):
        run = Run(tmp_path, "--", "sleep", "60")
        time.sleep(moment)
        run.process.send_signal(signal.SIGHUP)
        assert run.ended()[0] == -signal.SIGHUP


def test_a_folder_that_java_and_node_cannot_be_told_is_refused(tmp_path):
    for mark in "\"'":
        place = tmp_path / f"a{mark}b"
        place.mkdir()
        code, _, said = Run(place, "--", "true").ended()
        assert code == 78 and "quotation mark" in said


def test_python_that_has_a_sitecustomize_of_its_own_is_led_all_the_same(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('own')")
    code = "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('https://fcm.googleapis.com/')"
    run = Run(tmp_path, "--", sys.executable, "-c", code, environ={"PYTHONPATH": str(tmp_path)})
    _, printed, said = run.ended(False)
    assert set(printed.split()) == {"own"} and "HTTP Error 404" in said


SLEEPS = 'import subprocess; other = subprocess.Popen(["sleep", "60"]); print("ready"); other.wait()'


def test_killed_it_leaves_nothing(tmp_path):
    run = Run(tmp_path, *python(SLEEPS))
    assert run.line() == "ready"
    eventually(lambda: len(run.processes()) == 4)
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL


def test_killed_with_a_command_that_does_not_listen_it_leaves_nothing(tmp_path):
    run = Run(tmp_path, *python("import signal; signal.signal(15, signal.SIG_IGN); print('ready'); signal.pause()"))
    assert run.line() == "ready"
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL


def test_without_its_sandbox_the_command_is_ended(tmp_path):
    run = Run(tmp_path, "--", "sh", "-c", "echo ready; exec sleep 60")
    assert run.line() == "ready"
    os.kill(run.sandbox(), signal.SIGKILL)
    code, _, said = run.ended()
    assert code == 1 and said == "gocm: the sandbox has ended (killed by SIGKILL), and with it the command\n"


def test_what_a_kill_of_both_left_the_next_one_removes(tmp_path):
    run = Run(tmp_path, "--", "sleep", "60")
    eventually(lambda: len(run.processes()) == 3)
    sandbox = run.sandbox()
    os.kill(sandbox, signal.SIGSTOP)
    run.process.kill()
    os.kill(sandbox, signal.SIGKILL)
    run.process.wait(LIMIT)
    assert list(run.folder.iterdir())
    kill(run.processes())  # sleep
    assert Run(tmp_path, "--", "true").ended()[0] == 0


@root
def test_a_full_temporary_folder_is_told(tmp_path):
    """One without any room is not used at all, as Python does."""
    mount = 'mount -t tmpfs -o size=4k,nr_inodes=%d tmpfs "$TMPDIR"; "$0" "$@"; code=$?; ls -A "$TMPDIR"; exit $code'
    for inodes in (3, 5, 20):
        how = ("unshare", "--mount", "sh", "-c", mount % inodes)
        code, printed, said = Run(tmp_path, "--", "echo", "run", how=how).ended()
        assert code == 73 and printed == "", (inodes, printed, said)
        assert "No space left on device" in said and len(said.splitlines()) == 1


@root
def test_it_may_be_the_first_process_of_a_container(tmp_path):
    """Orphans, which end as its children, are not taken for the command."""
    orphan = "(sleep 0.1 & ) ; sleep 0.5; exit 5"
    how = ("unshare", "--pid", "--fork", "--mount-proc")
    assert Run(tmp_path, "--", "sh", "-c", orphan, how=how).ended()[0] == 5


def test_sighup_that_nohup_ignores_is_ignored(tmp_path):
    run = Run(tmp_path, *python("import time; print('ready'); time.sleep(60)"), how=("nohup",))
    assert run.line() == "ready"
    run.process.send_signal(signal.SIGHUP)
    run.process.terminate()
    assert run.ended()[0] == -signal.SIGTERM


# --------------------------------------------------------------------------------------------------------- environment


VARIABLES = google_variables.variables("/dir", 1, 2)


@pytest.mark.short
def test_what_is_set_is_kept_and_extended():
    before = {
        "NODE_OPTIONS": "--trace-warnings",
        "JAVA_TOOL_OPTIONS": "-Xmx1g",
        "NO_PROXY": "corp.example, 10.0.0.0/8",
        "HTTPS_PROXY": "http://corp.example:1",
        "GOOGLE_APPLICATION_CREDENTIALS": "/own.json",
        "OTHER": "kept",
    }
    new = google_variables.led(VARIABLES, before)
    assert google_variables.led(VARIABLES, {"PYTHONPATH": "/own"})["PYTHONPATH"] == "/dir:/own"
    assert new["NODE_OPTIONS"] == "--trace-warnings --require=/dir/node.cjs"
    assert new["JAVA_TOOL_OPTIONS"].startswith("-Xmx1g -Dhttps.proxyHost=")
    assert new["NO_PROXY"] == new["no_proxy"] == "corp.example,10.0.0.0/8,localhost,127.0.0.1,::1"
    assert new["HTTPS_PROXY"] == new["https_proxy"] == new["GOCM_SANDBOX"] == "http://127.0.0.1:1"
    assert new["GOOGLE_APPLICATION_CREDENTIALS"] == "/own.json" and new["OTHER"] == "kept"
    assert google_variables.led(VARIABLES, {})["GOOGLE_APPLICATION_CREDENTIALS"] == "/dir/account.json"


@pytest.mark.short
@pytest.mark.parametrize("entry", ["*", ".googleapis.com", "com", "FCM.googleapis.com:443", "accounts.google.com"])
def test_nobody_is_led_past_the_sandbox_to_google(entry):
    before = {"no_proxy": f"a.example,{entry}", "NO_PROXY": f"{entry} b.example"}
    assert google_variables.around(before) == [entry]
    new = google_variables.led(VARIABLES, before)
    assert new["NO_PROXY"] == new["no_proxy"] == f"a.example,b.example,{google_variables.HERE}"


def test_google_in_no_proxy_is_told(tmp_path):
    said = Run(tmp_path, *python('print(send("phone-1"))'), environ={"NO_PROXY": ".googleapis.com"}).ended()
    assert said[1] == "200\n" and "left out of NO_PROXY, as Google is there: .googleapis.com" in said[2]


def in_a_shell(lines, before):
    printed = subprocess.run(
        ["sh", "-eu", "-c", lines + "env -0"], env={"PATH": os.environ["PATH"], **before}, capture_output=True
    )
    assert printed.returncode == 0, printed.stderr
    return dict(each.split("=", 1) for each in printed.stdout.decode().split("\0") if each)


@pytest.mark.short
def test_a_shell_makes_the_same_of_the_lines_for_it():
    found = google_variables.variables("/a folder/it's", 1, 2)
    for before in (
        {},
        {
            "NODE_OPTIONS": "--x",
            "PYTHONPATH": "/x",
            "GOOGLE_APPLICATION_CREDENTIALS": "own",
            "HTTPS_PROXY": "http://c:1",
        },
    ):
        made = in_a_shell(google_variables.for_a_shell(found), before)
        assert {name: made[name] for name in found} == {
            name: google_variables.led(found, before)[name] for name in found
        }


def test_a_temporary_folder_with_a_space_in_its_name(tmp_path):
    place = tmp_path / "a folder"
    place.mkdir()
    for words in (["node", "-e", "fetch('https://fcm.googleapis.com/').then(each => console.log(each.status))"],):
        assert shutil.which(words[0]) or pytest.skip(f"no {words[0]} here")
        assert Run(place, "--", *words).ended()[1] == "404\n"


def test_those_who_were_trusted_are_trusted_still(tmp_path):
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
    before = {}
    for name in names:
        CA().cert_pem.write_to_path(str(tmp_path / name))
        before[name] = str(tmp_path / name)
    files = Run(
        tmp_path, "--", "sh", "-c", 'cat "$SSL_CERT_FILE"; echo then; cat "$NODE_EXTRA_CA_CERTS"', environ=before
    )
    bundle, extra = files.ended()[1].split("then\n")
    assert all((tmp_path / name).read_text().strip() in bundle for name in names[:3])
    assert (tmp_path / names[3]).read_text().strip() in extra
    assert bundle.count("BEGIN") == 4 and extra.count("BEGIN") == 2


def test_a_gocm_may_be_started_in_it(tmp_path):
    """That is told of the sandbox by a variable which is named as an option is."""
    words = ("--", sys.executable, str(ROOT / "gocm.py"), "print-config", "--apikey", "k")
    code, printed, said = Run(tmp_path, *words).ended()
    assert (code, "sandbox = false" in printed) == (0, True), said


@pytest.mark.parametrize("language", ["node", "python"])
def test_one_within_another(tmp_path, language):
    node = "fetch('https://fcm.googleapis.com/v1/projects/p/messages:send', {method: 'POST', body: '{}'})"
    bare = "import urllib.request as r; r.build_opener(r.ProxyHandler({}))"
    bare += ".open('https://fcm.googleapis.com/x/send', b'{}')"
    words = ["node", "-e", node] if language == "node" else [sys.executable, "-c", bare]
    assert shutil.which(words[0]) or pytest.skip(f"no {words[0]} here")
    _, _, said = Run(tmp_path, "--", *EXEC, "--", *words).ended(False)
    assert re.findall(r"sent (\d+) message", said) == ["1", "0"], said


# --------------------------------------------------------------------------------------------------------- other hosts


class Proxy(Upstream):
    """A proxy that leads whoever asks to a place on this machine, and tells how it was asked."""

    def __init__(self, port, status=200):
        self.port, self.status, self.asked = port, status, []
        super().__init__(Proxy._lead)
        self.address = "{}:{}".format(*self.listener.getsockname())

    def _lead(self, sock, _number):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        self.asked.append(head.decode())
        sock.sendall(b"HTTP/1.1 %d X\r\n\r\n" % self.status)
        if self.status == 200:
            far = dial(self.port)
            back = threading.Thread(target=copy, args=(far, sock), daemon=True)
            back.start()
            copy(sock, far)
            back.join()


def copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def far(tmp_path):
    """A server of TLS under another name, which says how much it was sent; who vouches for it is in far.pem."""
    authority = CA()
    authority.cert_pem.write_to_path(str(tmp_path / "far.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("far.example", "localhost", "127.0.0.1").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(sent[::-1])

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request, address):
            super().finish_request(context.wrap_socket(request, server_side=True), address)

        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


ASK = """
sent = os.urandom(2_000_000)
answer = requests.post("https://%s/", data=sent)
print(answer.content == sent[::-1], send("phone-1"))
"""


def test_others_are_reached_by_the_proxy_that_was_set(tmp_path, far):
    before = Proxy(far)
    environ = {"HTTPS_PROXY": f"http://user:secret@{before.address}", "REQUESTS_CA_BUNDLE": str(tmp_path / "far.pem")}
    code, printed, said = Run(tmp_path, "--pass", *python(ASK % "far.example"), environ=environ).ended()
    assert (code, printed) == (0, "True 200\n"), said
    assert len(before.asked) == 1 and before.asked[0].startswith("CONNECT far.example:443 HTTP/1.")
    assert base64.b64encode(b"user:secret").decode() in before.asked[0]
    assert "1 message to 1 token or topic," in said and "secret" not in said


def test_others_are_reached_without_a_proxy(tmp_path, far):
    """Programs do not ask a proxy for this machine: curl is told to."""
    words = ("curl", "-sS", "--noproxy", "", "-d", "abc", f"https://127.0.0.1:{far}/")
    environ = {"CURL_CA_BUNDLE": str(tmp_path / "far.pem")}
    code, printed, said = Run(tmp_path, "--pass", "--", *words, environ=environ).ended()
    assert (code, printed) == (0, "cba"), said


@pytest.mark.parametrize("status", [403, 407])
def test_a_proxy_that_refuses_is_told(tmp_path, status):
    before = Proxy(0, status)
    environ = {"HTTPS_PROXY": f"http://{before.address}"}
    code, _, said = Run(tmp_path, "--pass", "--", "curl", "-sS", "https://far.example/", environ=environ).ended()
    assert (
        code == 56
        and "502" in said
        and f"far.example port 443 cannot be reached: Tunnel connection failed: {status}" in said
    )


def test_a_proxy_that_cannot_be_used_is_told(tmp_path):
    environ = {"HTTPS_PROXY": "socks5://127.0.0.1:1"}
    code, _, said = Run(tmp_path, "--pass", "--", "true", environ=environ).ended()
    assert code == 78 and "spoken to by socks5 is not supported" in said
    assert Run(tmp_path, "--", "true", environ=environ).ended()[0] == 0


# ------------------------------------------------------------------------------------------------------------- counted


def message(fate, targets=("a",)):
    return Message(1, 0.0, "/v1/projects/p/messages:send", "", False, b"{}", list(targets), [], fate)


LEGACY = b'{"success": 1, "failure": 2, "results": [{"error": "NotRegistered"}, {"error": "NotRegistered"}, {}]}'


@pytest.mark.short
@pytest.mark.parametrize(
    "fate, targets, counts",
    [
        (ANSWERS["unregistered"][0], "a", {"UNREGISTERED": 1}),
        (ANSWERS["bad_condition"][0], "a", {"INVALID_ARGUMENT": 1}),
        (ANSWERS["third_party"][0], "a", {"THIRD_PARTY_AUTH_ERROR": 1}),
        (ANSWERS["bad_gateway"][0], "", {"502": 1}),
        (Answer(200, b'{"name": "x"}'), "a", {}),
        (Answer(200, LEGACY), "abc", {"NotRegistered": 2}),
        (Answer(200, b'{"success": 1, "failure": 1, "failed_registration_ids": ["a"]}'), "ab", {"failed": 1}),
        (Answer(200, b'{"error": "TopicsMessageRateExceeded"}'), "t", {"TopicsMessageRateExceeded": 1}),
        (Answer(200, b"Error=NotRegistered\n"), "a", {"NotRegistered": 1}),
        (Answer(200, b"id=1\n"), "a", {}),
        (Answer(503, b"[1]"), "abc", {"503": 3}),
        ("silent", "abc", {"silent": 3}),
    ],
)
def test_refusals_are_counted_by_kind(fate, targets, counts):
    assert record.refusals(message(fate, targets)) == Counter(counts)


@pytest.mark.short
def test_a_summary_stays_a_line_whatever_is_refused():
    kept = record.Record()
    for number in range(1000):
        kept.take(message(Answer(400, json.dumps({"error": {"status": f"KIND_{number}"}}).encode())))
        kept.refuse_host(f"host-{number}.example")
    summary = kept.summary()
    assert summary.startswith("1000 messages to 1000 tokens or topics, 1000 refused (900 others, ")
    assert len(summary) < 6000 and "900 others, 1 host-0.example" in summary
