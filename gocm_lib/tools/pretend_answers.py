"""The bodies that the pretend Google answers with, as its services were seen to send them. Pure.

With their inconsistencies: details come in either order, or are missing, and one error has several texts.
"""

import json
from typing import Any, NamedTuple

from gocm_lib.tools import pretend_schema

PROJECT = "sandbox-project"
PROJECTS = "sandbox-"  # others that are played begin so
FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


class Answer(NamedTuple):
    """An answer: its status, body and headers."""

    status: int
    body: bytes
    content_type: str = "application/json; charset=UTF-8"
    headers: str = ""  # more of them, each line with its end
    reason: str = "Pretend"  # of HTTP/1.1's first line


def error(status: int, word: str, text: str, *details: dict[str, Any]) -> bytes:
    error: dict[str, Any] = {"code": status, "message": text, "status": word}
    if details:
        error["details"] = list(details)
    return json.dumps({"error": error}, indent=2).encode() + b"\n"


def fcm(code: str) -> dict[str, Any]:
    return {"@type": FCM_ERROR, "errorCode": code}


def violation(field: str, text: str) -> dict[str, Any]:
    return {"@type": BAD_REQUEST, "fieldViolations": [{"field": field, "description": text}]}


def refused(violations: list[pretend_schema.Violation], *more: dict[str, Any]) -> Answer:
    """The answer that names all that is wrong with a request."""
    places = [{"field": field, "description": text} if field else {"description": text} for field, text in violations]
    detail = {"@type": BAD_REQUEST, "fieldViolations": places}
    text = "\n".join(text for _, text in violations)
    return Answer(400, error(400, "INVALID_ARGUMENT", text, detail, *more))


_BAD_TOKEN = "The registration token is not a valid FCM registration token"
_NO_SIGN_IN = (
    "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
    "authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project."
)
HTML = "text/html; charset=UTF-8"

# FCM v1's answers by name; where several forms of one were seen, they take turns.
ANSWERS: dict[str, tuple[Answer, ...]] = {
    "unregistered": (
        Answer(404, error(404, "NOT_FOUND", "Requested entity was not found.", fcm("UNREGISTERED"))),
    ),
    "invalid_token": (
        Answer(400, error(400, "INVALID_ARGUMENT", _BAD_TOKEN, fcm("INVALID_ARGUMENT"),
                           violation("message.token", _BAD_TOKEN))),
        Answer(400, error(400, "INVALID_ARGUMENT", "Request contains an invalid argument.",
                           violation("message.token", "Invalid registration token"), fcm("INVALID_ARGUMENT"))),
        Answer(400, error(400, "INVALID_ARGUMENT", _BAD_TOKEN, fcm("INVALID_ARGUMENT"))),
    ),
    "too_big": (
        Answer(400, error(400, "INVALID_ARGUMENT", "Message is too large. The maximum is 4K (4096 bytes).",
                           fcm("INVALID_ARGUMENT"), {"@type": BAD_REQUEST})),
        Answer(400, error(400, "INVALID_ARGUMENT", "Android message is too big", {"@type": BAD_REQUEST},
                           fcm("INVALID_ARGUMENT"))),
        Answer(400, error(400, "INVALID_ARGUMENT", "Request contains an invalid argument.")),
    ),
    "bad_value": (
        Answer(400, error(400, "INVALID_ARGUMENT", "Invalid value at 'message.data[0].value' (TYPE_STRING), 12",
                           violation("message.data[0].value", "Invalid value at 'message.data[0].value', 12"))),
    ),
    "unknown_field": (
        Answer(400, error(400, "INVALID_ARGUMENT", "Invalid JSON payload received. Unknown name at 'message': Cannot "
                           "find field.", violation("message", "Unknown name: Cannot find field."))),
    ),
    "reserved_key": (Answer(400, error(400, "INVALID_ARGUMENT", "Invalid data payload key: from")),),
    "no_target": (
        Answer(400, error(400, "INVALID_ARGUMENT", "Recipient of the message is not set.",
                           violation("message", "Recipient of the message is not set."), fcm("INVALID_ARGUMENT"))),
    ),
    "bad_condition": (Answer(400, error(400, "INVALID_ARGUMENT", "Invalid condition expression provided.")),),
    "sender_mismatch": (
        Answer(403, error(403, "PERMISSION_DENIED", "SenderId mismatch", fcm("SENDER_ID_MISMATCH"))),
    ),
    "permission_denied": (
        Answer(403, error(403, "PERMISSION_DENIED", "Permission 'cloudmessaging.messages.create' denied on resource "
                           "'//cloudresourcemanager.googleapis.com/projects/other' (or it may not exist).")),
    ),
    "expired": (
        Answer(401, error(401, "UNAUTHENTICATED", _NO_SIGN_IN, {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "ACCESS_TOKEN_EXPIRED",
            "domain": "googleapis.com", "metadata": {"service": "fcm.googleapis.com"}})),
    ),
    "third_party": (
        Answer(401, error(401, "UNAUTHENTICATED", _NO_SIGN_IN, fcm("THIRD_PARTY_AUTH_ERROR"), {
            "@type": "type.googleapis.com/google.firebase.fcm.v1.ApnsError", "statusCode": 403,
            "reason": "InvalidProviderToken"})),
    ),
    "quota_project": (
        Answer(429, error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Send requests' and limit 'Send "
                           "requests per minute' of service 'fcm.googleapis.com' for consumer 'project_number:1'.", {
                               "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED",
                               "domain": "googleapis.com"})),
    ),
    "quota_retry_info": (
        Answer(429, error(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", {
            "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1.2s"})),
    ),
    "quota_device": (
        Answer(429, error(429, "RESOURCE_EXHAUSTED", "Quota exceeded.", fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "device:1", "description": "Device message rate exceeded"}]})),
        Answer(429, error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for device.", fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "project:1", "description": "Message rate limit exceeded for device"}]})),
    ),
    "quota_topic": (
        Answer(429, error(429, "RESOURCE_EXHAUSTED", "Topic quota exceeded.", fcm("QUOTA_EXCEEDED"), {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"subject": "project:1", "description": "Topic quota exceeded."}]})),
    ),
    "internal": (Answer(500, error(500, "INTERNAL", "Internal error encountered.", fcm("INTERNAL"))),),
    "unavailable": (
        Answer(503, error(503, "UNAVAILABLE", "The service is currently unavailable.", fcm("UNAVAILABLE"))),
    ),
    "bad_gateway": (Answer(502, b"<title>Error 502</title>Please try again in 30 seconds.", HTML),),
    "not_found_page": (Answer(404, b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>", HTML),),
    "not_found_json": (Answer(404, error(404, "NOT_FOUND", "Requested entity was not found.")),),
}  # fmt: skip
