"""Which message makes senders die? The rule of suspicion. Pure.

A message that kills its sender would kill the next one too, and so on for ever. So each sender notes in shared memory
what it has in flight (its crash log). When a sender dies, the supervisor reads the notes, and the tokens found there
become suspects. But most senders die for other reasons, with hundreds of innocent tokens in flight. So suspects are
sent in ever smaller company, and no token fails for a death that another token could have caused:

    died with it | is sent again
    once         | with everything else, but at most COMPANY suspects at a time in a sender
    twice        | alone in its sender: nothing else in flight
    FATAL times  | not again: it is set aside as failed

A suspect whose request ends, with whatever answer, is innocent.

A message may end a whole machine. Then nobody is left to read the notes, and where nodes share a spool it would end
them one after the other. So what was with a node when it died has a loss, and from LOSSES on all of it is suspect, as
after one death; and a death is written down before each flight, and taken back when there is an answer. Of these a
node has COMPANY in hand, or one that must be alone.
"""

from collections.abc import Iterable
from typing import NamedTuple

FATAL = 3  # deaths
LOSSES = 3  # deaths of the nodes that had a pack, after which its tokens are suspects
COMPANY = 32  # suspects, or shared requests of so many, that a sender has in flight at once
UNREST = 10.0  # seconds: when more senders died in these than one message explains, somebody is killing them


class InFlight(NamedTuple):
    """A request as the crash log knows it, or part of one: a job, and the first and last place of its tokens."""

    job: int
    low: int
    high: int


def unrest(deaths: Iterable[float], now: float) -> bool:
    """Whether so many senders died lately, not counting those with a single token in flight, that no one message
    explains it. Then no token fails: it might be an innocent one that was hit twice by chance.
    """
    return sum(now - UNREST < death <= now for death in deaths) >= FATAL


def load(deaths: int) -> int:
    """How much of a node's COMPANY a suspect of a pack with LOSSES takes that flies after so many deaths."""
    return COMPANY if deaths >= FATAL - 1 else 1
