"""What the pretend Google answers for topics, device groups and access tokens, and in the legacy API's other forms."""

import base64
import http.client
import json
import os
import signal
import socket
import struct
import time
import urllib.parse

import pytest
import requests
import trustme
from hypothesis import given
from hypothesis import strategies as st
from kit import Program, jwt, stand_still

from gocm_lib.front.request import Request
from gocm_lib.message.assertion import AUDIENCES, Account
from gocm_lib.tools import pretend
from gocm_lib.tools.pretend_tokens import Tokens
from gocm_lib.tools.pretend_topics import Topics

short = pytest.mark.short
KEY = {"Authorization": "key=k"}


@pytest.fixture
def ask(sandbox):
    """A function that asks the sandbox as an SDK would: method, path, JSON (or a form); status and answer."""

    def do(method, path, body=None, headers=KEY, form=None):
        url = f"http://127.0.0.1:{sandbox.port}{path}"
        answer = requests.request(method, url, json=body, data=form, headers=headers, timeout=10)
        is_json = "json" in answer.headers["Content-Type"]
        return answer.status_code, answer.json() if is_json else answer.text

    return do


@pytest.fixture
def bearer(sandbox):
    url = f"http://127.0.0.1:{sandbox.port}/computeMetadata/v1/instance/service-accounts/default/token"
    token = requests.get(url, headers={"Metadata-Flavor": "Google"}, timeout=10).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}


# ---------------------------------------------------------------------------------------------------- the legacy API


def test_a_device_token_in_to_is_answered_like_a_list(ask):
    _, one = ask("POST", "/gcm/send", {"to": "phone-1", "data": {}})
    _, listed = ask("POST", "/gcm/send", {"registration_ids": ["phone-1"], "data": {}})
    assert set(one) == set(listed) and one["success"] == 1 and len(one["results"]) == 1
    _, gone = ask("POST", "/gcm/send", {"to": "gone-1"})
    assert (gone["failure"], gone["results"]) == (1, [{"error": "NotRegistered"}])


def test_a_topic_s_message_id_is_a_number(ask):
    for target in ({"to": "/topics/news"}, {"condition": "'news' in topics"}):
        status, told = ask("POST", "/gcm/send", {**target, "data": {}})
        assert status == 200 and isinstance(told["message_id"], int) and set(told) == {"message_id"}


def test_the_form_of_before_json(ask, sandbox):
    def send(**fields):
        return ask("POST", "/gcm/send", form={f"data.{name}": "v" for name in ("a", "b")} | fields)

    status, text = send(registration_id="phone-1")
    assert status == 200 and text.startswith("id=0:") and text.count("\n") == 1
    assert send(registration_id="canonical-2")[1].splitlines()[1] == "registration_id=new-2"
    assert send(registration_id="gone-3") == (200, "Error=NotRegistered\n")
    assert send() == (200, "Error=MissingRegistration\n")
    assert sandbox.received()["delivered"] == {"phone-1": 1, "canonical-2": 1}


def test_device_groups_answer(ask, sandbox):
    def change(operation, **fields):
        return ask("POST", "/fcm/notification", {"operation": operation, **fields})

    status, made = change("create", notification_key_name="me", registration_ids=["phone-1", "gone-2"])
    key = made["notification_key"]
    assert status == 200 and key
    assert change("create", notification_key_name="me", registration_ids=["x"])[0] == 400
    assert change("add", notification_key=key, registration_ids=["phone-3"]) == (200, {"notification_key": key})
    assert change("add", notification_key="other", registration_ids=["phone-3"])[0] == 400
    assert change("add", notification_key=key, registration_ids=[])[0] == 400
    assert change("create", notification_key_name="many", registration_ids=["x"] * 21)[0] == 400
    for bad in ("abc", [1], [None], {}):
        assert change("create", notification_key_name="bad", registration_ids=bad)[0] == 400
    assert change("burn", notification_key=key, registration_ids=["x"])[0] == 400
    assert ask("GET", "/fcm/notification?notification_key_name=me") == (200, {"notification_key": key})
    assert ask("GET", "/fcm/notification?notification_key_name=you")[0] == 400
    told = {"success": 2, "failure": 1, "failed_registration_ids": ["gone-2"]}
    assert ask("POST", "/fcm/send", {"to": key, "data": {}}) == (200, told)
    assert change("remove", notification_key=key, registration_ids=["gone-2"])[0] == 200
    assert ask("POST", "/fcm/send", {"to": key, "data": {}}) == (200, {"success": 2, "failure": 0})
    assert sandbox.received()["delivered"] == {"phone-1": 2, "phone-3": 2}
    assert ask("POST", "/fcm/notification", {"operation": "create"}, headers={})[0] == 401
    assert ask("POST", "/fcm/notification", ["x"])[0] == 400


# --------------------------------------------------------------------------------------------------------- topics


def test_members_receive_what_is_sent_to_their_topic(ask, bearer, sandbox):
    def change(call, *tokens, topic="/topics/news"):
        return ask("POST", f"/iid/v1:{call}", {"to": topic, "registration_tokens": list(tokens)}, bearer)

    assert change("batchAdd", "a", "gone-b", "c", "invalid-d") == (
        200,
        {"results": [{}, {"error": "NOT_FOUND"}, {}, {"error": "INVALID_ARGUMENT"}]},
    )
    assert change("batchRemove", "c", "never") == (200, {"results": [{}, {}]})
    assert change("batchAdd", "e", topic="sport") == (200, {"results": [{}]})
    for bad in ({}, {"to": "/topics/news"}, {"to": "/topics/a b", "registration_tokens": ["a"]}, []):
        assert ask("POST", "/iid/v1:batchAdd", bad, bearer)[0] == 400
    assert change("batchAdd", *map(str, range(1001)))[0] == 400
    assert ask("POST", "/iid/v1:batchAdd", {}, {})[0] == 401
    path = "/v1/projects/sandbox-project/messages:send"
    for target in ({"topic": "news"}, {"condition": "'news' in topics || 'sport' in topics"}, {"topic": "empty"}):
        assert ask("POST", path, {"message": target}, bearer)[0] == 200
    assert ask("POST", path, {"message": {"topic": "news"}, "validate_only": True}, bearer)[0] == 200
    ask("POST", "/gcm/send", {"to": "/topics/news", "data": {}})
    received = sandbox.received()["delivered"]
    assert {token: received.get(token, 0) for token in "ace"} == {"a": 3, "c": 0, "e": 1}


def test_the_newer_calls_for_topics(ask, bearer):
    base = "/v1/projects/sandbox-project/registrations"

    def call(method, path, body=None):
        return ask(method, f"{base}/{path}", body, bearer)

    status, made = call("POST", "a%2Fb/topicSubscriptions?topic_name=news", {})
    assert status == 200 and made["topicName"] == "news"
    assert made["name"] == "projects/sandbox-project/registrations/a/b/topicSubscriptions/news"
    assert call("POST", "a%2Fb/topicSubscriptions?topic_name=news", {})[0] == 409
    assert call("GET", "a%2Fb/topicSubscriptions/news")[1] == made
    assert call("PATCH", "a%2Fb/topicSubscriptions/news", {})[1] == made
    assert call("PATCH", "a%2Fb/topicSubscriptions/more?allow_missing=true", {})[0] == 200
    listed = call("GET", "a%2Fb/topicSubscriptions")[1]["topicSubscriptions"]
    assert [each["topicName"] for each in listed] == ["more", "news"]
    assert call("DELETE", "a%2Fb/topicSubscriptions/news") == (200, {})
    assert call("DELETE", "a%2Fb/topicSubscriptions/news")[0] == 404
    assert call("DELETE", "a%2Fb/topicSubscriptions/news?allow_missing=true") == (200, {})
    assert call("GET", "a%2Fb/topicSubscriptions/news")[0] == 404
    assert call("POST", "gone-1/topicSubscriptions?topic_name=news", {})[1]["error"]["status"] == "NOT_FOUND"
    assert call("POST", "invalid-1/topicSubscriptions?topic_name=news", {})[0] == 400
    assert call("POST", "a/topicSubscriptions?topic_name=a%20b", {})[0] == 400
    assert ask("POST", "/v1/projects/other/registrations/a/topicSubscriptions?topic_name=x", {}, bearer)[0] == 403
    assert ask("GET", f"{base}/a/topicSubscriptions", None, {})[0] == 401


def test_who_may_not_ask_changes_nothing(ask):
    nobody = {"Authorization": "nothing"}
    assert ask("POST", "/iid/v1:batchAdd", {"to": "/topics/x", "registration_tokens": ["a"]}, nobody)[0] == 401
    listed = ask("GET", "/v1/projects/sandbox-project/registrations/a/topicSubscriptions")
    assert listed == (200, {"topicSubscriptions": []})
    path = "/v1/projects/sandbox-project/registrations/a/topicSubscriptions"
    assert ask("PATCH", path + "?allow_missing=true", {})[0] == 400
    assert ask("PATCH", path + "/a%20b?allow_missing=true", {})[0] == 400
    assert ask("GET", path + "/zz?allow_missing=true")[0] == 404


@pytest.mark.parametrize(
    "condition", ["!" * 5000 + "'a' in topics", "(" * 5000, "'a' in topics x" + " " * 8000 + "y", "'a' in topics )"]
)
def test_a_condition_that_makes_no_sense_is_refused_at_once(ask, bearer, condition):
    ask("POST", "/iid/v1:batchAdd", {"to": "/topics/a", "registration_tokens": ["m"]})
    path = "/v1/projects/sandbox-project/messages:send"
    assert ask("POST", path, {"message": {"condition": condition}}, bearer)[0] == 400
    assert ask("POST", "/fcm/send", {"condition": condition})[0] == 400


def test_what_nobody_thought_of_ends_nothing(ask, sandbox):
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=10)
    # What is read at one depth may not be written again: how deep that is, is the interpreter's.
    for depth in (*range(940, 1000), 200_000):
        body = '{"to":"x","data":{"a":' + "[" * depth + "]" * depth + "}}"
        connection.request("POST", "/fcm/send", body, {**KEY, "Content-Type": "application/json"})
        connection.getresponse().read()
        connection.request("GET", "/sandbox/received")
        connection.getresponse().read()
    for claims in ("[" * 200_000, '{"iss":"a","aud":"b","iat":1' + "0" * 400 + ',"exp":1}'):
        head = base64.urlsafe_b64encode(b'{"alg":"RS256"}').decode().rstrip("=")
        said = base64.urlsafe_b64encode(claims.encode()).decode().rstrip("=")
        assert ask("POST", "/token", form={"assertion": f"{head}.{said}.AA"})[0] == 400
    assert ask("POST", "/fcm/send", {"to": "phone-1"})[0] == 200


@pytest.mark.parametrize("field", ["data", "notification", "to", "time_to_live", "registration_ids", "dry_run"])
def test_a_legacy_field_of_another_type_is_refused(ask, field):
    status, text = ask("POST", "/fcm/send", {"registration_ids": ["a"], field: 5 if field != "time_to_live" else "x"})
    assert status == 400 and f'Field "{field}" must be' in text


conditions = st.recursive(
    st.sampled_from("abc"),
    lambda inner: st.tuples(st.just("!"), inner) | st.tuples(inner, st.sampled_from(["&&", "||"]), inner),
    max_leaves=6,
)


def written(condition):
    """A condition in Google's words, and in Python's."""
    if isinstance(condition, str):
        return f"'{condition}' in topics", f"('{condition}' in topics)"
    if condition[0] == "!":
        google, python = written(condition[1])
        return f"!({google})", f"(not {python})"
    (first, _), (second, _) = written(condition[0]), written(condition[2])
    word = "and" if condition[1] == "&&" else "or"
    return f"({first} {condition[1]} {second})", f"({written(condition[0])[1]} {word} {written(condition[2])[1]})"


@short
@given(conditions, st.sets(st.sampled_from("abc")))
def test_a_condition_means_what_it_says(condition, mine):
    topics = Topics()
    topics.members["z"]["t"] = ""
    for name in mine:
        topics.members[name]["t"] = ""
    google, python = written(condition)
    assert topics.receivers("condition", google) == (["t"] if eval(python, {"topics": mine}) else [])


@short
@pytest.mark.parametrize(
    "condition, expected",
    [
        ("'a' in topics || 'b' in topics && 'c' in topics", True),  # && binds closer
        ("'a' in topics && !'b' in topics", True),
        ("('b' in topics || 'a' in topics)", True),
        ("'a' in topics ||", False),
        ("'a' in topics 'a' in topics", False),
        ("('a' in topics", False),
        ("a in topics", False),
        ("", False),
        ("!", False),
    ],
)
def test_how_a_condition_is_read(condition, expected):
    topics = Topics()
    topics.members["a"]["t"] = ""
    assert topics.receivers("condition", condition) == (["t"] if expected else [])


# ------------------------------------------------------------------------------------------------------ access tokens


@pytest.fixture(scope="module")
def keys():
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa", reason="cryptography is not installed")
    return [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]


def oauth(tokens, assertion):
    body = urllib.parse.urlencode({"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion})
    request = Request("POST", "/token", "", {"host": "127.0.0.1:5602"}, body.encode(), True)
    answer = tokens.oauth(request, 3600, 200)
    return answer.status, json.loads(answer.body)


@short
def test_what_is_wrong_with_a_request_for_a_token_is_said(keys):
    mine, other = keys
    tokens = Tokens(Account("me@x", "https://mine.example/t", mine.public_key()), False)
    good = (*AUDIENCES, "https://mine.example/t", "http://127.0.0.1:5602/token", "https://127.0.0.1:5602/token")
    for audience in good:
        status, told = oauth(tokens, jwt(mine, aud=audience))
        assert status == 200 and tokens.takes("Bearer " + told["access_token"]), audience
    now = int(time.time())
    for assertion, words in (
        (jwt(mine, aud="https://evil.example/token"), "audience"),
        (jwt(mine, iat=now - 7200, exp=now - 3600), "reasonable timeframe"),
        (jwt(mine, iat=now + 600, exp=now + 900), "reasonable timeframe"),
        (jwt(mine, exp=now + 7200), "reasonable timeframe"),
        (jwt(other), "Invalid JWT Signature"),
        (jwt(mine)[:-8] + "AAAAAAAA", "Invalid JWT Signature"),
        (jwt(mine, alg="none"), "Invalid JWT Signature"),
        (jwt(mine, iss="you@x"), "account not found"),
        ("a.b", "Bad Request"),
        ("", "Bad Request"),
    ):
        status, told = oauth(tokens, assertion)
        assert (status, told["error"]) == (400, "invalid_grant") and words in told["error_description"], words
    assert oauth(Tokens(None, False), jwt(mine))[1]["error_description"] == "Invalid grant: account not found"


@short
def test_any_token_is_taken_only_where_that_was_asked_for():
    for anybody in (False, True):
        assert Tokens(None, anybody).takes("Bearer any") is anybody
        assert not Tokens(None, anybody).takes("Bearer ") and not Tokens(None, anybody).takes("key=any")


def test_by_https_the_file_names_an_https_endpoint(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    words = ("--tls-cert", str(tmp_path / "both.pem"), "--write-credentials", str(tmp_path / "fcm.json"))
    program = Program("sandbox", "--port", "0", "--host", "localhost", *words, "--any-token")
    try:
        port = program.logged(r"sandbox listens on \S+ port (\d+)")
        account = json.loads((tmp_path / "fcm.json").read_text())
        assert account["token_uri"] == f"https://localhost:{port}/token"
        url = f"https://localhost:{port}/v1/projects/sandbox-project/messages:send"
        sent = requests.post(
            url,
            json={"message": {"token": "a"}},
            headers={"Authorization": "Bearer any"},
            verify=str(tmp_path / "ca.pem"),
            timeout=10,
        )
        assert sent.status_code == 200
        pid = program.process.pid
        stand_still(pid)
        for _ in range(3):  # they are gone before it takes them
            with socket.create_connection(("127.0.0.1", int(port))) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.kill(pid, signal.SIGCONT)
        url = f"https://localhost:{port}/sandbox/counts"
        assert requests.get(url, verify=str(tmp_path / "ca.pem"), timeout=10).status_code == 200
    finally:
        program.kill_group()


TEMPLATES = [
    '{"message":{"token":%s,"data":{"a":"b"}}}',
    '{"message":{"data":{"token":"x"},"token":%s}}',
    '{"message":{"data":{"token":"x"},"topic":%s}}',
    '{"message":{"data":{"a":1},"token":%s}}',
    '{"message":{"token":%s,"token":"b"}}',
    '{"validate_only":true,"message":{"token": %s}}',
    '{"message":{"token":%s,"android":{"data":{"google.x":"1"}}}}',
    '{"message":{"android":{"token":%s}}}',
    '{"token":%s}',
    '{"message":{"data":{"x":"\\"token\\":\\"y\\""},"token":%s}}',
    '["message",{"token":%s}]',
    "%s",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_message_like_the_one_before_is_judged_as_the_first(template):
    for token in ('"a"', '"b:c-d_e"', '"\\u0041"', '""', "7", '"x y"', '"a"'):
        body = (template % token).encode()
        assert pretend._asked(body) == pretend._look_at(body), body
