"""The pretend Google's device groups, of the legacy API: several tokens under one notification key. No sockets.

Source: "Send messages to device groups", the legacy protocol's form. `.../notification` makes, changes and reads one.
"""

import json
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from gocm_lib.front.request import Request
from gocm_lib.tools.pretend_answers import Answer

MOST = 20  # devices in a group


class _Group(NamedTuple):
    name: str
    tokens: list[str]


class Groups:
    """The groups by their notification keys."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def members(self, key: Any) -> list[str] | None:
        """The tokens of a group; None: there is no such group."""
        return self._groups[key].tokens if isinstance(key, str) and key in self._groups else None

    def answer(self, request: Request) -> Answer:
        """The answer to a call that makes, changes or reads a group."""
        if request.method == "GET":
            [name] = parse_qs(request.query).get("notification_key_name", [""])[-1:]
            key = self._key_of(name)
            return _told({"notification_key": key}) if key else _told({"error": "notification_key not found"}, 400)
        try:
            body = json.loads(request.body)
            tokens, name = body["registration_ids"], body.get("notification_key_name", "")
            texts = isinstance(tokens, list) and all(isinstance(each, str) for each in (name, *tokens))
            if not texts:
                return _told({"error": "BadJsonFormat"}, 400)
            if len(tokens) > MOST:
                return _told({"error": "too many registration ids"}, 400)
            return self._change(body.get("operation"), name, body, tokens)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return _told({"error": "BadJsonFormat"}, 400)

    def _change(self, operation: object, name: str, body: dict[str, Any], tokens: list[str]) -> Answer:
        if not tokens:
            return _told({"error": "no valid registration ids"}, 400)
        if operation == "create":
            if not name or self._key_of(name):
                return _told({"error": "notification_key already exists" if name else "invalid name"}, 400)
            key = f"group-{len(self._groups) + 1}"
            self._groups[key] = _Group(name, tokens)
            return _told({"notification_key": key})
        key = body.get("notification_key", "")
        group = self._groups.get(key)
        if group is None:
            return _told({"error": "notification_key not found"}, 400)
        if operation == "add":
            group.tokens.extend(token for token in tokens if token not in group.tokens)
            del group.tokens[MOST:]
        elif operation == "remove":
            group.tokens[:] = [token for token in group.tokens if token not in tokens]
            if not group.tokens:
                del self._groups[key]
        else:
            return _told({"error": "unknown operation"}, 400)
        return _told({"notification_key": key})

    def _key_of(self, name: str) -> str:
        return next((key for key, group in self._groups.items() if group.name == name), "")


def _told(body: dict[str, str], status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode())
