"""What the sandbox was sent: the last messages, each whole, so that tests can assert on them. Pure.

They are kept as the bytes that came, and become JSON when somebody asks: most are never looked at. Promises to keep no
more than 10,000 of them and 16 MiB; of those that it let go, it tells how many.
"""

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from gocm_lib.front import query
from gocm_lib.front.request import Request
from gocm_lib.message.job import FORM, media_type
from gocm_lib.tools.lines import Ending
from gocm_lib.tools.pretend_answers import Answer

MOST, MOST_BYTES = 10_000, 16 * 1024 * 1024
AROUND = 500  # bytes that an entry takes beside its bodies, about
PAGE = 100  # messages, unless limit= says otherwise
V1_PATH = re.compile(r"/v1/projects/([^/]+)/messages:send")


class Message(NamedTuple):
    """A message as it came, and what became of it."""

    number: int
    at: float  # seconds since the epoch
    path: str
    agent: str
    is_form: bool
    body: bytes
    targets: list[str]
    taken: list[str]  # who has got it, also by a topic
    fate: Ending

    def size(self) -> int:
        answer = len(self.fate.body) if isinstance(self.fate, Answer) else 0
        return AROUND + len(self.body) + answer

    def as_json(self) -> dict[str, Any]:
        v1 = V1_PATH.fullmatch(self.path)
        status, answer = (self.fate.status, _read(self.fate.body)) if isinstance(self.fate, Answer) else (None, None)
        return {
            "n": self.number,
            "at": self.at,
            "protocol": "v1" if v1 else "legacy",
            "project": v1[1] if v1 else "",
            "user_agent": self.agent,
            "verdict": verdict(self.fate, answer),
            "status": status,
            "answer": answer,
            "message": dict(parse_qsl(self.body.decode(errors="replace"), True)) if self.is_form else _read(self.body),
        }


def verdict(fate: Ending, answer: Any) -> str:
    """What became of a message in a word: "taken", "refused", "partly" (of a legacy message's tokens); or one of
    FAILURES, if nothing was answered. `answer` is what its body says.
    """
    if not isinstance(fate, Answer):
        return fate
    if isinstance(answer, str):
        return "refused" if fate.status != 200 or answer.startswith("Error=") else "taken"
    failures = answer.get("failure", int("error" in answer))
    if fate.status != 200 or (failures and not answer.get("success")):
        return "refused"
    return "partly" if failures else "taken"


def _read(body: bytes) -> Any:
    """What JSON says; a text that is none, as it is. An object or a text comes out."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else body.decode(errors="replace")


class Asked(NamedTuple):
    """Which messages somebody asks for; and until so many have come, for how many seconds he waits."""

    token: str = ""
    topic: str = ""
    after: int = 0
    limit: int = PAGE
    wait: int = 0
    enough: int = 1

    def fits(self, message: Message) -> bool:
        if self.token and self.token not in message.targets and self.token not in message.taken:
            return False
        return not self.topic or self.topic in message.targets or f"/topics/{self.topic}" in message.targets


def asked(text: str) -> Asked:
    """What a query string asks for. Raises BadRequest."""
    fields = query.parse(text, {"token", "topic", "after", "limit", "wait", "count"})
    limit = query.number(fields, "limit", 1, MOST) or PAGE
    return Asked(
        fields.get("token", ""),
        fields.get("topic", ""),
        query.number(fields, "after", 0, 2**63 - 1) or 0,
        limit,
        query.wait(fields) or 0,
        query.number(fields, "count", 1, limit) or 1,
    )


class Received:
    """The messages that are kept, numbered from 1 as they came."""

    def __init__(self) -> None:
        self.newest = 0
        self._followers: list[Callable[[Message], None]] = []
        self._kept: deque[Message] = deque()
        self._bytes = 0
        self._let_go = 0

    def add(self, at: float, request: Request, targets: list[str], taken: list[str], fate: Ending) -> None:
        self.newest += 1
        headers = request.headers
        is_form = media_type(headers.get("content-type", "")) == FORM
        agent = headers.get("user-agent", "")
        new = Message(self.newest, at, request.path, agent, is_form, request.body, targets, taken, fate)
        self._kept.append(new)
        self._bytes += new.size()
        for follower in self._followers:
            follower(new)
        while len(self._kept) > MOST or self._bytes > MOST_BYTES:
            self._bytes -= self._kept.popleft().size()
            self._let_go += 1

    def follow(self, follower: Callable[[Message], None]) -> None:
        """From now on show it each message as it comes."""
        self._followers.append(follower)

    def clear(self) -> None:
        """Forget them. Numbers go on, so that whoever goes on `after` one misses none."""
        self._kept.clear()
        self._bytes = self._let_go = 0

    def newer(self, than: int) -> Iterator[Message]:
        """The messages after a number, the newest first."""
        for message in reversed(self._kept):
            if message.number <= than:
                return
            yield message

    def page(self, asked: Asked) -> bytes:
        """The oldest messages that are asked for; "next" is what to come again `after`, if there are more."""
        found = [each for each in self.newer(asked.after) if asked.fits(each)]
        shown = [each.as_json() for each in reversed(found[-asked.limit :])]
        following = shown[-1]["n"] if len(found) > len(shown) else None
        return json.dumps({"messages": shown, "next": following, "let_go": self._let_go}).encode() + b"\n"


class Watch:
    """Somebody who waits for messages, and how he is answered. Looks at each message once."""

    def __init__(self, asked: Asked, answer: Callable[[], None], now: float) -> None:
        self.until = now + asked.wait
        self.answer = answer
        self._asked = asked
        self._seen = asked.after
        self._missing = asked.enough

    def is_over(self, received: Received, now: float) -> bool:
        """Whether to answer now: they are there, or the time is up."""
        self._missing -= sum(self._asked.fits(each) for each in received.newer(self._seen))
        self._seen = max(self._seen, received.newest)
        return self._missing <= 0 or now >= self.until


def soonest(watches: list[Watch]) -> float:
    """When the first of them is to be answered at the latest; infinite: there is none."""
    return min((each.until for each in watches), default=math.inf)
