"""The pretend Google's topics: who is in them, and the two APIs by which SDKs change that. No sockets.

`/iid/v1:batchAdd` and `:batchRemove` take up to 1,000 tokens at once; newer SDKs make, read and delete one resource for
each: `projects/P/registrations/TOKEN/topicSubscriptions/TOPIC` of FCM v1's discovery document.
"""

import json
import re
import time
from collections import defaultdict
from urllib.parse import parse_qs, unquote

from gocm_lib.front.request import Request
from gocm_lib.tools.pretend_answers import ANSWERS, PROJECT, Answer, error, fcm

MOST = 1000  # tokens in a call
IID = {"/iid/v1:batchAdd": True, "/iid/v1:batchRemove": False}  # and whether they subscribe
_RESOURCE = re.compile(r"/v1/projects/([^/]+)/registrations/([^/]+)/topicSubscriptions(?:/([^/]+))?")
_TOPIC = re.compile("[a-zA-Z0-9_.~%-]{1,900}")
_TERM = re.compile(r"'([^'\s]*)'\s+in\s+topics|(&&|\|\||[!()])")
LONGEST, DEEPEST = 8192, 64  # characters, and signs: what is longer is nobody's condition


class Topics:
    """Which tokens are in which topics."""

    def __init__(self) -> None:
        self.members: defaultdict[str, dict[str, str]] = defaultdict(dict)  # and since when

    def batch(self, request: Request) -> Answer:
        """The answer to one of the IID calls: for each token {}, or an error word."""
        try:
            body = json.loads(request.body)
            topic, tokens = str(body["to"]).removeprefix("/topics/"), body["registration_tokens"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Answer(400, b'{"error":"InvalidArgument"}')
        good = isinstance(tokens, list) and 1 <= len(tokens) <= MOST and all(isinstance(each, str) for each in tokens)
        if not good or not _TOPIC.fullmatch(topic):
            return Answer(400, b'{"error":"InvalidArgument"}')
        adds, results = IID[request.path], []
        for token in tokens:
            word = _no_member(token)
            if not word and adds:
                self._add(topic, token)
            elif not word:
                self.members[topic].pop(token, None)
            results.append({"error": word} if word else {})
        return Answer(200, json.dumps({"results": results}).encode())

    def resource(self, request: Request) -> Answer:
        """The answer to a call about one subscription."""
        found = _RESOURCE.fullmatch(request.path)
        assert found
        project, token, topic = (unquote(part or "") for part in found.groups())
        query = {name: values[-1] for name, values in parse_qs(request.query).items()}
        if project != PROJECT:
            return ANSWERS["permission_denied"][0]
        if word := _no_member(token):
            return ANSWERS["unregistered" if word == "NOT_FOUND" else "invalid_token"][0]
        if request.method == "GET" and not topic:
            mine = [self._shown(token, name) for name, members in sorted(self.members.items()) if token in members]
            return Answer(200, json.dumps({"topicSubscriptions": mine}).encode())
        if (topic and not _TOPIC.fullmatch(topic)) or (not topic and request.method != "POST"):
            return Answer(400, error(400, "INVALID_ARGUMENT", "Invalid topic name.", fcm("INVALID_ARGUMENT")))
        if request.method == "POST" and not topic:
            return self._create(token, query.get("topic_name", query.get("topicName", "")))
        return self._one(request.method, token, topic, query.get("allow_missing", query.get("allowMissing")) == "true")

    def _create(self, token: str, topic: str) -> Answer:
        if not _TOPIC.fullmatch(topic):
            return Answer(400, error(400, "INVALID_ARGUMENT", "Invalid topic name.", fcm("INVALID_ARGUMENT")))
        if token in self.members[topic]:
            return Answer(409, error(409, "ALREADY_EXISTS", "Topic subscription already exists."))
        self._add(topic, token)
        return Answer(200, json.dumps(self._shown(token, topic)).encode())

    def _one(self, method: str, token: str, topic: str, may_miss: bool) -> Answer:
        there = token in self.members[topic]
        if not there and not (may_miss and method in ("DELETE", "PATCH")):
            return Answer(404, error(404, "NOT_FOUND", "Topic subscription not found."))
        if method == "DELETE":
            self.members[topic].pop(token, None)
            return Answer(200, b"{}")
        if method == "PATCH" and not there:
            self._add(topic, token)
        if method not in ("GET", "PATCH"):
            return Answer(405, error(405, "INVALID_ARGUMENT", "Method not allowed."))
        return Answer(200, json.dumps(self._shown(token, topic)).encode())

    def _add(self, topic: str, token: str) -> None:
        self.members[topic].setdefault(token, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _shown(self, token: str, topic: str) -> dict[str, str]:
        name = f"projects/{PROJECT}/registrations/{token}/topicSubscriptions/{topic}"
        return {"name": name, "topicName": topic, "createTime": self.members[topic].get(token, "")}

    def receivers(self, kind: str, target: str) -> list[str]:
        """The tokens that a message to a topic or condition reaches. A condition that makes no sense reaches none."""
        if kind == "topic":
            return list(self.members.get(target, ()))
        terms = (_terms(target) if self.understands(target) else None) or []
        everybody = {token for members in self.members.values() for token in members} if terms else set()
        return sorted(token for token in everybody if self._any_of(token, terms.copy()))

    def understands(self, condition: str) -> bool:
        """Whether a condition makes sense."""
        terms = _terms(condition)
        try:
            self._any_of("", terms or [])
        except IndexError:  # it ends too early
            return False
        return terms == []

    def _any_of(self, token: str, terms: list[str]) -> bool:
        """The value of what stands between ||, taken off the terms; && binds closer, ! closest."""
        value = self._all_of(token, terms)
        while terms and terms[0] == "||":
            del terms[0]
            value = self._all_of(token, terms) or value
        return value

    def _all_of(self, token: str, terms: list[str]) -> bool:
        value = self._single(token, terms)
        while terms and terms[0] == "&&":
            del terms[0]
            value = self._single(token, terms) and value
        return value

    def _single(self, token: str, terms: list[str]) -> bool:
        first = terms.pop(0)
        if first == "!":
            return not self._single(token, terms)
        if first != "(":
            if first[:1] != "'":
                raise IndexError
            return token in self.members.get(first[1:], ())
        value = self._any_of(token, terms)
        if terms.pop(0) != ")":
            raise IndexError
        return value


def _terms(condition: str) -> list[str] | None:
    """The topics, operators and parentheses of a condition; None: it is none, or one that nests too deep for us."""
    if len(condition) > LONGEST or _TERM.sub("", condition).strip():
        return None
    terms = [sign or "'" + topic for topic, sign in _TERM.findall(condition)]
    return terms if terms.count("(") + terms.count("!") <= DEEPEST else None


def _no_member(token: str) -> str:
    """The error word for a token that cannot be in a topic; "": it can."""
    if token.startswith("gone-"):
        return "NOT_FOUND"
    return "INVALID_ARGUMENT" if token.startswith(("invalid-", "mismatch-")) or not token else ""


def is_about(request: Request) -> bool:
    """Whether a request is about topics."""
    return (request.method == "POST" and request.path in IID) or _RESOURCE.fullmatch(request.path) is not None


def answer(topics: Topics, request: Request) -> Answer:
    """The answer to a request that is about topics."""
    return topics.batch(request) if request.path in IID else topics.resource(request)
