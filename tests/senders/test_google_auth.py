"""Every kind of credentials file that google-auth knows, and a pretend token server; files that were replaced."""

import http.server
import json
import socket
import ssl
import sys
import time
from urllib.parse import parse_qs

import pytest
import trustme
from kit import serving

from gocm_lib.config.settings import Settings
from gocm_lib.senders import access_token, credentials
from gocm_lib.senders.access_token import CredentialError

pytest.importorskip("google.auth", reason="google-auth is not installed")
short = pytest.mark.short
POOL = "//iam.googleapis.com/projects/123456/locations/global/workloadIdentityPools/pool/providers/provider"


class TokenServer(http.server.ThreadingHTTPServer):
    """Gives a token for each secret that it knows; notes what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.good = {"right", "subject"}
        self.asked = []


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, body))
        fields = {name: values[0] for name, values in parse_qs(body).items()}
        secret = fields.get("refresh_token") or fields.get("subject_token", "")
        if self.path.startswith("/impersonate"):
            self.answer(
                200,
                {
                    "accessToken": "token-of-impersonate",
                    "expireTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600)),
                },
            )
        elif secret in self.server.good or "x-goog-cloud-target-resource" in secret:
            answer = {"access_token": f"token-of-{self.path[1:]}", "expires_in": 3600, "token_type": "Bearer"}
            self.answer(200, answer | {"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"})
        else:
            self.answer(400, {"error": "invalid_grant"})

    def answer(self, status, told):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def tokens(monkeypatch):
    server = TokenServer()
    # The addresses that do not come from the file.
    monkeypatch.setattr("google.oauth2.credentials._GOOGLE_OAUTH2_TOKEN_ENDPOINT", f"{server.url}/user")
    monkeypatch.setattr("google.auth.iam._IAM_ENDPOINT", f"{server.url}/impersonate/{{}}")
    with serving(server):
        yield server


def authorized_user(secret="right"):
    return {
        "type": "authorized_user",
        "client_id": "id",
        "client_secret": "s",
        "refresh_token": secret,
    }


def external_account(url, source, kind="jwt"):
    return {
        "type": "external_account",
        "audience": POOL,
        "subject_token_type": f"urn:ietf:params:oauth:token-type:{kind}",
        "token_url": f"{url}/sts",
        "credential_source": source,
    }


def made(kind, url, place):
    """A credentials file's content, by its kind; what it refers to is put beside it."""
    (place / "subject").write_text("subject")
    program = {"command": f"{sys.executable} {place / 'program.py'}", "timeout_millis": 20000}
    told = {"version": 1, "success": True, "token_type": "urn:ietf:params:oauth:token-type:jwt", "id_token": "subject"}
    (place / "program.py").write_text(f"print({json.dumps(told)!r})")
    aws = external_account(
        url, {"environment_id": "aws1", "regional_cred_verification_url": "https://sts.{region}.amazonaws.com"}
    )
    return {
        "authorized_user": authorized_user(),
        "external_account file": external_account(url, {"file": str(place / "subject")}),
        "external_account program": external_account(url, {"executable": program}),
        "external_account aws": {**aws, "subject_token_type": "urn:ietf:params:aws:token-type:aws4_request"},
        "external_account_authorized_user": {
            "type": "external_account_authorized_user",
            "audience": POOL,
            "refresh_token": "right",
            "token_url": f"{url}/workforce",
            "token_info_url": f"{url}/info",
            "client_id": "id",
            "client_secret": "s",
        },
        "impersonated_service_account": {
            "type": "impersonated_service_account",
            "service_account_impersonation_url": "https://iamcredentials.googleapis.com/v1/"
            "projects/-/serviceAccounts/a@b.iam.gserviceaccount.com:generateAccessToken",
            "source_credentials": authorized_user(),
            "delegates": [],
        },
    }[kind]


KINDS = {
    "authorized_user": "token-of-user",
    "external_account file": "token-of-sts",
    "external_account program": "token-of-sts",
    "external_account aws": "token-of-sts",
    "external_account_authorized_user": "token-of-workforce",
    "impersonated_service_account": "token-of-impersonate",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_gives_a_token(tokens, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES", "1")
    for name, value in {"REGION": "eu-central-1", "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(made(kind, tokens.url, tmp_path)))
    fetch, project = access_token.from_file(str(path), project="project-1")
    assert fetch(time.time()).value == KINDS[kind] and project == "project-1" and tokens.asked


@short
def test_a_file_that_was_replaced_is_read_again(tokens, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(authorized_user()))
    fetch, _ = access_token.from_file(str(path), project="project-1")
    assert fetch(time.time()).value == "token-of-user"
    tokens.good = {"next"}
    with pytest.raises(CredentialError, match="clock"):
        fetch(time.time())
    (tmp_path / "new.json").write_text(json.dumps(authorized_user("next")))
    (tmp_path / "new.json").rename(path)
    assert fetch(time.time()).value == "token-of-user"
    path.write_text("{")  # half written, and what it held before is good
    assert fetch(time.time()).value == "token-of-user"


@short
def test_the_token_server_is_trusted_as_the_upstream_is(tokens, tmp_path):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tokens.socket = context.wrap_socket(tokens.socket, server_side=True)
    path = tmp_path / "file.json"
    url = tokens.url.replace("http:", "https:")
    path.write_text(json.dumps(made("external_account file", url, tmp_path)))
    fetch, _ = access_token.from_file(str(path), str(tmp_path / "ca.pem"), "project-1")
    assert fetch(time.time()).value == "token-of-sts"
    with pytest.raises(CredentialError, match="127.0.0.1 cannot be reached: .*certificate verify failed"):
        access_token.from_file(str(path), project="project-1")[0](time.time())


@short
@pytest.mark.parametrize(("host", "said"), [("127.0.0.1", "Connection refused"), ("gone.invalid", ".*[Nn]ame")])
def test_a_token_server_that_is_away_is_named(tmp_path, host, said):
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        path = tmp_path / "file.json"
        url = f"http://{host}:{held.getsockname()[1]}/token"
        path.write_text(json.dumps(made("external_account file", url, tmp_path)))
        fetch, _ = access_token.from_file(str(path), project="project-1")
        with pytest.raises(CredentialError, match=f"--credentials: {host} cannot be reached: {said}"):
            fetch(time.time())


@short
def test_what_the_file_refers_to_may_change_too(tokens, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(made("external_account file", tokens.url, tmp_path)))
    fetch, _ = access_token.from_file(str(path), project="project-1")
    (tmp_path / "subject").write_text("stale")
    with pytest.raises(CredentialError):
        fetch(time.time())
    (tmp_path / "subject").write_text("subject")
    assert fetch(time.time()).value == "token-of-sts"


def test_a_key_s_file_that_was_replaced_is_read_again_when_the_key_is_refused(run, sandbox, tmp_path):
    key = tmp_path / "key"
    key.write_text("one-key")
    key.chmod(0o600)
    server = run("--gcm-url", sandbox.url(), "--apikey-file", str(key))
    server.send(["a"])
    server.settled()
    key.write_text("an-other-key\n")
    sandbox.mode(status=401)
    server.send(["b"])
    server.logged("upstream gcm: its key's file has another key")
    sandbox.mode(status=200)
    server.settled()
    assert "an-other-key" not in server.log() and "one-key" not in server.log()


@short
def test_a_key_that_is_not_from_a_file_is_not_read_again(tmp_path):
    (tmp_path / "key").write_text("k1")
    from_file = Settings(apikey="k1", apikey_file=str(tmp_path / "key"))
    assert credentials.sources(from_file, "/")[0]["gcm"].again
    assert not credentials.sources(Settings(apikey="k2", apikey_file=str(tmp_path / "key")), "/")[0]["gcm"].again
    assert not credentials.sources(Settings(apikey="k1"), "/")[0]["gcm"].again
