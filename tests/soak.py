"""An hour of bad days against a real server: nothing lost, nothing set aside but what is odd, nothing grows.

    python tests/soak.py [--minutes 60] [--minute 60] [--rate 200]

`--minute` is how many seconds a minute has: the short form of it is a test. Prints what came of it; exit code 1 if
anything that is promised was not so. Talks to its own sandbox only, and stops by itself.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kit import FORM, Http, Sandbox, Unread, eventually, form, memory

from gocm_lib.state.packs import from_bytes, read, runs

CLIENTS = 4
CALM = 10.0  # seconds after an outage until all is as it was before
ODD = ("error-not_found_json-", "error-unavailable-")


class Plan(NamedTuple):
    """What happens when, in minutes of `minute` seconds. `quota` is how the sandbox says 429."""

    minutes: float = 60
    minute: float = 60.0
    rate: float = 200.0
    kill_every: float = 1.0
    odd_every: float = 0.2
    reload_every: float = 5.0
    outage: tuple[float, float] = (10.0, 3.0)  # when, and for how long
    full: tuple[float, float] = (25.0, 2.0)
    unread: tuple[float, float] = (40.0, 1.0)
    quota: tuple[tuple[str, object], ...] = (("answer", "quota_project"),)


class Soak:
    def __init__(self, plan, place):
        self.plan = plan
        self.sandbox = Sandbox("--latency", "0.1")
        host = f"127.0.0.1:{self.sandbox.port}"
        fcm = ("--fcm-url", f"http://{host}", "--fcm-metadata", "--metadata-host", host)
        # Odd ones are to end within the hour: so their attempts come soon.
        often = ("--retry-base", "1", "--retry-cap", "30", "--access-log")
        self.server = Unread(place / "gocm.db", *fcm, *often)
        self.began = time.monotonic()
        self.began_at = time.time()
        self.accepted = set()
        self.refused = 0
        self.samples = []  # (MB, open files) of all processes of the server

    def passed(self):
        """Minutes since it began."""
        return (time.monotonic() - self.began) / self.plan.minute

    def run(self):
        """Do all that the plan has; what was found, by name."""
        clients = [threading.Thread(target=self._post, args=(k,), daemon=True) for k in range(CLIENTS)]
        chores = [
            threading.Thread(target=self._each, args=args, daemon=True)
            for args in (
                (self.plan.kill_every, self._kill),
                (self.plan.odd_every, self._odd),
                (self.plan.reload_every, lambda _: self.server.process.send_signal(signal.SIGHUP)),
                (1.0, self._sample, 0.5),  # half a minute after a kill, when there is one generation
            )
        ]
        chores += [
            threading.Thread(target=self._during, args=args, daemon=True)
            for args in (
                (self.plan.outage, lambda: self.sandbox.mode(status=503), lambda: self.sandbox.mode(status=200)),
                (self.plan.full, lambda: self.sandbox.mode(**dict(self.plan.quota)), self._no_quota),
                (self.plan.unread, self.server.is_read.clear, self.server.is_read.set),
            )
        ]
        for thread in (*clients, *chores):
            thread.start()
        for thread in clients:
            thread.join()
        eventually(lambda: self._open() == 0, limit=180.0, every=0.5)
        return self._findings()

    def _no_quota(self):
        self.sandbox.mode(**{name: 200 if name == "status" else "" for name, _ in self.plan.quota})

    # ------------------------------------------------------------------------------------------------ what is done

    def _post(self, k):
        """One client's share of the posts, each repeated until it is taken, under a key that makes it one."""
        connection, each = None, CLIENTS / self.plan.rate
        for n in range(int(self.plan.minutes * self.plan.minute / each)):
            time.sleep(max(0.0, self.began + n * each - time.monotonic()))
            token = f"good-{k}-{n}"
            while token not in self.accepted:
                try:
                    connection = connection or http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
                    self._ask(connection, token)
                except (OSError, http.client.HTTPException):
                    connection = None

    def _ask(self, connection, token):
        headers = {**FORM, "Idempotency-Key": token}
        connection.request("POST", "/gcm/send", form([token], upstream="fcm"), headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            self.accepted.add(token)
        else:
            self.refused += 1
            time.sleep(0.1)

    def _each(self, every, do, after=0.0):
        """Do something at each such part of the time, or so long after it, but at its beginning and its end."""
        count = 1
        while (due := count * every + after) < self.plan.minutes:
            time.sleep(max(0.0, self.began + due * self.plan.minute - time.monotonic()))
            do(count)
            count += 1

    def _during(self, when, begin, end):
        at, long = when
        time.sleep(max(0.0, self.began + at * self.plan.minute - time.monotonic()))
        begin()
        time.sleep(long * self.plan.minute)
        end()

    def _kill(self, _count):
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(self.server.children("sender-[0-9.]+")[-1], signal.SIGKILL)

    def _odd(self, count):
        with contextlib.suppress(OSError, http.client.HTTPException):
            Http(self.server.port).ask("POST", "/gcm/send", form([f"{ODD[count % 2]}{count}"]), FORM)

    def _sample(self, _count):
        with contextlib.suppress(OSError):
            pids = self.server.group()
            self.samples.append((memory(pids), sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)))

    # ----------------------------------------------------------------------------------------------- what came of it

    def _open(self):
        """Good tokens that are not finished."""
        return sum(token.startswith("good-") and not ended for token, _, ended, _ in self._tokens())

    def _tokens(self):
        """Of each token in the spool: itself, why it failed ("": it has not), when it ended (0: it has not), and when
        it was accepted.
        """
        ends = {
            (pack, first + at): when
            for pack, first, positions, when in self._ask_spool("SELECT pack, first, positions, at FROM ended")
            for low, high in runs(from_bytes(positions))
            for at in range(low, high)
        }
        singles = self._ask_spool("SELECT job, n, failure, due_at, state FROM single")
        alone = {(job, n): (failure, at if state else 0.0) for job, n, failure, at, state in singles}
        for pack, body in self._ask_spool("SELECT id, text FROM body"):
            position = 0
            for job in read(body):
                for n, token in enumerate(job.tokens):
                    failure, ended = alone.get((job.job, n)) or ("", ends.get((pack, position), 0.0))
                    yield token, failure, ended, job.accepted_at
                    position += 1

    def _ask_spool(self, statement):
        with contextlib.closing(sqlite3.connect(f"file:{self.server.spool}?mode=ro", uri=True)) as db:
            return db.execute(statement).fetchall()

    def _calm(self, at):
        """Whether what was accepted at that time met no outage."""
        minute = self.plan.minute
        return all(not begin * minute - 1 < at < (begin + long) * minute + CALM for begin, long in self._outages())

    def _outages(self):
        return self.plan.outage, self.plan.full

    def _findings(self):
        rows = [(token, failure, ended - at, at) for token, failure, ended, at in self._tokens()]
        delivered = self.sandbox.received()["delivered"]
        waits = sorted(
            wait for token, _, wait, at in rows if token.startswith("good-") and self._calm(at - self.began_at)
        )
        quarter = max(1, len(self.samples) // 4)
        first, last = self.samples[quarter : 2 * quarter] or self.samples, self.samples[-quarter:]
        return {
            "accepted": len(self.accepted),
            "refused for a moment": self.refused,
            "lost": len(self.accepted - delivered.keys()),
            "more than once": sum(count > 1 for count in delivered.values()),
            "set aside though good": sum(bool(why) for token, why, *_ in rows if token.startswith("good-")),
            "odd ones set aside": sum(bool(why) for token, why, *_ in rows if not token.startswith("good-")),
            "p50 s": round(waits[len(waits) // 2], 3),
            "p99 s": round(waits[int(len(waits) * 0.99)], 3),
            "MB, second quarter and last": [round(max(mb for mb, _ in part), 1) for part in (first, last)],
            "open files, the same": [max(files for _, files in part) for part in (first, last)],
            "senders killed": len(set(self.server.find(r"(sender-\d+\.\d+) died \(killed"))),
        }


def problems(found, *, long_enough=True):
    """What of this is not as promised; whether something grows is seen only if it was long enough."""
    told = [f"{name}: {found[name]}" for name in ("lost", "set aside though good") if found[name]]
    told += [] if found["odd ones set aside"] else ["no odd one ended"]
    told += [] if found["p99 s"] < 1.0 else [f"p99 {found['p99 s']} s"]
    for name, slack in (
        () if not long_enough else (("MB, second quarter and last", 1.15), ("open files, the same", 1.3))
    ):
        before, after = found[name]
        told += [f"{name}: {before} to {after}"] if after > before * slack + 10 else []
    return told


def soak(plan):
    """Run a plan; what was found."""
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        running = Soak(plan, Path(place))
        try:
            return running.run()
        finally:
            running.server.is_read.set()
            running.server.kill_group()
            running.sandbox.kill_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("minutes", 60.0), ("minute", 60.0), ("rate", 200.0)):
        parser.add_argument(f"--{option}", type=float, default=default)
    result = soak(Plan(**vars(parser.parse_args())))
    print(json.dumps(result, indent=1))
    wrong = problems(result)
    print("\n".join(wrong) or "as promised")
    sys.exit(bool(wrong))
