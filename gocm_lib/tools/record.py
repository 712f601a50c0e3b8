"""What the sandbox was sent in a whole run, whatever resets came between: counted, and kept in a file if asked for."""

import json
from collections import Counter
from typing import IO, Any

from gocm_lib.process import log
from gocm_lib.tools.pretend_answers import Answer
from gocm_lib.tools.received import Message

MOST_KINDS = 100  # of refusals and of hosts


class Record:
    """The messages of a run. `file` gets each of them, a line of JSON, as it comes."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file
        self._messages = 0
        self._targets = 0
        self._refused: Counter[str] = Counter()
        self._hosts: Counter[str] = Counter()

    def take(self, message: Message) -> None:
        self._messages += 1
        self._targets += len(message.targets)
        for kind, count in refusals(message).items():
            self._refused[kind if len(self._refused) < MOST_KINDS else "others"] += count
        if self._file:
            try:
                self._file.write(json.dumps(message.as_json()).encode() + b"\n")
                self._file.flush()
            except OSError as error:
                log.logger.error("what is received is not kept any more: %s", error.strerror)
                self._file = None

    def refuse_host(self, host: str) -> None:
        """Somebody wanted to be led to a host that is not Google's."""
        self._hosts[host if len(self._hosts) < MOST_KINDS else "others"] += 1

    def summary(self) -> str:
        """All of it in a line."""
        whom = "token or topic" if self._targets == 1 else "tokens or topics"
        line = f"{_many(self._messages, 'message')} to {self._targets} {whom}, {self._refused.total()} refused"
        line += _parts(self._refused)
        if self._hosts:
            count = _many(self._hosts.total(), "connection")
            line += f"; {count} to other hosts refused{_parts(self._hosts)}: --pass lets them through"
        return line


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _parts(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {kind}' for kind, count in counts.most_common())})" if counts else ""


def refusals(message: Message) -> Counter[str]:
    """How many of a message's tokens were refused, by kind: GCM's word for it, FCM's error code, or a status."""
    if not isinstance(message.fate, Answer):
        return Counter({message.fate: max(1, len(message.targets))})
    status, body = message.fate.status, message.fate.body
    try:
        said = json.loads(body)
    except ValueError:
        said = {}
    if not isinstance(said, dict):
        said = {}
    if status != 200:
        return Counter({_code(said.get("error")) or str(status): max(1, len(message.targets))})
    if body.startswith(b"Error="):
        return Counter({body[6:].strip().decode(errors="replace"): 1})
    words = [str(each["error"]) for each in [said, *said.get("results", ())] if "error" in each]
    return Counter(words + ["failed"] * len(said.get("failed_registration_ids", ())))


def _code(error: Any) -> str:
    """What FCM v1 calls an error; "": it does not."""
    if not isinstance(error, dict):
        return ""
    codes = [each["errorCode"] for each in error.get("details", ()) if "errorCode" in each]
    return str([*codes, error.get("status", "")][0])
