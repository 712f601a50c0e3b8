"""From the command line to a running GoCM and its exit code."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gocm_lib import bench, log, sandbox, settings
from gocm_lib.settings import BenchSettings, Exit, SandboxSettings, Settings, SettingsError
from gocm_lib.supervisor import Stop, Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gocm` (serve), `gocm sandbox` or `gocm bench`; the exit code is one of settings.Exit. Problems are one line
    on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["sandbox"]:
            _sandbox(words[1:])
        if words[:1] == ["bench"]:
            return bench.command(settings.parse(BenchSettings, words[1:], {}, "gocm bench"))
        return _serve(words)
    except (SettingsError, Stop) as problem:
        if problem.code != Exit.OK:
            print(f"gocm: {problem}", file=sys.stderr)
        return problem.code


def _serve(words: Sequence[str]) -> int:
    parsed = settings.parse(Settings, words, os.environ)
    given = settings.complete(parsed, os.environ)
    settings.check(given)
    _start_log("front", given.log_level, given.logto)
    return Supervisor(given, lambda: settings.complete(parsed, os.environ)).run()


def _sandbox(words: Sequence[str]) -> NoReturn:
    given = settings.parse(SandboxSettings, words, os.environ, "gocm sandbox")
    _start_log("sandbox", "info", "")
    sandbox.command(given)


def _start_log(process: str, level: str, path: str) -> None:
    try:
        log.start(process, level, path)
    except OSError as error:
        raise SettingsError(f"--logto {path} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
