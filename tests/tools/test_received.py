"""What the sandbox was sent, whole, and waiting for it."""

import json
import threading
import time
from urllib.parse import quote

import pytest
from kit import Http, eventually

from gocm_lib.front.request import Request
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.tools import received
from gocm_lib.tools.pretend_answers import Answer
from gocm_lib.tools.received import MOST, MOST_BYTES, Asked, Received

JSON = {"Content-Type": "application/json", "User-Agent": "an application"}
V1 = "/v1/projects/sandbox-project/messages:send"


@pytest.fixture
def bearer(sandbox):
    path = "/computeMetadata/v1/instance/service-accounts/default/token"
    _, _, answer = Http(sandbox.port).ask("GET", path, None, {"Metadata-Flavor": "Google"})
    return {"Authorization": "Bearer " + json.loads(answer)["access_token"], **JSON}


def post(sandbox, path, message, headers):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return Http(sandbox.port).ask("POST", path, body, headers)


def messages(sandbox, text=""):
    return Http(sandbox.port).json("GET", "/sandbox/messages" + text)


def test_each_message_is_kept_whole_with_what_became_of_it(sandbox, bearer):
    message = {"message": {"token": "gone-1", "data": {"título": "día"}, "android": {"priority": "high"}}}
    assert post(sandbox, V1, message, bearer)[0] == 404
    before = time.time()
    [kept] = messages(sandbox)["messages"]
    assert kept["message"] == message and before - 10 < kept["at"] <= time.time()
    assert kept["answer"]["error"]["details"][0]["errorCode"] == "UNREGISTERED"
    assert [kept[name] for name in ("protocol", "project", "user_agent", "verdict", "status")] == [
        *("v1", "sandbox-project", "an application", "refused", 404)
    ]


def test_verdicts(sandbox, bearer):
    key = {**JSON, "Authorization": "key=k"}
    form = {"Content-Type": "application/x-www-form-urlencoded;charset=UTF-8", "Authorization": "key=k"}
    for path, message, headers, verdict in (
        (V1, {"message": {"token": "a"}}, bearer, "taken"),
        (V1, {"message": {"token": "a"}}, {**JSON, "Authorization": "Bearer wrong"}, "refused"),
        (V1, b"[1]", bearer, "refused"),
        (V1, b"\xff{", bearer, "refused"),
        (V1, b"[" * 100_000, bearer, "refused"),
        ("/gcm/send", {"registration_ids": ["a", "b"]}, key, "taken"),
        ("/gcm/send", {"registration_ids": ["a", "gone-b"]}, key, "partly"),
        ("/gcm/send", {"registration_ids": ["gone-a"]}, key, "refused"),
        ("/fcm/send", {"to": "/topics/news"}, key, "taken"),
        ("/gcm/send", b"registration_id=a&data.x=%C3%AD", form, "taken"),
        ("/gcm/send", b"registration_id=gone-a", form, "refused"),
        ("/gcm/send", {"to": "a"}, JSON, "refused"),
    ):
        post(sandbox, path, message, headers)
        kept = messages(sandbox)["messages"][-1]
        assert kept["verdict"] == verdict, kept
        assert isinstance(message, bytes) or kept["message"] == message
    assert [each["message"] for each in messages(sandbox)["messages"]][-3] == {"registration_id": "a", "data.x": "í"}
    assert "Bearer" not in json.dumps(messages(sandbox)) and "key=" not in json.dumps(messages(sandbox))


def test_how_one_was_left_without_an_answer_is_told(sandbox, bearer):
    sandbox.mode(close=True)
    with pytest.raises(ConnectionError):
        post(sandbox, V1, {"message": {"token": "a"}}, bearer)
    [kept] = messages(sandbox)["messages"]
    assert (kept["verdict"], kept["status"], kept["answer"]) == ("close", None, None)


def test_a_token_s_messages_also_by_its_topic_and_a_topic_s_own(sandbox, bearer):
    members = {"to": "/topics/news", "registration_tokens": ["a"]}
    assert post(sandbox, "/iid/v1:batchAdd", members, bearer)[0] == 200
    for target in ({"token": "a"}, {"token": "b"}, {"topic": "news"}, {"topic": "other"}):
        assert post(sandbox, V1, {"message": target}, bearer)[0] == 200
    assert post(sandbox, "/gcm/send", {"to": "/topics/news"}, {**JSON, "Authorization": "key=k"})[0] == 200
    of_a = [each["message"] for each in messages(sandbox, "?token=a")["messages"]]
    assert of_a == [{"message": {"token": "a"}}, {"message": {"topic": "news"}}, {"to": "/topics/news"}]
    assert len(messages(sandbox, "?topic=news")["messages"]) == 2
    assert messages(sandbox, "?topic=none")["messages"] == []


def test_pages_go_on_over_a_reset(sandbox, bearer):
    for each in range(5):
        post(sandbox, V1, {"message": {"token": f"p-{each}"}}, bearer)
    first = messages(sandbox, "?limit=3")
    assert [each["message"]["message"]["token"] for each in first["messages"]] == ["p-0", "p-1", "p-2"]
    rest = messages(sandbox, f"?limit=3&after={first['next']}")
    assert len(rest["messages"]) == 2 and rest["next"] is None and rest["let_go"] == 0
    assert Http(sandbox.port).ask("POST", "/sandbox/reset")[0] == 200
    assert messages(sandbox)["messages"] == []
    post(sandbox, V1, {"message": {"token": "later"}}, bearer)
    assert len(messages(sandbox, f"?after={rest['messages'][-1]['n']}")["messages"]) == 1


def test_waiting_ends_when_they_have_come_and_nobody_is_held_up(sandbox, bearer):
    found = []
    waits = threading.Thread(target=lambda: found.append(messages(sandbox, "?token=a&count=2&wait=30")))
    waits.start()
    for token in ("a", "b", "a"):
        assert not found
        post(sandbox, V1, {"message": {"token": token}}, bearer)
    waits.join(10)
    assert [each["message"]["message"]["token"] for each in found[0]["messages"]] == ["a", "a"]
    assert Http(sandbox.port).json("GET", "/sandbox/counts")["in_flight"] == 0
    began = time.monotonic()
    assert len(messages(sandbox, "?token=b&count=2&wait=1")["messages"]) == 1, "what there is, after that time"
    assert time.monotonic() - began >= 0.9


def test_who_waits_and_leaves_takes_nobody_with_him(sandbox, bearer):
    for _ in range(20):
        gone = Http(sandbox.port)
        gone.connection.request("GET", "/sandbox/messages?wait=30")
        gone.connection.close()
    post(sandbox, V1, {"message": {"token": "a"}}, bearer)
    eventually(lambda: len(messages(sandbox, "?wait=5")["messages"]) == 1)


@pytest.mark.parametrize(
    "text",
    [
        "wait=31",
        "wait=x",
        "count=2&limit=1",
        "limit=0",
        "limit=10001",
        "after=-1",
        "tokn=a",
        "token=a&token=b",
        "a=%ff",
    ],
)
def test_what_cannot_be_asked_for_is_told(sandbox, text):
    status, _, answer = Http(sandbox.port).ask("GET", "/sandbox/messages?" + text)
    assert status == 400 and json.loads(answer)["error"]


def kept(store, size, targets=("a",)):
    request = Request("POST", V1, "", {}, b"x" * size, True)
    store.add(1.0, request, list(targets), [], Answer(200, b"{}"))


def test_it_keeps_so_many_and_so_much():
    store = Received()
    for _ in range(MOST + 10):
        kept(store, 10)
    page = json.loads(store.page(Asked(limit=MOST)))
    assert (len(page["messages"]), page["let_go"], page["messages"][0]["n"]) == (MOST, 10, 11)
    for _ in range(40):
        kept(store, 1 << 20)
    large = sum(len(each.body) for each in store.newer(0))
    assert MOST_BYTES - (2 << 20) < large <= MOST_BYTES


def test_a_query_is_read_strictly():
    assert received.asked("token=" + quote("a+b/c")) == Asked(token="a+b/c")
    with pytest.raises(BadRequest):
        received.asked("count=0")
