"""Takes the API key off the command line and out of the environment, where everybody on the machine can read it.

`ps` and /proc/PID/environ show what a process was started with, whatever it does later. So GoCM starts itself anew,
in the same process, with the key in a file without a name (memfd_create(2)) that only it has open.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

from gocm_lib.settings import secret

_OPTION = re.compile(r"--?apikey(?:=(.*))?", re.DOTALL)
VARIABLE = "GOCM_APIKEY"


def take_out(words: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], str | None]:
    """The words without --apikey and its value, and the key that counts, None when there is none: the last one of the
    words, else the variable's.
    """
    rest: list[str] = []
    key = None
    words = list(words)
    while words:
        word = words.pop(0)
        found = _OPTION.fullmatch(word)
        if not found or (found[1] is None and not words):
            rest.append(word)
            continue
        key = found[1] if found[1] is not None else words.pop(0)
    return rest, environ.get(VARIABLE) if key is None else key


def restart(words: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Start this program anew without a key in its words and environment, if there is one; else return. `words` are
    what came after the program's name.
    """
    rest, key = take_out(words, environ)
    given_by_word = len(rest) < len(words)
    if not key or not hasattr(os, "memfd_create") or _is_mistaken(key, rest if given_by_word else environ):
        return
    if given_by_word:
        print(
            "gocm: warning: ps has shown the key of --apikey; rather give it by --apikey-file FILE or GOCM_APIKEY",
            file=sys.stderr,
        )
    held = os.memfd_create("gocm-apikey", 0)
    os.fchmod(held, 0o600)
    os.write(held, key.encode("utf-8", "surrogateescape"))
    environ.pop(VARIABLE, None)
    path = f"/proc/self/fd/{held}"
    if given_by_word:
        rest.append(f"--apikey-file={path}")
    else:
        environ["GOCM_APIKEY_FILE"] = path
    # What came before our words: the interpreter, its own options, and the script or -m and a module.
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]
    os.execv(sys.executable, [sys.executable, *before, *rest])


def _is_mistaken(key: str, beside: Iterable[str]) -> bool:
    """Whether the key is none, or there is a file of one beside it: then the error is to name what was given."""
    try:
        secret(key)
    except ValueError:
        return True
    return any(word.partition("=")[0] in ("--apikey-file", f"{VARIABLE}_FILE") for word in beside)
