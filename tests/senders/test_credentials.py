"""Keys and access tokens: fetched, renewed, refused, re-read; wrong files told in one line; in no log."""

import contextlib
import gzip
import json
import resource
import signal
import socket
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, Program, Sandbox, eventually, form

from gocm_lib.config.proxy import DIRECTLY
from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.senders import access_token, credentials
from gocm_lib.senders.access_token import CredentialError, Token
from gocm_lib.tools.sandbox import write_credentials


@given(st.floats(0, 1e10), st.floats(1, 1e6))
def test_a_token_is_renewed_before_its_end_but_not_at_once(fetched_at, life):
    token = Token("x", fetched_at, fetched_at + life)
    assert fetched_at + min(life / 2, life - 300) <= credentials.renewal(token) <= token.expires_at


# ------------------------------------------------------------------------------------------- three ways to a token


@pytest.fixture
def account(tmp_path):
    """(sandbox, the service account's file it made)"""
    path = tmp_path / "fcm.json"
    sandbox = Sandbox("--write-credentials", str(path))
    yield sandbox, path
    sandbox.kill_group()


def delivered(server, sandbox):
    server.send(["a", "gone-b"])
    assert server.settled() == {"attempts": 2, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 1}
    assert sandbox.received()["delivered"] == {"a": 1}


def test_a_service_account_s_file_by_the_real_google_auth(account, run):
    """The sandbox checks the assertion's RS256 signature, audience and times."""
    sandbox, path = account
    server = run("--fcm-url", f"http://127.0.0.1:{sandbox.port}", "--credentials", str(path))
    delivered(server, sandbox)
    assert sandbox.received()["last"]["message"]["token"] in ("a", "gone-b")
    assert json.loads(path.read_text())["private_key"].splitlines()[1] not in server.log()
    assert "pretend-" not in server.log()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_token_command(account, run):
    sandbox, _ = account
    url = f"http://127.0.0.1:{sandbox.port}/computeMetadata/v1/instance/service-accounts/default/token"
    code = (
        "import json,urllib.request as r;"
        f"print(json.load(r.urlopen(r.Request('{url}',headers={{'Metadata-Flavor':'Google'}})))['access_token'])"
    )
    command = f'{sys.executable} -c "{code}"'
    words = ("--fcm-url", f"http://127.0.0.1:{sandbox.port}", "--token-command", command)
    delivered(run(*words, "--fcm-project", "sandbox-project"), sandbox)


def test_the_metadata_server(start_fcm, sandbox):
    delivered(start_fcm(), sandbox)


def test_google_application_credentials_and_systemd_s(account, run):
    sandbox, path = account
    words = ("--fcm-url", f"http://127.0.0.1:{sandbox.port}")
    server = run(*words, environ={"GOOGLE_APPLICATION_CREDENTIALS": str(path)})
    delivered(server, sandbox)
    server.terminate()
    server = run(*words, environ={"CREDENTIALS_DIRECTORY": str(path.parent)})
    server.send(["c"])
    eventually(lambda: "c" in sandbox.received()["delivered"])


# --------------------------------------------------------------------------------------------------- in the long run


def test_a_refused_token_is_renewed_once_and_what_was_refused_is_sent_again(start_fcm, sandbox):
    server = start_fcm()
    server.send(["a"])
    server.settled()
    sandbox.mode(revoke=True)
    for n in range(20):
        server.send([f"b{n}"])
    assert server.settled()["failures"] == 0
    received = sandbox.received()
    assert len(received["delivered"]) == 21 and set(received["delivered"].values()) == {1}
    assert received["tokens_given"] == 2, "one look-up for all that were refused"


def test_an_upstream_without_a_token_is_told(run, sandbox):
    server = run(
        *("--gcm-url", sandbox.url(), "--apikey", "k", "--token-command", "false", "--fcm-project", "my-project")
    )
    assert server.http().json("GET", "/readyz") == {"status": "degraded", "notes": ["upstream fcm has no access token"]}


def test_what_was_refused_for_a_while_is_sent_soon_after(start_fcm, sandbox):
    """New tokens do not help while the upstream refuses all: they are fetched as seldom as it is asked."""
    server = start_fcm()
    sandbox.mode(status=401)

    def longer():
        server.send(["a"], time_to_live="30")
        return server.find("paused for 4 s: HTTP 401")

    eventually(longer, every=0.1)
    assert sandbox.received()["tokens_given"] <= 4
    sandbox.mode(status=200)
    assert server.settled()["failures"] == 0, "none has expired"


def test_tokens_are_renewed_before_they_end_and_a_failing_renewal_is_tried_again(start_fcm, sandbox):
    sandbox.mode(token_life=4)
    server = start_fcm()
    server.send(["a"])
    server.settled()
    sandbox.mode(token_status=500)
    server.logged("the metadata server .* answers 500; trying again in 1 s")
    server.send(["b"])
    sandbox.mode(token_status=200)
    assert server.settled()["failures"] == 0
    eventually(lambda: sandbox.received()["tokens_given"] >= 3)


def test_without_a_token_nothing_is_sent_and_nothing_lost(start_fcm, sandbox):
    sandbox.mode(token_status=503)
    server = start_fcm("--fcm-project", "sandbox-project")
    server.send(["a"])
    server.logged("answers 503; trying again")
    assert server.report()["pending"] == 1 and sandbox.received()["requests"] == 0
    sandbox.mode(token_status=200)
    assert server.settled()["failures"] == 0


def test_a_key_that_google_refuses_is_told(account, run, tmp_path):
    sandbox, path = account
    other = tmp_path / "other.json"
    write_credentials(str(other), sandbox.port)  # another key than the sandbox knows
    server = run("--fcm-url", f"http://127.0.0.1:{sandbox.port}", "--credentials", str(other))
    server.logged("is this machine's clock right, and the key still valid")
    server.send(["a"])
    other.write_bytes(path.read_bytes())
    server.process.send_signal(signal.SIGHUP)
    server.logged("certificates were read again")
    assert server.settled()["failures"] == 0


def test_sighup_reads_the_key_file_again(sandbox, run, tmp_path):
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("bad-key\n")
    server = run("--gcm-url", sandbox.url(), "--apikey-file", str(key))
    server.send(["a"])
    server.logged("paused for 2 s: HTTP 401")
    key.write_text("good-key\n")
    server.process.send_signal(signal.SIGHUP)
    assert server.settled()["failures"] == 0
    assert "good-key" not in server.log() and "bad-key" not in server.log()


def test_sighup_gives_and_takes_away_upstreams(sandbox, run, tmp_path):
    """What is left of the messages of one that is taken away is kept, and goes when it is there again."""
    config = tmp_path / "gocm.toml"
    config.touch(0o600)
    shop = f'[upstream.shop]\ndialect = "gcm"\napikey = "shop-key"\nurl = "{sandbox.url()}"\n'
    config.write_text('apikey = "good-key"\n')
    server = run("--gcm-url", sandbox.url(), "--config", str(config))

    def rewrite(text):
        config.write_text(text)
        count = len(server.find("SIGHUP: keys, tokens"))
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(server.find("SIGHUP: keys, tokens")) > count)

    refused, _, answer = server.http().ask("POST", "/gcm/send", form(["a"], upstream="shop"), FORM)
    assert refused == 400 and b"there is gcm" in answer
    rewrite('apikey = "good-key"\n' + shop)
    server.send(["a"], upstream="shop")
    server.send(["b"])
    server.settled()
    assert sandbox.received()["delivered"] == {"a": 1, "b": 1}
    sandbox.mode(status=503)
    server.send(["c"], upstream="shop")
    eventually(lambda: b"is paused" in server.http().ask("GET", "/readyz")[2])
    rewrite('apikey = "good-key"\n')
    assert b"upstream shop is not there any more, and 1 tokens wait" in server.http().ask("GET", "/readyz")[2]
    sandbox.mode(status=200)
    rewrite('apikey = "good-key"\n' + shop)
    assert server.settled()["attempts"] == 3
    assert sandbox.received()["delivered"] == {"a": 1, "b": 1, "c": 1}


def test_sighup_does_not_send_one_project_s_messages_to_another(sandbox, run, tmp_path):
    config = tmp_path / "gocm.toml"
    config.touch(0o600)
    written = '[upstream.shop]\nurl = "%s"\ntoken-command = "echo t"\nproject = "%s"\n'
    url = f"http://127.0.0.1:{sandbox.port}"
    config.write_text(written % (url, "first-project"))
    server = run("--config", str(config))
    sandbox.mode(status=503)
    server.send(["a"])
    config.write_text(written % (url, "second-project"))
    server.process.send_signal(signal.SIGHUP)
    server.logged("nothing is changed: upstream shop has 1 tokens to send: give the new one another name, or wait")
    config.write_text(written.replace("shop", "other") % (url, "other-project"))
    server.process.send_signal(signal.SIGHUP)
    server.logged("upstream shop is taken away")
    config.write_text(written % (url, "second-project"))
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(server.find("nothing is changed: upstream shop has 1 tokens")) == 2)
    assert server.report()["pending"] == 1
    server.kill_group()
    with pytest.raises(AssertionError, match="upstream shop has 1 tokens to send as fcm first-project"):
        run("--config", str(config))


def test_sighup_with_a_broken_file_keeps_the_old_one(account, run):
    sandbox, path = account
    server = run("--fcm-url", f"http://127.0.0.1:{sandbox.port}", "--credentials", str(path))
    server.send(["a"])
    server.settled()
    path.write_text("{")
    server.process.send_signal(signal.SIGHUP)
    server.logged("nothing is changed: .*not JSON")
    server.send(["b"])
    assert server.settled()["failures"] == 0


def test_both_upstreams_and_v1_is_the_default(sandbox, start_fcm):
    server = start_fcm("--gcm-url", sandbox.url(), "--apikey", "k")
    server.send(["a"])
    server.settled()
    assert sandbox.received()["last"]["message"]["token"] == "a"
    server.send(["canonical-b"], upstream="gcm")
    assert server.settled()["canonicals"] == 1
    assert sandbox.received()["last"]["registration_ids"] == ["canonical-b"]
    status, _, body = server.http().ask("POST", "/gcm/send", form(["c"], upstream="apns"), FORM)
    assert status == 400 and json.loads(body)["field"] == "upstream" and "fcm, gcm" in json.loads(body)["error"]


# ------------------------------------------------------------------------------------------------------- bad files


ACCOUNT = {
    "type": "service_account",
    "client_email": "a@b",
    "private_key": "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n",
    "token_uri": "https://oauth2.googleapis.com/token",
    "project_id": "my-project",
}
BAD_FILES = {
    "missing": None,
    "not JSON": "{",
    "a list": "[]",
    "no type": "{}",
    "another type": json.dumps({"type": "pokemon"}),
    "no private key": json.dumps({**ACCOUNT, "private_key": ""}),
    "no e-mail": json.dumps({**ACCOUNT, "client_email": None}),
    "a broken key": json.dumps(ACCOUNT),
    "a deep one": "[" * 100_000,
    "no URL": json.dumps({**ACCOUNT, "token_uri": "https://[::1"}),
    "another kind, half": json.dumps({"type": "external_account", "credential_source": "x"}),
    "another kind, odd": json.dumps({"type": "impersonated_service_account", "source_credentials": "x"}),
    "a token server without TLS": json.dumps({**ACCOUNT, "token_uri": "http://example.org/token"}),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, what):
    path = tmp_path / "fcm.json"
    if BAD_FILES[what] is not None:
        path.write_text(BAD_FILES[what])
    with pytest.raises(Fatal) as caught:
        access_token.from_file(str(path))
    assert caught.value.code == Exit.SENDER
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_file_ends_the_start_with_exit_3(tmp_path, temporary):
    words = ("--credentials", str(tmp_path / "none.json"), "--port", "0", "--spool", str(tmp_path / "s.db"))
    program = Program(*words, environ={"TMPDIR": str(temporary)})
    try:
        assert program.wait(10) == Exit.SENDER
        told = f"--credentials {tmp_path}/none.json cannot be read: No such file or directory"
        assert program.lines == [f"gocm: {told}; see gocm help credentials"]
    finally:
        program.kill_group()


def test_a_missing_extra_is_told(tmp_path, monkeypatch):
    (tmp_path / "fcm.json").write_text(json.dumps(ACCOUNT))
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(Fatal, match=r"pip install 'gocm\[fcm\]'"):
        access_token.from_file(str(tmp_path / "fcm.json"))


ODD = ["Infinity", "1e999", "NaN", "-5", '"q"', "null", "[]", "1" + "0" * 400]


@pytest.mark.parametrize("life", ODD)
def test_an_odd_life_is_an_error_and_no_end_of_the_thread(life):
    with pytest.raises(CredentialError):
        access_token._from_json(b'{"access_token":"x","expires_in":%b}' % life.encode(), 0.0, "it")


@pytest.mark.parametrize("answer", [b"D\xe9sol\xe9", b"[1]", b"{}", b'{"access_token":"x","expires_in":"q"}'])
def test_odd_answers_of_the_token_server_are_survived(account, run, upstream_of_bytes, answer):
    sandbox, path = account
    odd = upstream_of_bytes(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "token_uri": odd}))
    server = run("--fcm-url", f"http://127.0.0.1:{sandbox.port}", "--credentials", str(path))
    server.logged("no access token for --credentials|gave no token|sensible")
    assert "sol" not in server.log().partition("no access token")[2]
    path.write_text(good)
    server.process.send_signal(signal.SIGHUP)
    delivered(server, sandbox)


@pytest.fixture
def upstream_of_bytes():
    """A function that starts a server which answers every connection with the same bytes; its URL."""
    listeners = []

    def start_server(answer):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.recv(65536)
                    sock.sendall(answer)
                    sock.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/token"

    yield start_server
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("command", ["/nowhere/at/all", "false", "echo", "echo {}", "printf 'a b'", "yes", ""])
def test_a_command_that_gives_no_token_is_told_without_what_it_printed(command):
    with pytest.raises(CredentialError) as caught:
        access_token.from_command(command, "/")(0.0)
    assert "--token-command" in str(caught.value) and "a b" not in str(caught.value)


def test_a_command_may_print_json():
    fetch = access_token.from_command("""echo '{"access_token": "x", "expires_in": 60}'""", "/")
    assert fetch(1000.0) == Token("x", 1000.0, 1060.0)


def answers(*lines, body=b""):
    """A pretend metadata server: it gives everybody this answer, and then nothing more."""

    def behave(_, sock, __):
        sock.recv(65536)
        sock.sendall(b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"Content-Length: %d" % len(body), b"", body]))

    return behave


GOOD = json.dumps({"access_token": "token", "expires_in": 3600}).encode()
FLAVOR = b"Metadata-Flavor: Google"


@pytest.mark.short
def test_a_metadata_server_says_that_it_is_one(upstream):
    def ask(*lines, body=GOOD):
        host = upstream(answers(*lines, body=body)).url().split("/")[2]
        return access_token.ask_metadata(host, "instance/service-accounts/default/token")

    assert ask(FLAVOR) == GOOD
    with pytest.raises(access_token.CredentialError, match="is no metadata server"):
        ask()


@pytest.mark.short
def test_what_a_token_server_packs_is_not_unpacked(upstream):
    """400 KB of gzip can be a gigabyte and more."""
    packed = gzip.compress(b"[" + b" " * 40_000_000 + b"]")
    assert len(packed) < 50_000
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for lines, body in (((b"Content-Encoding: gzip", FLAVOR), packed), ((FLAVOR,), b" " * 1_000_000)):
        host = upstream(answers(*lines, body=body)).url().split("/")[2]
        with pytest.raises(access_token.CredentialError, match="is no token server"):
            access_token.ask_metadata(host, "x")
        with pytest.raises(access_token.CredentialError, match="is no token server"):
            access_token._Outwards("", DIRECTLY).request("POST", f"http://{host}/token", body=b"x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 20_000  # KiB
