"""`gocm token new`: a token for who may send, and the line for the server's file of tokens, which has only its hash."""

import hashlib
import os
import secrets
import sys
import time
from collections.abc import Sequence

from gocm_lib.config import values
from gocm_lib.config.settings import Exit, Fatal, TokenSettings
from gocm_lib.front import auth
from gocm_lib.tools import account

BYTES = 32  # of chance in a token


def command(words: Sequence[str]) -> int:
    """Run `gocm token` with these words; returns the exit code. Raises Fatal."""
    given = values.parse(TokenSettings, words, {}, "gocm token", words="new NAME")
    if len(given.words) != 2 or given.words[0] != "new":
        raise Fatal("say whose it is to be: gocm token new NAME", Exit.USAGE, topic="security")
    settings = given.settings
    token = secrets.token_urlsafe(BYTES)
    bounds = {"name": given.words[1], "may": settings.may, "upstream": settings.upstream}
    bounds |= {"rate": settings.rate, "until": settings.until}
    hashed = f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    line = " ".join([hashed, *(f"{name}={value}" for name, value in bounds.items() if value)])
    try:
        grant = auth.read_line(line)[1]
        if grant.until < time.time():
            raise ValueError("until= is over already")
        if settings.file and os.path.exists(settings.file):
            auth.check_name(settings.file, grant)
    except ValueError as error:
        raise Fatal(str(error), Exit.USAGE, topic="security") from None
    if settings.write_credentials:
        if not settings.project:
            raise Fatal("--project is missing: the Firebase project that messages are for", Exit.USAGE)
        account.write(settings.write_credentials, settings.project, token, f"{settings.to.rstrip('/')}/token")
    if settings.file:
        _append(settings.file, line)
        print(f"its hash is in {settings.file} now: SIGHUP the server", file=sys.stderr)
    else:
        print(f"for the server's --auth-token-file: {line}", file=sys.stderr)
    if settings.write_credentials:
        print(f"{settings.write_credentials} is for Google's SDKs, and has the token in it", file=sys.stderr)
    else:
        print(token)
    return Exit.OK


def _append(path: str, line: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "rb+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        raise Fatal(f"{path} cannot be written: {error.strerror}", Exit.FAILED) from None
