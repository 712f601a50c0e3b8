"""`gocm help`: the topics, one of them, or all as a manual page."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from gocm_lib import __version__
from gocm_lib.config import values
from gocm_lib.config.settings import Exit, Fatal, HelpSettings
from gocm_lib.help import man, terminal
from gocm_lib.help.topics import TOPICS, sections, source, suggestion

# Who asks for a command's name means this topic.
OF_COMMANDS = {
    **dict.fromkeys(("serve", "check-config", "print-config"), "options"),
    **{"send": "sending", "watch": "watching", "ping": "watching", "bundle": "install", "completion": "install"},
}


def command(words: Sequence[str], purpose: str, commands: Mapping[str, str]) -> int:
    """Run `gocm help` with these words; returns the exit code. `commands` are all of ours, and what each does. Raises
    Fatal for a word of which no topic speaks.
    """
    given = values.parse(HelpSettings, words, {}, "gocm help", words="TOPIC")
    if given.settings.man:
        print(man.render({topic: source(topic) for topic in TOPICS}, __version__, purpose, commands), end="")
    elif not given.words:
        print("gocm help TOPIC, where TOPIC is one of these, or a word to look for in all of them:\n")
        for name, meaning in TOPICS.items():
            print(f"  {name:14}{meaning.replace('`', '')}")
    else:
        _explain(" ".join(given.words))
    return Exit.OK


def _explain(word: str) -> None:
    topic = OF_COMMANDS.get(word, word)
    if topic in TOPICS:
        _page(terminal.render(source(topic)))
    elif found := sections(word):
        print(f"{word} is no topic; these speak of it:\n")
        for name, heading in found:
            print(f"  {name:14}{heading}")
    else:
        near = suggestion(word)
        said = f"; did you mean {near}?" if near else ""
        raise Fatal(f"no topic is called {word[:64]}, and none speaks of it{said} (see gocm help)", Exit.USAGE)


def _page(text: str) -> None:
    """Print a text, in a terminal through $PAGER."""
    pager = shlex.split(os.environ.get("PAGER") or "less -FRX")
    if not (sys.stdout.isatty() and pager):
        print(text, end="")
        return
    try:
        subprocess.run(pager, input=text.encode(), check=False)
    except OSError:  # there is none
        print(text, end="")
