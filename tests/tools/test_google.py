"""The sandbox in Google's place: by proxy and by name, for programs that nobody can tell another address."""

import contextlib
import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys

import pytest
from kit import ROOT, Http, Program

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.front import google
from gocm_lib.message.bad_request import BadRequest

NOW = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
SEND = "https://fcm.googleapis.com/v1/projects/my-app/messages:send"


class Pretended:
    """A sandbox in Google's place, and programs that are led to it."""

    def __init__(self, place):
        self.place = place
        self.program = Program("sandbox", "--port", "0", "--google", str(place))
        self.port = int(self.program.logged(r"listens on \S+ port (\d+)"))
        self.tls_port = int(self.program.logged(r"by TLS on port (\d+)"))

    def run(self, *words):
        """What a program prints that knows nothing but the variables of DIR/env."""
        assert shutil.which(words[0]) or pytest.skip(f"no {words[0]} here")
        script = f'. {self.place}/env && exec "$@"'
        ended = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def targets(self):
        found = Http(self.port).json("GET", "/sandbox/messages")["messages"]
        return [each["message"]["message"]["token"] for each in found]


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    made = Pretended(tmp_path_factory.mktemp("google") / "files")
    yield made
    made.program.kill_group()


@pytest.fixture(autouse=True)
def emptied(request):
    if "pretended" in request.fixturenames:
        Http(request.getfixturevalue("pretended").port).ask("POST", "/sandbox/reset")


PYTHON = f"""
import requests
answer = requests.post("{SEND}", json={{"message": {{"token": "python"}}}}, headers={{"Authorization": "Bearer any"}})
print(answer.status_code)
try:
    requests.get("https://example.org/")
except requests.exceptions.ProxyError as error:
    print("403" in str(error))
"""
NODE = f"""
import http2 from "node:http2";
import https from "node:https";
const headers = {{authorization: "Bearer any", "content-type": "application/json"}};
const body = token => JSON.stringify({{message: {{token}}}});
const fetched = await fetch("{SEND}", {{method: "POST", headers, body: body("fetch")}});
const asked = await new Promise((done, failed) => https.request("{SEND}", {{method: "POST", headers}}, done)
  .on("error", failed).end(body("https")));
const session = http2.connect("https://fcm.googleapis.com");
const request = session.request({{":path": new URL("{SEND}").pathname, ":method": "POST", ...headers}});
request.end(body("http2"));
const streamed = await new Promise((done, failed) => request.on("response", done).on("error", failed));
console.log(fetched.status, asked.statusCode, streamed[":status"]);
process.exit();
"""
JAVA = f"""
import java.net.*;
import java.net.http.*;
public class Led {{
  public static void main(String[] words) throws Exception {{
    var asked = (HttpURLConnection) new URL("{SEND}").openConnection();
    asked.setDoOutput(true);
    asked.setRequestProperty("Authorization", "Bearer any");
    asked.setRequestProperty("Content-Type", "application/json");
    asked.getOutputStream().write("{{\\"message\\": {{\\"token\\": \\"java\\"}}}}".getBytes());
    System.out.println(asked.getResponseCode());
    var post = HttpRequest.newBuilder(URI.create("{SEND}")).header("Authorization", "Bearer any")
        .header("Content-Type", "application/json")
        .POST(HttpRequest.BodyPublishers.ofString("{{\\"message\\": {{\\"token\\": \\"java 11\\"}}}}")).build();
    var answer = HttpClient.newHttpClient().send(post, HttpResponse.BodyHandlers.ofString());
    System.out.println(answer.statusCode());
  }}
}}
"""


def test_python(pretended):
    assert pretended.run(sys.executable, "-c", PYTHON).split() == ["200", "True"]
    assert pretended.targets() == ["python"]


def test_python_that_takes_no_proxy(pretended, tmp_path):
    """Google's names lead to the sandbox; what sitecustomize.py hides of others is done still."""
    (tmp_path / "sitecustomize.py").write_text("print('hidden')")
    get = "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('https://%s/')"
    words = ["sh", "-c", f'PYTHONPATH="$PYTHONPATH:{tmp_path}" "$0" -c "$1" 2>&1; true', sys.executable]
    assert pretended.run(*words, get % "fcm.googleapis.com").startswith("hidden\n")
    assert "HTTP Error 404: Pretend" in pretended.run(*words, get % "fcm.googleapis.com")
    assert "HTTP Error" not in pretended.run(*words, get % "localhost:1")


def test_curl(pretended):
    words = ("-sS", "-H", "Authorization: Bearer any", "-H", "Content-Type: application/json")
    answer = pretended.run("curl", *words, "-d", '{"message": {"token": "curl"}}', SEND)
    assert '"projects/my-app/messages/0:' in answer and pretended.targets() == ["curl"]


def test_node(pretended, tmp_path):
    (tmp_path / "led.mjs").write_text(NODE)
    assert pretended.run("node", str(tmp_path / "led.mjs")).split() == ["200", "200", "200"]
    assert pretended.targets() == ["fetch", "https", "http2"]


RUBY = f"""
require "net/http"
answer = Net::HTTP.post(URI("{SEND}"), '{{"message": {{"token": "ruby"}}}}', "Authorization" => "Bearer any",
                        "Content-Type" => "application/json")
print answer.code
"""
PHP = f"""<?php
$curl = curl_init("{SEND}");
curl_setopt_array($curl, [CURLOPT_POSTFIELDS => '{{"message": {{"token": "php"}}}}', CURLOPT_RETURNTRANSFER => true,
    CURLOPT_HTTPHEADER => ["Authorization: Bearer any", "Content-Type: application/json"]]);
curl_exec($curl);
echo curl_getinfo($curl, CURLINFO_RESPONSE_CODE), curl_error($curl);
"""
PERL = f"""
use LWP::UserAgent;
my $answer = LWP::UserAgent->new->post("{SEND}", Authorization => "Bearer any", "Content-Type" => "application/json",
    Content => '{{"message": {{"token": "perl"}}}}');
print $answer->code;
"""


@pytest.mark.parametrize(
    "language, needs, program",
    [
        ("ruby", ["-rnet/http"], ["sh", "-c", 'http_proxy=$HTTPS_PROXY exec ruby "$0"']),
        ("php", ["-r", "curl_init();"], ["php"]),
        ("perl", ["-MLWP::Protocol::https"], ["perl"]),
    ],
)
def test_another_language(pretended, tmp_path, language, needs, program):
    can = [language, *needs, *([] if language == "php" else ["-e", "1"])]
    if not shutil.which(language) or subprocess.run(can, capture_output=True).returncode:
        pytest.skip(f"no {language} here, or no library of its to send with")
    (tmp_path / "led").write_text({"ruby": RUBY, "php": PHP, "perl": PERL}[language])
    assert pretended.run(*program, str(tmp_path / "led")) == "200"
    assert pretended.targets() == [language]


NAMED = """
mount --bind "$1/hosts" /etc/hosts && ip link set lo up || exit 77
"$2" "$3" sandbox --host 0.0.0.0 --no-auth --google "$1/google" --tls-port 443 --port 0 >"$1/out" 2>"$1/log" &
for i in $(seq 200); do grep -q "TLS on port 443" "$1/log" && break; sleep 0.1; done
SSL_CERT_FILE="$1/google/bundle.pem" REQUESTS_CA_BUNDLE="$1/google/bundle.pem" "$2" -c "$4"; kill $!; wait $!
"""


@pytest.mark.skipif(os.getuid() != 0, reason="takes root, to have a hosts file and a network of its own")
def test_by_name_as_aliases_of_a_container_have_it(tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 localhost " + " ".join(google.NAMES))
    words = (str(tmp_path), sys.executable, str(ROOT / "gocm.py"), PYTHON.split("try:")[0])
    ended = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", NAMED, "sh", *words], capture_output=True, text=True
    )
    assert ended.returncode != 77 or pytest.skip("no network of its own here")
    assert ended.stdout == "200\n", ended.stderr + (tmp_path / "log").read_text()


def test_java(pretended, tmp_path):
    (tmp_path / "Led.java").write_text(JAVA)
    assert pretended.run("java", str(tmp_path / "Led.java")).split() == ["200", "200"]
    assert pretended.targets() == ["java", "java 11"]


def spoken(sock, name, ca):
    context = ssl.create_default_context(cafile=ca)
    with context.wrap_socket(sock, server_hostname=name) as line:
        line.sendall(b"GET /sandbox/counts HTTP/1.1\r\nHost: %b\r\n\r\n" % name.encode())
        return line.recv(4096)


@pytest.mark.parametrize("name", google.NAMES)
def test_each_name_by_tls_and_none_may_look_into_the_sandbox(pretended, name):
    with socket.create_connection(("127.0.0.1", pretended.tls_port)) as sock:
        assert b" 421 " in spoken(sock, name, pretended.place / "ca.pem").split(b"\r\n")[0]


def test_no_other_name_is_believed(pretended):
    with socket.create_connection(("127.0.0.1", pretended.tls_port)) as sock, pytest.raises(ssl.SSLError):
        spoken(sock, "example.org", pretended.place / "ca.pem")


def shake_hands(context, ca, name):
    """With a server of this context, as a client that trusts an authority and means this name."""
    client, server = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = ssl.create_default_context(cafile=ca).wrap_bio(server, client, server_hostname=name)
    serves = context.wrap_bio(client, server, server_side=True)
    for _ in range(4):
        for side in (asks, serves):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


def test_the_authority_can_speak_for_no_other_name(tmp_path, monkeypatch):
    google.serve_as(str(tmp_path), datetime.datetime.now(datetime.UTC))
    monkeypatch.setattr(google, "NAMES", ("example.org",))  # as one who has stolen its key would
    forged = google.serve_as(str(tmp_path), datetime.datetime.now(datetime.UTC))
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        shake_hands(forged, tmp_path / "ca.pem", "example.org")


def test_the_authority_can_speak_for_no_address(tmp_path, monkeypatch):
    from cryptography import x509

    google.serve_as(str(tmp_path), datetime.datetime.now(datetime.UTC))
    address = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(x509, "DNSName", lambda name: x509.IPAddress(address))
    forged = google.serve_as(str(tmp_path), datetime.datetime.now(datetime.UTC))
    with pytest.raises(ssl.SSLCertVerificationError, match="subtree"):
        shake_hands(forged, tmp_path / "ca.pem", "127.0.0.1")


def test_a_key_that_others_may_read_is_not_used(tmp_path):
    google.serve_as(str(tmp_path), NOW)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(Fatal, match="may be read by others"):
        google.serve_as(str(tmp_path), NOW)


def asked(port, *pieces):
    """What the sandbox says at first to these bytes."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        for piece in pieces:
            sock.sendall(piece)
        return sock.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"CONNECT fcm.googleapis.com:443 HTTP/1.1\r\n\r\n", b"200"),
        (b"CONNECT FCM.GoogleAPIs.com:443 HTTP/1.0\r\nProxy-Authorization: Basic eDp5\r\n\r\n", b"200"),
        (b"CONNECT example.org:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fcm.googleapis.com:80 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT xfcm.googleapis.com:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fcm.googleapis.com HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT \xff:443 HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT  HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT a:66000 HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT a:\xb2 HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT fcm.googleapis.com:443\r\n\r\n", b"400"),
        (b"CONNECT fcm.googleapis.com:443 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT " + b"a" * 20_000, b"400"),
    ],
)
def test_who_asks_to_be_led(pretended, request_, status):
    for pieces in ([request_], [request_[:3], request_[3:]]):
        assert asked(pretended.port, *pieces).split()[1] == status
    assert Http(pretended.port).json("GET", "/sandbox/counts")["requests"] == 0


def test_who_stops_in_the_handshake_or_speaks_garbage_holds_up_nobody(pretended):
    held = [socket.create_connection(("127.0.0.1", pretended.port)) for _ in range(30)]
    for number, sock in enumerate(held):
        sock.sendall(b"CONNECT fcm.googleapis.com:443 HTTP/1.1\r\n\r\n"[: 5 if number % 3 == 0 else None])
        if number % 3 == 1:
            sock.recv(100)
            sock.sendall(b"\x16\x03\x01\x02\x00\x01garbage" * 100)
    assert pretended.run("curl", "-sS", "-o", os.devnull, "-w", "%{http_code}", SEND) == "404"
    for sock in held:
        sock.close()
    assert Http(pretended.port).json("GET", "/sandbox/counts")["in_flight"] == 0


def test_the_authority_outlives_a_start_and_is_renewed_before_its_end(tmp_path):
    def made(now):
        google.serve_as(str(tmp_path), now)
        return (tmp_path / "ca.pem").read_bytes()

    first = made(NOW)
    assert made(NOW + google.LIFE - 2 * google.RENEWED) == first
    second = made(NOW + google.LIFE - google.RENEWED / 2)
    assert second != first
    (tmp_path / "ca.key").write_text("no key")  # keeps its mode
    assert made(NOW + google.LIFE) != second


def test_secrets_are_for_their_owner(pretended):
    for name in ("ca.key", "server.pem", "account.json"):
        assert stat.S_IMODE((pretended.place / name).stat().st_mode) == 0o600
    assert sorted(each.name for each in pretended.place.iterdir() if each.is_file()) == [
        *("account.json", "bundle.pem", "ca.key", "ca.pem", "env", "extra.pem", "node.cjs", "php.ini"),
        *("server.pem", "sitecustomize.py", "tls-port", "trust.p12"),
    ]


def test_a_folder_that_cannot_be_and_what_does_not_go_together(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fatal, match="cannot be written"):
        google.serve_as(str(tmp_path / "file"), NOW)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Fatal, match="may be written by others"):
        google.serve_as(str(tmp_path / "open"), NOW)
    google.serve_as(str(tmp_path / "made"), NOW)
    words = ("--google", str(tmp_path / "other"), "--tls-cert", str(tmp_path / "made/server.pem"))
    program = Program("sandbox", "--port", "0", *words)
    assert program.wait() == Exit.CONFIG and "--tls-cert" in program.log()


def test_a_malformed_line_is_told_apart_from_another_name():
    with pytest.raises(BadRequest) as found:
        google.asked_for(b"CONNECT a:443 HTTP/2\r\n")
    assert found.value.status == 400
