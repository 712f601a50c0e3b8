"""Fields of the legacy API mean on iOS and the web what they meant there; a message given beside them counts more."""

import json

import pytest

from gocm_lib.message import fcm, gcm, job, platforms
from gocm_lib.message.bad_request import BadRequest

pytestmark = pytest.mark.short
NOW = 1_800_000_000.5


def message(**given):
    body = json.dumps({"tokens": ["t"], "payload": {}, **given}).encode()
    found = json.loads(fcm.message(job.parse("application/json", body, 10), NOW))["message"]
    assert found.pop("data") == {}
    return found


def at(found, path):
    """What stands at a path; None: nothing does."""
    for part in path.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return found or None


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            {"priority": "high"},
            {
                "android": {"priority": "HIGH"},
                "apns": {"headers": {"apns-priority": "10"}},
                "webpush": {"headers": {"Urgency": "high"}},
            },
        ),
        (
            {"priority": "normal"},
            {
                "android": {"priority": "NORMAL"},
                "apns": {"headers": {"apns-priority": "5"}},
                "webpush": {"headers": {"Urgency": "normal"}},
            },
        ),
        (
            {"time_to_live": 60},
            {
                "android": {"ttl": "60s"},
                "apns": {"headers": {"apns-expiration": "1800000060"}},
                "webpush": {"headers": {"TTL": "60"}},
            },
        ),
        (
            {"time_to_live": 0},
            {
                "android": {"ttl": "0s"},
                "apns": {"headers": {"apns-expiration": "0"}},
                "webpush": {"headers": {"TTL": "0"}},
            },
        ),
        (
            {"collapse_key": "k"},
            {"android": {"collapse_key": "k"}, "apns": {"headers": {"apns-collapse-id": "k"}}},
        ),
        ({"collapse_key": "k" * 65}, {"android": {"collapse_key": "k" * 65}}),  # which APNs would refuse
        ({"content_available": False, "mutable_content": False}, {}),
        (
            {"content_available": True, "priority": "high"},  # silent: Apple takes 5 only
            {
                "android": {"priority": "HIGH"},
                "apns": {"headers": {"apns-priority": "5"}, "payload": {"aps": {"content-available": 1}}},
                "webpush": {"headers": {"Urgency": "high"}},
            },
        ),
        (
            {"mutable_content": True, "content_available": True, "notification": {"title": "T"}},
            {
                "notification": {"title": "T"},
                "apns": {"payload": {"aps": {"content-available": 1, "mutable-content": 1}}},
            },
        ),
        (
            {"notification": {"title": "T", "sound": "s.caf", "badge": "7", "click_action": "OPEN"}},
            {
                "notification": {"title": "T"},
                "android": {"notification": {"sound": "s.caf", "click_action": "OPEN"}},
                "apns": {"payload": {"aps": {"sound": "s.caf", "badge": 7, "category": "OPEN"}}},
            },
        ),
        (
            {"notification": {"click_action": "https://a.example/x", "icon": "i", "badge": 0}},
            {
                "android": {"notification": {"click_action": "https://a.example/x", "icon": "i"}},
                "apns": {"payload": {"aps": {"category": "https://a.example/x", "badge": 0}}},
                "webpush": {"notification": {"icon": "i"}, "fcm_options": {"link": "https://a.example/x"}},
            },
        ),
        (
            {"notification": {"title": "T", "body_loc_key": "b", "body_loc_args": ["1"], "title_loc_key": "t"}},
            {
                "notification": {"title": "T"},
                "android": {"notification": {"body_loc_key": "b", "body_loc_args": ["1"], "title_loc_key": "t"}},
                "apns": {
                    "payload": {
                        "aps": {"alert": {"loc-key": "b", "loc-args": ["1"], "title-loc-key": "t", "title": "T"}}
                    }
                },
            },
        ),
    ],
)
def test_what_it_means_on_each_platform(given, expected):
    assert message(**given) == expected


FIELDS = {
    **{"collapse_key": "k", "restricted_package_name": "p", "time_to_live": 9, "priority": "high"},
    **{"content_available": True, "mutable_content": True},
}
SHOWN = {name: ["x"] if name.endswith("args") else "5" for name in platforms.NOTIFICATION} | {
    "click_action": "https://a.example",
    "color": "#ff8000",
}


def test_every_field_of_the_table_reaches_each_of_its_places():
    assert set(FIELDS) == set(platforms.OPTIONS) == set(job.OPTIONS) - {"dry_run", "notification"}
    found = message(**FIELDS, notification=SHOWN)
    for table in (platforms.OPTIONS, platforms.NOTIFICATION):
        for name, places in table.items():
            assert places and all(at(found, place.path) for place in places), name


# Written down once more, from the sources that the module names: the table must not be compared with itself.
PLACES = """
collapse_key: android.collapse_key apns.headers.apns-collapse-id
restricted_package_name: android.restricted_package_name
time_to_live: android.ttl apns.headers.apns-expiration webpush.headers.TTL
priority: android.priority apns.headers.apns-priority webpush.headers.Urgency
content_available: apns.payload.aps.content-available
mutable_content: apns.payload.aps.mutable-content
title: notification.title
body: notification.body
image: notification.image
subtitle: apns.payload.aps.alert.subtitle
icon: android.notification.icon webpush.notification.icon
sound: android.notification.sound apns.payload.aps.sound
badge: apns.payload.aps.badge
tag: android.notification.tag
color: android.notification.color
click_action: android.notification.click_action apns.payload.aps.category webpush.fcm_options.link
body_loc_key: android.notification.body_loc_key apns.payload.aps.alert.loc-key
body_loc_args: android.notification.body_loc_args apns.payload.aps.alert.loc-args
title_loc_key: android.notification.title_loc_key apns.payload.aps.alert.title-loc-key
title_loc_args: android.notification.title_loc_args apns.payload.aps.alert.title-loc-args
channel_id: android.notification.channel_id
android_channel_id: android.notification.channel_id
"""


def test_the_places_are_those_of_the_sources():
    expected = dict(line.split(": ") for line in PLACES.strip().splitlines())
    table = {**platforms.OPTIONS, **platforms.NOTIFICATION}
    assert {name: " ".join(place.path for place in places) for name, places in table.items()} == expected


@pytest.mark.parametrize(
    "notification", [{"title": ["x"]}, {"badge": "x"}, {"color": "red"}, {"sound": 5}, {"body_loc_args": [1]}]
)
def test_legacy_gcm_gets_no_value_that_means_nothing(notification):
    body = json.dumps({"tokens": ["t"], "payload": {}, "notification": notification}).encode()
    with pytest.raises(BadRequest) as caught:
        gcm.message(job.parse("application/json", body, 10), NOW)
    assert caught.value.field == "notification"


@pytest.mark.parametrize("camel", [False, True])
def test_a_message_beside_them_counts_more_field_by_field(camel):
    own = {
        "android": {"collapseKey" if camel else "collapse_key": "own", "notification": {"tag": "own"}},
        "apns": {"headers": {"apns-priority": "1"}, "payload": {"aps": {"alert": "own"}, "mine": True}},
        "webpush": {"headers": {"TTL": "1"}},
    }
    notification = {"tag": "t", "color": "#ffffff", "body_loc_key": "b", "sound": "s"}
    found = message(message=own, collapse_key="k", priority="high", time_to_live=9, notification=notification)
    android = {"priority": "HIGH", "ttl": "9s"}
    shown = {"tag": "own", "color": "#ffffff", "body_loc_key": "b", "sound": "s"}
    assert found["android"] == {"collapse_key": "own", **android, "notification": shown}
    assert found["apns"] == {
        "headers": {"apns-priority": "1", "apns-collapse-id": "k", "apns-expiration": "1800000009"},
        "payload": {"aps": {"alert": "own", "sound": "s"}, "mine": True},
    }
    assert found["webpush"] == {"headers": {"TTL": "1", "Urgency": "high"}}


@pytest.mark.parametrize("badge", ["x", "-1", 1.5, True, "", None, "1e3"])
def test_a_badge_is_a_number(badge):
    with pytest.raises(BadRequest) as caught:
        message(notification={"badge": badge})
    assert caught.value.field == "notification"


def test_legacy_gcm_gets_them_by_its_own_names():
    body = json.dumps({"tokens": ["t"], "payload": {}, **FIELDS, "notification": {"badge": "5"}}).encode()
    written = json.loads(gcm.message(job.parse("application/json", body, 10), NOW))
    assert written == {"data": {}, **FIELDS, "notification": {"badge": "5"}}
