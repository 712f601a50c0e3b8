"""What Google's front end says of a request's JSON for FCM v1, by the pretend Google's own reading of the schema. Pure.

It shares nothing with the product's reading (it imports no dialect), so that a mistake there is met here. The texts are
those that Google was seen to send: an unknown name, or a value of another type, each a violation with its place.
"""

import re
from typing import Any

# As in google/firebase/fcm/v1/message.proto: type and name of each field, * after a type for a repeated one.
_PROTO = """
SendMessageRequest: bool validate_only, Message message
Message: string name, string token, string topic, string condition, string fid, map data, Notification notification,
  AndroidConfig android, AndroidConfigV2 android_v2, WebpushConfig webpush, ApnsConfig apns, FcmOptions fcm_options
Notification: string title, string body, string image
FcmOptions: string analytics_label
AndroidFcmOptions: string analytics_label
ApnsFcmOptions: string analytics_label, string image
WebpushFcmOptions: string link, string analytics_label
AndroidConfig: string collapse_key, AndroidMessagePriority priority, Duration ttl, string restricted_package_name,
  map data, AndroidNotification notification, AndroidFcmOptions fcm_options, bool direct_boot_ok,
  bool bandwidth_constrained_ok, bool restricted_satellite_ok
AndroidConfigV2: string collapse_key, Duration ttl, string restricted_package_name, map data,
  AndroidFcmOptions fcm_options, bool direct_boot_ok, bool bandwidth_constrained_ok, bool restricted_satellite_ok,
  AndroidRemoteNotification remote_notification, AndroidBackgroundSyncMessage background_sync
AndroidBackgroundSyncMessage:
AndroidRemoteNotification: AndroidNotificationV2 notification, bool mutable_content, bool use_as_v1_data_message
AndroidNotification: string title, string body, string icon, string color, string sound, string tag,
  string click_action, string body_loc_key, string* body_loc_args, string title_loc_key, string* title_loc_args,
  string channel_id, string ticker, bool sticky, Timestamp event_time, bool local_only,
  NotificationPriority notification_priority, bool default_sound, bool default_vibrate_timings,
  bool default_light_settings, Duration* vibrate_timings, Visibility visibility, int32 notification_count,
  LightSettings light_settings, string image, bool bypass_proxy_notification, Proxy proxy
AndroidNotificationV2: string title, string body, string icon, string color, string sound, string tag, int32 id,
  string click_action, string body_loc_key, string* body_loc_args, string title_loc_key, string* title_loc_args,
  string channel_id, string ticker, bool sticky, Timestamp event_time, bool local_only,
  NotificationPriority notification_priority, bool default_sound, bool default_vibrate_timings,
  bool default_light_settings, Duration* vibrate_timings, Visibility visibility, int32 notification_count,
  LightSettings light_settings, string image
LightSettings: Color color, Duration light_on_duration, Duration light_off_duration
Color: float red, float green, float blue, float alpha
WebpushConfig: map headers, map data, Struct notification, WebpushFcmOptions fcm_options
ApnsConfig: map headers, Struct payload, ApnsFcmOptions fcm_options, string live_activity_token
"""
_ENUMS = {
    "AndroidMessagePriority": "NORMAL HIGH",
    "NotificationPriority": "PRIORITY_UNSPECIFIED PRIORITY_MIN PRIORITY_LOW PRIORITY_DEFAULT PRIORITY_HIGH "
    "PRIORITY_MAX",
    "Visibility": "VISIBILITY_UNSPECIFIED PRIVATE PUBLIC SECRET",
    "Proxy": "PROXY_UNSPECIFIED ALLOW DENY IF_PRIORITY_LOWERED",
}
_SCALARS = {"string": "TYPE_STRING", "bool": "TYPE_BOOL", "int32": "TYPE_INT32", "float": "TYPE_FLOAT"}
_SCALARS |= {name: f"type.googleapis.com/google.protobuf.{name}" for name in ("Duration", "Timestamp", "Struct")}
_PACKAGE = "type.googleapis.com/google.firebase.fcm.v1."

Violation = tuple[str, str]  # the field, and what is wrong with it


def _types() -> dict[str, dict[str, str]]:
    """By type the type of each field, under both spellings that proto3 JSON has."""
    types: dict[str, dict[str, str]] = {}
    for line in re.sub(r"\n  ", " ", _PROTO.strip()).split("\n"):
        name, _, body = line.partition(":")
        fields = [field.split() for field in body.split(",") if field.strip()]
        types[name] = {field: kind for kind, field in fields}
        types[name] |= {re.sub("_(.)", lambda found: found[1].upper(), field): kind for kind, field in fields}
    return types


TYPES = _types()


def violations(value: Any, kind: str = "SendMessageRequest", place: str = "") -> list[Violation]:
    """All that is wrong with an object of a type; `place` is where it stands."""
    found: list[Violation] = []
    for name, part in value.items():
        here = f"{place}.{name}" if place else name
        if (its_kind := TYPES[kind].get(name)) is None:
            where = f" at '{place}'" if place else ""
            text = f'Invalid JSON payload received. Unknown name "{name}"{where}: Cannot find field.'
            found.append((place, text))
        elif part is not None:
            found += _of_field(part, its_kind, here)
    return found


def _of_field(value: Any, kind: str, place: str) -> list[Violation]:
    if kind.endswith("*"):
        if not isinstance(value, list):
            return [(place, f"Invalid value at '{place}' ({_type_name(kind[:-1])}), {_shown(value)}")]
        return [wrong for n, part in enumerate(value) for wrong in _of_field(part, kind[:-1], f"{place}[{n}]")]
    if kind == "map" and isinstance(value, dict):
        parts = enumerate(value.values())
        return [wrong for n, part in parts for wrong in _of_field(part, "string", f"{place}[{n}].value")]
    if kind in TYPES and isinstance(value, dict):
        return violations(value, kind, place)
    if _is_a(value, kind):
        return []
    return [(place, f"Invalid value at '{place}' ({_type_name(kind)}), {_shown(value)}")]


def _type_name(kind: str) -> str:
    if kind == "map":
        return "TYPE_MESSAGE"
    return _SCALARS.get(kind) or _PACKAGE + kind


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _is_a(value: Any, kind: str) -> bool:
    """Whether a JSON value is one of a scalar, an enum or a well-known type."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match kind:
        case "string":
            return isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "Struct":
            return isinstance(value, dict)
        case "Duration":
            return isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d{1,9})?s", value, re.ASCII) is not None
        case "Timestamp":
            return isinstance(value, str) and re.fullmatch(_RFC3339, value, re.ASCII) is not None
        case "float" | "int32":
            number = _as_number(value) if isinstance(value, str) else value if is_number else None
            whole = kind == "float" or (number is not None and number == number // 1 and abs(number) < 2**31)
            return number is not None and whole
    words = _ENUMS.get(kind, "").split()
    if isinstance(value, str):
        return value.isascii() and value.upper() in words
    return is_number and value in range(len(words))


_RFC3339 = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)"


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def what_it_means(message: dict[str, Any]) -> list[Violation]:
    """What FCM itself says of a message whose types are right: values that it cannot use."""
    found: list[Violation] = []
    android = _part(message, "android")
    if {"android", "android_v2"} <= set(message) or {"android", "androidV2"} <= set(message):
        found.append(("message.android", "Only one of android and android_v2 may be set."))
    if (ttl := android.get("ttl")) and not 0 <= float(ttl[:-1]) <= 28 * 86400:
        found.append(("message.android.ttl", "Invalid TTL: it must be between 0 and 2419200 seconds."))
    for name in ("ttl", "TTL"):
        ttl = _part(_part(message, "webpush"), "headers").get(name)
        if ttl is not None and not ttl.isdigit():
            found.append((f"message.webpush.headers.{name}", "TTL must be a non-negative integer."))
    color = _part(android, "notification").get("color")
    if color and not re.fullmatch("#[0-9a-fA-F]{6}", color):
        found.append(("message.android.notification.color", "Invalid color: it must be in the form #rrggbb."))
    web = _part(message, "webpush")
    link = (_part(web, "fcm_options") or _part(web, "fcmOptions")).get("link")
    if link and not link.startswith("https://"):
        found.append(("message.webpush.fcm_options.link", "The link must be an HTTPS URL."))
    payload = _part(message, "apns").get("payload")
    if payload is not None and not isinstance(payload.get("aps"), dict):
        text = "Payload of Apple Push Notification Service must contain an [aps] key."
        found.append(("message.apns.payload", text))
    return [*found, *_out_of_range(_part(android, "notification"))]


def _out_of_range(shown: dict[str, Any]) -> list[Violation]:
    """What is wrong with the parts of an Android notification that have limits of their own."""
    place = "message.android.notification"
    found = [
        (f"{place}.{name}", "Duration out of range.")
        for name in ("vibrate_timings", "vibrateTimings")
        if any(not 0 <= float(each[:-1]) <= 315_576_000_000 for each in _part(shown, name))
    ]
    lights = _part(shown, "light_settings") or _part(shown, "lightSettings")
    parts = [(name, _part(lights, name)) for name in ("color", "light_on_duration", "light_off_duration")]
    if "light_settings" in shown or "lightSettings" in shown:
        other = {"color": "color", "light_on_duration": "lightOnDuration", "light_off_duration": "lightOffDuration"}
        for name, value in parts:
            if not (value or _part(lights, other[name])):
                found.append((f"{place}.light_settings.{name}", f"{name} is required."))
    if any(not 0 <= float(each) <= 1 for each in _part(lights, "color").values()):
        found.append((f"{place}.light_settings.color", "A color's parts are from 0 to 1."))
    return found


def _part(of: dict[str, Any], name: str) -> dict[str, Any]:
    return of.get(name) or {}
