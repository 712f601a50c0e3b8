"""What a field of the legacy API means on each platform in an FCM v1 message: one table. Pure.

Sources: "Firebase Cloud Messaging HTTP protocol" (the legacy reference), tables 1, 2a to 2c; the reference of
projects.messages; Apple's "Generating a remote notification" and "Sending notification requests to APNs"; RFC 8030 for
TTL and Urgency of Web Push. In the legacy API a field counted wherever the device was; in v1 each platform has its own.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gocm_lib.message import v1_schema
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import weigh
from gocm_lib.message.strict_json import read_json

LONGEST_COLLAPSE_ID = 64  # bytes: APNs refuses a longer apns-collapse-id
NOWHERE = object()  # what a field becomes where it means nothing


class Place(NamedTuple):
    """Where a field goes in a v1 message, and what it becomes there: of its value, and the time now."""

    path: str
    becomes: Callable[[Any, float], Any]


def _same(value: Any, now: float) -> Any:
    return value


def _if_true(value: Any, now: float) -> Any:
    return 1 if value else NOWHERE


def _link(value: Any, now: float) -> Any:
    return value if value.startswith("https://") else NOWHERE  # FCM takes no other


def _collapse_id(value: Any, now: float) -> Any:
    return value if len(value.encode()) <= LONGEST_COLLAPSE_ID else NOWHERE


def _expiration(value: Any, now: float) -> str:
    return str(int(now) + value) if value else "0"  # 0: now or never, for Apple as for the legacy API


ALERT = "apns.payload.aps.alert"
OPTIONS = {
    "collapse_key": (Place("android.collapse_key", _same), Place("apns.headers.apns-collapse-id", _collapse_id)),
    "restricted_package_name": (Place("android.restricted_package_name", _same),),
    "time_to_live": (
        Place("android.ttl", lambda value, now: f"{value}s"),
        Place("apns.headers.apns-expiration", _expiration),
        Place("webpush.headers.TTL", lambda value, now: str(value)),
    ),
    "priority": (
        Place("android.priority", lambda value, now: value.upper()),
        Place("apns.headers.apns-priority", lambda value, now: "10" if value == "high" else "5"),
        Place("webpush.headers.Urgency", _same),
    ),
    "content_available": (Place("apns.payload.aps.content-available", _if_true),),
    "mutable_content": (Place("apns.payload.aps.mutable-content", _if_true),),
}
NOTIFICATION = {
    "title": (Place("notification.title", _same),),
    "body": (Place("notification.body", _same),),
    "image": (Place("notification.image", _same),),
    "subtitle": (Place(f"{ALERT}.subtitle", _same),),
    "icon": (Place("android.notification.icon", _same), Place("webpush.notification.icon", _same)),
    "sound": (Place("android.notification.sound", _same), Place("apns.payload.aps.sound", _same)),
    "badge": (Place("apns.payload.aps.badge", lambda value, now: int(value)),),
    "tag": (Place("android.notification.tag", _same),),
    "color": (Place("android.notification.color", _same),),
    "click_action": (
        Place("android.notification.click_action", _same),
        Place("apns.payload.aps.category", _same),
        Place("webpush.fcm_options.link", _link),
    ),
    "body_loc_key": (Place("android.notification.body_loc_key", _same), Place(f"{ALERT}.loc-key", _same)),
    "body_loc_args": (Place("android.notification.body_loc_args", _same), Place(f"{ALERT}.loc-args", _same)),
    "title_loc_key": (Place("android.notification.title_loc_key", _same), Place(f"{ALERT}.title-loc-key", _same)),
    "title_loc_args": (Place("android.notification.title_loc_args", _same), Place(f"{ALERT}.title-loc-args", _same)),
    "channel_id": (Place("android.notification.channel_id", _same),),
    "android_channel_id": (Place("android.notification.channel_id", _same),),
}


def fill(template: dict[str, Any], options: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A template of a v1 message with what the options mean wherever it leaves that open. `now` is in seconds since
    1970. Raises BadRequest.
    """
    meant: dict[str, Any] = {}
    for name, value in options.items():
        _put(meant, OPTIONS.get(name, ()), value, now)
    notification = options.get("notification", {})
    for name, value in notification.items():
        _put(meant, _places(name), _checked(name, value), now)
    alert = meant.get("apns", {}).get("payload", {}).get("aps", {}).get("alert")
    if alert is not None:  # it stands in the place of the common title and body
        alert |= {name: notification[name] for name in ("title", "body") if name in notification}
    if options.get("content_available") and not notification:
        meant["apns"].setdefault("headers", {})["apns-priority"] = "5"  # Apple takes no other for a silent push
    return _under(template, meant)


# What takes the place of data and notification on a platform, and so may have no more bytes than they.
INSTEAD = ("android.data", "android.notification", "webpush.data", "webpush.notification", "apns.payload")


def weights(message: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The bytes, as Google counts them, of what a v1 message has for one platform alone: each with its place."""
    for path in INSTEAD:
        platform, part = path.split(".")
        if found := message.get(platform, {}).get(part):
            yield f"message.{path}", weigh(found)


def check(notification: Mapping[str, Any]) -> None:
    """Raise BadRequest for a value that a field of the legacy API's notification cannot have, on any platform. Fields
    that are not known are left to the upstream.
    """
    for name in NOTIFICATION.keys() & notification.keys():
        _checked(name, notification[name])


def _places(name: str) -> tuple[Place, ...]:
    if name not in NOTIFICATION:
        raise BadRequest(f"FCM v1 has no notification.{name[:64]}; give a whole message for it", "notification")
    return NOTIFICATION[name]


def _put(meant: dict[str, Any], places: tuple[Place, ...], value: Any, now: float) -> None:
    for path, becomes in places:
        *above, last = path.split(".")
        if (there := becomes(value, now)) is not NOWHERE:
            inner = meant
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = there


def _checked(name: str, value: Any) -> Any:
    """A notification's value. Raises BadRequest."""
    if name in ("body_loc_args", "title_loc_args"):
        return _loc_args(name, value)
    if name == "badge":
        if not re.fullmatch("[0-9]{1,9}", str(value)) or isinstance(value, bool):
            raise BadRequest("notification.badge must be a whole number", "notification")
    elif name == "color" and not v1_schema.KINDS["rgb"].fits(value):
        raise BadRequest(f"notification.color must be {v1_schema.KINDS['rgb'].must}", "notification")
    elif not isinstance(value, str):
        raise BadRequest(f"notification.{name[:64]} must be a text", "notification")
    return value


def _loc_args(name: str, value: Any) -> list[str]:
    """Arguments of a localised text: a list, or, as the legacy API had it, a list written as JSON in a text."""
    if isinstance(value, str):
        value = read_json(value, "notification")
    if not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        raise BadRequest(f"notification.{name} must be a list of texts", "notification")
    return value


def _under(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Both objects merged, field by field; where both have one, the upper one counts. Names of headers are one in any
    case.
    """
    merged = dict(above)
    known = {name.lower(): name for name in above}
    for name, value in below.items():
        given = known.get(name.lower())
        if given is None:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[given], dict):
            merged[given] = _under(merged[given], value)
    return merged
