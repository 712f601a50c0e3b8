"""How much is in hand at once: in the queue and in the senders together. Pure."""

from gocm_lib.config.settings import Settings
from gocm_lib.config.upstreams import described
from gocm_lib.message import gcm
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.senders.feeder import Terms

MULTICASTS = 20  # that may be in the queue and the senders: in tokens far more than they have connections
AT_ONCE = 4  # upstreams with all their requests in flight, for which a sender's crash log has room


def limits(settings: Settings) -> dict[str, int]:
    """How many tokens of each upstream the queue and the senders may have in hand together."""
    flights = settings.senders * settings.connections
    of_dialect = {
        name: max(MULTICASTS * each.TOKENS_PER_REQUEST, 2 * flights) if each is gcm else 2 * flights
        for name, each in DIALECTS.items()
    }
    return {name: of_dialect[each.dialect] for name, each in described(settings).items()}


def terms(settings: Settings) -> Terms:
    """On which terms senders are fed."""
    multicast = {name for name, each in described(settings).items() if DIALECTS[each.dialect].TOKENS_PER_REQUEST > 1}
    return Terms(limits(settings), multicast)


def crash_log_size(settings: Settings) -> int:
    """How many cells the crash log of a sender needs: enough even if everything in hand of AT_ONCE upstreams is in its
    requests, and no two tokens form a run.
    """
    counts = [
        limits(settings)[name] if DIALECTS[each.dialect] is gcm else settings.connections
        for name, each in described(settings).items()
    ]
    return 3 * sum(sorted(counts)[-AT_ONCE:])
