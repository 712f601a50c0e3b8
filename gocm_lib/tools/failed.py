"""`gocm failed list`, `replay` and `discard`: the failed tokens of a running server."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from gocm_lib.config import values
from gocm_lib.config.settings import Exit, FailedSettings, Fatal
from gocm_lib.front import auth
from gocm_lib.tools.api_client import ApiClient, ApiError, show

ACTIONS = ("list", "replay", "discard")


def command(words: Sequence[str]) -> int:
    """Run `gocm failed` with these words; returns the exit code. Raises Fatal."""
    action = words[0] if words else ""
    if action in ("-h", "--help"):
        action, words = "list", ["list", *words]
    if action not in ACTIONS:
        raise Fatal("say what to do: gocm failed list, replay or discard", Exit.USAGE)
    given = values.parse(FailedSettings, words[1:], {}, f"gocm failed {action}").settings
    token = auth.first_token(given.auth_token_file) if given.auth_token_file else ""
    server = ApiClient(given.to, token, given.ca)
    fields = {
        name: getattr(given, name) for name in ("job", "reason", "upstream", "by", "older") if getattr(given, name)
    }
    if action == "list":
        return _list(server, fields, given.json)
    form = urlencode(fields | ({"all": 1} if given.all else {}))
    done = server.take("POST", f"/gcm/failed/{action}", f"{action}ed", form)
    show(f"{done[action + 'ed']} {action}ed" + ("; for the others there is no room now" if done.get("left") else ""))
    return Exit.OK


def _list(server: ApiClient, fields: dict[str, Any], as_json: bool) -> int:
    after: dict[str, Any] = {"limit": 1000}
    try:
        while page := (answer := server.take("GET", f"/gcm/failed?{urlencode(fields | after)}", "failed"))["failed"]:
            for entry in page:
                _show(entry, as_json)
            if answer["next"] is None:
                break
            after["after"] = answer["next"]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ApiError("what answers there is no GoCM") from None
    return Exit.OK


def _show(entry: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(entry))
        return
    failed_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["failed_at"]))
    show(failed_at, *(entry[column] for column in ("job", "n", "upstream", "reason", "token", "detail")))
