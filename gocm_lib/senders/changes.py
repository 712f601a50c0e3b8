"""What SIGHUP changes: from the settings as they were and as they are given now, to those that are applied.

Promises that nothing is changed here, and that what comes out can be used: whoever applies it need not fail half-way.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import NamedTuple

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.config.upstreams import described, meanings
from gocm_lib.process import log
from gocm_lib.senders import credentials, trust
from gocm_lib.senders.credentials import Source
from gocm_lib.state.contract import Snapshot

OF_UPSTREAMS = {"apikey", "apikey_file", "credentials", "token_command"}  # options that the sandbox stands in for
FRONT_FILES, FILES_PER_SENDER, SENDER_FILES = 56, 12, 32  # open files but connections: here, for each sender, in one


def fit_files(settings: Settings, files: int) -> Settings:
    """The settings with no more connections than a process with this many open files can serve. Otherwise the last
    connections would take files that we need ourselves. Logs when they are fewer; raises Fatal when none is left.
    """
    clients = files - FRONT_FILES - FILES_PER_SENDER * settings.senders
    upstream = (files - SENDER_FILES) // max(1, len(described(settings)))
    if min(clients, upstream) < 1:
        raise Fatal(f"{files} open files are too few for {settings.senders} senders: raise ulimit -n", Exit.CONFIG)
    clients, upstream = min(settings.max_connections, clients), min(settings.connections, upstream)
    if (clients, upstream) != (settings.max_connections, settings.connections):
        log.logger.warning(
            "%d files may be open: serving at most %d clients, %d upstream connections per sender; raise ulimit -n; "
            "see gocm help limits",
            *(files, clients, upstream),
        )
    return replace(settings, max_connections=clients, connections=upstream)


class Change(NamedTuple):
    """What is to be applied: the settings, and as they were given; where credentials come from. Which options changed,
    and which would have but need a restart.
    """

    settings: Settings
    given: Settings
    sources: dict[str, Source]
    changed: list[str]
    fixed: list[str]

    def tell(self) -> None:
        """Log what has changed."""
        log.logger.info("SIGHUP: keys, tokens and certificates were read again, log files opened again")
        if self.changed:
            log.logger.info("SIGHUP: changed: %s", ", ".join(self.changed))
        if self.fixed:
            log.logger.warning("SIGHUP: these need a restart: %s", ", ".join(self.fixed))


def read(
    now: Settings,
    given: Settings,
    fresh: Settings,
    files: int,
    home: str,
    point: Callable[[Settings], Settings],
    look: Callable[[], Snapshot],
) -> Change:
    """The Change from the settings that are applied `now`, which were `given` so, to the `fresh` ones, where a process
    may have so many `files` open. `point` makes the settings send where they are to; `look` tells what upstreams have
    to send still. Raises Fatal.
    """
    names = [row.name for row in fields(fresh) if getattr(fresh, row.name) != getattr(given, row.name)]
    live = {row.name for row in fields(fresh) if row.metadata["live"]}
    live -= OF_UPSTREAMS if now.sandbox else set()
    changed = {name: getattr(fresh, name) for name in names if name in live}
    # Whose project it is, the credentials may say anew.
    settings = point(replace(now, **changed, fcm_project=given.fcm_project))
    sources, settings = credentials.sources(settings, home)
    _check(now, settings, look)
    fitted = fit_files(replace(settings, connections=given.connections), files)
    settings = replace(settings, connections=fitted.connections)
    return Change(
        settings, replace(given, **changed), sources, list(changed), [name for name in names if name not in live]
    )


def _check(before: Settings, after: Settings, look: Callable[[], Snapshot]) -> None:
    """Raise Fatal when upstreams cannot be so from now on. Looks at what there is to send only when a name gets another
    meaning: a certificate is to be renewed also while the state process does not answer.
    """
    if not described(after):
        raise Fatal("no upstream is left")
    for each in described(after).values():
        trust.check(each.ca)
    known = meanings(before)
    fresh = {name: meaning for name, meaning in meanings(after).items() if known.get(name) != meaning}
    if not fresh:
        return
    found = look()
    for name, meaning in fresh.items():
        if found.meant.get(name, meaning) != meaning:
            raise Fatal(
                f"upstream {name} has {found.waiting[name]} tokens to send: give the new one another name, or wait",
                topic="upstreams",
            )
