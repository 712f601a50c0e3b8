"""What FCM HTTP v1 takes in a message: Google's published schema as a table, and a message read by it. Pure.

Source: the discovery document of fcm.googleapis.com, projects.messages; a test compares the table with it. Names may be
in snake_case or lowerCamelCase, and null means that a field is not set, as proto3 JSON has it (protobuf.dev, "ProtoJSON
Format"). What does not fit is refused here, with its place: Google would refuse it only after we said `ok`.
"""

import datetime
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, NamedTuple

from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import MAX_TTL
from gocm_lib.message.strict_json import Number

# Fields by type. A kind is a type of this table, or one of KINDS, or one of ENUMS; [] before it: a list of them.
_DATA_AND_APP = {
    "collapse_key": "text",
    "restricted_package_name": "text",
    "data": "texts",
    "ttl": "life",
    "fcm_options": "AndroidFcmOptions",
    "direct_boot_ok": "boolean",
    "bandwidth_constrained_ok": "boolean",
    "restricted_satellite_ok": "boolean",
}
_SHOWN = {
    **dict.fromkeys(("title", "body", "icon", "sound", "tag", "click_action"), "text"),
    **dict.fromkeys(("body_loc_key", "title_loc_key", "channel_id", "ticker", "image"), "text"),
    **dict.fromkeys(("body_loc_args", "title_loc_args"), "[]text"),
    **dict.fromkeys(("sticky", "local_only", "default_sound"), "boolean"),
    **dict.fromkeys(("default_vibrate_timings", "default_light_settings"), "boolean"),
    "color": "rgb",
    "event_time": "time",
    "notification_priority": "NotificationPriority",
    "vibrate_timings": "[]duration",
    "visibility": "Visibility",
    "notification_count": "integer",
    "light_settings": "LightSettings",
}
SCHEMA: dict[str, dict[str, str]] = {
    "Message": {
        "name": "text",
        "data": "texts",
        "notification": "Notification",
        "android": "AndroidConfig",
        "android_v2": "AndroidConfigV2",
        "webpush": "WebpushConfig",
        "apns": "ApnsConfig",
        "fcm_options": "FcmOptions",
    },
    "Notification": dict.fromkeys(("title", "body", "image"), "text"),
    "AndroidConfig": {**_DATA_AND_APP, "priority": "MessagePriority", "notification": "AndroidNotification"},
    "AndroidConfigV2": {
        **_DATA_AND_APP,
        "remote_notification": "AndroidRemoteNotification",
        "background_sync": "AndroidBackgroundSyncMessage",
    },
    "AndroidRemoteNotification": {
        "notification": "AndroidNotificationV2",
        "mutable_content": "boolean",
        "use_as_v1_data_message": "boolean",
    },
    "AndroidBackgroundSyncMessage": {},
    "AndroidNotification": {**_SHOWN, "bypass_proxy_notification": "boolean", "proxy": "Proxy"},
    "AndroidNotificationV2": {**_SHOWN, "id": "integer"},
    "LightSettings": {"color": "Color", "light_on_duration": "duration", "light_off_duration": "duration"},
    "Color": dict.fromkeys(("red", "green", "blue", "alpha"), "share"),
    "WebpushConfig": {
        "headers": "headers",
        "data": "texts",
        "notification": "object",
        "fcm_options": "WebpushFcmOptions",
    },
    "ApnsConfig": {
        "headers": "headers",
        "payload": "apple",
        "fcm_options": "ApnsFcmOptions",
        "live_activity_token": "text",
    },
    "FcmOptions": {"analytics_label": "label"},
    "AndroidFcmOptions": {"analytics_label": "label"},
    "ApnsFcmOptions": {"analytics_label": "label", "image": "text"},
    "WebpushFcmOptions": {"analytics_label": "label", "link": "link"},
}
# Google reads their words in any case: its own examples have "priority": "high" and "HIGH". Numbers count from 0.
ENUMS = {
    "MessagePriority": ("NORMAL", "HIGH"),
    "NotificationPriority": tuple(
        f"PRIORITY_{word}" for word in ("UNSPECIFIED", "MIN", "LOW", "DEFAULT", "HIGH", "MAX")
    ),
    "Visibility": ("VISIBILITY_UNSPECIFIED", "PRIVATE", "PUBLIC", "SECRET"),
    "Proxy": ("PROXY_UNSPECIFIED", "ALLOW", "DENY", "IF_PRIORITY_LOWERED"),
}
REQUIRED = {"LightSettings": ("color", "light_on_duration", "light_off_duration")}  # by type, as its page says
LONGEST_DURATION = 315_576_000_000  # seconds: 10,000 years (google.protobuf.Duration)
TARGETS = ("token", "topic", "condition", "fid")  # fields of a Message that are given beside it


class Kind(NamedTuple):
    """A kind of value: whether something is one, and what it must be, in words."""

    fits: Callable[[Any], bool]
    must: str


def _matches(pattern: str) -> Callable[[Any], bool]:
    whole = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and whole.fullmatch(value) is not None


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_is_seconds = _matches(r"[0-9]{1,12}(\.[0-9]{1,9})?s")
_is_time = _matches(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_is_number = _matches(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,2})?")


def _is_one_of(words: tuple[str, ...]) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if isinstance(value, str):
            return value.isascii() and value.upper() in words
        return type(value) is int and 0 <= value < len(words)

    return fits


def _is_duration(value: Any) -> bool:
    return _is_seconds(value) and Decimal(value[:-1]) <= LONGEST_DURATION


def _is_life(value: Any) -> bool:
    return _is_seconds(value) and Decimal(value[:-1]) <= MAX_TTL


def _is_moment(value: Any) -> bool:
    try:
        return _is_time(value) and bool(datetime.datetime.fromisoformat(value).astimezone(datetime.UTC))
    except (ValueError, OverflowError):  # it must be a time in UTC, too
        return False


def _is_real(value: Any) -> bool:
    text = value if isinstance(value, str) else str(value) if isinstance(value, Number | int) else ""
    return not isinstance(value, bool) and _is_number(text)


def _is_share(value: Any) -> bool:
    return _is_real(value) and 0 <= Decimal(str(value)) <= 1


def _are_headers(value: Any) -> bool:
    return isinstance(value, dict) and not any(_CONTROL.search(str(text)) for text in value.values())


def _is_for_apple(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("aps"), dict)


def _is_integer(value: Any) -> bool:
    """proto3 JSON takes 5, 5.0, 5e0 and "5" for an int32."""
    if not _is_real(value):
        return False
    number = Decimal(str(value))
    return number == int(number) and -(1 << 31) <= number < 1 << 31


KINDS = {
    "text": Kind(lambda value: isinstance(value, str), "a text"),
    "boolean": Kind(lambda value: isinstance(value, bool), "true or false"),
    "integer": Kind(_is_integer, "a whole number below 2147483648"),
    "share": Kind(_is_share, "a number from 0 to 1"),
    "duration": Kind(_is_duration, 'a text of seconds with an s, like "3.5s"'),
    "life": Kind(_is_life, f'a text of seconds with an s, like "3600s", up to "{MAX_TTL}s"'),
    "time": Kind(_is_moment, 'a time like "2026-01-02T15:04:05Z"'),
    # In proto3 an empty text is none at all.
    "rgb": Kind(_matches("(#[0-9a-fA-F]{6})?"), 'a colour like "#ff8000"'),
    "label": Kind(_matches("[a-zA-Z0-9_.~%-]{0,50}"), "up to 50 letters, digits and -_.~%"),
    "link": Kind(_matches("(?s)(https://.+)?"), "a text that begins with https://"),
    "apple": Kind(_is_for_apple, "a JSON object with an object aps"),
    "object": Kind(lambda value: isinstance(value, dict), "a JSON object"),
    "texts": Kind(lambda value: isinstance(value, dict), "a JSON object of texts"),
    "headers": Kind(_are_headers, "a JSON object of texts in a line each"),
    **{name: Kind(_is_one_of(words), "one of " + ", ".join(words)) for name, words in ENUMS.items()},
}


def camel(name: str) -> str:
    """A field's name in lowerCamelCase."""
    return re.sub("_([a-z0-9])", lambda found: found[1].upper(), name)


def read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its target, in snake_case, without what is null. Raises BadRequest, which names the place, for
    what FCM would refuse.
    """
    for name in TARGETS:
        if name in message:
            raise BadRequest(f"give {name} beside the message, not in it", "message")
    found = _read_object(message, "Message", "message")
    for name, value in found.get("webpush", {}).get("headers", {}).items():
        if name.lower() == "ttl" and not re.fullmatch("[0-9]{1,10}", value):
            raise BadRequest("message.webpush.headers.TTL must be a whole number of seconds, as a text", "message")
    return found


def _read_object(given: Any, kind: str, place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRequest(f"{place} must be a JSON object", "message")
    known = {spelt: name for name in SCHEMA[kind] for spelt in (name, camel(name))}
    found: dict[str, Any] = {}
    for spelt, value in given.items():
        if spelt not in known:
            near = get_close_matches(spelt[:64], known, 1)
            hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(SCHEMA[kind])
            raise BadRequest(f"{place} has an unknown field {spelt[:64]!r}; {hint}", "message")
        name = known[spelt]
        if name in found:
            raise BadRequest(f"{place}.{name} is given twice", "message")
        if value is not None:
            found[name] = _read_value(value, SCHEMA[kind][name], f"{place}.{name}")
    for name in REQUIRED.get(kind, ()):
        if name not in found:
            raise BadRequest(f"{place} needs {name}", "message")
    return found


def _read_value(value: Any, kind: str, place: str) -> Any:
    if kind in SCHEMA:
        return _read_object(value, kind, place)
    if kind.startswith("[]"):
        if not isinstance(value, list):
            raise BadRequest(f"{place} must be a list", "message")
        return [_read_value(part, kind[2:], f"{place}[{number}]") for number, part in enumerate(value)]
    if not KINDS[kind].fits(value):
        raise BadRequest(f"{place} must be {KINDS[kind].must}", "message")
    if kind in ("texts", "headers"):
        for name, part in value.items():
            if not isinstance(part, str):
                raise BadRequest(f"{place}.{name[:64]} must be a text", "message")
    return value
