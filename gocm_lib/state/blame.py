"""Blame: whose trouble is it? Pure.

An answer like 503 or 404, or no answer, may be the upstream's fault or one message's. The rule: *trouble that everybody
has is the upstream's; trouble that one job has while others get through is that job's*. It leads to two questions, and
the answers to other messages are the evidence for both:

* Is it everybody's? Then the upstream is paused. It is, when no message has got through for a moment, and more jobs in
  a row met trouble than their usual share explains. A job that had trouble before, while others got through, is a poor
  witness: alone it delays nobody. But when only such jobs are waiting, many of them together tell of a dead upstream.
* Is it this token's own? Then its attempts count. A token's trouble is judged when it meets the next one: by then it is
  known what others were answered before and after, and whether others in trouble got over it. The weight of a trouble
  is how surprising it would be by chance, so an upstream that refuses every fifth message ends no message early.

When the upstream may have taken the message, because no answer said otherwise, the attempt always counts: each
repetition may push the message once more.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from gocm_lib.message.outcome import Outcome, Verdict

TICK = 0.25  # seconds
SIDE = 30.0  # seconds: so far before and after a trouble others' answers are evidence,
NEIGHBOURS = 20  # and no more than so many of the nearest
KEPT = 900.0  # seconds for which answers are remembered: a little longer than the longest retry takes
PROOF = math.log(20)  # surprise that charges a token: what chance does once in twenty times
JUDGED = 8  # troubles of a token that are judged anew each time, for others get over theirs
ANEW = 5.0  # seconds until the next trouble of a job that may be at fault itself is one more
LULL = 0.5  # seconds of trouble and no other answer, before it is everybody's
HALF_LIFE = 10.0  # seconds: what is usual, for a row of troubles to be told from it
UNLIKELY = math.log(1000)  # a row of troubles as long as chance makes it once in a thousand times
LONGEST_ROW = 100
DOUBTFUL = 10  # so many jobs that have each been at fault themselves witness as much as one that has not
REMEMBERED = 50_000  # tokens, and jobs, whose troubles are remembered; of more, the oldest are forgiven

Key = TypeVar("Key")
Value = TypeVar("Value")


class Trouble(NamedTuple):
    """What a token has met so far: how many troubles, the time of the last, and the surprise of the earlier ones less
    what was charged for.
    """

    tries: int
    at: tuple[float, ...]
    surprise: float


class Answers:
    """An upstream's answers, by time: how many messages got through, and how many had trouble by chance and got through
    later. A message that always has trouble is no evidence about others.
    """

    def __init__(self) -> None:
        self._ticks: OrderedDict[int, list[int]] = OrderedDict()

    def note(self, through: int, trouble: int, at: float) -> None:
        tick = self._ticks.setdefault(int(at / TICK), [0, 0])
        tick[0] += through
        tick[1] += trouble
        while len(self._ticks) > KEPT / TICK:
            self._ticks.popitem(last=False)

    def surprise(self, at: float) -> float:
        """How surprising a trouble at that time would be by chance, given what others met before and after; 0 when
        nobody got through on one side.
        """
        here = int(at / TICK)
        reach = int(SIDE / TICK)
        sides = self._near(range(here - 1, here - reach - 1, -1)), self._near(range(here + 1, here + reach + 1))
        if not all(through for through, _ in sides):
            return 0.0
        return -math.log(max((met + 1) / (through + met + 2) for through, met in sides))

    def _near(self, ticks: Iterable[int]) -> tuple[int, int]:
        through = met = 0
        for tick in ticks:
            more = self._ticks.get(tick, (0, 0))
            through, met = through + more[0], met + more[1]
            if through + met >= NEIGHBOURS:
                break
        return through, met


def again(known: Trouble | None, outcome: Outcome, answers: Answers, now: float) -> tuple[Trouble, bool]:
    """What to remember of a token that has met trouble, and whether an attempt is charged to it."""
    tries, at, surprise = known or Trouble(0, (), 0.0)
    weights = [min(PROOF, answers.surprise(when)) for when in at]
    charged = outcome.may_be_taken
    if not charged and outcome.verdict is not Verdict.UNREACHABLE:
        charged = surprise + sum(weights) >= PROOF - 1e-9
    if charged:
        surprise -= PROOF
    if len(at) >= JUDGED:
        at, surprise = at[1:], surprise + weights[0]
    return Trouble(tries + 1, (*at, now), surprise), charged


class Row:
    """The troubles in a row that an upstream's jobs have met since a message got through, and how many are usual."""

    def __init__(self) -> None:
        self.through_at = -math.inf  # when somebody last got through
        self._began = -math.inf
        self._length = 0
        self._doubtful: set[int] = set()  # suspect jobs that met trouble
        self._counted: OrderedDict[int, float] = OrderedDict()  # jobs that may be at fault themselves, and when
        self._usual = [0.0, 0.0]  # that got through, and the length of rows: moving sums
        self._at = 0.0

    def weigh(self, job: int, proven: bool, count: int, now: float) -> int:
        """How many troubles the same answer to `count` messages of a job counts as: all, if others of the job got
        through; only now and then, if the job itself may be at fault.
        """
        if proven:
            return count
        if now - self._counted.get(job, -math.inf) < ANEW:
            return 0
        remember(self._counted, job, now)
        return 1

    def lengthen(self, count: int, certain: bool, now: float) -> None:
        """Add `count` troubles. `certain`: no job can be at fault, so nothing more need be waited for."""
        if certain:
            self._began = -math.inf
        elif not self._length:
            self._began = now
        self._length += count

    def doubt(self, job: int) -> None:
        """A suspect job met trouble; each counts once."""
        self._doubtful.add(job)

    def end(self, through: int, now: float) -> None:
        """`count` messages got through: the row, if there is one, is over."""
        fading = self._fading(now)
        self._usual = [self._usual[0] * fading + through, self._usual[1] * fading + self._length]
        self._at = self.through_at = now
        self._length = 0
        self._doubtful.clear()

    def _fading(self, now: float) -> float:
        return math.pow(0.5, max(0.0, now - self._at) / HALF_LIFE)

    def is_everybodys(self, now: float) -> bool:
        """Whether the troubles in this row are the upstream's fault."""
        length = self._length + len(self._doubtful) // DOUBTFUL
        if not length or 0 <= now - max(self.through_at, self._began) < LULL:
            return False
        through, met = (usual * self._fading(now) for usual in self._usual)
        if through < 1.0:
            return True
        share = (met + 1) / (through + met + 2)
        return length >= min(LONGEST_ROW, UNLIKELY / -math.log(share))


def remember(memory: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Put something into a memory of the latest things."""
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
