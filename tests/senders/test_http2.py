"""Sending by HTTP/2: to the sandbox with each of FCM's habits, and to servers that others have written."""

import contextlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import trustme
from kit import Sandbox, dial, eventually, free_port

from gocm_lib.message.dialects import DIALECTS
from gocm_lib.senders.upstream import DialError, Upstream

NAME = b'{"name":"projects/p/messages/1"}'


class Secure(Sandbox):
    """A sandbox that speaks TLS, asked by its own certificate."""

    def __init__(self, directory, *words):
        authority = trustme.CA()
        self.ca, cert, key = (str(directory / name) for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(self.ca)
        made = authority.issue_cert("127.0.0.1", "localhost")
        made.private_key_pem.write_to_path(key)
        made.cert_chain_pems[0].write_to_path(cert)
        self.files = cert, key
        super().__init__("--tls-cert", cert, "--tls-key", key, "--any-token", *words)
        self.client = httpx.Client(verify=ssl.create_default_context(cafile=self.ca), timeout=30)

    def ask(self, method, path, **how):
        answer = self.client.request(method, f"https://127.0.0.1:{self.port}/sandbox/{path}", **how)
        assert answer.is_success, answer.text
        return answer

    def received(self):
        return self.ask("GET", "received").json()

    def mode(self, **fields):
        self.ask("POST", "mode", json=fields)


def listens(port):
    with contextlib.suppress(ConnectionRefusedError):
        dial(port).close()
        return True
    return False


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    program = Secure(tmp_path_factory.mktemp("secure"))
    yield program
    program.kill_group()


@pytest.fixture
def secure(kept):
    kept.ask("POST", "reset")
    return kept


@pytest.fixture
def start_secure(secure, run):
    """A function that starts a server sending FCM v1 to the sandbox by TLS."""
    return lambda *words: run(*to(secure.port, secure.ca), *words)


def to(port, ca):
    return (
        *("--fcm-url", f"https://127.0.0.1:{port}", "--upstream-ca", ca, "--fcm-project", "sandbox-project"),
        *("--token-command", "echo ya29.pretend", "--fcm-rate", "0"),
    )


def figure(server, name, **labels):
    """The sum of a metric over all labels but these."""
    _, _, text = server.http().ask("GET", "/metrics")
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text.decode(), re.MULTILINE)
    return sum(float(value) for found, value in lines if all(each in found for each in wanted))


def connections(server, protocol):
    return figure(server, "gocm_upstream_connections", upstream="fcm", protocol=protocol)


def send(server, count, name="t"):
    """Send a message to that many tokens, and wait for their end; returns the report."""
    server.send([f"{name}-{number}" for number in range(count)])
    return server.settled()


def each_once(sandbox, count, name="t"):
    delivered = sandbox.received()["delivered"]
    return {f"{name}-{number}": 1 for number in range(count)} == delivered


def test_many_messages_share_few_connections_and_arrive_once(start_secure, secure):
    secure.mode(latency=0.2)
    server = start_secure("--senders", "2")
    assert send(server, 1500)["failures"] == 0
    assert each_once(secure, 1500)
    found = secure.received()
    assert found["peak"] > 400, "at once"
    assert found["connections"] <= 24, "with 2,048 allowed in flight"
    assert 1 <= connections(server, "h2") <= 24 and connections(server, "http/1.1") == 0
    assert figure(server, "gocm_upstream_in_flight") == 0


def test_connections_are_the_requests_in_flight(start_secure, secure):
    secure.mode(latency=0.1)
    server = start_secure("--senders", "1", "--connections", "30")
    send(server, 200)
    assert each_once(secure, 200) and secure.received()["peak"] == 30
    assert connections(server, "h2") == 1


@pytest.mark.parametrize("errors", [{"refuse": 0.1}, {"goaway": 0.004}, {"refuse": 0.03, "goaway": 0.003}], ids=str)
@pytest.mark.parametrize("code", [0, 11])
def test_what_was_not_looked_at_is_sent_again_counts_nothing_and_is_not_doubled(start_secure, secure, errors, code):
    secure.mode(latency=0.02, errors=errors, goaway=code)
    server = start_secure("--max-attempts", "1", "--senders", "1")
    said = {0: "NO_ERROR", 11: "ENHANCE_YOUR_CALM"}[code]
    rounds = 0
    while rounds < 40:  # until chance has done what it is to do
        rounds += 1
        assert send(server, 200, f"r{rounds}")["failures"] == 0
        goaways = figure(server, "gocm_upstream_goaways_total", code=said)
        refused = figure(server, "gocm_upstream_refused_streams_total")
        if bool(goaways) == ("goaway" in errors) and bool(refused) == ("refuse" in errors):
            break
    assert rounds < 40 and server.report()["attempts"] == 200 * rounds
    assert set(secure.received()["delivered"].values()) == {1}
    assert len(secure.received()["delivered"]) == 200 * rounds
    assert figure(server, "gocm_retries_total") == 0 and figure(server, "gocm_upstream_repeats_total") > 0


def test_a_reset_stream_is_tried_again_as_an_attempt(start_secure, secure):
    secure.mode(errors={"reset": 0.2}, reset=2)
    server = start_secure("--max-attempts", "20")
    assert send(server, 300)["failures"] == 0
    assert each_once(secure, 300), "the sandbox resets before it takes anything"
    assert figure(server, "gocm_retries_total", cause="connection") > 0


def test_who_refuses_for_ever_is_not_asked_for_ever(start_secure, secure):
    secure.mode(errors={"refuse": 1})
    server = start_secure("--retry-base", "30")
    server.send(["a"])
    eventually(lambda: figure(server, "gocm_retries_total", cause="unavailable") == 1)
    assert secure.received()["requests"] == 6
    secure.mode(errors={})


def test_one_that_blames_us_twice_is_spoken_to_by_http1(start_secure, secure):
    secure.mode(errors={"goaway": 1}, goaway=1)
    server = start_secure("--senders", "1")
    server.send(["a"])
    server.logged("fcm ends a connection and says that it is our fault: GOAWAY PROTOCOL_ERROR pretended")
    eventually(lambda: figure(server, "gocm_upstream_goaways_total", code="PROTOCOL_ERROR") == 2)
    secure.mode(errors={})
    assert server.settled()["failures"] == 0
    send(server, 3)
    assert connections(server, "http/1.1") >= 1


def test_one_that_wants_http1_for_a_request_gets_it(start_secure, secure):
    secure.mode(errors={"reset": 1}, reset=13)
    server = start_secure("--senders", "1", "--max-attempts", "100")
    server.send(["a"])
    eventually(lambda: figure(server, "gocm_upstream_repeats_total") >= 1)
    secure.mode(errors={})
    assert server.settled()["failures"] == 0
    send(server, 3)
    assert connections(server, "http/1.1") >= 1
    assert secure.received()["delivered"] == {"a": 1, "t-0": 1, "t-1": 1, "t-2": 1}


@pytest.mark.parametrize("how", ["off", "not offered"])
def test_http1_where_http2_is_not_wanted(start_secure, secure, how):
    secure.mode(http2=how == "off")
    server = start_secure(*(("--http2", "off") if how == "off" else ()))
    send(server, 50)
    assert each_once(secure, 50)
    assert connections(server, "h2") == 0 and connections(server, "http/1.1") >= 1


def test_one_whose_window_takes_no_message_is_spoken_to_by_http1(start_secure, secure):
    secure.mode(window=10)
    server = start_secure()
    send(server, 20)
    assert each_once(secure, 20)


def test_few_streams_are_kept_to(start_secure, secure):
    secure.mode(streams=3, latency=0.05)
    server = start_secure("--senders", "1")
    send(server, 100)
    assert each_once(secure, 100)
    assert figure(server, "gocm_upstream_refused_streams_total") == 0


def test_a_killed_sandbox_loses_nothing(tmp_path, run):
    port = free_port()
    first = Secure(tmp_path, "--port", str(port))
    server = run(*to(port, first.ca), "--max-attempts", "50", "--retry-cap", "0.2")
    first.mode(latency=0.3)
    server.send([f"t-{number}" for number in range(300)])
    eventually(lambda: first.received()["in_flight"] > 100)
    first.kill_group()
    second = Sandbox("--tls-cert", first.files[0], "--tls-key", first.files[1], "--any-token", "--port", str(port))
    try:
        assert server.settled()["failures"] == 0
    finally:
        second.kill_group()


def test_a_sender_that_is_stopped_finishes_its_streams(start_secure, secure):
    secure.mode(latency=0.5)
    server = start_secure()
    server.send([f"t-{number}" for number in range(250)])
    eventually(lambda: secure.received()["in_flight"] >= 200)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    found = secure.received()
    assert found["in_flight"] == 0 and set(found["delivered"].values()) == {1}
    again = start_secure()
    assert again.settled()["pending"] == 0 and each_once(secure, 250)


def test_by_a_proxy_that_takes_connect(start_secure, secure, tmp_path):
    if not shutil.which("tinyproxy"):
        pytest.skip("no tinyproxy here")
    port = free_port()
    (tmp_path / "tiny.conf").write_text(f"Port {port}\nListen 127.0.0.1\nMaxClients 20\nConnectPort {secure.port}\n")
    proxy = subprocess.Popen(["tinyproxy", "-d", "-c", str(tmp_path / "tiny.conf")], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: listens(port))
        # This machine's own addresses are never asked for by a proxy, so a name that the proxy resolves.
        upstream = Upstream(DIALECTS["fcm"], f"https://localhost:{secure.port}/x", ca_file=secure.ca, http2=True)
        assert upstream.dial().protocol == "h2"
    finally:
        proxy.kill()
        proxy.wait()


# ------------------------------------------------------------------------------------------- servers of other people


def nginx(place, port, cert, key):
    (place / "nginx.conf").write_text(
        "daemon off; error_log stderr; pid nginx.pid; events {}\nhttp { access_log off; client_body_temp_path body;\n"
        f"server {{ listen 127.0.0.1:{port} ssl http2; ssl_certificate {cert}; ssl_certificate_key {key};\n"
        f"location / {{ return 200 '{NAME.decode()}'; }} }} }}\n"
    )
    return ["nginx", "-e", "stderr", "-p", str(place), "-c", str(place / "nginx.conf")]


def haproxy(place, port, cert, key):
    (place / "both.pem").write_text(Path(cert).read_text() + Path(key).read_text())
    (place / "haproxy.cfg").write_text(
        "defaults\n mode http\n timeout client 30s\n timeout server 30s\n timeout connect 5s\nfrontend f\n"
        f" bind 127.0.0.1:{port} ssl crt {place}/both.pem alpn h2,http/1.1\n"
        f" http-request return status 200 content-type application/json string '{NAME.decode()}'\n"
    )
    return ["haproxy", "-db", "-f", str(place / "haproxy.cfg")]


def nghttpd(place, port, cert, key):
    target = place / "v1/projects/sandbox-project"
    target.mkdir(parents=True)
    (target / "messages:send").write_bytes(NAME)
    return ["nghttpd", "-d", str(place), str(port), key, cert]


def node(place, port, cert, key):
    (place / "server.js").write_text(
        f"""const fs = require("fs");
require("http2").createSecureServer({{key: fs.readFileSync("{key}"), cert: fs.readFileSync("{cert}")}})
  .on("stream", (stream) => {{ stream.resume(); stream.on("end", () => {{
    stream.respond({{":status": 200, "content-type": "application/json"}}); stream.end('{NAME.decode()}'); }}); }})
  .listen({port}, "127.0.0.1");
"""
    )
    return ["node", str(place / "server.js")]


def hypercorn(place, port, cert, key):
    (place / "app.py").write_text(
        f"""async def app(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError
    while (await receive()).get("more_body"):
        pass
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}})
    await send({{"type": "http.response.body", "body": {NAME!r}}})
"""
    )
    words = ["--certfile", cert, "--keyfile", key, "-b", f"127.0.0.1:{port}", "app:app"]
    return [sys.executable, "-m", "hypercorn", *words]


@pytest.mark.parametrize("make", [nginx, haproxy, nghttpd, node, hypercorn])
def test_servers_that_others_have_written(make, tmp_path, run, secure):
    place, port = tmp_path / "theirs", free_port()
    place.mkdir()
    words = make(place, port, *secure.files)
    if make is hypercorn:
        pytest.importorskip("hypercorn")
    if not shutil.which(words[0]):
        pytest.skip(f"no {words[0]} here")
    theirs = subprocess.Popen(words, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: listens(port))
        server = run(*to(port, secure.ca), "--senders", "1")
        report = send(server, 2500)
        assert (report["attempts"], report["failures"]) == (2500, 0)
        assert connections(server, "h2") >= 1 and connections(server, "http/1.1") == 0
        assert figure(server, "gocm_upstream_responses_total", code="200") == 2500
    finally:
        theirs.kill()
        theirs.wait()


# -------------------------------------------------------------------------------------------------------- dialling


@pytest.mark.short
@pytest.mark.parametrize("http2, offered", [(True, ["h2", "http/1.1"]), (False, ["http/1.1"])])
def test_what_is_offered_by_alpn_with_the_urllib3_that_is_installed(http2, offered, tmp_path, authority):
    """urllib3 has each context offer HTTP/1.1 alone, by a method that ours does not listen to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    for accepted in (["h2"], ["http/1.1"], ["h2", "http/1.1"]):
        context.set_alpn_protocols(accepted)
        chosen = []

        with listening(lambda tls, chosen=chosen: chosen.append(tls.selected_alpn_protocol()), context) as port:
            url = f"https://127.0.0.1:{port}/"
            upstream = Upstream(DIALECTS["fcm"], url, ca_file=str(tmp_path / "ca.pem"), http2=http2)
            try:
                upstream.dial().close()
            except DialError as error:  # who agrees to HTTP/2 and hangs up
                assert "HTTP/2" in str(error)
            eventually(lambda chosen=chosen: chosen)
        expected = next((each for each in offered if each in accepted), None)
        assert chosen == [expected], accepted


@contextlib.contextmanager
def listening(serve, context):
    """A server in a thread: each connection, once TLS is agreed, is given to `serve`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with context.wrap_socket(sock, server_side=True) as tls:
                    serve(tls)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@pytest.mark.short
@pytest.mark.parametrize(
    "said, reason, verdict",
    [
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100, "speaks no HTTP/2", "upstream_config"),
        (b"", "closed before|ConnectionReset", "unreachable"),  # a reset, where it has not read what we said
        (None, "timed out", "unreachable"),
    ],
)
def test_one_that_says_http2_and_speaks_none_is_a_failed_dial(said, reason, verdict, tmp_path, authority, monkeypatch):
    monkeypatch.setattr("gocm_lib.senders.upstream.CONNECT_TIMEOUT", 0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])

    def serve(tls):
        if said:
            tls.recv(1000)
            tls.sendall(said)
        while said is None and tls.recv(1000):
            pass

    with listening(serve, context) as port:
        url = f"https://127.0.0.1:{port}/"
        upstream = Upstream(DIALECTS["fcm"], url, ca_file=str(tmp_path / "ca.pem"), http2=True)
        with pytest.raises(DialError, match=reason) as caught:
            upstream.dial()
    assert caught.value.outcome.verdict == verdict
