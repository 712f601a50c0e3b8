"""How much is in hand at once: in the queue and in the senders together. Pure."""

from gocm_lib.config.settings import Settings
from gocm_lib.message import fcm, gcm

MULTICASTS = 20  # that may be in the queue and the senders: in tokens far more than they have connections


def limits(settings: Settings) -> dict[str, int]:
    """How many tokens of each upstream the queue and the senders may have in hand together."""
    flights = settings.senders * settings.connections
    return {fcm.NAME: 2 * flights, gcm.NAME: max(MULTICASTS * gcm.TOKENS_PER_REQUEST, 2 * flights)}


def crash_log_size(settings: Settings) -> int:
    """How many cells the crash log of a sender needs: enough even if everything in hand is in its requests, and no two
    tokens form a run.
    """
    return 3 * (settings.connections + limits(settings)[gcm.NAME])
