"""The webhook: each unregistered and replaced token arrives, signed, whatever happens on the way."""

import base64
import contextlib
import hmac
import http.client
import http.server
import json
import re
import ssl
import subprocess
import threading
import time

import pytest
import trustme
from kit import ends, eventually, secret, serving

from gocm_lib.config.settings import Fatal
from gocm_lib.front import exchange, webhook
from gocm_lib.help.topics import source
from gocm_lib.state.contract import Invalid, Replaced, Unregistered

short = pytest.mark.short
KEY = "0123456789abcdef"


class Application:
    """One that is posted to: keeps what comes, and answers what `answers` says in turn, then 200."""

    def __init__(self, answers=(), handler=None, port=0):
        self.posts, self.answers = [], list(answers)
        application = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = application.answers.pop(0) if application.answers else 200
                application.posts.append((self.path, dict(self.headers), body))
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer)
                self.send_header("Content-Length", "0")
                self.send_header("Location", "/elsewhere")
                self.send_header("Retry-After", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler or Handler)
        self.port = self.server.server_port
        self._open = contextlib.ExitStack()
        self._open.enter_context(serving(self.server))

    def told(self):
        """All that came, as (token, or token and replacement)."""
        data = [json.loads(body)["data"] for _, _, body in self.posts]
        return (
            [token for part in data for token in part["notregistered"]],
            [(pair["original"], pair["canonical"]) for part in data for pair in part["canonical_replacements"]],
        )

    def close(self):
        self._open.close()


@pytest.fixture
def application(request):
    made = Application(getattr(request, "param", ()))
    yield made
    made.close()


def words(tmp_path, port, path="/hook?key=1"):
    return "--feedback-url", f"http://127.0.0.1:{port}{path}", "--feedback-secret-file", secret(tmp_path / "fs", KEY)


def is_signed(headers, body):
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = b"v1," + base64.b64encode(hmac.digest(KEY.encode(), signed, "sha256"))
    return hmac.compare_digest(expected.decode(), headers["webhook-signature"])


def test_dead_and_replaced_tokens_arrive_and_leave_their_lists(start, application, tmp_path):
    server = start(*words(tmp_path, application.port))
    server.send(["gone-1", "canonical-2", "fine", "gone-3"])
    eventually(lambda: application.posts)
    eventually(lambda: server.http().json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": None})
    eventually(lambda: server.http().json("GET", "/gcm/report/canonical?peek=1") == {"canonical_replacements": None})
    path, headers, body = application.posts[0]
    assert path == "/hook?key=1" and headers["Content-Type"] == "application/json" and is_signed(headers, body)
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60 and json.loads(body)["type"] == "gocm.feedback"
    assert application.told() == (["gone-1", "gone-3"], [("canonical-2", "new-2")])
    assert server.report()["notregistered"] == 2, "the counters are not the lists"
    assert 'gocm_feedback_requests_total{result="taken"} 1\n' in server.http().ask("GET", "/metrics")[2].decode()


@pytest.mark.parametrize("application", [[500, None, 302, 404]], indirect=True)
def test_what_is_not_taken_comes_again_the_same(start, application, tmp_path):
    """A redirect is no answer either: who knows who asks for tokens there."""
    server = start(*words(tmp_path, application.port))
    server.send(["gone-1"])
    eventually(lambda: len(application.posts) == 5)
    eventually(lambda: server.http().json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": None})
    assert len({(headers["webhook-id"], body) for _, headers, body in application.posts}) == 1
    assert {path for path, _, _ in application.posts} == {"/hook?key=1"}
    assert all(is_signed(headers, body) for _, headers, body in application.posts)
    [problem] = server.find("feedback does not reach (.*)")
    assert problem == "127.0.0.1: HTTP 500; see gocm help reports"
    server.logged("feedback reaches the application again")
    assert "key=1" not in server.log() and KEY not in server.log()


def test_an_application_that_is_away_slows_nothing_and_loses_nothing(start, application, tmp_path):
    """Neither its absence, nor kill -9 of all of us, nor of the state process in the middle of it."""
    application.close()
    server = start(*words(tmp_path, application.port))
    for part in range(20):
        server.send([f"gone-{part}-{n}" for n in range(100)])
    assert server.settled()["notregistered"] == 2000
    server.logged("feedback does not reach 127.0.0.1: connection refused error")
    server.kill_group()
    server = start(*words(tmp_path, application.port))
    back = Application(port=application.port)
    try:
        server.send(["gone-later"])
        expected = {f"gone-{part}-{n}" for part in range(20) for n in range(100)} | {"gone-later"}
        eventually(lambda: set(back.told()[0]) == expected)
        eventually(lambda: server.http().json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": None})
        assert all(len(json.loads(body)["data"]["notregistered"]) <= webhook.BATCH for _, _, body in back.posts)
        assert len(back.told()[0]) == len(expected), "each once, where nothing is killed in the middle"
    finally:
        back.close()


def test_the_receiver_in_the_help_takes_what_is_signed_and_nothing_else(start, tmp_path, monkeypatch):
    """With a secret that is made as it says."""
    monkeypatch.chdir(tmp_path)
    text = source("reports")
    [made] = re.findall(r"(?m)^(\(umask 077; echo whsec_.*)$", text)
    subprocess.run(made, shell=True, check=True)
    code = text[text.index("import base64, hmac, json\n") :]
    code = code[: code.index("```")]
    names = {"dead": []}
    names["forget_token"] = names["dead"].append
    names["replace_token"] = lambda old, new: names["dead"].append((old, new))
    exec(code.partition("\n\n\nHTTPServer")[0], names)
    names["Feedback"].log_message = lambda *_: None
    receiver = Application(handler=names["Feedback"])
    try:
        told = ("--feedback-url", f"http://127.0.0.1:{receiver.port}/", "--feedback-secret-file")
        server = start(*told, str(tmp_path / "secret"))
        server.send(["gone-1", "canonical-2"])
        eventually(lambda: len(names["dead"]) == 2)
        assert set(names["dead"]) == {"gone-1", ("canonical-2", "new-2")}
        server.terminate()
        names["SECRET"] = b"another secret, which is not ours"
        server = start(*told, str(tmp_path / "secret"))
        server.send(["gone-3"])
        server.logged("feedback does not reach 127.0.0.1: HTTP 401")
        assert len(names["dead"]) == 2
    finally:
        receiver.close()


@short
@pytest.mark.parametrize("drip", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X", b""])
def test_who_only_drips_is_not_waited_for(upstream, monkeypatch, drip):
    """A time limit for each read would never be met."""
    monkeypatch.setattr(exchange, "PATIENCE", 0.5)
    ended = threading.Event()

    def behave(upstream, sock, number):
        while not ended.wait(0.05):
            sock.sendall(drip)

    port = upstream(behave).listener.getsockname()[1]
    began = time.monotonic()
    with pytest.raises((OSError, http.client.HTTPException)):
        exchange.exchange("POST", f"http://127.0.0.1:{port}/", b"{}", {})
    ended.set()
    assert time.monotonic() - began < 5


@short
def test_a_signature_as_the_standard_s_own_example_has_it():
    """From docs.svix.com/receiving/verifying-payloads/how-manual."""
    batch = webhook.Batch(b'{"event_type":"ping","data":{"success":true}}', "msg_loFOjxBNrRLzqYUf", {})
    key = base64.b64decode("plJ3nmyCDGBKInavdOK15jsl")
    signed = webhook.sign(batch, key, 1731705121.9)
    assert signed["webhook-signature"] == "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


@short
def test_a_request_is_known_by_what_it_tells():
    def compose(now, last=9, wave=False, **more):
        gone = [Unregistered(7, "t"), Unregistered(last, "u", wave)]
        lists = {"canonical": [Replaced(3, "a", "b")], "notregistered": gone, "invalid": [], **more}
        return webhook.compose(lists, now)

    first = compose(1000.0)
    assert first.upto == {"canonical": 3, "notregistered": 9, "invalid": None}
    assert compose(2000.0).id == first.id
    assert compose(1000.0, last=10).id != first.id, "it has died again"
    assert compose(1000.0, canonical=[]).upto == {"canonical": None, "notregistered": 9, "invalid": None}
    assert "wave" not in json.loads(first.body)["data"]
    told = json.loads(compose(1000.0, wave=True, invalid=[Invalid(2, "x", "wrong_sender")]).body)["data"]
    assert (told["wave"], told["in_wave"]) == (True, ["u"])
    assert told["invalid"] == [{"token": "x", "reason": "wrong_sender"}]


@short
def test_waiting_grows_to_its_limit_and_is_spread():
    assert [webhook.wait(n, None, 1.0) for n in (1, 2, 3, 9, 99)] == [1.0, 2.0, 4.0, 256.0, 300.0]
    assert webhook.wait(3, None, 0.0) == 2.0 and webhook.wait(1, 60.0, 0.5) == 60.0


@short
@pytest.mark.parametrize(
    "text, wrong",
    [
        ("", "holds no secret of 16 characters"),
        ("short", "holds no secret of 16 characters"),
        ("whsec_???????????????", "is not base64"),
        (b"\xff" * 20, "it is no text"),
    ],
)
def test_secrets_that_are_none(tmp_path, text, wrong):
    path = tmp_path / "fs"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Fatal, match=wrong) as caught:
        webhook.read_secret(str(path))
    assert not text or str(text) not in str(caught.value)


def test_over_https_to_who_is_trusted_only(start, application, tmp_path):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    application.server.socket = context.wrap_socket(application.server.socket, server_side=True)
    url = ("--feedback-url", f"https://127.0.0.1:{application.port}/", *words(tmp_path, 0)[2:])
    server = start(*url)
    server.send(["gone-1"])
    server.logged("feedback does not reach 127.0.0.1: sslcert verification error")
    assert server.terminate() == 0 and application.posts == []
    start(*url, environ={"SSL_CERT_FILE": str(tmp_path / "ca.pem")})
    eventually(lambda: application.told() == (["gone-1"], []))


def test_a_bad_secret_is_told_at_the_start(tmp_path):
    path = secret(tmp_path / "fs", "short")
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", str(tmp_path / "s.db"))
    words = (*words, "--feedback-url", "http://127.0.0.1:1/", "--feedback-secret-file", path)
    problem = f"--feedback-secret-file {path} holds no secret of 16 characters or more, like: openssl rand -hex 32"
    told = [f"gocm: {problem}; see gocm help reports"]
    assert ends(*words) == ends("check-config", *words) == (78, told)
    assert not (tmp_path / "s.db").exists(), "nothing was begun"


@short
def test_both_kinds_of_secret(tmp_path):
    assert webhook.read_secret(secret(tmp_path / "a", "whsec_plJ3nmyCDGBKInavdOK15jsl\n"))[:2] == b"\xa6R"
    assert webhook.read_secret(secret(tmp_path / "b", f" {KEY}\n")) == KEY.encode()
