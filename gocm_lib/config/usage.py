"""What `gocm --help` prints: the commands, and the server's options in groups, a line for each."""

import textwrap
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from gocm_lib.config.settings import GROUPS, Settings, option_flag, rows, show

MARGIN = 30  # columns of an option's name
NOTHING: Mapping[str, str] = {}


def overview(program: str, kind: type = Settings, purpose: str = "", commands: Mapping[str, str] = NOTHING) -> str:
    """The text, at most 80 columns wide. `commands` are their names and what they do; `kind` is Settings, or what has
    options beside those.
    """
    known = {row.name: row for row in rows(kind)}
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {f"of {program}": tuple(name for name in known if name not in grouped), **GROUPS}
    lines = [f"usage: {program} {'[COMMAND] ' if commands else ''}[OPTIONS]", *([purpose] if purpose else [])]
    lines += ["commands:"] if commands else []
    for name, meaning in commands.items():
        lines += _entry(name, meaning.replace("`", ""), 16)
    lines += ["options, with their defaults; gocm help options says more:"]
    lines += _entry("--help, --version", "print this, or the version, and exit", MARGIN)
    for group, names in groups.items():
        lines += [f"{group}:"] if names else []
        for name in names:
            words = f"{option_flag(known[name])} {known[name].metadata['metavar']}"
            lines += _entry(words.strip(), brief(known[name]), MARGIN)
    return "\n".join(lines) + "\n"


def brief(row: Field[Any]) -> str:
    """An option's meaning in a line: up to the first semicolon, with its default."""
    meaning = str(row.metadata["help"]).partition(";")[0].replace("`", "")
    return meaning + (f" [{show(row, row.default)}]" if row.default not in ("", (), False) else "")


def _entry(name: str, meaning: str, margin: int) -> list[str]:
    return textwrap.wrap(
        meaning,
        80,
        initial_indent=f"  {name} ".ljust(margin),
        subsequent_indent=" " * margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
