"""A whole v1 message is taken when Google would take it: our table, the sandbox's reading, Google's document."""

import json
from pathlib import Path

import pytest

from gocm_lib.message import fcm, job, v1_schema
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.tools import pretend_schema
from gocm_lib.tools.pretend import v1_fault

pytestmark = pytest.mark.short

LONG = {"a": {"b": [1, 2.5, None, True, {"c": "d"}]}}
GOOD = [
    {"data": {"a": "b"}, "notification": {"title": "T", "body": "B", "image": "https://a.example/x.png"}},
    {"name": "projects/p/messages/1", "fcmOptions": {"analyticsLabel": "a_b-c.d~e%f"}},
    *({"android": {"ttl": ttl}} for ttl in ("0s", "3600s", "3.5s", "2419200s", "1.000000001s")),
    *({"android": {"priority": word}} for word in ("NORMAL", "HIGH", "normal", "high", "High", 0, 1)),
    {"android": {"collapseKey": "k", "restricted_package_name": "p", "data": {"n": "1"}, "directBootOk": True}},
    {"android": {"notification": {"notification_count": 5, "sticky": False, "event_time": "2026-01-02T15:04:05Z"}}},
    {"android": {"notification": {"notificationCount": "5", "eventTime": "2026-01-02T15:04:05.123456789+01:00"}}},
    {"android": {"notification": {"body_loc_args": ["a", "b"], "vibrate_timings": ["0.5s", "1s"], "color": "#Ff8000"}}},
    {"android": {"notification": {"notification_priority": "PRIORITY_MAX", "visibility": "secret", "proxy": "DENY"}}},
    {"android": {"notification": {"light_settings": {"color": {"red": 0.5, "green": 1, "blue": "0.25", "alpha": 0},
                                                     "light_on_duration": "1s", "lightOffDuration": "0.5s"}}}},
    {"android_v2": {"remote_notification": {"notification": {"title": "T", "id": 7}, "mutable_content": True}}},
    {"androidV2": {"backgroundSync": {}, "ttl": "5s"}},
    {"apns": {"headers": {"apns-priority": "10"}, "payload": {"aps": {"badge": 1, "alert": "x"}, **LONG}}},
    {"apns": {"live_activity_token": "t", "fcm_options": {"image": "https://a.example/x.png", "analytics_label": "l"}}},
    {"webpush": {"headers": {"TTL": "15"}, "data": {"a": "b"}, "notification": LONG}},
    {"webpush": {"fcm_options": {"link": "https://a.example/"}}},
    {"android": None, "notification": {"title": None}, "data": {}},
    {"fcm_options": {"analytics_label": ""}, "webpush": {"fcm_options": {"link": ""}}},  # in proto3, not set
    {"android": {"notification": {"color": "", "vibrate_timings": ["315576000000s"]}}},
]  # fmt: skip

BAD = [
    ({"android": {"ttl": 5}}, "message.android.ttl"),
    *(({"android": {"ttl": ttl}}, "message.android.ttl")
      for ttl in ("5", "5m", "", "s", "2419201s", "-1s", "1.s", "1e3s")),
    *(({"android": {"data": {"n": value}}}, "message.android.data") for value in (1, None, True, {}, [], 1.5)),
    ({"android": {"data": "x"}}, "message.android.data"),
    ({"data": {"n": 1}}, "message.data"),
    ({"data": ["n"]}, "message.data"),
    *(({"android": {"priority": word}}, "message.android.priority")
      for word in ("urgent", "", 2, -1, True, [], 1.5)),
    ({"notification": {"sound": "s"}}, "message.notification"),
    ({"notification": {"title": 5}}, "message.notification.title"),
    ({"notification": "T"}, "message.notification"),
    ({"android": {"sound": "s"}}, "message.android"),
    ({"android": {"notification": {"badge": 5}}}, "message.android.notification"),
    ({"android": {"notification": "x"}}, "message.android.notification"),
    ({"android": {"Priority": "HIGH"}}, "message.android"),
    ({"apns": {"headers": {"apns-priority": 10}}}, "message.apns.headers"),
    ({"apns": {"headers": ["apns-priority"]}}, "message.apns.headers"),
    ({"apns": {"aps": {}}}, "message.apns"),
    ({"apns": {"payload": "x"}}, "message.apns.payload"),
    ({"apns": []}, "message.apns"),
    ({"webpush": {"headers": {"TTL": "soon"}}}, "message.webpush.headers"),
    ({"webpush": {"headers": {"TTL": 15}}}, "message.webpush.headers"),
    ({"webpush": {"notification": []}}, "message.webpush.notification"),
    ({"webpush": {"fcm_options": {"link": "http://a.example/"}}}, "message.webpush.fcm_options.link"),
    ({"webpush": {"fcm_options": {"Link": "x"}}}, "message.webpush.fcm_options"),
    ({"android": {"notification": {"sticky": "true"}}}, "message.android.notification.sticky"),
    ({"android": {"notification": {"sticky": 1}}}, "message.android.notification.sticky"),
    *(({"android": {"notification": {"notification_count": count}}}, "message.android.notification.notification_count")
      for count in ("x", 1.5, True, 1 << 31, [])),
    *(({"android": {"notification": {"event_time": moment}}}, "message.android.notification.event_time")
      for moment in ("yesterday", 5, "2026-13-02T15:04:05Z", "2026-01-02 15:04:05", "2026-01-02T15:04:05")),
    ({"android": {"notification": {"body_loc_args": "a"}}}, "message.android.notification.body_loc_args"),
    ({"android": {"notification": {"body_loc_args": [1]}}}, "message.android.notification.body_loc_args[0]"),
    ({"android": {"notification": {"vibrate_timings": ["1s", 2]}}}, "message.android.notification.vibrate_timings[1]"),
    ({"android": {"notification": {"color": "red"}}}, "message.android.notification.color"),
    ({"android": {"notification": {"visibility": "HIDDEN"}}}, "message.android.notification.visibility"),
    ({"android": {"notification": {"light_settings": {"color": {"red": "x"}}}}},
     "message.android.notification.light_settings.color.red"),
    ({"android": {}, "android_v2": {"ttl": "5s"}}, "android or android_v2"),
    ({"apns": {"payload": {}}}, "message.apns.payload"),
    ({"apns": {"payload": {"sound": "default"}}}, "message.apns.payload"),
    ({"apns": {"payload": {"aps": 5}}}, "message.apns.payload"),
    ({"android": {"priority": "h\u0131gh"}}, "message.android.priority"),
    ({"android": {"notification": {"visibility": "\u017fecret"}}}, "message.android.notification.visibility"),
    ({"android": {"notification": {"vibrate_timings": ["315576000001s"]}}}, "vibrate_timings[0]"),
    ({"android": {"notification": {"light_settings": {}}}}, "light_settings needs color"),
    *(({"android": {"notification": {"light_settings": {"color": {"red": red}, "light_on_duration": "1s",
                                                        "light_off_duration": "1s"}}}}, "light_settings.color.red")
      for red in (5, -1, 1e99)),
    ({"fcm_options": {"analytics_label": 5}}, "message.fcm_options.analytics_label"),
    ({"fcmoptions": {}}, "message"),
]  # fmt: skip


def message(template):
    body = json.dumps({"tokens": ["t"], "message": template}).encode()
    return json.loads(fcm.message(job.parse("application/json", body, 10), 1.8e9))


@pytest.mark.parametrize("template", GOOD, ids=json.dumps)
def test_what_google_takes_is_taken(template):
    taken = message(template)
    assert not pretend_schema.violations({"message": template}) and not pretend_schema.violations(taken)
    assert not pretend_schema.what_it_means(taken["message"])


@pytest.mark.parametrize("template, place", BAD, ids=json.dumps)
def test_what_google_refuses_is_refused_with_its_place(template, place):
    with pytest.raises(BadRequest) as caught:
        message(template)
    assert caught.value.field == "message" and place in caught.value.error
    wrong = pretend_schema.violations({"message": template})
    assert wrong or pretend_schema.what_it_means(template)


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"])
def test_a_time_is_one_in_utc_too(moment):
    with pytest.raises(BadRequest, match="event_time must be a time"):
        message({"android": {"notification": {"event_time": moment}}})


@pytest.mark.parametrize("platform", ["webpush", "apns"])
def test_a_header_is_one_line(platform):
    with pytest.raises(BadRequest, match="texts in a line each"):
        message({platform: {"headers": {"Urgency": "high\r\nX: y"}}})


@pytest.mark.parametrize(
    "part",
    [
        {"android": {"data": {"a": "x" * 4096}}},
        {"android": {"notification": {"body": "x" * 4093}}},
        {"webpush": {"data": {"a": "x" * 4096}}},
        {"webpush": {"notification": {"body": "x" * 4093}}},
        {"apns": {"payload": {"aps": {"alert": "x" * 4096}}}},
    ],
    ids=json.dumps,
)
def test_what_one_platform_gets_has_a_size_too(part):
    with pytest.raises(BadRequest, match=r"message\.[a-z.]+ has \d+ bytes; 4096 is Google's limit"):
        message(part)


@pytest.mark.parametrize("many", [1, 500])
@pytest.mark.parametrize("platform", ["android", "webpush"])
def test_both_halves_measure_alike(platform, many):
    """However many names there are: JSON's own signs count for neither."""
    data = {f"k{n:03}": "x" for n in range(many)}
    data["last"] = "é" * ((4096 - 4 - sum(len(name) + 1 for name in data)) // 2)
    for more, refused in (("", ""), ("xx", "too_big")):
        template = {platform: {"data": {**data, "last": data["last"] + more}}}
        if refused:
            with pytest.raises(BadRequest, match="Google's limit"):
                message(template)
        else:
            message(template)
        assert v1_fault(template, "token") == refused


def test_a_name_in_both_spellings_is_given_twice():
    with pytest.raises(BadRequest, match=r"message\.fcm_options is given twice"):
        message({"fcm_options": {}, "fcmOptions": {}})


@pytest.mark.parametrize("label", ["a" * 51, "a b", "ü"])
@pytest.mark.parametrize("under", [(), ("android",), ("apns",), ("webpush",)])
def test_a_label_is_one_that_google_takes(label, under):
    template = {"fcm_options": {"analytics_label": label}}
    for name in under:
        template = {name: template}
    with pytest.raises(BadRequest, match=r"fcm_options\.analytics_label must be up to 50"):
        message(template)


@pytest.mark.parametrize("name", v1_schema.TARGETS)
def test_the_target_is_not_in_it(name):
    with pytest.raises(BadRequest, match=f"give {name} beside the message, not in it"):
        message({name: "x"})


@pytest.mark.parametrize("platform", ["android", "android_v2", "webpush"])
@pytest.mark.parametrize("key", ["from", "message_type", "google.x", "gcm.notification.x"])
def test_reserved_keys_are_so_on_each_platform(platform, key):
    with pytest.raises(BadRequest, match=f"the key {key} is reserved"):
        message({platform: {"data": {key: "x"}}})


def test_a_near_name_is_named():
    with pytest.raises(BadRequest, match=r"message\.android has an unknown field 'prority'; did you mean priority"):
        message({"android": {"prority": "HIGH"}})


def test_numbers_keep_their_digits_in_it():
    body = b'{"tokens":["t"],"message":{"apns":{"payload":{"aps":{},"price":1.10,"n":0.10000000000000000000001}}}}'
    assert '"price":1.10,"n":0.10000000000000000000001' in fcm.message(job.parse("application/json", body, 10), 0.0)


def test_a_header_s_name_is_one_in_any_case():
    body = json.dumps({"tokens": ["t"], "time_to_live": 9, "message": {"webpush": {"headers": {"ttl": "1"}}}}).encode()
    found = json.loads(fcm.message(job.parse("application/json", body, 10), 0.0))
    assert found["message"]["webpush"]["headers"] == {"ttl": "1"}


# ----------------------------------------------------------------------------------------------- Google's own document


@pytest.fixture(scope="module")
def google():
    """Google's schemas by type."""
    package = pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    place = Path(package.__path__[0]) / "discovery_cache/documents/fcm.v1.json"
    return json.loads(place.read_text())["schemas"]


NAMES = {"GoogleFirebaseFcmV1AndroidNotificationV2LightSettings": "LightSettings"}


def theirs(schema):
    """A field of Google's document in the words of our table."""
    if "$ref" in schema:
        return NAMES.get(schema["$ref"], schema["$ref"])
    if schema["type"] == "array":
        return "[]" + theirs(schema["items"])
    if "enum" in schema:
        return tuple(schema["enum"])
    if schema["type"] == "object":
        return "texts" if schema["additionalProperties"]["type"] == "string" else "object"
    known = {"google-duration": "duration", "google-datetime": "time", "int32": "integer", "float": "number"}
    return known.get(schema.get("format"), {"string": "text"}.get(schema["type"], schema["type"]))


STRICTER = {"life": "duration", "rgb": "text", "label": "text", "link": "text"}
STRICTER |= {"share": "number", "headers": "texts", "apple": "object"}


def test_our_table_is_google_s(google):
    for name, fields in v1_schema.SCHEMA.items():
        given = {
            v1_schema.camel(field): STRICTER.get(kind, v1_schema.ENUMS.get(kind, kind))
            for field, kind in fields.items()
        }
        if name == "Message":
            given |= dict.fromkeys(v1_schema.TARGETS, "text")
        assert given == {field: theirs(schema) for field, schema in google[name].get("properties", {}).items()}, name
    reached = {theirs(schema) for name in v1_schema.SCHEMA for schema in google[name].get("properties", {}).values()}
    assert {kind for kind in reached if kind in google} <= set(v1_schema.SCHEMA)


PROTO = {"string": "text", "bool": "boolean", "int32": "integer", "float": "number", "map": "texts", "Struct": "object"}
PROTO |= {"Duration": "duration", "Timestamp": "time"}


def test_the_sandbox_s_reading_is_google_s(google):
    assert {name for name in pretend_schema.TYPES if name in google} == set(pretend_schema.TYPES)
    for name, fields in pretend_schema.TYPES.items():
        properties = google[name].get("properties", {})
        assert {field for field in fields if "_" not in field} == set(properties), name
        for field, schema in properties.items():
            kind = fields[field]
            if kind.endswith("*"):
                kind = "[]" + PROTO[kind[:-1]]
            enum = pretend_schema._ENUMS.get(kind)
            assert (tuple(enum.split()) if enum else PROTO.get(kind, kind)) == theirs(schema), (name, field)
