"""proxy: which way leads to a URL; and sending, tokens and the webhook by a proxy."""

import base64
import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import trustme
from kit import Sandbox, Server, Upstream, dial, eventually, free_port

from gocm_lib.config import proxy
from gocm_lib.config.proxy import is_exception
from gocm_lib.config.settings import Fatal, Settings

short = pytest.mark.short
FCM = "https://fcm.googleapis.com/v1"

# (NO_PROXY, host, port): whether it is an exception. How curl, Go, Python's requests and urllib read these differs.
EXCEPTIONS = [
    ("", "fcm.googleapis.com", 443, False),
    ("googleapis.com", "fcm.googleapis.com", 443, True),
    ("googleapis.com", "googleapis.com", 443, True),
    (".googleapis.com", "fcm.googleapis.com", 443, True),
    (".googleapis.com", "googleapis.com", 443, True),
    ("*.googleapis.com", "fcm.googleapis.com", 443, True),
    ("apis.com", "fcm.googleapis.com", 443, False),
    ("*", "fcm.googleapis.com", 443, True),
    ("example.org,*", "fcm.googleapis.com", 443, True),
    ("fcm.googleapis.com:443", "fcm.googleapis.com", 443, True),
    ("fcm.googleapis.com:8443", "fcm.googleapis.com", 443, False),
    ("FCM.GoogleAPIs.COM", "fcm.googleapis.com", 443, True),
    (" example.org , fcm.googleapis.com ", "fcm.googleapis.com", 443, True),
    ("example.org fcm.googleapis.com", "fcm.googleapis.com", 443, True),
    ("10.0.0.0/8", "10.1.2.3", 443, True),
    ("10.0.0.0/8", "11.1.2.3", 443, False),
    ("10.0.0.0/8", "fcm.googleapis.com", 443, False),
    ("10.1.2.3", "10.1.2.3", 443, True),
    ("10.1.2.3:80", "10.1.2.3", 443, False),
    ("fd00::/8", "fd00::1", 443, True),
    ("fd00::1", "fd00::1", 443, True),
    ("[fd00::1]", "fd00::1", 443, True),
    ("[fd00::1]:443", "fd00::1", 443, True),
    ("[fd00::1]:80", "fd00::1", 443, False),
    ("googleapis.com.", "fcm.googleapis.com", 443, True),
    ("googleapis.com", "fcm.googleapis.com.", 443, True),
    ("3.14", "fcm.googleapis.com", 443, False),
]


@short
@pytest.mark.parametrize("entries, host, port, expected", EXCEPTIONS)
def test_no_proxy_is_read_as_most_read_it(entries, host, port, expected):
    assert is_exception(entries, host, port) == expected


def way(url=FCM, settings=None, **environ):
    found = proxy.ways(settings or Settings(), environ).to(url)
    return found and str(found)


@short
def test_the_option_counts_then_the_variables():
    assert way() is None
    assert way(HTTPS_PROXY="http://a:1", ALL_PROXY="http://b:2") == "a:1"
    assert way(https_proxy="http://c:3", HTTPS_PROXY="http://a:1") == "c:3"
    assert way(HTTPS_PROXY="", ALL_PROXY="b:2") == "b:2" and way(all_proxy="http://[fd00::1]") == "[fd00::1]:80"
    assert way(HTTP_PROXY="http://d:4", http_proxy="http://d:4") is None
    given = Settings(proxy="http://o:9")
    assert way(settings=given, HTTPS_PROXY="http://a:1") == "o:9"
    assert way(settings=given, NO_PROXY="googleapis.com") is None
    assert way(settings=Settings(proxy="none"), HTTPS_PROXY="http://a:1") is None
    assert way("http://10.0.0.1/x", settings=given) is None
    assert all(way(f"https://{host}/x", settings=given) is None for host in ("localhost", "127.0.0.9", "[::1]:7"))


@short
@pytest.mark.parametrize(
    "settings, environ, words",
    [
        ({"proxy": "http://u:secret@h:1"}, {}, "--proxy-auth-file"),
        ({"proxy": "http://:secret@h:1"}, {}, "--proxy-auth-file"),
        ({"proxy": "https://h:1"}, {}, "spoken to by TLS"),
        ({"proxy": "socks5://h:1"}, {}, "spoken to by socks5"),
        ({"proxy": "http://"}, {}, "must be a URL like"),
        ({"proxy": "http://h:99999"}, {}, "must be a URL like"),
        ({"proxy": "http://h/path"}, {}, "must be a URL like"),
        ({}, {"HTTPS_PROXY": "https://u:secret@h:1"}, "HTTPS_PROXY: .* spoken to by TLS"),
    ],
)
def test_a_proxy_that_cannot_be_is_told_without_its_password(settings, environ, words):
    with pytest.raises(Fatal, match=words) as caught:
        proxy.ways(Settings(**settings), environ)
    assert "secret" not in str(caught.value)


@short
def test_where_its_password_comes_from(tmp_path):
    (tmp_path / "auth").write_text("user:p@ss:w\n")
    by_file = Settings(proxy="http://h:1", proxy_auth_file=str(tmp_path / "auth"))
    wanted = base64.b64encode(b"user:p@ss:w").decode()
    assert proxy.ways(by_file, {}).to(FCM).headers == {"Proxy-Authorization": f"Basic {wanted}"}
    assert (
        proxy.ways(Settings(), {"HTTPS_PROXY": "http://user:p%40ss:w@h:1"}).to(FCM).authorization == f"Basic {wanted}"
    )
    assert proxy.ways(Settings(proxy="http://h:1"), {}).to(FCM).headers == {}
    assert "p@ss" not in str(proxy.ways(by_file, {}))
    for wrong in ("", "nothing", "a:b\nc:d"):
        (tmp_path / "auth").write_text(wrong)
        with pytest.raises(Fatal, match="must hold one line"):
            proxy.ways(by_file, {})


# ------------------------------------------------------------------------------------------------------- real traffic


class Tunnel(Upstream):
    """A proxy that takes CONNECT to names of its own, and answers as it is told to."""

    def __init__(self, names):
        self.names, self.answer, self.asked = names, None, []
        super().__init__(Tunnel._tunnel)
        self.proxy = "http://{}:{}".format(*self.listener.getsockname())

    def _tunnel(self, sock, _number):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        name = head.split()[1].decode().rpartition(":")[0]
        self.asked.append((name, dict(re.findall(r"(?m)^([A-Za-z-]+): (.*?)\r$", head.decode()))))
        if self.answer:
            sock.sendall(f"HTTP/1.1 {self.answer} X\r\nContent-Length: 0\r\n\r\n".encode())
            return
        with socket.create_connection(("127.0.0.1", self.names[name])) as there:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(there, sock), daemon=True)
            back.start()
            _copy(sock, there)
            back.join(5)


def _copy(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def google(tmp_path):
    """(a sandbox over TLS that is fcm.test, its authority's file)"""
    authority = trustme.CA()
    issued = authority.issue_cert("fcm.test", "127.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    words = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    found = Sandbox(*words, "--write-credentials", str(tmp_path / "fcm.json"))
    yield found, str(tmp_path / "ca.pem")
    found.kill_group()


def https_json(sandbox, ca, path):
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection("fcm.test", context=context)
    connection.sock = context.wrap_socket(dial(sandbox.port), server_hostname="fcm.test")
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": "localhost"})
        return json.loads(connection.getresponse().read())


# Asks the sandbox, by no proxy, for a token that it will take.
TOKEN = """\
import json, ssl, urllib.request as r
way = r.build_opener(r.ProxyHandler({{}}), r.HTTPSHandler(context=ssl._create_unverified_context()))
url = "https://127.0.0.1:{port}/computeMetadata/v1/instance/service-accounts/default/token"
print(json.load(way.open(r.Request(url, headers={{"Metadata-Flavor": "Google"}})))["access_token"])
"""


@pytest.fixture
def begin(google, tmp_path):
    """A function that starts a server that sends to https://fcm.test."""
    made = []

    def start(*words, environ=None, name="fcm.test"):
        (tmp_path / "token.py").write_text(TOKEN.format(port=google[0].port))
        command = f"{sys.executable} {tmp_path / 'token.py'}"
        fcm = ("--fcm-url", f"https://{name}:{google[0].port}", "--fcm-project", "sandbox-project")
        token = () if "--credentials" in words else ("--token-command", command)
        server = Server(tmp_path / "gocm.db", *fcm, *token, "--upstream-ca", google[1], *words, environ=environ or {})
        made.append(server)
        return server

    yield start
    for server in made:
        server.kill_group()


def test_messages_tokens_and_the_webhook_go_by_it(begin, google, tmp_path):
    sandbox, ca = google
    tunnel = Tunnel({"fcm.test": sandbox.port, "hook.test": sandbox.port})
    account = json.loads((tmp_path / "fcm.json").read_text())
    (tmp_path / "fcm.json").write_text(json.dumps({**account, "token_uri": f"https://fcm.test:{sandbox.port}/token"}))
    for name, text in {"auth": "user:secret-p", "hook": "x" * 32}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    hook = ("--feedback-url", "https://hook.test/x", "--feedback-secret-file", str(tmp_path / "hook"))
    way = ("--proxy", tunnel.proxy, "--proxy-auth-file", str(tmp_path / "auth"))
    server = begin("--credentials", str(tmp_path / "fcm.json"), *way, *hook)
    server.logged(r"proxy 127.0.0.1:\d+ with a password, by --proxy")
    server.send(["a", "gone-b"])
    eventually(lambda: "hook.test" in [name for name, _ in tunnel.asked])
    eventually(lambda: https_json(sandbox, ca, "/sandbox/received")["delivered"] == {"a": 1})
    wanted = "Basic " + base64.b64encode(b"user:secret-p").decode()
    assert all(fields["Proxy-Authorization"] == wanted for _, fields in tunnel.asked)
    assert "secret-p" not in server.log() and wanted not in server.log()


@pytest.mark.parametrize("answer, verdict", [("407", "refuses"), ("403", "refuses"), ("502", "unreachable")])
def test_what_the_proxy_says_is_told_as_its_own(begin, google, answer, verdict):
    sandbox, ca = google
    tunnel = Tunnel({"fcm.test": sandbox.port})
    tunnel.answer = answer
    server = begin(environ={"https_proxy": tunnel.proxy})
    server.logged("proxy 127.0.0.1:.*, by https_proxy")
    server.send(["a"])
    server.send(["b"])
    server.logged(rf"upstream fcm is paused for . s: proxy 127.0.0.1:\d+ answers {answer}")
    tunnel.answer = None
    server.settled()
    assert https_json(sandbox, ca, "/sandbox/received")["delivered"] == {"a": 1, "b": 1}


def test_a_proxy_that_drips_keeps_no_other_upstream_from_sending(begin, sandbox, key_file):
    """It kept all threads that connect, for good, and nothing told of it."""
    drips = Upstream(_drip)
    place = drips.listener.getsockname()
    server = begin(
        # One connection of HTTP/2 would do for all, and one thread would dial it.
        *("--proxy", "http://{}:{}".format(*place), "--senders", "1", "--http2", "off"),
        *("--gcm-url", sandbox.url(), "--apikey-file", str(key_file)),
    )
    server.send([f"t{n}" for n in range(200)])
    eventually(lambda: drips.connections >= 10)
    server.send(["to-gcm"], upstream="gcm")
    eventually(lambda: sandbox.received()["delivered"].get("to-gcm"))
    server.logged(r"upstream fcm is paused for . s: proxy 127.0.0.1:\d+: connecting timed out")


def _drip(_upstream, sock, _number):
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        sock.sendall(b"X-A: b\r\n")
        time.sleep(1.0)


@pytest.mark.alone
def test_a_proxy_that_is_away_is_named(begin):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    server = begin("--proxy", f"http://127.0.0.1:{port}")
    server.send(["a"])
    server.logged(rf"upstream fcm is paused for . s: proxy 127.0.0.1:{port}: ConnectionRefusedError")


def tinyproxy(port, place):
    (place / "tinyproxy.conf").write_text(
        f'Port {port}\nListen 127.0.0.1\nBasicAuth user pass\nMaxClients 100\nAllow 127.0.0.1\nStatHost "none"\n'
    )
    return ["tinyproxy", "-d", "-c", str(place / "tinyproxy.conf")]


def proxy_py(port, place):
    words = ("--hostname", "127.0.0.1", "--port", str(port), "--basic-auth", "user:pass", "--num-workers", "1")
    return [sys.executable, "-m", "proxy", *words]


def is_here(name):
    if name == "tinyproxy":
        return shutil.which(name)
    return subprocess.run([sys.executable, "-c", "import proxy"], capture_output=True).returncode == 0


@pytest.mark.alone
@pytest.mark.parametrize("make", [tinyproxy, proxy_py])
def test_by_a_real_proxy(begin, google, tmp_path, make):
    """To an address that this machine has, by a name that is not taken for its own."""
    if not is_here(make.__name__):
        pytest.skip(f"{make.__name__} is not here")
    sandbox, ca = google
    port = free_port()
    running = subprocess.Popen(make(port, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        eventually(lambda: _answers(port))
        wrong = {"HTTPS_PROXY": f"http://user:wrong@127.0.0.1:{port}"}
        server = begin(environ=wrong, name="127.1")
        server.send(["a"])
        server.send(["b"])
        server.logged(rf"paused for . s: proxy 127.0.0.1:{port} answers 40[17]")
        server.terminate()
        server = begin(environ={"HTTPS_PROXY": f"http://user:pass@127.0.0.1:{port}"}, name="127.1")
        server.settled()
        assert https_json(sandbox, ca, "/sandbox/received")["delivered"] == {"a": 1, "b": 1}
    finally:
        running.terminate()
        running.wait(20)


def _answers(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
