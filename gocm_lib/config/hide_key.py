"""Takes secrets off the command line and out of the environment, where everybody on the machine can read them.

`ps` and /proc/PID/environ show what a process was started with, whatever the process does later. So GoCM executes
itself again, in the same process, with each secret in an unnamed file (memfd_create(2)) that only this process has
open.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import NamedTuple

from gocm_lib.config.settings import http_url, secret


class Secret(NamedTuple):
    """An option whose value is a secret: what it is, the words that give it, its reader (raises ValueError for a bad
    value), and whether a given value is certainly a secret, so that the operator must be warned.
    """

    option: str
    what: str
    words: re.Pattern[str]
    read: Callable[[str], str]
    is_sure: Callable[[str], bool]

    @property
    def variable(self) -> str:
        return "GOCM_" + self.option.strip("-").replace("-", "_").upper()


SECRETS = (
    Secret("--apikey", "key", re.compile(r"--?apikey(?:=(.*))?", re.DOTALL), secret, lambda value: True),
    # It may have a secret of the application's in it, in its query for sure.
    Secret(
        "--feedback-url",
        "URL",
        re.compile(r"--feedback-url(?:=(.*))?", re.DOTALL),
        http_url,
        lambda value: "?" in value,
    ),
)


def take_out(kind: Secret, words: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], str | None]:
    """The words without a secret's option and its value, and the value that counts: the last one among the words, else
    the variable's. None when there is no value.
    """
    rest: list[str] = []
    value = None
    words = list(words)
    while words:
        word = words.pop(0)
        found = kind.words.fullmatch(word)
        if not found or (found[1] is None and not words):
            rest.append(word)
            continue
        value = found[1] if found[1] is not None else words.pop(0)
    return rest, environ.get(kind.variable) if value is None else value


def restart(words: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Start this program again without secrets in its words and environment. Return if there are none. `words` are the
    words after the program's name.
    """
    # What came before our words: the interpreter, its own options, and the script or -m and a module.
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]
    left, found = list(words), False
    for kind in SECRETS if hasattr(os, "memfd_create") else ():
        if any(word.partition("=")[0] == f"{kind.option}-file" for word in left):
            # It counts for more than the variable, which need not be there then.
            found = environ.pop(kind.variable, None) is not None or found
        rest, value = take_out(kind, left, environ)
        given_by_word = len(rest) < len(left)
        if not value or _is_mistaken(kind, value, rest if given_by_word else environ):
            continue
        found = True
        path = _hold(value)
        environ.pop(kind.variable, None)
        if given_by_word and kind.is_sure(value):
            shown = f"ps has shown the {kind.what} of {kind.option}"
            rather = f"rather give it by {kind.option}-file FILE or {kind.variable}"
            print(f"gocm: warning: {shown}; {rather}", file=sys.stderr)
        if given_by_word:
            left = [*rest, f"{kind.option}-file={path}"]
        else:
            environ[f"{kind.variable}_FILE"] = path
    if found:
        os.execv(sys.executable, [sys.executable, *before, *left])


def _hold(value: str) -> str:
    """Put a secret into an unnamed file; returns the file's path."""
    held = os.memfd_create("gocm-secret", 0)
    os.fchmod(held, 0o600)
    os.write(held, value.encode("utf-8", "surrogateescape"))
    return f"/proc/self/fd/{held}"


def _is_mistaken(kind: Secret, value: str, beside: Iterable[str]) -> bool:
    """Whether the value is no valid secret, or a file is given beside it. Then the error must name the option that was
    given, so nothing is hidden.
    """
    try:
        kind.read(value)
    except ValueError:
        return True
    return any(word.partition("=")[0] in (f"{kind.option}-file", f"{kind.variable}_FILE") for word in beside)
