"""The legacy door: who speaks Google's legacy protocol is answered as Google answered."""

import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit import FORM, eventually

from gocm_lib.message import legacy
from gocm_lib.message.bad_request import BadRequest

short = pytest.mark.short
KEY = {"Authorization": "key=AIzaSyPretendPretend", "Content-Type": "application/json"}


def post(server, message, path="/fcm/send", headers=KEY):
    body = message if isinstance(message, bytes) else json.dumps(message)
    return server.http().ask("POST", path, body, headers)


def told(server, message, **how):
    status, headers, body = post(server, message, **how)
    assert status == 200 and headers["Content-Type"].startswith("application/json"), (status, body)
    return json.loads(body)


@pytest.mark.parametrize("path", ["/fcm/send", "/gcm/send"])
def test_each_token_has_its_result_in_its_place(start, sandbox, path):
    server = start()
    tokens = ["a", "gone-b", "canonical-c", "", "mismatch-d", "e f"]
    found = told(server, {"registration_ids": tokens, "data": {"n": "1"}, "unknown": {"x": 1}}, path=path)
    assert 0 < found.pop("multicast_id") < 1 << 31
    first, *rest = found.pop("results")
    assert found == {"success": 2, "failure": 4, "canonical_ids": 1} and first["message_id"].startswith("0:")
    assert [each.get("error") for each in rest] == [
        "NotRegistered",
        None,
        "InvalidRegistration",
        "MismatchSenderId",
        "InvalidRegistration",
    ]
    assert rest[1]["registration_id"] == "new-c"
    assert set(sandbox.received()["arrived"]) == {"a", "gone-b", "canonical-c", "mismatch-d"}


def test_a_single_token_a_topic_and_a_condition(start_both, sandbox):
    server = start_both()
    assert told(server, {"to": "a", "notification": {"title": "x"}})["success"] == 1
    topic = told(server, {"to": "/topics/news", "data": {"a": "1"}, "priority": "HIGH", "time_to_live": "60"})
    assert topic.keys() == {"message_id"} and 0 < topic["message_id"] < 1 << 31
    assert told(server, {"condition": "'a' in topics || 'b' in topics"}).keys() == {"message_id"}
    assert [line for line in server.lines if "audit: 127.0.0.1 sent to topic 'news'" in line]
    assert sandbox.received()["requests"] == 3 and sandbox.received()["arrived"]["a"] == 1


def test_the_form_of_before_json(start, sandbox):
    server = start()
    headers = {**FORM, "Authorization": "key=x"}
    asked = {
        "registration_id": "canonical-a",
        "data.n": "1",
        "data.m": "ü",
        "collapse_key": "k",
        "delay_while_idle": "1",
    }
    status, _, body = post(server, urllib.parse.urlencode(asked).encode(), headers=headers)
    lines = body.decode().splitlines()
    assert status == 200 and lines[0].startswith("id=") and lines[1:] == ["registration_id=new-a"]
    asked["registration_id"] = "gone-b"
    assert post(server, urllib.parse.urlencode(asked).encode(), headers=headers)[2] == b"Error=NotRegistered\n"
    assert post(server, b"data.n=1", headers=headers)[2] == b"Error=MissingRegistration\n"
    assert json.loads(json.dumps(server.http().json("GET", "/gcm/report")))["attempts"] == 2


def test_who_has_no_result_in_time_counts_as_sent(start, sandbox):
    sandbox.mode(latency=3.0)
    server = start("--legacy-wait", "1")
    found = told(server, {"registration_ids": ["a", "gone-b"], "data": {}})
    assert found["success"] == 2 and all(each["message_id"].startswith("0:") for each in found["results"])
    server.settled()
    assert server.report()["notregistered"] == 1, "it was told wrongly, and is in the list"


def test_what_clients_spell_otherwise_is_understood(start_both):
    server = start_both()
    message = {"to": "a", "dry_run": "false", "content_available": 1, "mutable_content": "true"}
    message |= {"notification": {"title": "x", "foo": {"bar": 1}}, "time_to_live": "5"}
    assert told(server, message)["success"] == 1
    assert json.loads(post(server, {"to": "b"}, headers={"Authorization": "key=x"})[2])["success"] == 1


def test_a_thousand_tokens(start, sandbox):
    server = start()
    tokens = [f"{'gone-' if n % 3 else ''}{n}" for n in range(1000)]
    found = told(server, {"registration_ids": tokens, "data": {"a": "b"}})
    assert [("error" in each) for each in found["results"]] == [bool(n % 3) for n in range(1000)]


@pytest.mark.parametrize(
    "message, status, said",
    [
        (b"{", 400, "JSON_PARSING_ERROR"),
        (b"[]", 400, "JSON_PARSING_ERROR"),
        (b'{"to": "\xff"}', 400, "JSON_PARSING_ERROR"),
        ({"registration_ids": "a"}, 400, "is not a JSON array"),
        ({"to": ["a"]}, 400, 'Field "to" must be a JSON string'),
        ({"to": "a", "registration_ids": ["b"]}, 400, "not both"),
        ({"registration_ids": ["a"] * 1001}, 400, "exceeds maximum allowed (1000)"),
        ({"to": "a", "data": []}, 200, '"success": 1'),
        ({"to": "a", "data": ["x"]}, 400, "JSON_TYPE_ERROR"),
        ({"data": {"a": "1"}}, 200, "MissingRegistration"),
        ({"registration_ids": []}, 200, "MissingRegistration"),
        ({"to": "a", "data": {"a": "x" * 5000}}, 200, "MessageTooBig"),
        ({"to": "a", "time_to_live": -1}, 200, "InvalidTtl"),
        ({"to": "a", "priority": "soon"}, 400, "priority must be"),
        ({"to": "a b", "data": {}}, 200, "InvalidRegistration"),
        ({"to": "/topics/a b", "data": {}}, 200, "InvalidRegistration"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_googles_words(standing, message, status, said):
    found, _, body = post(standing, message)
    assert found == status and said in body.decode(), body


def test_a_key_is_one_of_our_tokens(start, tmp_path):
    file = tmp_path / "tokens"
    file.touch(0o600)
    file.write_text("0123456789abcdef0123\n")
    server = start("--auth-token-file", str(file))
    assert post(server, {"to": "a", "data": {}})[0] == 401
    headers = {**KEY, "Authorization": "key=0123456789abcdef0123"}
    assert told(server, {"to": "a", "data": {}}, headers=headers)["success"] == 1


def test_our_own_fields_with_a_key_stay_our_own(start):
    server = start()
    body = b'{"tokens": ["a"], "payload": {"a": 1}}'
    status, _, answer = server.http().ask("POST", "/gcm/send", body, KEY)
    assert (status, answer) == (200, b"ok\n")


def test_many_at_once_get_their_own_results(start, sandbox):
    sandbox.mode(latency=0.05)
    server = start()

    def one(n):
        return told(server, {"registration_ids": [f"a-{n}", f"gone-{n}"], "data": {"n": str(n)}})

    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(one, range(300)))
    assert all((each["success"], each["failure"]) == (1, 1) and "error" in each["results"][1] for each in found)
    assert len({each["results"][0]["message_id"] for each in found}) == 300
    eventually(lambda: server.report()["pending"] == 0)


@short
def test_words_of_the_upstream_are_told_if_they_are_googles():
    asked = legacy.Asked({}, 3, False, False)
    results = {
        0: legacy.Result(failure="bad_message", detail="InvalidDataKey"),
        1: legacy.Result(failure="rejected", detail="<script>"),
        2: legacy.Result(failure="attempts", detail="Unavailable, attempt 5 of 5"),
    }
    _, _, body = legacy.answer(asked, 1 << 40, results, ())
    errors = [each["error"] for each in json.loads(body)["results"]]
    assert errors == ["InvalidDataKey", "InvalidParameters", "InternalServerError"]


@short
def test_what_is_of_this_protocol_is_known():
    key = {"authorization": "key=a"}
    assert legacy.speaks(key, b'{"to": "x"}') and not legacy.speaks(key, b"{")
    assert not legacy.speaks({"authorization": "Bearer a"}, b'{"to": "x"}')
    form = {**key, "content-type": FORM["Content-Type"]}
    assert legacy.speaks(form, b"a=b&registration_id=x")
    assert not legacy.speaks(form, b"tokens=x&payload={%22u%22:%22?registration_id=5%22}")
    assert not legacy.speaks(key, b'{"tokens": ["x"], "payload": {"to": "Bob"}}')
    assert not legacy.speaks(key, b'{"condition": "x", "payload": {"registration_ids": 1}}')
    assert legacy.speaks(key, b'{"condition": "x", "data": {"payload": "to"}}')
    with pytest.raises(BadRequest, match="form cannot be read"):
        legacy.read("", b"a=\xff")
