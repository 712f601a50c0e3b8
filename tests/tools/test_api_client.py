"""What whoever answers at a port says does not reach the terminal as it is."""

import contextlib
import http.server
import json
import subprocess
import sys

import pytest
from kit import ROOT, serving

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n"


class Liar(http.server.BaseHTTPRequestHandler):
    """Answers each route as GoCM does, with escapes wherever there may be a text."""

    def do_GET(self):
        entry = dict.fromkeys(("job", "n", "token", "upstream", "reason", "detail", "attempts"), EVIL)
        page = {"failed": [] if "after" in self.path else [{**entry, "failed_at": 1.0}], "next": "x.1"}
        told = {"status": EVIL, "reasons": [EVIL], "notes": [EVIL], "sentence": EVIL, "pending": None, **page}
        self._answer(self.server.status, json.dumps(told if self.server.status == 200 else {"error": EVIL}).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        told = {"replayed": EVIL, "discarded": EVIL, "left": True, "error": EVIL}
        self._answer(self.server.status, json.dumps(told).encode())

    def _answer(self, status, body):
        self.send_response_only(status)
        self.send_header("X-GoCM-Job", "\x1b]0;owned\x07")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(params=[200, 400])
def liar(request):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.status = request.param
    with serving(server):
        yield server.server_port


@pytest.mark.short
@pytest.mark.parametrize(
    "words",
    [
        ["ping", "--port", "PORT"],
        ["watch", "--once", "--to", "http://127.0.0.1:PORT"],
        ["send", "--to", "http://127.0.0.1:PORT", "--data", "a=1", "phone-1"],
        ["failed", "list", "--to", "http://127.0.0.1:PORT"],
        ["failed", "replay", "--all", "--to", "http://127.0.0.1:PORT"],
        ["failed", "discard", "--all", "--to", "http://127.0.0.1:PORT"],
    ],
)
def test_nothing_that_comes_from_the_network_is_an_escape(liar, words):
    words = [word.replace("PORT", str(liar)) for word in words]
    found = subprocess.run([sys.executable, str(ROOT / "gocm.py"), *words], capture_output=True, timeout=30)
    said = (found.stdout + found.stderr).decode()
    assert ("owned" in said or words[0] == "ping") and "Traceback" not in said, said
    assert all(line.replace("\t", "").isprintable() for line in said.splitlines())


@pytest.mark.short
@pytest.mark.parametrize("words", [["ping", "--port", "PORT"], ["watch", "--once", "--to", "http://127.0.0.1:PORT"]])
@pytest.mark.parametrize("answer", ["deep", "endless", "wrong kinds", "a redirect"])
def test_it_need_be_no_gocm_that_answers(words, answer):
    class Odd(Liar):
        def do_GET(self):
            if answer == "a redirect":
                self._answer(302, b"{}")
            elif answer != "endless":
                self._answer(200, {"deep": b"[" * 300_000, "wrong kinds": b'{"status":"ok","reasons":5}'}[answer])
            else:
                self.send_response_only(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(1_000_000))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    words = [word.replace("PORT", str(server.server_port)) for word in words]
    with serving(server):
        command = [sys.executable, str(ROOT / "gocm.py"), *words]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "Traceback" not in found.stderr
    assert (found.returncode == 1 and len(found.stderr) > 10) or found.stdout == "ok: ready\n"


@pytest.mark.short
@pytest.mark.parametrize("failed_at", ["x", 1e300, None])
def test_what_makes_no_sense_is_no_gocm(failed_at):
    class Odd(Liar):
        def do_GET(self):
            self._answer(200, json.dumps({"failed": [{"failed_at": failed_at}], "next": 1}).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    words = ["failed", "list", "--to", f"http://127.0.0.1:{server.server_port}"]
    with serving(server):
        command = [sys.executable, str(ROOT / "gocm.py"), *words]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert found.returncode == 1 and found.stderr == "gocm: what answers there is no GoCM\n"
