"""What is noted of an answered request: the figures and the access log, without queries and without secrets."""

from gocm_lib.front import routes
from gocm_lib.front.gate import Asker, Gate
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.response import Response
from gocm_lib.process import log


class Answered:
    """Takes note of answered requests."""

    def __init__(self, handlers: Handlers, gate: Gate) -> None:
        self._handlers = handlers
        self._gate = gate

    def note(self, asker: Asker, method: str, path: str, response: Response, rid: str, took: float) -> None:
        """Count a request that was answered within `took` seconds, and log it if that is wanted: without its query, and
        without a path that is not ours, because both may hold tokens.
        """
        refused = response.status >= 400 and path not in routes.PROBES
        self._handlers.collector.answered(routes.counted_as(path), response.status, took, refused)
        if response.refuses_token:
            self._gate.refused(asker.address)
        if self._handlers.settings.access_log:
            fields = {
                "request_id": rid,
                "client": asker.address or "local",
                "method": method,
                "path": path if routes.is_ours(path) else log.token(path),
                "status": response.status,
                "bytes": len(response.body),
                "ms": round(took * 1000, 1),
            }
            if asker.name:
                fields["name"] = asker.name
            if job := response.headers.get("X-GoCM-Job"):
                fields["job"] = job
            log.logger.info("access", extra={"fields": fields})
        if response.audit:
            log.logger.info("audit: %s %s", asker, response.audit)
