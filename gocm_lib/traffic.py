"""Traffic: whether, and how fast, each upstream may be sent to.

Owns the pauses and the paces (module outcome has their rules), which start afresh with the process: an upstream that
was paused is probed again, a pace ramps up again. Promises that a paused upstream is asked with one token at a time.
"""

from collections.abc import Mapping

from gocm_lib import log
from gocm_lib.job import format_id
from gocm_lib.outcome import (
    BLAMES_UPSTREAM,
    Pace,
    Pause,
    Result,
    Verdict,
    advance,
    pause,
    slow_down,
    spend,
    start_pace,
    until_credit,
)

PROBE_WAIT = 60.0  # seconds until a probe of a paused upstream that nobody reported on is given up


class Traffic:
    def __init__(self, paces: Mapping[str, Pace]) -> None:
        self.paces = dict(paces)
        self.pauses: dict[str, Pause] = {}

    def end_pause(self, upstream: str, since: float, now: float) -> None:
        """Let a paused upstream be probed at once if its credential, which we have had `since` then, is newer than
        that, or the clock went back.
        """
        paused = self.pauses.get(upstream)
        if not paused or paused.until <= now:
            return
        if not paused.probing and paused.began < since and paused.reason.startswith("HTTP 401"):
            # Half of it, so that it is what it was, not doubled, if this one is refused as well.
            self.pauses[upstream] = paused._replace(until=now, delay=paused.delay / 2)
        elif paused.until > now + max(paused.delay, PROBE_WAIT):
            self.pauses[upstream] = paused._replace(began=now, until=now)

    def allow(self, upstream: str, now: float) -> tuple[int, float]:
        """How many tokens may go there now; when none, after how many seconds to ask again."""
        paused = self.pauses.get(upstream)
        if paused and now < paused.until:
            return 0, paused.until - now
        pace = self.paces[upstream] = advance(self.paces[upstream], now)
        if pace.credit < 1:
            return 0, until_credit(pace)
        return 1 if paused else int(pace.credit), 0.0

    def sent(self, upstream: str, count: int, now: float) -> None:
        """So many tokens went; the one to a paused upstream is its probe."""
        self.paces[upstream] = spend(self.paces[upstream], count)
        paused = self.pauses.get(upstream)
        if count and paused:
            self.pauses[upstream] = paused._replace(until=now + PROBE_WAIT, probing=True)

    def judge(self, result: Result, now: float) -> None:
        """Slow an upstream down, pause it or end its pause, by what it said to a token."""
        if result.outcome.slows:
            pace = self.paces[result.upstream]
            self.paces[result.upstream] = slower = slow_down(advance(pace, now), now)
            if slower.slowed_at != pace.slowed_at:
                log.logger.warning(
                    "upstream %s says %s: slowing down to %.0f/s", result.upstream, result.outcome.reason, slower.rate
                )
        known = self.pauses.get(result.upstream)
        if result.outcome.verdict in BLAMES_UPSTREAM:
            self._pause(result, known, now)
        elif known and (result.outcome.verdict is Verdict.RETURNED or (now < known.until and not known.probing)):
            pass  # of a request from before the pause: the probe will tell
        elif known and not result.outcome.answered:
            # Connected, and no answer: that proves nothing. The pause goes on, and then another token is tried.
            self.pauses[result.upstream] = known._replace(until=now + known.delay, probing=False)
        elif known:
            del self.pauses[result.upstream]
            self.paces[result.upstream] = start_pace(self.paces[result.upstream].limit, now)
            log.logger.warning("upstream %s answers again", result.upstream)

    def _pause(self, result: Result, known: Pause | None, now: float) -> None:
        self.pauses[result.upstream] = paused = pause(known, result.outcome, now)
        if paused != known:
            log.logger.warning(
                "upstream %s is paused for %.0f s: %s; its messages are kept (job %s)",
                result.upstream,
                paused.delay,
                paused.reason,
                format_id(result.job),
            )
