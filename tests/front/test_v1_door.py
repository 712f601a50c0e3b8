"""The v1 door: who has an SDK of Google's for FCM v1 is answered as Google answers."""

import base64
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import ROOT, eventually

from gocm_lib.message import fcm_door
from gocm_lib.message.assertion import GRANT
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.outcome import FAILURES

short = pytest.mark.short
JSON = {"Content-Type": "application/json"}
PROJECT = "sandbox-project"
TOKEN = "app-token-0123456789"


def post(server, message, project=PROJECT, token="", **more):
    body = message if isinstance(message, bytes) else json.dumps({"message": message, **more})
    headers = {**JSON, **({"Authorization": f"Bearer {token}"} if token else {})}
    status, got, answer = server.http().ask("POST", f"/v1/projects/{project}/messages:send", body, headers)
    assert got["Content-Type"].startswith("application/json"), answer
    return status, json.loads(answer), got


def fault(answer):
    """The status and FCM's word in an error."""
    return answer["error"]["status"], *(each["errorCode"] for each in answer["error"].get("details", ()))


@pytest.mark.parametrize(
    "token, status, word",
    [
        ("gone-a", 404, ("NOT_FOUND", "UNREGISTERED")),
        ("mismatch-b", 403, ("PERMISSION_DENIED", "SENDER_ID_MISMATCH")),
        ("invalid-c", 400, ("INVALID_ARGUMENT", "INVALID_ARGUMENT")),
    ],
)
def test_what_google_says_of_a_token_is_what_its_sender_hears(start_fcm, token, status, word):
    found, answer, _ = post(start_fcm(), {"token": token, "data": {"a": "1"}})
    assert (found, fault(answer)) == (status, word), answer


def test_a_message_that_google_takes_has_google_s_name(start_fcm, sandbox):
    server = start_fcm()
    message = {"token": "phone-1", "data": {"a": "1"}, "android": {"priority": "HIGH", "ttl": "60s"}}
    status, answer, headers = post(server, message)
    assert status == 200 and answer["name"].startswith(f"projects/{PROJECT}/messages/0:")
    assert sandbox.received()["last"]["message"] == message
    assert server.http().json("GET", f"/gcm/jobs/{headers['X-GoCM-Job']}")["states"]["delivered"] == 1
    for target in ({"topic": "news"}, {"topic": "/topics/news"}, {"condition": "'a' in topics && 'b' in topics"}):
        assert post(server, {**target, "data": {"a": "1"}})[0] == 200
    assert post(server, {"token": "phone-2"}, validate_only=True)[1]["name"].endswith("/fake_message_id")
    assert "phone-2" not in sandbox.received()["delivered"]


def test_what_has_no_result_in_time_counts_as_sent(start_fcm, sandbox):
    server = start_fcm("--legacy-wait", "0.3", "--retry-base", "0.1")
    sandbox.mode(status=503)
    status, answer, headers = post(server, {"token": "phone-1", "data": {"a": "1"}})
    assert (status, answer["name"]) == (200, f"projects/{PROJECT}/messages/{headers['X-GoCM-Job']}")
    sandbox.mode(status=200)
    server.settled()
    assert sandbox.received()["delivered"] == {"phone-1": 1}


@pytest.mark.parametrize(
    "body, field",
    [
        (b"{", ""),
        (b"[]", "message"),
        (b'{"message": []}', "message"),
        (b'{"message": {"data": {"a": "1"}}}', "message"),
        (b'{"message": {"token": "a", "topic": "b"}}', "message"),
        (b'{"message": {"token": "a"}, "dry": true}', "dry"),
        (b'{"message": {"token": "a"}, "validate_only": 1}', "validate_only"),
        (b'{"message": {"token": "a", "data": {"n": 1}}}', "message"),
        (b'{"message": {"token": "a", "nothing": 1}}', "message"),
        (b'{"message": {"token": "a", "data": {"n": "%s"}}}' % (b"x" * 5000), "4096 is Google's limit"),
        (b'{"message": {"topic": 7}}', "topic"),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_garbage_is_told_in_google_s_form(start_fcm, body, field):
    status, answer, _ = post(start_fcm(), body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT"), answer
    assert field in answer["error"]["message"]


def test_who_may_not_is_told_in_google_s_form(start_fcm, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"{TOKEN} name=app upstream=fcm may=send rate=2/s\nelse-token-0123456789 upstream=other\n")
    server = start_fcm("--auth-token-file", str(tokens))
    message = {"token": "a", "data": {"a": "1"}}
    assert (post(server, message)[0], fault(post(server, message)[1])) == (401, ("UNAUTHENTICATED",))
    assert fault(post(server, message, token="wrong-token-0123456789")[1]) == ("UNAUTHENTICATED",)
    for project, token in (("another-project", TOKEN), (PROJECT, "else-token-0123456789")):
        status, answer, _ = post(server, message, project, token)
        assert (status, fault(answer)) == (403, ("PERMISSION_DENIED",)) and "may not exist" in answer["error"][
            "message"
        ]
    assert fault(post(server, {"topic": "news"}, token=TOKEN)[1]) == ("PERMISSION_DENIED",), "may=topics"
    answers = [post(server, message, token=TOKEN) for _ in range(8)]
    [late] = {fault(answer) for status, answer, _ in answers if status != 200}
    assert late == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED") and answers[-1][2]["Retry-After"] == "1"


def assertion(**head):
    parts = (json.dumps(part).encode() for part in (head, {"iss": "x"}))
    signed = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    return {"grant_type": GRANT, "assertion": f"{signed}.c2ln"}


@short
@pytest.mark.parametrize("asked", [{}, assertion(), assertion(kid=7), {"grant_type": GRANT, "assertion": "%"}])
def test_only_an_assertion_has_a_secret(asked):
    with pytest.raises(BadRequest):
        fcm_door.secret(asked)
    assert fcm_door.secret(assertion(kid="s" * 43)) == "s" * 43


@short
def test_every_failure_has_a_form():
    for failure in (*FAILURES, "cancelled"):
        code, body = fcm_door.failed(failure, "")
        assert code in fcm_door.STATUSES and json.loads(body)["error"]["code"] == code


def test_google_s_own_library_gets_a_token_with_our_account_file(start_fcm, sandbox, tmp_path):
    service_account = pytest.importorskip("google.oauth2.service_account")
    transport = pytest.importorskip("google.auth.transport.urllib3")
    urllib3 = pytest.importorskip("urllib3")
    tokens, account = tmp_path / "tokens", tmp_path / "account.json"
    tokens.touch(0o600)
    tokens.write_text("other-token-0123456789\n")
    server = start_fcm("--auth-token-file", str(tokens))
    words = ("token", "new", "app", "--upstream", "fcm", "--file", tokens, "--write-credentials", account)
    to = ("--project", PROJECT, "--to", f"http://127.0.0.1:{server.port}")
    done = subprocess.run([sys.executable, ROOT / "gocm.py", *words, *to], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout and account.stat().st_mode & 0o777 == 0o600, done.stderr
    held = service_account.Credentials.from_service_account_file(account, scopes=["https://www.googleapis.com/auth/x"])
    request = transport.Request(urllib3.PoolManager())
    with pytest.raises(Exception, match="invalid_grant"):
        held.refresh(request)
    server.process.send_signal(1)
    server.logged("SIGHUP: keys, tokens")
    held.refresh(request)
    status, answer, _ = post(server, {"token": "phone-1", "data": {"a": "1"}}, token=held.token)
    assert status == 200, answer
    assert held.token not in "".join(server.lines)


@pytest.mark.alone
def test_a_thousand_by_many_clients_are_all_answered_right(start_fcm, sandbox):
    server = start_fcm()
    sandbox.mode(latency=0.02)

    def one(n):
        token = f"gone-{n}" if n % 3 == 0 else f"phone-{n}"
        status, answer, _ = post(server, {"token": token, "data": {"n": str(n)}})
        return status == (404 if n % 3 == 0 else 200) and (status == 404 or answer["name"].count("/messages/0:") == 1)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(1000)))
    assert eventually(lambda: server.report()["pending"] == 0)
    assert set(sandbox.received()["arrived"].values()) == {1}
