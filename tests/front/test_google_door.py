"""The door under Google's own names: who may, what is served, what is passed on, and that nothing comes back to us."""

import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
import requests
from kit import ROOT, Http, Program, Sandbox, Server, Upstream, eventually, free_port, jwt

from gocm_lib.config.settings import Settings, UpstreamSettings
from gocm_lib.front import accounts, google_door
from gocm_lib.message.assertion import AUDIENCES, GRANT, Account
from gocm_lib.message.bad_request import BadRequest

short = pytest.mark.short
PROJECT = "sandbox-project"
SEND = f"https://fcm.googleapis.com/v1/projects/{PROJECT}/messages:send"
IID = "https://iid.googleapis.com/iid/v1:batchAdd"


class Door:
    """A server with a door under Google's name, in front of a sandbox, and clients of it."""

    def __init__(self, place, *words, account=None):
        self.place = place
        self.account = account or place / "fcm.json"
        self.sandbox = Sandbox("--write-credentials", str(self.account))
        self.words = ("--door-google", str(place / "google"), "--door-google-port", "0", *words)
        self.start()

    def start(self):
        url = f"http://127.0.0.1:{self.sandbox.port}"
        how = ("--credentials", str(self.account), "--fcm-url", url)
        self.server = Server(self.place / "gocm.db", *how, *self.words)
        self.port = int(self.server.logged(r"under Google's name on \S+ port (\d+)"))

    def end(self):
        self.server.kill_group()
        self.sandbox.kill_group()

    def client(self):
        """A client that is led here by nothing but what stands in a service's environment."""
        made = requests.Session()
        made.trust_env = False
        made.proxies = {"https": f"http://127.0.0.1:{self.port}"}
        made.verify = str(self.place / "google/bundle.pem")
        return made

    def key(self, path=None):
        from cryptography.hazmat.primitives import serialization

        told = json.loads((path or self.account).read_text())
        return told, serialization.load_pem_private_key(told["private_key"].encode(), None)

    def token(self, path=None, **claims):
        """The answer to a request for a token that is signed by an account's key."""
        told, key = self.key(path)
        signed = jwt(key, **{"iss": told["client_email"], **claims})
        form = {"grant_type": GRANT, "assertion": signed}
        return self.client().post(AUDIENCES[0], form)

    def bearer(self, **claims):
        return {"Authorization": "Bearer " + self.token(**claims).json()["access_token"]}

    def send(self, message, headers, url=SEND, client=None):
        return (client or self.client()).post(url, json={"message": message}, headers=headers)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    pytest.importorskip("cryptography")
    made = Door(tmp_path_factory.mktemp("door"), "--legacy-wait", "5")
    yield made
    made.end()


@pytest.fixture
def door(shared):
    Http(shared.sandbox.port).ask("POST", "/sandbox/reset")
    return shared


@pytest.fixture
def made(tmp_path):
    """A function that makes one."""
    doors = []

    def make(*words, **how):
        doors.append(Door(tmp_path, *words, **how))
        return doors[-1]

    yield make
    for each in doors:
        each.end()


def test_a_message_goes_the_way_of_all(door):
    answer = door.send({"token": "phone-1", "data": {"a": "1"}}, door.bearer())
    assert answer.status_code == 200 and answer.json()["name"].startswith(f"projects/{PROJECT}/messages/0:")
    job = door.server.http().json("GET", f"/gcm/jobs/{answer.headers['X-GoCM-Job']}")
    assert job["states"]["delivered"] == 1
    assert door.send({"token": "gone-2"}, door.bearer()).json()["error"]["details"][0]["errorCode"] == "UNREGISTERED"


@pytest.mark.parametrize("url", AUDIENCES)
def test_each_token_endpoint_that_google_has_had(door, url):
    told, key = door.key()
    form = {"grant_type": GRANT, "assertion": jwt(key, iss=told["client_email"], aud=url)}
    answer = door.client().post(url, form).json()
    assert 3500 < answer["expires_in"] <= 3600 and answer["token_type"] == "Bearer"


def test_another_key_is_an_invalid_grant_in_google_s_words(door, tmp_path):
    other, now = tmp_path / "other.json", int(time.time())
    program = Program("sandbox", "--port", "0", "--write-credentials", str(other))
    program.logged("listens on")
    program.kill_group()
    for answer, words in (
        (door.token(other), "Invalid JWT Signature."),  # the same name, another key
        (door.token(iss="else@x"), "Invalid grant: account not found"),
        (door.token(aud="https://evil.example/token"), "Failed audience check"),
        (door.token(iat=now - 7200, exp=now - 3600), "reasonable timeframe"),
        (door.token(alg="none"), "Invalid JWT Signature."),
        (door.client().post(AUDIENCES[0], {"grant_type": GRANT, "assertion": "a.b.c"}), "Bad Request"),
        (door.client().post(AUDIENCES[0], {"grant_type": GRANT}), "Bad Request"),
    ):
        assert answer.status_code == 400, words
        assert answer.json()["error"] == "invalid_grant" and words in answer.json()["error_description"]
    assert door.client().post(AUDIENCES[0], b"\xff").json()["error"] == "unsupported_grant_type"


def test_what_may_not_be_sent_is_refused_in_google_s_form(door):
    bearer = door.bearer()
    other = door.send({"token": "a"}, bearer, SEND.replace(PROJECT, "another-project"))
    assert (other.status_code, other.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": bearer["Authorization"] + "0"}):
        answer = door.send({"token": "a"}, headers)
        assert (answer.status_code, answer.json()["error"]["status"]) == (401, "UNAUTHENTICATED")
    fat = door.client().post(SEND, b"x" * 5_000_000, headers=bearer)
    assert (fat.status_code, fat.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert door.client().post(SEND, b"{", headers=bearer).json()["error"]["status"] == "INVALID_ARGUMENT"


def test_nothing_but_push_is_served_here(door):
    bearer, client = door.bearer(), door.client()
    for path in ("/gcm/report", "/status", "/metrics", "/gcm/send", "/livez", "/fcm/send"):
        assert client.get(f"https://fcm.googleapis.com{path}", headers=bearer).status_code == 404
    assert client.get(SEND, headers=bearer).status_code == 405
    for headers in ({"Host": "gocm.example"}, {"Host": "localhost"}):
        assert client.post(SEND, b"{}", headers=bearer | headers).status_code == 421
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post(SEND, b"{}", headers=bearer | headers).status_code == 403
    # And what is for here is for nobody there.
    status, _, _ = door.server.http().ask("POST", "/iid/v1:batchAdd", b"{}", bearer)
    assert status == 404


def test_topics_are_passed_on_and_answered_as_it_comes(door):
    bearer, client = door.bearer() | {"access_token_auth": "true"}, door.client()
    asked = {"to": "/topics/news", "registration_tokens": ["phone-1", "gone-2"]}
    answer = client.post(IID, json=asked, headers=bearer)
    assert (answer.status_code, answer.json()) == (200, {"results": [{}, {"error": "NOT_FOUND"}]})
    path = f"https://fcm.googleapis.com/v1/projects/{PROJECT}/registrations/phone-3/topicSubscriptions"
    assert client.post(path + "?topic_name=news", headers=bearer).status_code == 200
    assert client.post(path + "?topic_name=news", headers=bearer).status_code == 409
    assert client.get(path, headers=bearer).json()["topicSubscriptions"]
    assert door.send({"topic": "news", "data": {"a": "1"}}, bearer).status_code == 200
    assert {"phone-1", "phone-3"} <= set(Http(door.sandbox.port).json("GET", "/sandbox/received")["delivered"])
    assert client.delete(f"{path}/news", headers=bearer).status_code == 200
    assert client.post(IID, json={"to": "?"}, headers=bearer).status_code == 400
    assert client.get(path.replace(PROJECT, "other"), headers=bearer).status_code == 403
    assert client.post(IID, json=asked).status_code == 401
    assert "phone-3" not in door.server.log()


@pytest.mark.parametrize(
    "path, status",
    [
        ("registrations/a/topicSubscriptions/%2e%2e", 404),
        ("registrations/a%2Fb/topicSubscriptions", 404),
        ("registrations/../topicSubscriptions", 404),
        ("registrations/a%5Cb/topicSubscriptions", 404),
        ("registrations/a/topicSubscriptions?x=/../y", 400),
        ("registrations/a:b-c_d.e%3Af/topicSubscriptions?topic_name=news", 200),
    ],
)
def test_what_is_passed_on_means_there_what_it_means_here(door, path, status):
    """Else our token would be used for something that the application may not ask for."""
    client = Streams(door)
    bearer = [("authorization", door.bearer()["Authorization"])]
    client.h2.end_stream(client.begin(f"/v1/projects/{PROJECT}/{path}", bearer))
    client.flush()
    answer = client.until(h2.events.ResponseReceived)
    assert (":status", str(status)) in answer.headers


def established(port):
    """How many connections somebody has made to a port of this machine (proc(5), net/tcp)."""
    rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_while_google_does_not_answer_about_topics_all_else_goes_on(made):
    door = made()
    door.sandbox.mode(latency=8)
    bearer = door.bearer()
    with ThreadPoolExecutor(80) as threads:  # more than there are threads for reports
        asked = {"to": "/topics/news", "registration_tokens": ["a"]}
        calls = [threads.submit(door.client().post, IID, json=asked, headers=bearer) for _ in range(80)]
        eventually(lambda: door.sandbox.received()["in_flight"] >= 32 and established(door.port) == 80)
        began = time.monotonic()
        assert door.server.http().ask("GET", "/gcm/report")[0] == 200 and time.monotonic() - began < 2
        door.sandbox.mode(latency=0)
        # Who has waited too long for his turn is told so, and nothing is asked for him.
        assert {each.result().status_code for each in calls} <= {200, 503}


def test_a_token_is_good_after_a_restart_and_ends_with_the_account(made, tmp_path):
    door = made()
    bearer = door.bearer()
    door.server.terminate()
    door.start()
    assert door.send({"token": "a"}, bearer).status_code == 200
    other = tmp_path / "other.json"
    program = Program("sandbox", "--port", "0", "--write-credentials", str(other))
    program.logged("listens on")
    program.kill_group()
    told = json.loads(other.read_text())
    told["token_uri"] = json.loads(door.account.read_text())["token_uri"]
    door.account.write_text(json.dumps(told))
    door.server.process.send_signal(signal.SIGHUP)
    eventually(lambda: door.send({"token": "a"}, bearer).status_code == 401)
    assert door.token(other).status_code == 200


def test_auth_tokens_and_account_files_of_ours_are_good_here_too(made, tmp_path):
    tokens, ours = tmp_path / "tokens", tmp_path / "ours.json"
    new = (sys.executable, str(ROOT / "gocm.py"), "token", "new", "app", "--may", "send", "--file", str(tokens))
    more = ("--project", PROJECT, "--write-credentials", str(ours))
    assert subprocess.run([*new, *more], capture_output=True).returncode == 0
    door = made("--auth-token-file", str(tokens))
    told, key = door.key(ours)
    signed = jwt(key, iss=told["client_email"], kid=told["private_key_id"])
    granted = door.client().post(AUDIENCES[0], {"grant_type": GRANT, "assertion": signed})
    assert granted.status_code == 200, granted.text
    bearer = {"Authorization": "Bearer " + granted.json()["access_token"]}
    assert door.send({"token": "a"}, bearer).status_code == 200
    assert door.send({"topic": "a"}, bearer).status_code == 403
    assert door.send({"token": "a"}, door.bearer()).status_code == 200


def test_while_google_is_down_every_call_is_answered_and_all_is_delivered_once(made):
    door = made("--legacy-wait", "0.5", "--retry-cap", "0.3")
    door.sandbox.mode(status=503)
    bearer, client = door.bearer(), door.client()
    took = []
    for number in range(10):
        began = time.monotonic()
        assert door.send({"token": f"phone-{number}"}, bearer, client=client).status_code == 200
        took.append(time.monotonic() - began)
    assert max(took) < 5 and sorted(took)[5] < 1
    door.sandbox.mode(status=200)
    door.server.settled()
    assert door.sandbox.received()["delivered"] == {f"phone-{number}": 1 for number in range(10)}


# --------------------------------------------------------------------------------------------------------- raw clients


def led(port, name="fcm.googleapis.com"):
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.sendall(f"CONNECT {name}:443 HTTP/1.1\r\nHost: {name}:443\r\n\r\n".encode())
    assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    return sock


@pytest.mark.parametrize(
    "said, status",
    [
        (b"CONNECT example.org:443 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fcm.googleapis.com:80 HTTP/1.1\r\n\r\n", b"403"),
        (b"CONNECT fcm.googleapis.com HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT fcm.googleapis.com:443 HTTP/1.1\r\n\r\nearly", b"400"),
        (b"\x15garbage" * 3000, b"400"),
    ],
)
def test_who_asks_for_something_else_is_told(door, said, status):
    with socket.create_connection(("127.0.0.1", door.port), 10) as sock:
        sock.sendall(said)
        assert sock.recv(4096).split()[1] == status


def test_who_stops_or_speaks_garbage_is_let_go_and_holds_up_nobody(made):
    door = made("--head-timeout", "5")
    held = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(20)]
    held += [led(door.port) for _ in range(20)]
    for number, sock in enumerate(held):
        sock.sendall(
            [b"CONN", b"\x16\x03\x01\x02\x00\x01", b""][number % 3] if number < 20 else b"\x16\x03" * (number % 2)
        )
    began = time.monotonic()
    assert door.send({"token": "a"}, door.bearer()).status_code == 200
    assert time.monotonic() - began < 4
    for sock in held:
        sock.settimeout(20)
        while sock.recv(4096):  # an alert of TLS may come before the end
            pass
    garbage = led(door.port)
    garbage.sendall(os.urandom(100))
    assert garbage.recv(4096)[:1] in (b"", b"\x15")


def test_by_name_a_client_speaks_tls_at_once(door):
    context = ssl.create_default_context(cafile=door.place / "google/ca.pem")
    with (
        socket.create_connection(("127.0.0.1", door.port)) as sock,
        context.wrap_socket(sock, server_hostname="fcm.googleapis.com") as line,
    ):
        line.sendall(b"POST /token HTTP/1.1\r\nHost: oauth2.googleapis.com\r\nContent-Length: 0\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_many_clients_at_once(door):
    bearer = door.bearer()

    def one(number):
        return door.send({"token": f"phone-{number}"}, bearer).status_code

    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(one, range(64))) == {200}
    assert len(door.sandbox.received()["delivered"]) == 64


def test_its_key_is_its_owner_s_and_nothing_is_there_for_others_accounts(door):
    folder = door.place / "google"
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600
    assert "GOCM_SANDBOX" not in (folder / "env").read_text() and not (folder / "account.json").exists()


# --------------------------------------------------------------------------------------------------------------- loops

COMES_BACK = """
mount --bind "$1/hosts" /etc/hosts && ip link set lo up || exit 77
exec "$2" "$3" --spool :memory: --port 0 --credentials "$1/fcm.json" --door-google "$1/google" --door-google-port 443
"""


@pytest.mark.skipif(os.getuid() != 0, reason="takes root, to have a hosts file and a network of its own")
@pytest.mark.parametrize("name", ["fcm.googleapis.com", "oauth2.googleapis.com"])
def test_google_s_name_must_not_lead_back_to_us(door, tmp_path, name):
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost {name}")
    (tmp_path / "fcm.json").write_bytes(door.account.read_bytes())
    (tmp_path / "fcm.json").chmod(0o600)
    words = ["unshare", "--mount", "--net", "sh", "-c", COMES_BACK, "sh", str(tmp_path), sys.executable]
    ended = subprocess.run([*words, str(ROOT / "gocm.py")], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 77 or pytest.skip("no network of its own here")
    assert ended.returncode == 78 and f"{name} is this machine itself (127.0.0.1)" in ended.stderr, ended.stderr


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_proxy_must_not_lead_back_to_us(door, tmp_path, by):
    port = str(free_port())
    url = f"http://localhost:{port}"
    words = ("--credentials", str(door.account), "--door-google", str(tmp_path), "--door-google-port", port)
    more = ("--proxy", url) if by == "option" else ()
    environ = {} if by == "option" else {"https_proxy": url}
    program = Program("serve", "--spool", ":memory:", "--port", "0", *words, *more, environ=environ)
    assert program.wait() == 78 and "is --door-google itself" in program.log()


def test_what_we_send_ourselves_is_not_taken(door):
    """By a way round another machine nobody sees at the start that it leads back."""
    answer = door.send({"token": "a"}, door.bearer() | {"User-Agent": google_door.OURS})
    assert answer.status_code == 508


def test_what_does_not_go_together_is_told(tmp_path):
    words = ("--sandbox", "--sandbox-port", "0", "--spool", ":memory:", "--door-google", str(tmp_path / "g"))
    program = Program("serve", *words, "--host", "none", "--socket", str(tmp_path / "s"))
    assert program.wait() == 78 and "--door-google needs an address" in program.log()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        program = Program("serve", *words, "--port", "0", "--door-google-port", port)
        assert program.wait() == 69 and f"port {port}" in program.log()


# ---------------------------------------------------------------------------------------------------------------- pure


@pytest.fixture(scope="module")
def key():
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa", reason="cryptography is not installed")
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@short
def test_tokens_are_for_their_upstreams_and_their_time(key):
    account = Account("me@x", "https://t/", key.public_key())
    senders = {"0123456789abcdef": accounts.Sender(account, ("a", "b"), b"s" * 32)}
    now = time.time()
    token = accounts.give(senders, jwt(key), now)
    grant = accounts.grant(senders, token, now)
    assert grant.name == "me@x" and grant.upstreams == ("a", "b") and grant.may == {"send", "topics"}
    assert accounts.grant(senders, token, now + accounts.LIFE) is None
    name, until, mac = token.split("_")[1:]
    later = f"gocm_{name}_{int(until) + 1}_{mac}"
    for wrong in (
        "",
        token + "0",
        token[:-1],
        later,
        token.upper(),
        token.replace("_", "-"),
        f"gocm_{'0' * 16}_{until}_{mac}",
    ):
        assert accounts.grant(senders, wrong, now) is None, wrong
    for held, text in (({}, jwt(key)), (senders, jwt(key, iss="\ud800"))):
        with pytest.raises(BadRequest, match="account not found"):
            accounts.give(held, text, now)
    for audience in ("http:", "https:"):
        with pytest.raises(BadRequest, match="audience"):
            accounts.give(senders, jwt(key, aud=audience), now)


@short
def test_while_its_key_is_replaced_an_account_has_two(tmp_path, key):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    other, upstreams = rsa.generate_private_key(public_exponent=65537, key_size=2048), {}
    for name, each in (("a", key), ("b", other), ("c", key)):
        nothing = serialization.NoEncryption()
        pem = each.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, nothing).decode()
        told = {"type": "service_account", "client_email": "me@x", "token_uri": "https://t/", "private_key": pem}
        (tmp_path / name).write_text(json.dumps(told))
        upstreams[name] = UpstreamSettings(dialect="fcm", credentials=str(tmp_path / name), project="p")
    senders, now = accounts.read(Settings(upstream=upstreams)), time.time()
    for each, wanted in ((key, ("a", "c")), (other, ("b",))):
        assert accounts.grant(senders, accounts.give(senders, jwt(each), now), now).upstreams == wanted


@short
def test_only_addresses_of_this_machine_are_here():
    assert google_door._is_here("127.0.0.1") and google_door._is_here("::1") and google_door._is_here("127.9.9.9")
    assert not google_door._is_here("192.0.2.1") and not google_door._is_here("no address")


# -------------------------------------------------------------------------------------------------------------- HTTP/2


class Streams:
    """A client that speaks HTTP/2 by name, as raw as a test wants it."""

    def __init__(self, door):
        context = ssl.create_default_context(cafile=door.place / "google/ca.pem")
        context.set_alpn_protocols(["h2"])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", door.port))
        self.line = context.wrap_socket(sock, server_hostname="fcm.googleapis.com")
        assert self.line.selected_alpn_protocol() == "h2"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()

    def flush(self):
        self.line.sendall(self.h2.data_to_send())

    def begin(self, path, headers=(), host="fcm.googleapis.com"):
        stream = self.h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", host), *headers]
        self.h2.send_headers(stream, head)
        return stream

    def events(self):
        """What comes, until the connection ends."""
        while data := self.line.recv(65536):
            yield from self.h2.receive_data(data)
            self.flush()

    def until(self, kind):
        """The first event of a kind; None: the connection has ended without one."""
        return next((event for event in self.events() if isinstance(event, kind)), None)


PATH = f"/v1/projects/{PROJECT}/messages:send"


def test_by_http2_hundreds_are_sent_on_one_connection(door):
    bearer = door.bearer()["Authorization"]
    client, left, under_way, bodies = Streams(door), list(range(500)), 0, []
    client.until(h2.events.RemoteSettingsChanged)
    while left or under_way:
        while left and under_way < 100:
            stream, under_way = client.begin(PATH, [("authorization", bearer)]), under_way + 1
            client.h2.send_data(stream, b'{"message": {"token": "h2-%d"}}' % left.pop(), end_stream=True)
        client.flush()
        for event in client.h2.receive_data(client.line.recv(65536)):
            under_way -= isinstance(event, h2.events.StreamEnded)
            if isinstance(event, h2.events.DataReceived):
                bodies.append(event.data)
    assert len({json.loads(each)["name"] for each in bodies}) == 500
    assert sum(each.startswith("h2-") for each in door.sandbox.received()["delivered"]) == 500


def test_by_http2_a_wrong_token_is_guessed_once_a_connection(door):
    client = Streams(door)
    client.h2.end_stream(client.begin(PATH, [("authorization", "Bearer wrong")]))
    client.flush()
    events = list(client.events())
    [answer] = [event for event in events if isinstance(event, h2.events.ResponseReceived)]
    assert (":status", "401") in answer.headers
    assert any(isinstance(event, h2.events.ConnectionTerminated) for event in events)


@pytest.mark.parametrize(
    "does", ["nothing", "half a request", "half a frame", "pings", "half a request and pings", "reads nothing"]
)
def test_by_http2_who_does_not_go_on_is_let_go(made, does):
    door = made("--head-timeout", "1")
    client = Streams(door)
    if does.startswith("half a request"):
        client.h2.send_data(client.begin(PATH, [("authorization", door.bearer()["Authorization"])]), b"{")
        client.flush()
    elif does == "half a frame":
        client.line.sendall(b"\x00\x40\x00\x00\x00\x00\x00\x00\x01{")
    began = time.monotonic()
    if does == "reads nothing":
        bearer = [("authorization", door.bearer()["Authorization"])]
        with pytest.raises(OSError):
            while time.monotonic() < began + 15:
                client.h2.end_stream(client.begin(PATH, bearer))
                client.flush()
    elif does.endswith("pings"):
        with pytest.raises(OSError):
            while time.monotonic() < began + 15:
                client.line.sendall(b"\0\0\x08\x06\0\0\0\0\0pingping")
                time.sleep(0.2)
    else:
        assert client.until(h2.events.ConnectionTerminated) is not None
    assert time.monotonic() - began < 15
    assert door.send({"token": "a"}, door.bearer()).status_code == 200


def test_by_http2_who_may_not_is_told_before_his_body_comes(door):
    client = Streams(door)
    client.begin(PATH, [("content-length", "1000")])
    client.flush()
    assert (":status", "401") in client.until(h2.events.ResponseReceived).headers


def test_by_http2_bodies_that_do_not_end_are_bounded_together(door):
    client, bearer = Streams(door), [("authorization", door.bearer()["Authorization"])]
    client.until(h2.events.RemoteSettingsChanged)
    with pytest.raises((OSError, h2.exceptions.ProtocolError)):
        for _ in range(90):
            stream = client.begin("/iid/v1:batchAdd", bearer, "iid.googleapis.com")
            for _ in range(60):
                while client.h2.local_flow_control_window(stream) < 16384:
                    client.flush()
                    [*map(client.h2.receive_data, [client.line.recv(65536)])]
                client.h2.send_data(stream, b"x" * 16384)
                client.flush()
    assert door.send({"token": "a"}, door.bearer()).status_code == 200
    assert not door.server.find("Traceback")


def test_by_http2_a_message_that_is_too_long_is_refused_without_its_body(door):
    client = Streams(door)
    client.begin(PATH, [("authorization", door.bearer()["Authorization"]), ("content-length", "100000")])
    client.flush()
    assert (":status", "400") in client.until(h2.events.ResponseReceived).headers


@pytest.mark.parametrize(
    "path", ["/v1/projects/a b", "/v1/projects/\xe9", "/v1/..#/x", "/v1/registrations/.\n./topicSubscriptions"]
)
def test_by_http2_a_path_that_is_none_is_reset(door, path):
    client = Streams(door)
    client.h2.config.validate_outbound_headers = False
    client.h2.end_stream(client.begin(path))
    client.flush()
    assert client.until((h2.events.StreamReset, h2.events.ConnectionTerminated)) is not None


def test_by_http2_header_fields_without_end_cost_no_more_than_their_connection(door):
    client = Streams(door)
    block = b"\x88" * 60_000
    frames = b"\0\x40\0\x01\x01\0\0\0\x01" + block[:16384]
    frames += b"".join(b"\0\x40\0\x09\0\0\0\0\x01" + block[:16384] for _ in range(2)) + b"\0\0\0\x09\4\0\0\0\1"
    with contextlib.suppress(OSError):  # it is ended while we write
        client.line.sendall(frames * 20)
    began = time.monotonic()
    assert door.send({"token": "a"}, door.bearer()).status_code == 200 and time.monotonic() - began < 2
    with contextlib.suppress(OSError):
        assert client.until(h2.events.ConnectionTerminated) is not None


def test_by_http2_guesses_that_come_together_are_one(door):
    client = Streams(door)
    for number in range(50):
        client.h2.end_stream(client.begin(PATH, [("authorization", f"Bearer wrong-{number}")]))
    client.flush()
    answers = [event for event in client.events() if isinstance(event, h2.events.ResponseReceived)]
    assert len(answers) == 1


def test_an_account_s_key_is_guessed_once_a_connection(door):
    body = b"grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=a.b.c"
    head = b"POST /token HTTP/1.1\r\nHost: oauth2.googleapis.com\r\nContent-Length: %d\r\n\r\n" % len(body)
    context = ssl.create_default_context(cafile=door.place / "google/ca.pem")
    with led(door.port) as sock, context.wrap_socket(sock, server_hostname="oauth2.googleapis.com") as line:
        line.sendall((head + body) * 2)
        said = b"".join(iter(lambda: line.recv(4096), b""))
    assert said.count(b"invalid_grant") == 1


class Strange(Upstream):
    """An upstream that gives tokens, and answers about topics as it is told to."""

    def __init__(self, answer):
        self.answer = answer
        super().__init__(Strange._behave)

    def _behave(self, sock, _number):
        sock.recv(65536)
        sock.sendall(self.answer)


@pytest.mark.parametrize(
    "answer, status",
    [
        (b"HTTP/1.1 520 Unknown\r\nContent-Length: 2\r\n\r\n{}", 520),
        (b"HTTP/1.1 299 Odd\r\nContent-Length: 2\r\n\r\n{}", 299),
        (b"HTTP/1.1 103 Early\r\n\r\n", 503),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\n{}", 503),
        (b"HTTP/1.1 200 OK\r\nContent-Type: a\r\n b: c\r\nContent-Length: 2\r\n\r\n{}", 200),
        (b"garbage\r\n\r\n", 503),
        (b"", 503),
    ],
)
def test_whatever_is_answered_about_topics_harms_nobody(made, tmp_path, answer, status):
    strange = Strange(answer)
    url = "http://{}:{}".format(*strange.listener.getsockname())
    account = tmp_path / "fcm.json"
    program = Program("sandbox", "--port", "0", "--write-credentials", str(account))
    program.logged("listens on")
    door = Door(tmp_path, "--fcm-url", url, account=account)
    try:
        got = door.client().post(IID, json={"to": "/topics/a"}, headers=door.bearer())
        assert got.status_code == status and "b: c" not in str(got.headers)
        assert door.server.http().ask("GET", "/livez")[0] == 200
    finally:
        door.end()
        program.kill_group()


def test_its_authority_is_made_anew_at_sighup_with_all_that_is_made_of_it(made):
    door = made()
    before = (door.place / "google/bundle.pem").read_bytes()
    (door.place / "google/ca.pem").unlink()
    door.server.process.send_signal(signal.SIGHUP)
    eventually(lambda: (door.place / "google/bundle.pem").read_bytes() != before)
    eventually(lambda: door.server.find("new access token")[1:])
    assert door.send({"token": "a"}, door.bearer()).status_code == 200


def test_by_http2_garbage_ends_only_its_own_connection(door):
    for garbage in (b"\x00" * 1000, b"\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n"):
        client = Streams(door)
        client.line.sendall(garbage)
        assert client.until(h2.events.ConnectionTerminated) is not None
    assert door.send({"token": "a"}, door.bearer()).status_code == 200


def test_by_http2_what_is_in_work_at_a_stop_is_answered(made):
    door = made("--legacy-wait", "2")
    door.sandbox.mode(latency=1.0)
    bearer = door.bearer()["Authorization"]
    client = Streams(door)
    stream = client.begin(PATH, [("authorization", bearer)])
    client.h2.send_data(stream, b'{"message": {"token": "phone-1"}}', end_stream=True)
    client.flush()
    eventually(lambda: door.sandbox.received()["requests"])
    door.server.process.send_signal(signal.SIGTERM)
    events = list(client.events())
    assert any((":status", "200") in event.headers for event in events if isinstance(event, h2.events.ResponseReceived))
    assert door.server.wait() == 0
