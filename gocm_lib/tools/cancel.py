"""`gocm cancel`: stop messages of a running server that were a mistake, by id or by tag."""

from collections.abc import Sequence
from urllib.parse import urlencode

from gocm_lib.config import values
from gocm_lib.config.settings import CancelSettings, Exit, Fatal
from gocm_lib.front import auth
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.tools.api_client import ApiClient, ApiError, show


def command(words: Sequence[str]) -> int:
    """Run `gocm cancel` with these words; returns the exit code. Raises Fatal."""
    given = values.parse(CancelSettings, words, {}, "gocm cancel", words="ID")
    settings = given.settings
    if bool(given.words) == bool(settings.tag):
        raise Fatal("say what: gocm cancel ID..., or gocm cancel --tag TAG", Exit.USAGE, topic="jobs")
    try:
        for word in given.words:
            job.parse_id(word)
        if settings.tag:
            job.check_tag(settings.tag)
    except BadRequest as problem:
        raise Fatal(problem.error, Exit.USAGE, topic="jobs") from None
    token = auth.first_token(settings.auth_token_file) if settings.auth_token_file else ""
    server = ApiClient(settings.to, token, settings.ca)
    if settings.tag:
        done = server.take("POST", "/gcm/jobs/cancel", "jobs", urlencode({"tag": settings.tag}))
        show(f"{done['jobs']} messages: {_told(done)}")
        return Exit.OK
    for word in given.words:
        status, done = server.ask("DELETE", f"/gcm/jobs/{word}")
        if status not in (200, 202) or not isinstance(done, dict) or "cancelled" not in done:
            raise ApiError(f"{word}: {done.get('error') if isinstance(done, dict) else f'HTTP {status}'}")
        show(f"{word}: {_told(done)}")
    return Exit.OK


def _told(done: dict[str, object]) -> str:
    if done["cancelled"] is None:
        return "another node has it, and cancels it"
    rest = f"; another node cancels {done['elsewhere']} of them" if done.get("elsewhere") else ""
    return f"{done['cancelled']} tokens cancelled, {done['in_air']} were on their way{rest}"
