"""blame: what others were answered is the evidence, before and after; the rest is in test_bad_days."""

import pytest

from gocm_lib.message.outcome import Outcome, Verdict
from gocm_lib.state.blame import JUDGED, LULL, NEIGHBOURS, PROOF, SIDE, Answers, Row, Trouble, again

pytestmark = pytest.mark.short

NOW = 1e6
BUSY = Outcome(Verdict.DEFERRED, "HTTP 503", cause="unavailable")


def answers(before=0, after=0, recovered=0):
    """Of an upstream that had so many get through before and after NOW, and had trouble with so many of them then."""
    found = Answers()
    found.note(before, recovered, NOW - 1)
    found.note(after, recovered, NOW + 1)
    return found


def test_evidence_is_needed_of_both_sides():
    assert answers(before=50).surprise(NOW) == answers(after=50).surprise(NOW) == 0.0
    assert answers(50, 50).surprise(NOW) >= PROOF
    assert 0 < answers(1, 1).surprise(NOW) < PROOF / 2


def test_what_others_met_too_and_got_over_is_no_surprise():
    assert answers(50, 50, recovered=50).surprise(NOW) < 0.8


def test_what_is_long_ago_says_nothing():
    found = Answers()
    found.note(50, 0, NOW - SIDE - 1)
    found.note(50, 0, NOW + 1)
    assert found.surprise(NOW) == 0.0


def test_a_token_is_charged_when_it_meets_trouble_again():
    first, charged = again(None, BUSY, answers(50, 50), NOW)
    assert not charged and first == Trouble(1, (NOW,), 0.0)
    second, charged = again(first, BUSY, answers(50, 50), NOW + 10)
    assert charged and second.tries == 2
    assert not again(first, BUSY, answers(50), NOW + 10)[1]
    assert again(None, BUSY._replace(answered=False), Answers(), NOW)[1]
    assert not again(first, Outcome(Verdict.UNREACHABLE, "x"), answers(50, 50), NOW + 10)[1]


def test_what_looked_like_its_own_is_chance_once_others_got_over_it():
    found = answers(15, 15)
    known, _ = again(None, BUSY, found, NOW)
    known, charged = again(known, BUSY, found, NOW + 2)
    assert not charged and found.surprise(NOW) > 0.9 * PROOF
    found.note(15, 40, NOW + 3)
    known, charged = again(known, BUSY, found, NOW + 10)
    assert not charged and found.surprise(NOW + 2) > 0.1 * PROOF


def test_of_many_troubles_the_oldest_are_not_judged_anew():
    known, charges, found = None, 0, answers(15, 15)
    for n in range(20 * JUDGED):
        found.note(15, 15, NOW + n)
        known, charged = again(known, BUSY, found, NOW + n)
        charges += charged
    assert len(known.at) == JUDGED and known.tries == 20 * JUDGED
    assert 0.2 < charges * PROOF / known.tries < 0.8, "each weighs as much as one of two is surprising"


def test_a_row_is_everybodys_when_it_is_longer_than_usual():
    row = Row()
    for n in range(20):
        row.lengthen(1, False, NOW + n)
        row.end(NEIGHBOURS, NOW + n)
    assert not row.is_everybodys(NOW + 20)
    row.lengthen(1, False, NOW + 19)
    assert not row.is_everybodys(NOW + 19 + LULL / 2) and not row.is_everybodys(NOW + 20)
    row.lengthen(9, False, NOW + 20)
    assert row.is_everybodys(NOW + 20)


def test_the_first_trouble_of_all_is_nobodys_yet():
    row = Row()
    row.lengthen(1, False, NOW)
    assert not row.is_everybodys(NOW + LULL / 2) and row.is_everybodys(NOW + LULL)
    row.lengthen(1, True, NOW)
    assert row.is_everybodys(NOW), "but where no job can be at fault"
