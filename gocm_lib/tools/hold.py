"""`gocm hold` and `gocm resume`: send nothing to an upstream of a running server; send to it again."""

import re
from collections.abc import Sequence

from gocm_lib.config import values
from gocm_lib.config.settings import NAME, ClientSettings, Exit, Fatal
from gocm_lib.front import auth
from gocm_lib.tools.api_client import ApiClient, show


def command(action: str, words: Sequence[str]) -> int:
    """Run `gocm hold` or `gocm resume` with these words; returns the exit code. Raises Fatal."""
    given = values.parse(ClientSettings, words, {}, f"gocm {action}", words="UPSTREAM")
    if len(given.words) != 1 or not re.fullmatch(NAME, given.words[0]):
        raise Fatal(f"say which upstream: gocm {action} NAME", Exit.USAGE, topic="upstreams")
    settings, [name] = given.settings, given.words
    token = auth.first_token(settings.auth_token_file) if settings.auth_token_file else ""
    done = ApiClient(settings.to, token, settings.ca).take("POST", f"/gcm/upstreams/{name}/{action}", "held", "")
    show(f"{name} is held: its messages are kept" if done["held"] else f"{name} is sent to")
    return Exit.OK
