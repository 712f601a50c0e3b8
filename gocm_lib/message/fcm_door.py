"""What a client of FCM HTTP v1 asks for, and what it is answered, in Google's forms. Pure.

The reverse of module fcm: there we ask Google, here somebody asks us as if we were it. What is read is the body of
projects.messages.send; errors have the form of google.rpc.Status with FCM's own word in it, which Google's SDKs read
(firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode).
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from gocm_lib.message import assertion
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import TARGETS
from gocm_lib.message.strict_json import read_json

JSON = "application/json; charset=UTF-8"
_FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
# google.rpc.Code's words for HTTP's numbers.
STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
OURS = (413, 415, 422)  # that Google does not tell from 400


class Fault(NamedTuple):
    """How a failure is told: HTTP's number, and FCM's own word ("": it has none)."""

    code: int
    word: str


# For each of outcome.FAILURES. What is none of these was given up by us, not by Google.
FAULTS = {
    "unregistered": Fault(404, "UNREGISTERED"),
    "invalid_token": Fault(400, "INVALID_ARGUMENT"),
    "bad_message": Fault(400, "INVALID_ARGUMENT"),
    "rejected": Fault(400, "INVALID_ARGUMENT"),
    "wrong_sender": Fault(403, "SENDER_ID_MISMATCH"),
    "third_party_auth": Fault(401, "THIRD_PARTY_AUTH_ERROR"),
}
GIVEN_UP = Fault(500, "INTERNAL")


def read(body: bytes) -> dict[str, Any]:
    """What a request asks for, as the fields of our own API. Raises BadRequest."""
    try:
        found = read_json(body.decode(), "")
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    if not isinstance(found, dict) or not isinstance(found.get("message"), dict):
        raise BadRequest('Invalid JSON payload received: {"message": {...}} is expected', "message")
    for name in found.keys() - {"message", "validate_only", "validateOnly"}:
        raise BadRequest("Invalid JSON payload received. Unknown name: Cannot find field.", name[:64])
    dry_run = found.get("validate_only", found.get("validateOnly", False))
    if not isinstance(dry_run, bool):
        raise BadRequest("must be true or false", "validate_only")
    message = dict(found["message"])
    targets = {field: message.pop(name) for field, name in TARGETS.items() if name in message}
    if len(targets) != 1:
        raise BadRequest("Recipient of the message is not set, or there are several.", "message")
    [(field, value)] = targets.items()
    if field == "topic" and isinstance(value, str):
        value = value.removeprefix("/topics/")
    fields: dict[str, Any] = {field: [value] if field in ("tokens", "fid") else value, "message": message}
    return fields | ({"dry_run": True} if dry_run else {})


def error(code: int, message: str, word: str = "") -> bytes:
    """An error in Google's form: HTTP's number, a text, FCM's own word if it has one."""
    told: dict[str, Any] = {"code": code, "message": message, "status": STATUSES.get(code, "INVALID_ARGUMENT")}
    if word:
        told["details"] = [{"@type": _FCM_ERROR, "errorCode": word}]
    return json.dumps({"error": told}).encode() + b"\n"


def refusal(problem: BadRequest) -> tuple[int, bytes]:
    """The answer to a request that is refused: its status and body. What is wrong with the message is an
    INVALID_ARGUMENT, whatever number we have for it.
    """
    code = 400 if problem.status in OURS else problem.status
    message = f"{problem.field}: {problem.error}" if problem.field else problem.error
    return code, error(code, message, "INVALID_ARGUMENT" if code == 400 else "")


def sent(project: str, job: str, receipt: str) -> bytes:
    """The answer for a message that was taken: by Google, with its id, or ("") by us, as this job."""
    return json.dumps({"name": receipt or f"projects/{project}/messages/{job}"}).encode() + b"\n"


def failed(failure: str, detail: str) -> tuple[int, bytes]:
    """The answer for a message that failed, for one of outcome.FAILURES: its status and body."""
    code, word = FAULTS.get(failure, GIVEN_UP)
    return code, error(code, detail or failure, word)


def secret(form: Mapping[str, str]) -> str:
    """The auth token in a request for an access token: in a service account's file of ours it is the key's id, which
    the assertion names. Raises BadRequest.
    """
    if form.get("grant_type") != assertion.GRANT:
        raise BadRequest("unsupported_grant_type")
    head = form.get("assertion", "").partition(".")[0]
    try:
        named = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))["kid"]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        named = None
    if not isinstance(named, str) or not named.isascii():
        raise BadRequest("invalid_grant")
    return named
