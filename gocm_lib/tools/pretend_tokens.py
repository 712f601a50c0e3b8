"""The access tokens that the pretend Google gives and takes: its token endpoint and its metadata server. No sockets.

The token endpoint checks what a service account signs as Google does (RFC 7523), and says what is wrong with it.
"""

import base64
import json
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from gocm_lib.front.request import Request
from gocm_lib.tools.pretend_answers import HTML, PROJECT, Answer

# Google takes each name that its endpoint has had; the SDKs for Go and Java sign for the account's own token_uri.
AUDIENCES = (
    "https://oauth2.googleapis.com/token",
    "https://accounts.google.com/o/oauth2/token",
    "https://www.googleapis.com/oauth2/v3/token",
    "https://www.googleapis.com/oauth2/v4/token",
)
LEEWAY, LONGEST = 60, 3600  # seconds
_FLAVOR = "Metadata-Flavor: Google\r\n"
_TIME = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp "
    "values in the JWT claim."
)


class Account(NamedTuple):
    """A service account that may have access tokens: what its file says, and the key that checks its signatures."""

    email: str
    token_uri: str
    key: Any


class Tokens:
    """The access tokens that are good. `account`: None for none. `anybody`: whatever is given as a token is one, and
    any account may have one.
    """

    def __init__(self, account: Account | None, anybody: bool) -> None:
        self._account = account
        self._anybody = anybody
        self._good_until: dict[str, float] = {}
        self._given = 0

    def revoke(self) -> None:
        """Refuse all that were given so far."""
        self._good_until.clear()

    def takes(self, authorization: str) -> bool:
        """Whether a header has a good token."""
        kind, _, token = authorization.partition(" ")
        if kind != "Bearer" or not token:
            return False
        return self._anybody or self._good_until.get(token, 0.0) >= time.time()

    def oauth(self, request: Request, life: int, status: int) -> Answer:
        """The token endpoint's answer: a token good for `life` seconds, or a failure of its own with another status."""
        if status != 200:
            return Answer(status, b"<TITLE>pretend failure</TITLE>", HTML)
        found = re.search(rb"(?:^|&)assertion=([\w.%-]+)", request.body)
        here = f"//{request.headers.get('host', '')}/token"
        wrong = _mistake(found[1].decode() if found else "", self._account, self._anybody, here, time.time())
        if wrong:
            return Answer(400, json.dumps({"error": "invalid_grant", "error_description": wrong}).encode())
        return self._give(life)

    def metadata(self, request: Request, life: int, status: int) -> Answer:
        """The same of the metadata server, which also knows the project."""
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(403, b"Missing Metadata-Flavor:Google header.", "text/plain")
        if status != 200:
            return Answer(status, b"pretend failure", "text/plain")
        if request.path.endswith("/project/project-id"):
            return Answer(200, PROJECT.encode(), "application/text", _FLAVOR)
        if request.path.endswith("/token"):
            return self._give(life)._replace(headers=_FLAVOR)
        return Answer(404, b"not found", "text/plain")

    def _give(self, life: int) -> Answer:
        self._given += 1
        token = f"pretend-{self._given}"
        self._good_until[token] = time.time() + life
        return Answer(200, json.dumps({"access_token": token, "expires_in": life, "token_type": "Bearer"}).encode())


def _mistake(assertion: str, account: Account | None, anybody: bool, here: str, now: float) -> str:
    """What is wrong with a JWT that asks for a token, in Google's words; "": nothing. `here`: this endpoint's address,
    without its scheme.
    """
    try:
        head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in assertion.split("."))
        algorithm, said = json.loads(head)["alg"], json.loads(claims)
        issuer, audience, issued, ends = said["iss"], said["aud"], float(said["iat"]), float(said["exp"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "Bad Request"
    known = account if account and issuer == account.email else None
    if not (known or anybody):
        return "Invalid grant: account not found"
    if algorithm != "RS256" or (known and not _is_signed(known, assertion, signature)):
        return "Invalid JWT Signature."
    if audience not in (*AUDIENCES, known.token_uri if known else "") and audience not in (
        "http:" + here,
        "https:" + here,
    ):
        return f"Invalid JWT: Failed audience check. The right audience is {AUDIENCES[0]}"
    return "" if issued - LEEWAY <= now <= ends <= issued + LONGEST else _TIME


def _is_signed(account: Account, assertion: str, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    try:
        account.key.verify(signature, assertion.rpartition(".")[0].encode(), padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def read_account(file: Mapping[str, Any], key: Any) -> Account:
    """The account of a service account's file. Raises KeyError."""
    return Account(file["client_email"], file["token_uri"], key)
