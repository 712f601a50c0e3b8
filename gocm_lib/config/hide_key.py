"""Takes secrets off the command line and out of the environment, where everybody on the machine can read them.

`ps` and /proc/PID/environ show what a process was started with, whatever it does later. So GoCM starts itself anew,
in the same process, with each secret in a file without a name (memfd_create(2)) that only it has open.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import NamedTuple

from gocm_lib.config.settings import http_url, secret


class Secret(NamedTuple):
    """An option whose value is one: what it is, by which words it is given, what reads it (ValueError: it is none), and
    whether such a value is a secret for sure, so that somebody is to be warned.
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
    """The words without a secret's option and its value, and the value that counts, None when there is none: the last
    one of the words, else the variable's.
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
    """Start this program anew without secrets in its words and environment, if there are any; else return. `words` are
    what came after the program's name.
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
    """The path of a file without a name that holds a secret."""
    held = os.memfd_create("gocm-secret", 0)
    os.fchmod(held, 0o600)
    os.write(held, value.encode("utf-8", "surrogateescape"))
    return f"/proc/self/fd/{held}"


def _is_mistaken(kind: Secret, value: str, beside: Iterable[str]) -> bool:
    """Whether the secret is none, or there is a file of one beside it: then the error is to name what was given."""
    try:
        kind.read(value)
    except ValueError:
        return True
    return any(word.partition("=")[0] in (f"{kind.option}-file", f"{kind.variable}_FILE") for word in beside)
