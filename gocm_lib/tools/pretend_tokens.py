"""The access tokens that the pretend Google gives and takes: its token endpoint and its metadata server. No sockets.

The token endpoint checks what a service account signs as Google does (RFC 7523), and says what is wrong with it.
"""

import json
import re
import time

from gocm_lib.front.request import Request
from gocm_lib.message import assertion
from gocm_lib.message.assertion import Account
from gocm_lib.tools.pretend_answers import HTML, PROJECT, Answer

_FLAVOR = "Metadata-Flavor: Google\r\n"


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
        try:
            asked = assertion.read(found[1].decode() if found else "")
            wrong = assertion.mistake(asked, self._account, self._anybody, here, time.time())
        except ValueError:
            wrong = "Bad Request"
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
