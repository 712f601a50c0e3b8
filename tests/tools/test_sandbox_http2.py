"""The sandbox by HTTP/2: with the clients that people have, and with FCM's habits."""

import json
import shutil
import socket
import ssl
import subprocess

import httpx
import pytest
import trustme
from kit import Http, Sandbox

from gocm_lib.http2 import frames
from gocm_lib.http2.client import Again, Answer, Client, Lost

SEND = "/v1/projects/sandbox-project/messages:send"


def body(token):
    return json.dumps({"message": {"token": token, "data": {"a": "b"}}}).encode()


def credential(sandbox):
    path = "/computeMetadata/v1/instance/service-accounts/default/token"
    _, _, answer = Http(sandbox.port).ask("GET", path, None, {"Metadata-Flavor": "Google"})
    return "Bearer " + json.loads(answer)["access_token"]


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """A sandbox that speaks TLS, and the file of its authority."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    sandbox = Sandbox("--tls-cert", str(directory / "cert.pem"), "--tls-key", str(directory / "key.pem"), "--any-token")
    yield sandbox, str(directory / "ca.pem")
    sandbox.kill_group()


class Line:
    """Our own client on a socket."""

    def __init__(self, sandbox):
        self.headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", SEND),
            (":authority", "localhost"),
            ("authorization", credential(sandbox)),
        )
        self.sock = socket.create_connection(("127.0.0.1", sandbox.port), 10)
        self.client = Client(0.0)
        self.found = []
        while not self.client.greeted:
            self.turn()

    def turn(self):
        self.sock.sendall(self.client.out)
        self.client.out.clear()
        data = self.sock.recv(65536)
        self.found += self.client.receive(data, 0.0) if data else self.client.end("closed")
        return bool(data)

    def ask(self, *tokens):
        """What becomes of messages to these tokens, by token."""
        for token in tokens:
            self.client.request(token, self.headers, body(token), 0.0)
        while self.client.open and self.turn():
            pass
        found, self.found = self.found, []
        return {event.key: event for event in found}


def test_a_hundred_at_once_arrive_and_each_is_answered(sandbox):
    line = Line(sandbox)
    found = line.ask(*[f"t-{number}" for number in range(98)], "gone-1", "slow-1-x")
    assert len(found) == 100 and {event.status for event in found.values()} == {200, 404}
    assert found["gone-1"].status == 404 and b"UNREGISTERED" in found["gone-1"].body
    assert sandbox.received()["delivered"].keys() == {*found} - {"gone-1"}


def test_what_is_refused_reset_or_cut_off_by_a_goaway(sandbox):
    line = Line(sandbox)
    sandbox.mode(errors={"refuse": 1})
    assert line.ask("a")["a"].again is Again.FREELY and line.client.refusals == 1
    sandbox.mode(errors={"reset": 1}, reset=8)
    assert line.ask("b")["b"] == Lost("b", "reset: CANCEL", Again.NO)
    sandbox.mode(errors={})
    assert isinstance(line.ask("c")["c"], Answer)
    sandbox.mode(errors={"goaway": 1}, goaway=11)
    lost = line.ask("d")["d"]
    assert lost.again is Again.FREELY and line.client.goaways == [(11, "ENHANCE_YOUR_CALM pretended")]
    assert not line.sock.recv(1), "then it closes"
    assert set(sandbox.received()["delivered"]) == {"c"}


def test_its_limits_are_told_and_kept(sandbox):
    sandbox.mode(streams=2, window=40)
    line = Line(sandbox)
    assert line.client.room() == 2 and line.client.narrow == 40
    line.client._peer.initial = line.client._peer.streams = 1000  # a client that does not care
    assert line.ask("a")["a"].reason == "reset: FLOW_CONTROL_ERROR"
    sandbox.mode(streams=2, window=1000)
    line = Line(sandbox)
    line.client._peer.streams = 3
    found = line.ask("slow-1-a", "slow-1-b", "c")
    assert found["c"].reason == "reset: REFUSED_STREAM" and found["slow-1-a"].status == 200


def test_a_stranger_s_bytes_are_answered_and_the_connection_closed(sandbox):
    for data in (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", frames.PREFACE + b"\xff" * 50, b"PRJ\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", sandbox.port), 10) as sock:
            sock.sendall(data)
            while sock.recv(4096):
                pass


def test_httpx_by_alpn_and_without_it(secure):
    sandbox, ca = secure
    for http2, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
        with httpx.Client(http2=http2, verify=ssl.create_default_context(cafile=ca)) as client:
            for _ in range(3):
                answer = client.post(
                    f"https://127.0.0.1:{sandbox.port}{SEND}", content=body("t"), headers={"Authorization": "Bearer x"}
                )
                assert (answer.status_code, answer.http_version) == (200, version)


def test_a_client_may_be_refused_http2(secure):
    sandbox, ca = secure
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2", "http/1.1"])

    def offered():
        sock = socket.create_connection(("127.0.0.1", sandbox.port))
        with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
            return tls.selected_alpn_protocol()

    def mode(http2):
        with httpx.Client(verify=context) as client:
            assert client.post(f"https://127.0.0.1:{sandbox.port}/sandbox/mode", json={"http2": http2}).is_success

    assert offered() == "h2"
    mode(False)
    assert offered() == "http/1.1"
    mode(True)


@pytest.mark.parametrize("how", ["plain", "tls"])
@pytest.mark.parametrize("program", ["curl", "nghttp"])
def test_programs_that_people_try_it_with(sandbox, secure, program, how):
    if not shutil.which(program):
        pytest.skip(f"no {program} here")
    port, ca = (sandbox.port, "") if how == "plain" else (secure[0].port, secure[1])
    if program == "nghttp" and ca:
        ca = ""  # it verifies nothing
    url = f"{'https' if how == 'tls' else 'http'}://127.0.0.1:{port}/v1/projects/other/messages:send"
    if program == "curl":
        how_to = ["--http2", "--cacert", ca] if ca else ["--http2-prior-knowledge"]
        words = ["curl", "-sS", *how_to, "-H", "Authorization: Bearer x", "-d", "{}", "-w", "%{http_version}", url]
    else:
        words = ["nghttp", "-v", "-H:method: POST", "-Hauthorization: Bearer x", url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if program == "curl" and "does not support" in done.stderr:
        pytest.skip("this curl has no HTTP/2")
    assert done.returncode == 0, done.stderr
    assert "UNAUTHENTICATED" in done.stdout or "PERMISSION_DENIED" in done.stdout


def test_h2load_finds_no_fault(sandbox, tmp_path):
    if not shutil.which("h2load"):
        pytest.skip("no h2load here")
    (tmp_path / "body").write_bytes(body("t"))
    done = subprocess.run(
        [
            *("h2load", "-n", "3000", "-c", "4", "-m", "100", "-d", str(tmp_path / "body")),
            *("-H", f"authorization: {credential(sandbox)}", f"http://127.0.0.1:{sandbox.port}{SEND}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "3000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout, done.stdout
    assert sandbox.received()["delivered"]["t"] == 3000
