"""What a service account signs to get an access token (RFC 7523), and what is wrong with it, in Google's words. Pure.

For who plays Google's token endpoint: the sandbox, and the server's door under Google's names. Checking a signature
takes cryptography.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"  # the grant_type, which google-auth and all SDKs use
# Google takes each name that its endpoint has had; the SDKs for Go and Java sign for the account's own token_uri.
AUDIENCES = (
    "https://oauth2.googleapis.com/token",
    "https://accounts.google.com/o/oauth2/token",
    "https://www.googleapis.com/oauth2/v3/token",
    "https://www.googleapis.com/oauth2/v4/token",
)
LEEWAY, LONGEST = 60, 3600  # seconds
_TIME = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp "
    "values in the JWT claim."
)


class Account(NamedTuple):
    """A service account: what its file says, and the key that checks its signatures."""

    email: str
    token_uri: str
    key: Any


class Assertion(NamedTuple):
    """A JWT that asks for a token. Times in seconds since 1970."""

    algorithm: str
    issuer: str
    audience: str
    issued: float
    ends: float
    signed: bytes
    signature: bytes


def read(text: str) -> Assertion:
    """Take a JWT apart. Raises ValueError."""
    try:
        head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in text.split("."))
        algorithm, said = json.loads(head)["alg"], json.loads(claims)
        issued, ends = float(said["iat"]), float(said["exp"])
        found = Assertion(
            algorithm, said["iss"], said["aud"], issued, ends, text.rpartition(".")[0].encode(), signature
        )
    except (KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("no assertion") from None
    if not (isinstance(found.issuer, str) and isinstance(found.audience, str)):
        raise ValueError("no assertion")
    return found


def mistake(found: Assertion, account: Account | None, anybody: bool, here: str, now: float) -> str:
    """What is wrong with an assertion, in Google's words; "": nothing. `account` is the one that may ask, None: none;
    with `anybody` any may. `here`: this endpoint's address, without its scheme.
    """
    known = account if account and found.issuer == account.email else None
    if not (known or anybody):
        return "Invalid grant: account not found"
    if found.algorithm != "RS256" or (known and not _is_signed(found, known)):
        return "Invalid JWT Signature."
    good = [*AUDIENCES, *([f"http:{here}", f"https:{here}"] if here else []), *([known.token_uri] if known else [])]
    if found.audience not in good:
        return f"Invalid JWT: Failed audience check. The right audience is {AUDIENCES[0]}"
    return "" if found.issued - LEEWAY <= now <= found.ends <= found.issued + LONGEST else _TIME


def _is_signed(found: Assertion, account: Account) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    try:
        account.key.verify(found.signature, found.signed, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def read_account(file: Mapping[str, Any]) -> Account:
    """The account of a service account's file. Raises KeyError, ValueError, TypeError; ImportError without
    cryptography.
    """
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(file["private_key"].encode(), None)
    return Account(file["client_email"], file["token_uri"], private.public_key())
