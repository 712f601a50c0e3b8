"""The short form of the soak: twenty minutes of one and a half seconds."""

import pytest
from soak import Plan, problems, soak

pytestmark = pytest.mark.alone


def test_bad_days_lose_nothing():
    plan = Plan(
        minutes=20,
        minute=1.5,
        rate=100.0,
        kill_every=6.0,
        outage=(5.0, 2.0),
        full=(12.0, 1.0),
        unread=(16.0, 1.0),
        quota=(("status", 429), ("retry_after", 1)),
    )
    found = soak(plan)
    assert not problems(found, long_enough=False), found
    assert found["senders killed"] >= 2 and found["accepted"] == 3000
