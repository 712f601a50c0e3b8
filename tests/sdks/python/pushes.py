"""An application's tests with firebase-admin: `gocm sandbox exec -- pytest pushes.py`."""

import asyncio
import os

import firebase_admin
import pytest
import requests
from firebase_admin import exceptions, messaging

firebase_admin.initialize_app()


def sandbox(path, **wanted):
    return requests.get(f"{os.environ['GOCM_SANDBOX']}/sandbox/{path}", wanted, timeout=60).json()


def to(token):
    return messaging.Message(token=token, notification=messaging.Notification("Hello"), data={"order": "7"})


def test_send():
    android = messaging.AndroidConfig(priority="high", collapse_key="orders")
    message = messaging.Message(token="py-one", notification=messaging.Notification("Hello"), android=android)
    assert messaging.send(message).startswith("projects/sandbox-project/messages/")
    [sent] = sandbox("messages", token="py-one", wait=5)["messages"]
    assert sent["message"]["message"]["notification"] == {"title": "Hello"}
    assert sent["message"]["message"]["android"] == {"collapse_key": "orders", "priority": "high"}


def test_send_each():
    answer = messaging.send_each([to(f"py-each-{n}") for n in range(500)])
    assert answer.success_count == 500
    assert sum(token.startswith("py-each-") for token in sandbox("received")["delivered"]) == 500


def test_send_each_async():
    answer = asyncio.run(messaging.send_each_async([to(f"py-async-{n}") for n in range(500)]))
    assert answer.success_count == 500
    assert sum(token.startswith("py-async-") for token in sandbox("received")["delivered"]) == 500


def test_multicast():
    tokens = ["py-many-1", "gone-py-many", "py-many-2"]
    answer = messaging.send_each_for_multicast(messaging.MulticastMessage(tokens, data={"a": "b"}))
    assert [each.success for each in answer.responses] == [True, False, True]


def test_dry_run():
    messaging.send(to("py-dry"), dry_run=True)
    [sent] = sandbox("messages", token="py-dry", wait=5)["messages"]
    assert sent["message"]["validate_only"] is True and "py-dry" not in sandbox("received")["delivered"]


def test_topics():
    assert messaging.subscribe_to_topic(["py-member", "gone-py"], "py-news").failure_count == 1
    messaging.send(messaging.Message(topic="py-news", data={"a": "b"}))
    messaging.send(messaging.Message(condition="'py-news' in topics && !('other' in topics)", data={"a": "b"}))
    assert sandbox("received")["delivered"]["py-member"] == 2
    assert messaging.unsubscribe_from_topic("py-member", "py-news").success_count == 1
    messaging.send(messaging.Message(topic="py-news", data={"a": "b"}))
    assert sandbox("received")["delivered"]["py-member"] == 2


@pytest.mark.parametrize(
    "token, error",
    [
        ("gone-py", messaging.UnregisteredError),
        ("mismatch-py", messaging.SenderIdMismatchError),
        ("quota-py", messaging.QuotaExceededError),
        ("error-third_party-py", messaging.ThirdPartyAuthError),
        ("invalid-py", exceptions.InvalidArgumentError),
        ("error-unavailable-py", exceptions.UnavailableError),
        ("error-internal-py", exceptions.InternalError),
    ],
)
def test_errors(token, error):
    with pytest.raises(error):
        messaging.send(to(token))
