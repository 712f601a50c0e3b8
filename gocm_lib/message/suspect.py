"""Which message makes senders die? The rule of suspicion. Pure.

A message that ends its sender would end the next one too, and so for ever. So each sender notes in shared memory what
it has in the air, the supervisor reads the notes of one that died, and a token that is found there is a suspect. But
most senders die for other reasons, with hundreds of innocent tokens in the air. So suspects are tried in ever smaller
company, and nobody is condemned for a death that another could have caused:

    died with it | is sent again
    once         | with everything else, but at most COMPANY suspects at a time in a sender
    twice        | alone in its sender: nothing else in the air
    FATAL times  | not again: it is buried

A suspect that comes to ground, whatever the answer, is innocent.
"""

from collections.abc import Iterable
from typing import NamedTuple

FATAL = 3  # deaths
COMPANY = 32  # suspects, or shared requests of so many, that a sender has in the air at once
UNREST = 10.0  # seconds: when more senders died in these than one message explains, somebody is killing them


class Aloft(NamedTuple):
    """A flight as the black box knows it, or a part of one: from which to which of a job's tokens."""

    job: int
    low: int
    high: int


def unrest(deaths: Iterable[float], now: float) -> bool:
    """Whether so many senders died lately, other than with a token alone in the air, that no single message explains
    it. Nobody is condemned then: it would be an innocent that was hit twice by chance.
    """
    return sum(now - UNREST < death <= now for death in deaths) >= FATAL
