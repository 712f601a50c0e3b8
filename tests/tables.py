"""The tables of the help, from the code's own: python tests/tables.py writes them into gocm_lib/help/*.md.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test says when one is stale.
"""

import re
from pathlib import Path

from gocm_lib import cli
from gocm_lib.config import settings
from gocm_lib.front import auth, routes
from gocm_lib.message import outcome, platforms
from gocm_lib.monitoring import metrics
from gocm_lib.monitoring.collector import CAUSES
from gocm_lib.tools import bench

HELP = Path(__file__).parent.parent / "gocm_lib/help"


def rows(head, found):
    lines = [head, ["---"] * len(head), *found]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def option_rows(found):
    return rows(
        ("option", "default", "meaning"),
        (
            (
                f"`{settings.option_flag(row)}`",
                f"`{settings.show(row, row.default)}`" if row.default not in ("", (), False) else "",
                row.metadata["help"],
            )
            for row in found
        ),
    )


def upstream_rows():
    """Spelt as the configuration file has them."""
    found = settings.rows(settings.UpstreamSettings)
    return rows(
        ("in the table", "meaning"), ((f"`{row.name.replace('_', '-')}`", row.metadata["help"]) for row in found)
    )


def server_options():
    """A table for each group."""
    named = {row.name: row for row in settings.rows(settings.Settings)}
    parts = (
        f"## {group[0].upper()}{group[1:]}\n\n{option_rows(named[name] for name in names)}"
        for group, names in settings.GROUPS.items()
    )
    return "\n".join(parts)


def meanings(first, found):
    return rows((first, "meaning"), ((f"`{name}`", meaning) for name, meaning in found.items()))


def platforms_rows():
    fields = {**platforms.OPTIONS, **{f"notification.{name}": each for name, each in platforms.NOTIFICATION.items()}}
    found = ((f"`{name}`", ", ".join(f"`{place.path}`" for place in places)) for name, places in fields.items())
    return rows(("field", "in the v1 message"), found)


def of_cause(cause):
    return ", ".join(str(status) for status, named in CAUSES.items() if named == cause)


def sighup():
    return (
        "\n".join(
            f"* `{settings.option_flag(row)}`" for row in settings.rows(settings.Settings) if row.metadata["live"]
        )
        + "\n"
    )


def tables():
    """The text of each table, by its name."""
    shared = {row.name for row in settings.rows(settings.ClientSettings)}
    of_commands = {
        f"gocm {name}": option_rows(row for row in settings.rows(command.options) if row.name not in shared)
        for name, command in cli.COMMANDS.items()
        if name in ("send", "watch", "failed", "sandbox", "bench", "bundle")
    }
    figures = ((f"`{m.name}`", m.kind, ", ".join(m.labels), m.help) for m in metrics.METRICS)
    return {
        "rights": meanings("may", auth.RIGHTS),
        **of_commands,
        "gocm": server_options(),
        "upstreams": upstream_rows(),
        "clients": option_rows(settings.rows(settings.ClientSettings)),
        "sighup": sighup(),
        "commands": meanings("command", {f"gocm {name}": each.meaning for name, each in cli.COMMANDS.items()}),
        "routes": rows(("route", "what it does"), ((f"`{r.method} {r.path}`", r.meaning) for r in routes.ROUTES)),
        "metrics": rows(("metric", "kind", "labels", "meaning"), figures),
        "causes": rows(
            ("cause", "status"), ((f"`{cause}`", of_cause(cause)) for cause in dict.fromkeys(CAUSES.values()))
        ),
        "failures": meanings("reason", outcome.FAILURES),
        "retries": meanings("cause", outcome.RETRIES),
        "platforms": platforms_rows(),
        "scenarios": meanings("scenario", {name: each.meaning for name, each in bench.SCENARIOS.items()}),
        "exit codes": rows(("code", "meaning"), ((int(code), code.meaning) for code in settings.Exit)),
    }


def filled(source, found):
    """A topic with its tables as they should be. Raises KeyError for a name that is none."""

    def fill(match):
        return f"<!-- table: {match[1]} -->\n\n{found[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n(?:.*\n)*?<!-- end -->", fill, source)


if __name__ == "__main__":
    for path in sorted(HELP.glob("*.md")):
        path.write_text(filled(path.read_text(), tables()))
