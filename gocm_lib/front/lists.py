"""The lists that applications read: tokens to replace, tokens to delete, and what is no token of ours.

Promises that no entry is given to two readers, and that an entry leaves its list only after it was handed to the
network, or confirmed.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from gocm_lib.front import auth, query
from gocm_lib.front.request import Request
from gocm_lib.front.response import Response, unavailable
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.process import log
from gocm_lib.state.client import Client, StateUnavailable
from gocm_lib.state.contract import LISTS, Entry

LARGEST_ANSWER = 50_000  # entries in an answer when no number is asked for; who asks again gets the next
LAST = 1 << 62  # no entry has a higher number

Page = Callable[[Any], bytes]  # writes entries of one list


class Lists:
    """All lists, for all threads that answer clients."""

    def __init__(self, client: Client, upstreams: Callable[[], Collection[str]]) -> None:
        """`upstreams` tells which there are."""
        self.client = client
        self._upstreams = upstreams
        self._readers = {which: threading.Lock() for which in LISTS}
        self._paging = threading.Lock()

    def read(self, which: str, page: Page, request: Request, peeked: Page | None = None) -> Response:
        """GET: a page of the list `which`, written by `page`; `peeked` writes it for who asks with peek, if that is
        another form. Raises BadRequest, StateUnavailable.
        """
        fields = query.parse(request.query, {"peek", "ack", "limit", "upstream"})
        limit = query.number(fields, "limit", 1, query.LARGEST_PAGE)
        if fields.get("peek", "1") != "1":
            raise BadRequest("peek takes no value but 1", "peek")
        if "ack" in fields and "peek" in fields:
            raise BadRequest("give peek or ack, not both", "ack")
        ack = query.number(fields, "ack", 0, LAST)
        looks = "peek" in fields or request.method == "HEAD"
        if not (looks or ack == 0):
            auth.check_clearing(request.headers)
        upstream = self._upstream(request, fields)
        if ack is None and not looks:
            return self._hand_out(which, page, limit or LARGEST_ANSWER, upstream)
        audit = "" if looks else self._acknowledge(which, ack or 0, 400, upstream)
        with self.one_page():
            most = LARGEST_ANSWER if ack is None else query.LARGEST_PAGE
            entries = self.client.page(which, ack or 0, limit or most, upstream)
            body = (peeked if peeked and looks else page)(entries)
        return Response(200, body, headers=_cursor(entries, ack or 0), audit=audit)

    @contextlib.contextmanager
    def one_page(self) -> Iterator[None]:
        """Make one page at a time: until its bytes are counted (gate.Budget), its memory is not limited."""
        if not self._paging.acquire(timeout=self.client.limit):
            raise StateUnavailable("others read lists")
        try:
            yield
        finally:
            self._paging.release()

    def _upstream(self, request: Request, fields: Mapping[str, str]) -> str:
        """Of which upstream's entries a request is ("": of all). Raises BadRequest."""
        if fields.get("upstream", "-") == "":
            raise BadRequest("upstream is empty: leave it out for all", "upstream")
        return auth.only_upstream(request.grant, fields.get("upstream", ""), self._upstreams())

    def _acknowledge(self, which: str, ack: int, unknown: int, upstream: str) -> str:
        """Take entries of an upstream ("": of all) up to a cursor off a list; returns the audit text for that, "" for
        none. Raises BadRequest, with the status `unknown` for a cursor that never was.
        """
        if not self.client.forget(which, ack, upstream):
            raise BadRequest("no such cursor was ever given here: begin with ack=0", "ack", unknown)
        return f"cleared {which}{f' of {upstream}' if upstream else ''} up to {ack}" if ack else ""

    def confirm(self, which: str, request: Request) -> Response:
        """POST: take entries that were read off the list `which`. Raises BadRequest, StateUnavailable."""
        fields = query.form(request, {"ack", "upstream"}, "ack=12")
        ack = query.number(fields, "ack", 0, LAST)
        if ack is None:
            raise BadRequest("say up to where: the GoCM-Cursor of what you have read", "ack")
        upstream = self._upstream(request, fields)
        audit = self._acknowledge(which, ack, 404, upstream)  # such as fits the API's description, and is not there
        return Response(200, json.dumps({"acknowledged": ack}).encode() + b"\n", audit=audit)

    def _hand_out(self, which: str, page: Page, limit: int, upstream: str) -> Response:
        """A list as the original gives it: read and cleared in one call. We clear exactly what was in the answer, after
        it was written. The next reader waits until then, so that no entry is given to two.
        """
        turn = self._readers[which]
        if not turn.acquire(timeout=self.client.limit):
            return unavailable("another reader of this list is not done yet")
        try:
            with self.one_page():
                found = self.client.hand_out(which, limit, upstream)
                entries = found or []
                body = page(entries)
        except BaseException:
            turn.release()
            raise
        if found is None:
            turn.release()
            return unavailable("another node hands out this list just now")

        count, last = len(entries), entries[-1][0] if entries else 0  # not they: a slow reader would keep them

        def written(whole: bool) -> None:
            try:
                if last:
                    self.client.handed_out(which, last if whole else 0, upstream)
            except StateUnavailable as error:
                log.logger.warning("%d entries of %s will be given again: %s", count, which, error)
            finally:
                turn.release()

        audit = f"took {len(entries)} entries off {which}" if entries else ""
        return Response(200, body, written=written, audit=audit)


def _cursor(entries: Sequence[Entry], before: int) -> dict[str, str | Sequence[str]]:
    """The header that tells how far a page of a list goes: its last entry's number."""
    return {"GoCM-Cursor": str(entries[-1][0] if entries else before)}
