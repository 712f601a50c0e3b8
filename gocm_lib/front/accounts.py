"""Who may send under Google's names: whose service account an upstream here uses. They get a token of ours for it.

The token is made of the account's own key, and nothing of it is kept: it is good after a restart and at every node with
that account's file, and ends with the file. Pure, but for reading the files.
"""

import hmac
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.config.upstreams import described
from gocm_lib.front.auth import Grant
from gocm_lib.message import assertion
from gocm_lib.message.assertion import Account
from gocm_lib.message.bad_request import BadRequest

LIFE = 3600  # seconds, as Google's tokens have
MAY = frozenset({"send", "topics"})
_BEARER = re.compile("gocm_([0-9a-f]{16})_([0-9]{10})_([0-9a-f]{64})")


class Sender(NamedTuple):
    """A service account, the upstreams that use it, and the secret by which its tokens are made."""

    account: Account
    upstreams: tuple[str, ...]
    secret: bytes


Senders = Mapping[str, Sender]  # by a digest of the account's name and key


def read(settings: Settings) -> Senders:
    """The accounts of these settings' upstreams. Raises Fatal."""
    found: dict[str, Sender] = {}
    for name, upstream in described(settings).items():
        if not upstream.credentials:
            continue
        try:
            with open(upstream.credentials) as file:
                said = json.load(file)
            if said["type"] != "service_account":
                continue
            account = assertion.read_account(said)
        except ImportError:
            raise Fatal("--door-google needs cryptography: pip install 'gocm[fcm]'", Exit.SENDER) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Fatal(f"upstream {name}: the account in {upstream.credentials} cannot be read", Exit.SENDER) from None
        # While its key is replaced an account has two.
        secret = hmac.digest(said["private_key"].encode(), b"tokens of --door-google", "sha256")
        key = hmac.digest(secret, account.email.encode(), "sha256").hex()[:16]
        upstreams = (*(found[key].upstreams if key in found else ()), name)
        found[key] = Sender(account, upstreams, secret)
    return found


def give(senders: Senders, text: str, now: float) -> str:
    """A token for who has signed this assertion. Raises BadRequest, in Google's words."""
    try:
        found = assertion.read(text)
    except ValueError:
        raise BadRequest("Bad Request") from None
    wrong = "Invalid grant: account not found"
    for name, sender in senders.items():
        if sender.account.email != found.issuer:
            continue
        if not (wrong := assertion.mistake(found, sender.account, False, "", now)):
            until = f"{int(now) + LIFE:010d}"
            return f"gocm_{name}_{until}_{_sign(sender, name, until)}"
    raise BadRequest(wrong)


def _sign(sender: Sender, name: str, until: str) -> str:
    return hmac.digest(sender.secret, f"{name} {until}".encode(), "sha256").hex()


def grant(senders: Senders, token: str, now: float) -> Grant | None:
    """What a token of ours is good for; None: it is none, or its time is over."""
    given = _BEARER.fullmatch(token)
    sender = senders.get(given[1]) if given else None
    if not given or not sender or not hmac.compare_digest(_sign(sender, given[1], given[2]), given[3]):
        return None
    if now >= int(given[2]):
        return None
    return Grant(b"", sender.account.email, MAY, float(given[2]), sender.upstreams)
