"""`gocm watch`: what goes on in a running server, live in a terminal; elsewhere a line at a time."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from gocm_lib.config.settings import Exit, WatchSettings
from gocm_lib.front import auth
from gocm_lib.process import log
from gocm_lib.tools.api_client import ApiClient, ApiError, show

HOME, REST = "\033[H", "\033[K\n"  # to the first line; clear what is right of here, and go on below
BELOW = "\033[J"  # clear all that is below
SPARKS = " ▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, each as a block whose height is its share of the highest."""
    highest = max(values, default=0.0)
    return "".join(SPARKS[round(8 * value / highest)] if highest else SPARKS[0] for value in values[-width:])


def line(told: dict[str, Any]) -> str:
    """The answer of /api/status in one line."""
    if told["pending"] is None:
        return str(told["sentence"])
    totals = told["totals"]
    counts = f"{totals['delivered']} delivered, {totals['failures']} failed, {totals['notregistered']} unregistered"
    return f"{told['pending']['tokens']} to be sent, {told['sent_per_second']}/s, {counts}: {told['sentence']}"


def screen(told: dict[str, Any], width: int, height: int) -> list[str]:
    """The same as lines of at most `width` characters, as many as fit."""
    rate = [point["sent"] for point in told["trend"]["points"]]
    lines = [f"GoCM {told['version']}  {told['sentence']}", ""]
    if told["pending"] is not None:
        pending, totals, lists = told["pending"], told["totals"], told["lists"]
        lines += [
            f"to be sent   {pending['tokens']:>12,}   {pending['messages']:,} messages, {pending['sending']:,} sending",
            f"delivered    {totals['delivered']:>12,}   {told['sent_per_second']:,}/s  {sparkline(rate, 60)}",
            f"failed       {totals['failures']:>12,}   {told['failed']:,} can be replayed",
            f"unregistered {totals['notregistered']:>12,}   {lists['notregistered']['waiting']:,} not read yet"
            + (f", {lists['notregistered']['held']:,} held back" if lists["notregistered"]["held"] else ""),
            f"replaced     {totals['canonicals']:>12,}   {lists['canonical']['waiting']:,} not read yet",
        ]
    lines += [f"senders      {told['senders']['ready']:>12,}   {told['senders']['died']:,} died", ""]
    for upstream in told["upstreams"]:
        times = " ".join(f"{name} {_duration(seconds)}" for name, seconds in upstream["latency"].items())
        state = f"paused: {upstream['paused']}" if upstream["paused"] else "sending"
        lines.append(f"{upstream['name']:12} {times}  {state}")
    if told["failures"]:
        lines += ["", "failures"]
    for each in told["failures"] or ():
        lines.append(f"{each['count']:>12,}  {each['upstream']}: {each['meaning']}; {each['advice']}")
    return [log.one_line(text)[:width] for text in lines[: max(1, height - 1)]]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def command(settings: WatchSettings) -> int:
    """`gocm watch`. Raises Fatal; ends at Ctrl-C."""
    token = auth.first_token(settings.auth_token_file) if settings.auth_token_file else ""
    server = ApiClient(settings.to, token, settings.ca)
    told = server.take("GET", "/api/status", "sentence")
    if settings.once:
        show(line(told))
        return Exit.OK
    if sys.stdout.isatty():
        sys.stdout.write("\033[2J")
    try:
        while True:
            _show(told)
            time.sleep(settings.interval)
            told = _next(server, told)
    except KeyboardInterrupt:
        return Exit.OK


def _next(server: ApiClient, told: dict[str, Any]) -> dict[str, Any]:
    """The next answer of the server; while there is none, the last one with the problem as its sentence."""
    try:
        return server.take("GET", "/api/status", "sentence")
    except ApiError as problem:
        return told | {"sentence": str(problem)}


def _show(told: dict[str, Any]) -> None:
    if not sys.stdout.isatty():
        show(line(told))
        return
    size = shutil.get_terminal_size()
    sys.stdout.write(HOME + "".join(text + REST for text in screen(told, size.columns, size.lines)) + BELOW)
    sys.stdout.flush()
