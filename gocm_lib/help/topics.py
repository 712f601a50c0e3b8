"""The topics of the help, in the order in which one would read them, and their sources."""

import re
from collections.abc import Iterable
from importlib.resources import files

TOPICS = {
    "sending": "post a message: fields, formats, answers; gocm send",
    "reports": "counters, tokens to delete and to replace; have them told to you",
    "jobs": "look up what became of a message and of each of its tokens",
    "failed": "list, replay and discard what could not be sent",
    "promise": "what `ok` means, and what is not promised",
    "limits": "how much of what is taken, and what is answered beyond",
    "install": "one file, systemd, containers, upgrades",
    "fleet": "several nodes on one PostgreSQL; gocm spool",
    "proxies": "nginx, HAProxy before it; a full house; a proxy behind it",
    "security": "who may send, what is guarded, where secrets are",
    "upstreams": "several applications: upstreams by name, a token for each, holding one",
    "credentials": "Google's credentials, API keys, and how to rotate them",
    "watching": "status page, metrics, alerts, probes, the log; gocm watch",
    "sandbox": "a pretend FCM and GCM, for trying and for tests",
    "google": "the sandbox under Google's own names, for what cannot be told another address",
    "bench": "how fast it is on this machine; gocm bench",
    "moving": "from GCM, from firebase-admin, from the Go GoCM",
    "options": "every option, its default, and where values come from",
    "exit-codes": "what an exit code means",
    "api": "every route, and what a refusal looks like",
    "internals": "processes, rooms of the code, the life of a token",
    "developing": "run the tests, the rules, make a release",
    "changes": "what has changed, by version",
}


def source(topic: str) -> str:
    """The Markdown of a topic. Raises KeyError for a name that is none; suggestion() knows what was meant."""
    if topic not in TOPICS:
        raise KeyError(topic)
    return (files(__package__) / f"{topic}.md").read_text(encoding="utf-8")


def sections(word: str) -> list[tuple[str, str]]:
    """The topics and headings under which a word, or several, are found, in any case; as a beginning, too."""
    wanted = re.compile(r"\b" + r"\s+".join(map(re.escape, word.split())), re.IGNORECASE)
    parts = ((topic, part) for topic in TOPICS for part in re.split(r"(?m)^#+ ", source(topic))[1:])
    return [(topic, part.partition("\n")[0].replace("`", "")) for topic, part in parts if wanted.search(part)]


def nearest(word: str) -> str:
    """The topic whose name is nearest to `word`; "": none is near."""
    return _nearest(word, TOPICS, 0.6)


def suggestion(word: str) -> str:
    """The same; else the word that is nearest of all that are in the topics."""
    words = {each for topic in TOPICS for each in re.findall(r"[a-z]{4,}", source(topic).lower())}
    return nearest(word) or _nearest(word, sorted(words), 0.75)


def _nearest(word: str, known: Iterable[str], likeness: float) -> str:
    import difflib  # here: few need it

    found = difflib.get_close_matches(word.lower()[:64], known, 1, likeness)
    return found[0] if found else ""
