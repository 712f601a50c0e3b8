"""Who may ask: tokens, names, pages of other sites; TLS."""

import base64
import datetime
import hashlib
import json
import re
import signal
import ssl
import stat
import time
import urllib.parse
import warnings
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, OTHER, TOKEN, Http, dial, eventually, form, https, issue, secret

from gocm_lib.config.settings import Fatal, Settings
from gocm_lib.front import auth, listener
from gocm_lib.front.auth import RIGHTS, Grant, Policy
from gocm_lib.message.bad_request import BadRequest

short = pytest.mark.short


def policy(tmp_path, *tokens, **more):
    path = secret(tmp_path / "tokens", "# ours\n" + "\n".join(tokens) + "\n") if tokens else ""
    return auth.read_policy(Settings(auth_token_file=path, **more))


def status(headers, policy, local=False, public=False):
    try:
        auth.check(headers, policy, local=local, public=public)
    except BadRequest as problem:
        return problem.status
    return 200


def basic(password, user="x"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@short
@pytest.mark.parametrize(
    "given, expected",
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {OTHER}", 200),
        (basic(TOKEN), 200),
        (basic(TOKEN, ""), 200),
        (f"Bearer {TOKEN}0", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (basic("wrong"), 401),
        ("Basic ???", 401),
        ("Basic " + base64.b64encode(TOKEN.encode()).decode(), 401),
        (f"Digest {TOKEN}", 401),
        (TOKEN, 401),
        ("", 401),
        ("# ours", 401),
    ],
)
def test_one_of_the_tokens_is_needed(tmp_path, given, expected):
    asked = policy(tmp_path, TOKEN, OTHER)
    assert status({"authorization": given}, asked) == expected
    assert status({"authorization": given}, asked, public=True) == 200
    assert status({"authorization": given}, asked, local=True) == expected, "a UNIX socket is no token"


def allowed(headers, policy, right, now=0.0):
    try:
        return auth.check(headers, policy, local=True, public=False, right=right, now=now).name
    except BadRequest as problem:
        return problem.status


@short
def test_a_token_may_be_bounded(tmp_path):
    hashed = hashlib.sha256(OTHER.encode()).hexdigest()
    asked = policy(tmp_path, f"{TOKEN} name=shop may=send,read", f"sha256:{hashed} until=2027-01-31 may=metrics")
    shop, other = ({"authorization": f"Bearer {token}"} for token in (TOKEN, OTHER))
    assert {right for right in RIGHTS if allowed(shop, asked, right) == "shop"} == {"send", "read"}
    endless = policy(tmp_path, f"{TOKEN} until=9999-12-31")
    assert allowed(shop, endless, "send", 4e9) == ""
    assert allowed(shop, asked, "lists") == 403 and allowed(shop, asked, "") == "shop"
    last = datetime.datetime(2027, 1, 31, 23, 59, tzinfo=datetime.UTC).timestamp()
    assert allowed(other, asked, "metrics", last) == "" and allowed(other, asked, "metrics", last + 60) == 401
    plain = Policy((Grant(hashlib.sha256(TOKEN.encode()).digest()),))
    assert all(allowed(shop, plain, right) == "" for right in RIGHTS), "a plain line means all"


@short
@pytest.mark.parametrize(
    "line, said",
    [
        (f"{TOKEN} may=send,{OTHER}", "no right"),
        (f"{TOKEN} may=send may=read", "each once"),
        ("until=2027-12-31-and-more", "the token is missing"),
        ("name=shop-backend may=send", "the token is missing"),
        (f"SHA256:{TOKEN}", "64 hexadecimal digits"),
        (f"{OTHER}\n{OTHER} may=read", "on a line before"),
        (f"{TOKEN} may=", "no right"),
        (f"{TOKEN} name=a/b", "a name is"),
        (f"{TOKEN} until=2027-02-30", "until=YYYY-MM-DD"),
        (f"{TOKEN} until=tomorrow", "until=YYYY-MM-DD"),
        (f"{TOKEN} {OTHER}", "name=NAME"),
        ("sha256:abc", "64 hexadecimal digits"),
        ("abababababababababab", "can be guessed"),
    ],
)
def test_a_line_that_cannot_be_read_is_told_without_its_token(tmp_path, line, said):
    with pytest.raises(Fatal, match=re.escape(said)) as problem:
        policy(tmp_path, line)
    assert (
        f"line {2 + line.count(chr(10))}" in str(problem.value)
        and TOKEN not in str(problem.value)
        and OTHER not in str(problem.value)
    )


@short
def test_a_client_takes_the_first_token_that_is_one(tmp_path):
    path = secret(tmp_path / "tokens", f"sha256:{'0' * 64}\n{TOKEN} name=a\n")
    assert auth.first_token(path) == TOKEN
    with pytest.raises(Fatal, match="hashes only"):
        auth.first_token(secret(tmp_path / "hashes", f"sha256:{'0' * 64}\n"))


def test_a_bounded_token_at_a_server(start, tmp_path):
    lines = f"{TOKEN} name=shop may=send\n{OTHER} name=eyes may=metrics,read\n"
    server = start("--auth-token-file", secret(tmp_path / "t", lines), "--access-log")

    def ask(method, path, token, body=None, kind=FORM):
        headers = {"Authorization": f"Bearer {token}", **(kind if body else {})}
        return server.http().ask(method, path, body, headers)[0]

    assert ask("POST", "/gcm/send", TOKEN, form(["a"])) == 200
    topic = urllib.parse.urlencode({"topic": "news", "payload": "{}"})
    assert ask("POST", "/gcm/send", TOKEN, topic) == 403, "a topic reaches everybody"
    lines = json.dumps({"topic": "news", "payload": {}}) + "\n"
    assert ask("POST", "/gcm/send", TOKEN, lines, {"Content-Type": "application/x-ndjson"}) == 403
    legacy = json.dumps({"to": "/topics/news", "data": {}})
    assert ask("POST", "/fcm/send", TOKEN, legacy, {"Content-Type": "application/json"}) == 403
    for path in ("/metrics", "/gcm/report", "/status", "/gcm/report/canonical", "/gcm/failed"):
        assert ask("GET", path, TOKEN) == 403
    assert ask("GET", "/metrics", OTHER) == 200 == ask("GET", "/gcm/report", OTHER)
    assert ask("POST", "/gcm/send", OTHER, form(["a"])) == 403 == ask("GET", "/gcm/report/canonical", OTHER)
    assert ask("DELETE", f"/gcm/jobs/{'0' * 15}1", OTHER) == 403
    assert eventually(lambda: [line for line in server.lines if "name=shop" in line and "status=200" in line])
    assert server.http().ask("GET", "/livez")[0] == 200


@short
@given(st.binary(max_size=64))
def test_any_bytes_for_a_token_are_an_answer(given):
    header = given.decode("latin-1")
    for scheme in ("Bearer ", "Basic ", ""):
        assert status({"authorization": scheme + header}, Policy((Grant(b"\0" * 32),))) == 401


@short
@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", 200),
        ("localhost:5601", 200),
        ("LOCALHOST.", 200),
        ("127.0.0.1:5601", 200),
        ("[::1]:5601", 200),
        ("", 200),
        ("10.0.0.7", 200),
        ("evil.example", 421),
        ("evil.example:5601", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("push.example", 421),
    ],
)
def test_a_name_that_nobody_allowed_is_refused(tmp_path, host, expected):
    """A page may have chosen it, to be taken for our own (DNS rebinding)."""
    assert status({"host": host}, policy(tmp_path)) == expected
    assert status({"host": host}, policy(tmp_path, no_auth=True)) == expected, "a firewall keeps no page out"
    assert status({"host": host}, policy(tmp_path, host=("push.example",))) == (
        200 if host == "push.example" else expected
    )
    assert status({"host": host}, policy(tmp_path), local=True) == 200, "no browser speaks to a UNIX socket"
    named = policy(tmp_path, allowed_hosts=("push.example",))
    assert status({"host": host}, named) == (200 if host == "push.example" else expected)
    assert status({"host": host, "authorization": f"Bearer {TOKEN}"}, policy(tmp_path, TOKEN)) == 200


@short
@pytest.mark.parametrize(
    "headers, expected",
    [
        ({"origin": "http://localhost:5601"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "", "origin": "http://localhost:5601"}, 403),
        ({"sec-fetch-site": "none", "origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "http://localhost:5601"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "https://push.example"}, 200),  # a proxy asks us by our address
    ],
)
def test_pages_of_other_sites_are_refused(headers, expected):
    assert status({"host": "localhost:5601", **headers}, Policy()) == expected


def test_a_page_can_neither_send_nor_clear_a_list(server):
    server.send(["gone-a"])
    server.settled()
    http, foreign = server.http(), {"Sec-Fetch-Site": "cross-site"}
    code, _headers, body = http.ask("POST", "/gcm/send", form(["b"]), {**FORM, "Origin": "http://evil.example"})
    assert code == 403 and json.loads(body)["field"] == "origin"
    assert http.ask("GET", "/gcm/report/notregistered", headers=foreign)[0] == 403
    assert http.ask("GET", "/gcm/report/notregistered", headers={"Host": "evil.example"})[0] == 421
    assert server.report()["attempts"] == 1
    assert http.json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-a"]}
    figures = http.ask("GET", "/metrics")[2].decode()
    assert 'gocm_rejected_total{cause="foreign_site"} 2\n' in figures
    assert 'gocm_rejected_total{cause="wrong_host"} 1\n' in figures


IMAGE = {"User-Agent": "Mozilla/5.0 (X11) Firefox/140.0", "Accept": "image/*", "Referer": "http://evil.example/"}
BROWSERS = [
    IMAGE,
    {"User-Agent": "Mozilla/5.0 (X11) Chrome/140.0"},
    {"Sec-Fetch-Site": "none", "User-Agent": "Mozilla/5.0"},  # typed into the address bar, or a link in a mail
    {"Referer": "http://gocm.lan:5601/status"},
]
CLIENTS = [
    {},
    {"User-Agent": "curl/8.5.0", "Accept": "*/*"},
    {"User-Agent": "python-requests/2.32", "Accept": "*/*", "Accept-Encoding": "gzip"},
    {"User-Agent": "node", "Sec-Fetch-Mode": "cors", "Accept-Language": "*"},  # as Node's fetch has it
    {"User-Agent": "Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US) WindowsPowerShell/5.1.19041"},
    {"User-Agent": "Mozilla/5.0", "Sec-Fetch-Site": "same-origin"},
]


def test_a_list_is_not_cleared_by_a_picture_in_some_page(server):
    """Where we are called by http and a name, browsers tell neither Origin nor Sec-Fetch-Site of a GET."""
    http = server.http()
    for n in range(len(CLIENTS)):
        server.send([f"gone-{n}"])
    eventually(lambda: server.report()["notregistered"] == len(CLIENTS))
    path = "/gcm/report/notregistered"
    for headers in BROWSERS:
        cursor = http.ask("GET", path + "?ack=0&limit=1", headers=headers)[1]["GoCM-Cursor"]
        for clearing in (path, path + "?limit=1", f"{path}?ack={cursor}"):
            code, _, body = http.ask("GET", clearing, headers=headers)
            assert code == 403 and b"POST to .../ack" in body
        assert http.ask("HEAD", path, headers=headers)[0] == 200
        code, _told, body = http.ask("GET", path + "?peek=1", headers=headers)
        assert code == 200 and len(json.loads(body)["tokens"]) == len(CLIENTS)
    for headers in CLIENTS:
        code, _, body = http.ask("GET", path + "?limit=1", headers=headers)
        assert code == 200 and len(json.loads(body)["tokens"]) == 1
    assert http.json("GET", path) == {"tokens": None}


def test_what_was_read_is_taken_off_by_a_post(server):
    server.send(["gone-a", "gone-b"])
    server.settled()
    http, path = server.http(), "/gcm/report/notregistered"
    code, headers, _body = http.ask("GET", path + "?peek=1")
    server.send(["gone-c"])
    eventually(lambda: server.report()["notregistered"] == 3)
    for form_, field, status in (
        ("", "ack", 400),
        ("ack=x", "ack", 400),
        ("ack=999", "ack", 404),
        ("upto=1", "upto", 400),
    ):
        code, _, answer = http.ask("POST", path + "/ack", form_, FORM)
        assert code == status and json.loads(answer)["field"] == field
    assert http.ask("POST", path + "/ack", "{}", {"Content-Type": "application/json"})[0] == 415
    evil = {**FORM, "Origin": "http://evil.example"}
    assert http.ask("POST", path + "/ack", f"ack={headers['GoCM-Cursor']}", evil)[0] == 403
    for _ in range(2):  # a repetition is no mistake
        code, _, answer = http.ask("POST", path + "/ack", f"ack={headers['GoCM-Cursor']}", FORM)
        assert (code, json.loads(answer)) == (200, {"acknowledged": int(headers["GoCM-Cursor"])})
    assert http.json("GET", path) == {"tokens": ["gone-c"]}


def test_who_did_what_is_in_the_log(start):
    server = start("--max-attempts", "1", unix="")
    http = server.http()
    server.send(["gone-a", "flaky-9-b", "flaky-9-c"])
    server.settled()
    http.ask("GET", "/gcm/report/notregistered")
    server.logged("audit: 127.0.0.1 took 1 entries off notregistered")
    http.ask("POST", "/gcm/failed/replay", "reason=attempts", FORM)
    server.logged(r"audit: 127.0.0.1 replayed \d failed tokens \(reason=attempts\)")
    server.settled()
    http.ask("POST", "/gcm/failed/discard", "all=1", FORM)
    server.logged(r"audit: 127.0.0.1 discarded \d failed tokens \(all=1\)")
    topic = http.ask("POST", "/gcm/send", "topic=news&payload={}", FORM)[1]["X-GoCM-Job"]
    server.logged(f"audit: 127.0.0.1 sent to topic 'news' as {topic}")


def test_tokens_are_asked_for_and_rotated(start, tmp_path):
    path = tmp_path / "tokens"
    server = start("--auth-token-file", secret(path, TOKEN), "--access-log")
    http = server.http()
    for route in ("/gcm/report", "/gcm/report/notregistered", "/metrics"):
        code, headers, body = http.ask("GET", route)
        # In one header, browsers understand neither.
        assert code == 401 and headers.get_all("WWW-Authenticate") == ['Bearer realm="gocm"', 'Basic realm="gocm"']
        assert headers["Connection"] == "close", "one guess a connection"
        assert json.loads(body)["field"] == "authorization"
        assert http.ask("GET", route, headers={"Authorization": basic(TOKEN)})[0] == 200
    for route in ("/livez", "/readyz", "/healthz"):
        assert http.ask("GET", route)[0] == 200
    assert http.ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 401
    assert http.ask("POST", "/gcm/send", form(["a"]), {**FORM, "Authorization": f"Bearer {TOKEN}"})[0] == 200
    secret(path, f"{TOKEN}\n{OTHER}\n")
    server.process.send_signal(signal.SIGHUP)
    server.logged("tokens and certificates were read again")
    assert http.ask("GET", "/gcm/report", headers={"Authorization": f"Bearer {OTHER}"})[0] == 200
    assert http.ask("GET", "/gcm/report", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
    secret(path, "short")
    server.process.send_signal(signal.SIGHUP)
    server.logged("nothing is changed: --auth-token-file .* line 1")
    assert http.ask("GET", "/gcm/report", headers={"Authorization": f"Bearer {OTHER}"})[0] == 200
    assert TOKEN not in server.log() and OTHER not in server.log()


def test_a_body_is_not_asked_for_without_a_token(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    http = Http(server.port)
    http.connection.putrequest("POST", "/gcm/send")
    for name, value in {**FORM, "Content-Length": "100000", "Expect": "100-continue"}.items():
        http.connection.putheader(name, value)
    http.connection.endheaders()
    assert http.connection.getresponse().status == 401


def test_a_body_is_not_read_without_a_token(start, tmp_path):
    """Or those who have none could fill our memory."""
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    sock = dial(server.port)
    sock.sendall(f"POST /gcm/send HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n{'x' * 1000}".encode())
    assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_https_with_a_certificate_that_is_renewed(start, authority, tmp_path):
    issue(authority, tmp_path)
    files = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start(*files, "--head-timeout", "0.6", "--idle-timeout", "1")
    http = https(server, tmp_path)
    tokens = [f"t{n}" for n in range(9000)]  # more than a TLS record, in and out
    code, _, body = http.ask("POST", "/gcm/send", form([*tokens, "gone-" + "x" * 3000]), FORM)
    assert (code, body) == (200, b"ok\n")
    before = http.connection.sock.getpeercert()["serialNumber"]
    slow = https(server, tmp_path)  # reads a large answer at its leisure, and longer than a head may take
    for part in range(4):
        server.send([f"gone-{part}-{n}-{'x' * 3000}" for n in range(1000)], client=https(server, tmp_path))
    eventually(lambda: https(server, tmp_path).json("GET", "/gcm/report")["notregistered"] == 4001)
    slow.connection.request("GET", "/gcm/report/notregistered?peek=1", headers={"Host": "localhost"})
    answer, began, size = slow.connection.getresponse(), time.monotonic(), 0
    while piece := answer.read(400_000):
        size += len(piece)
        eventually(lambda due=began + size / 4e6: time.monotonic() > due)
    assert size > 8_000_000, "as much as a page may have"
    plain = Http(server.port)
    with pytest.raises((OSError, ConnectionError)):
        plain.ask("GET", "/gcm/report")
    silent = Http(server.port)
    silent.connection.connect()  # shakes no hands, and is not waited for
    assert silent.connection.sock.recv(1) == b""
    issue(authority, tmp_path)
    server.process.send_signal(signal.SIGHUP)
    server.logged("certificates were read again")
    again = https(server, tmp_path)
    assert again.ask("GET", "/livez")[0] == 200
    assert again.connection.sock.getpeercert()["serialNumber"] != before
    idle = again.connection.sock
    assert idle.recv(1) == b"", "an idle connection is closed in time"


def test_only_clients_with_a_certificate_of_ours(start, authority, tmp_path):
    issue(authority, tmp_path)
    files = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    # Which is enough for an address that others can reach.
    server = start(*files, "--tls-client-ca", str(tmp_path / "ca.pem"), "--host", "0.0.0.0")
    mine, other = authority.issue_cert("client.example"), trustme.CA().issue_cert("client.example")

    def ask(client, version=None):
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        if client:
            client.configure_cert(context)
        context.maximum_version = version or ssl.TLSVersion.TLSv1_3
        return Http(server.port, lambda sock: context.wrap_socket(sock, server_hostname="localhost")).ask(
            "GET", "/livez"
        )[0]

    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        assert ask(mine, version) == 200
        for client in (None, other):
            with pytest.raises(OSError):  # ssl.SSLError is one
                ask(client, version)


@short
def test_of_old_tls_only_what_is_sound(authority, tmp_path):
    issue(authority, tmp_path)
    context = listener.tls_context(str(tmp_path / "tls.pem"), str(tmp_path / "key.pem"))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.get_ciphers() and all(cipher["aead"] for cipher in context.get_ciphers())
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(Fatal, match="--tls-client-ca .* holds no PEM"):
        listener.tls_context(str(tmp_path / "tls.pem"), str(tmp_path / "key.pem"), str(tmp_path / "none.pem"))


ENDS = [(2049, 12, 31), (2050, 1, 1), (2027, 2, 28)]


@short
@pytest.mark.parametrize("year, month, day", ENDS)
def test_when_a_certificate_ends(authority, tmp_path, year, month, day):
    """Of whatever kind: times until 2049 are written otherwise than later ones."""
    ends = datetime.datetime(year, month, day, 1, 2, 3, tzinfo=datetime.UTC)
    for key_type in (trustme.KeyType.RSA, trustme.KeyType.ECDSA):
        issued = authority.issue_cert("a.example", not_after=ends, key_type=key_type)
        path = tmp_path / "cert.pem"
        path.write_bytes(b"# some text\n" + b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        assert listener.certificate_end(str(path)) == ends.timestamp()


@short
@given(st.binary(max_size=300))
def test_what_is_no_certificate_has_no_end(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("cert") / "cert.pem"
    path.write_bytes(content)
    assert listener.certificate_end(str(path)) is None
    path.write_text(ssl.DER_cert_to_PEM_cert(content))
    listener.certificate_end(str(path))


def test_a_certificate_that_ends_soon_is_told(start, authority, tmp_path):
    soon = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=13)
    issue(authority, tmp_path, not_after=soon)
    files = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start(*files)
    server.logged(f"the certificate of --tls-cert ends {soon:%Y-%m-%d %H:%M} UTC")

    def figure():
        found = https(server, tmp_path).ask("GET", "/metrics")[2].decode()
        return float(re.search(r"^gocm_tls_certificate_expiry_timestamp_seconds (\S+)$", found, re.MULTILINE)[1])

    assert figure() == soon.timestamp()
    later = soon + datetime.timedelta(days=300)
    issue(authority, tmp_path, not_after=later)
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: figure() == later.timestamp())
    assert len(server.find("the certificate of")) == 1


def test_no_tls_before_1_2(start, authority, tmp_path):
    issue(authority, tmp_path)
    server = start("--tls-cert", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "key.pem"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such versions are old
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(OSError):
        context.wrap_socket(dial(server.port), server_hostname="localhost")
    assert https(server, tmp_path).ask("GET", "/livez")[0] == 200


def test_the_state_process_s_socket_is_for_us_alone(start, temporary):
    """Nobody else reaches it; who does (the same user) needs a key that is in our memory only."""
    server = start(environ={"TMPDIR": str(temporary)})
    [place] = temporary.glob("gocm-*")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4none", b"\xff\xff\xff\xff" + b"\x7f" * 8, b"\0" * 4000):
        other = dial(str(place / "state"))
        other.sendall(garbage)
        other.close()
    with pytest.raises((AuthenticationError, OSError, EOFError)):
        Client(str(place / "state"), authkey=b"guess")
    server.send(["a"])
    assert server.settled()["attempts"] == 1 and "Traceback" not in server.log()
