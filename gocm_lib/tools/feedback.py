"""`gocm feedback release` and `discard`: what becomes of the unregistered tokens that a running server holds back."""

from collections.abc import Sequence

from gocm_lib.config import values
from gocm_lib.config.settings import ClientSettings, Exit, Fatal
from gocm_lib.front import auth
from gocm_lib.tools.api_client import ApiClient, show

ACTIONS = ("release", "discard")


def command(words: Sequence[str]) -> int:
    """Run `gocm feedback` with these words; returns the exit code. Raises Fatal."""
    action = words[0] if words else ""
    if action in ("-h", "--help"):
        action, words = "release", ["release", *words]
    if action not in ACTIONS:
        raise Fatal("say what to do: gocm feedback release or discard", Exit.USAGE, topic="reports")
    given = values.parse(ClientSettings, words[1:], {}, f"gocm feedback {action}").settings
    token = auth.first_token(given.auth_token_file) if given.auth_token_file else ""
    did = action.rstrip("e") + "ed"
    done = ApiClient(given.to, token, given.ca).take("POST", f"/gcm/feedback/{action}", did, "all=1")
    show(f"{done[did]} {did}")
    return Exit.OK
