"""The rules for alive and ready. Pure: `now` is an argument.

Alive (/livez, systemd's watchdog) means that every part moves: when one stands still, only a restart helps. Ready
(/readyz) means that messages can be taken and sent. A paused or absent upstream makes neither false, because its
messages are kept.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Seconds without a move until a part is taken for stuck. A commit may take the intake 30; a sender that stands still is
# replaced long before.
STILL = 45.0


def stuck(pulses: Mapping[str, float], now: float, limit: float = STILL) -> list[str]:
    """The parts that have not moved for `limit` seconds. `pulses` has when each last moved."""
    return sorted(name for name, moved_at in pulses.items() if now - moved_at > limit)


class Abilities(NamedTuple):
    """What taking and sending messages need."""

    stopping: bool
    state_answers: bool
    not_kept: str  # why the last messages could not be brought to the disk, "" if they were
    refusing: str  # why no message is taken, "" when they are
    senders: int  # that are ready
    without_token: Sequence[str]  # upstreams that we have no access token for
    upstreams: int


def unready(able: Abilities) -> list[str]:
    """Why messages cannot be taken or sent just now; empty when they can."""
    reasons = []
    if able.stopping:
        reasons.append("stopping")
    if not able.state_answers:
        reasons.append("the state process does not answer: nothing can be kept")
    elif able.not_kept:
        reasons.append(f"messages cannot be kept: {able.not_kept}")
    if able.refusing:
        reasons.append(f"messages are refused: {able.refusing}")
    if not able.senders:
        reasons.append("no sender is ready")
    if len(able.without_token) == able.upstreams:
        reasons.append(f"no access token for {' and '.join(able.without_token)}")
    return reasons
