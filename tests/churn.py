"""What somebody's open transaction costs a fleet: packs that come, are taken by another node and end, while dead rows
pile up that nobody may clean away.

    python tests/churn.py --seconds 60

Prints the median time of a claim that takes a pack from the pool, before anybody holds a snapshot, and for each sixth
of the time that one is held; and how many dead rows there were.
"""

import argparse
import contextlib
import time
from statistics import median

from kit import KEEPING
from postgres import Postgres, open_store

from gocm_lib.message.job import Job, first_id, next_id
from gocm_lib.state.contract import Count
from gocm_lib.state.packs import pack
from gocm_lib.state.postgres.database import connect
from gocm_lib.state.store import Changed, Finish

JOBS = 16  # that come together


class Churn:
    """One node takes messages and lets go of them, another one sends them."""

    def __init__(self, address):
        self.giver, self.sender = (open_store(address, KEEPING, ("gcm",), name) for name in "ab")
        self.last = 0

    def round(self):
        """How many milliseconds a claim took."""
        now, new = time.time(), []
        for _ in range(JOBS):
            self.last = next_id(first_id(self.last, self.giver.number), now)
            new.append(Job(self.last, "gcm", "token", ("a-token",), '{"data":{"a":1}}', now, now + 1000))
        [made] = pack(new)
        self.giver.keep([made], {Count("accepted_tokens", "gcm"): JOBS})
        self.giver.give("gcm", made.lane, 0, [])
        taken = []
        while not taken:  # a beat that was late may say that there is nothing
            self.sender._pool.add(("gcm", made.lane))
            began = time.perf_counter()
            taken = self.sender.take("gcm", made.lane, 1000)
            took = time.perf_counter() - began
        assert [each.id for each in taken] == [made.id]
        over = Changed(made.id, 0, -JOBS, -JOBS, -JOBS, JOBS)
        self.sender.finish(Finish(now, [over], {"gcm": -JOBS}, counts={Count("delivered", "gcm"): JOBS}))
        return took * 1000

    def run(self, seconds):
        """How long claims took in this time, and when each was."""
        began, found = time.monotonic(), []
        while (at := time.monotonic() - began) < seconds:
            found.append((at, self.round()))
        return found

    def close(self):
        for each in (self.giver, self.sender):
            each.close()


def main(seconds):
    """Run it and print figures."""
    server = Postgres(fsync=True)
    address = server.spool()
    churn = Churn(address)
    try:
        churn.run(2.0)
        usual = median(took for _, took in churn.run(seconds / 6))
        print(f"nobody holds a snapshot: {usual:.2f} ms")
        with contextlib.closing(connect(address)) as reader:
            reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            reader.execute("SELECT count(*) FROM pack")
            found = churn.run(seconds)
            for part in range(6):
                took = median(each for at, each in found if part <= 6 * at / seconds < part + 1)
                print(f"held for {(part + 1) * seconds / 6:.0f} s: {took:.2f} ms, {took / usual:.2f} times")
        with contextlib.closing(connect(address)) as db:
            print(
                "dead rows:",
                dict(db.execute("SELECT relname, n_dead_tup FROM pg_stat_user_tables WHERE n_dead_tup > 0")),
            )
        print(f"{len(found)} claims of {JOBS} messages meanwhile")
    finally:
        churn.close()
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    main(parser.parse_args().seconds)
