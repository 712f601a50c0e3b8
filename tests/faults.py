"""Random faults on a fleet: two nodes on a primary with a synchronous standby, under load, for as long as one likes.

    python tests/faults.py --seed 1 --minutes 10 --rate 500

Nodes, state processes, senders and servers are killed, stopped for a while and started again, and standbys promoted.
Prints each fault; at the end what was accepted, delivered, lost, delivered twice, and the longest time without an `ok`.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from kit import eventually
from postgres import Pair
from test_nodes import Fleet

DRAIN = 180  # seconds until all has ended when the faults are over


class Faults:
    """What can go wrong with a fleet, each ended before the next begins."""

    def __init__(self, fleet, names, chance, tell):
        self.fleet, self.names, self.chance, self.tell = fleet, names, chance, tell
        self.nodes = {name: self.start(name) for name in names}
        self.in_air = 0  # tokens that the killed had in the air, at most

    def start(self, name):
        return self.fleet.start(name, "--spool-durable", "standby")

    def one(self):
        """Let something go wrong, and wait until it is over."""
        kinds = (
            *(self.kill_node, self.kill_state, self.kill_sender, self.stop_node, self.leave),
            *(self.restart_server, self.kill_server, self.fail_over),
        )
        kind, name = self.chance.choice(kinds), self.chance.choice(self.names)
        self.tell(f"{kind.__name__} {name if 'server' not in kind.__name__ and kind != self.fail_over else ''}")
        kind(name)

    def kill_node(self, name):
        os.killpg(self.nodes[name].process.pid, signal.SIGKILL)
        self.in_air += 2 * 2048
        time.sleep(self.chance.choice([0.1, 5.0, 20.0]))
        self.fleet.nodes.remove(self.nodes[name])
        self.nodes[name] = self.start(name)

    def leave(self, name):
        self.nodes[name].process.terminate()
        self.nodes[name].process.wait(60)
        self.fleet.nodes.remove(self.nodes[name])
        self.nodes[name] = self.start(name)

    def kill_state(self, name):
        self._kill(self.nodes[name].children("state"))

    def kill_sender(self, name):
        self._kill(self.nodes[name].children("sender.*"))
        self.in_air += 2048

    def _kill(self, pids):
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[-1], signal.SIGKILL)

    def stop_node(self, name):
        os.killpg(self.nodes[name].process.pid, signal.SIGSTOP)
        time.sleep(self.chance.choice([1.0, 8.0, 18.0]))
        os.killpg(self.nodes[name].process.pid, signal.SIGCONT)
        self.in_air += 2 * 2048

    def restart_server(self, _):
        self.fleet.server.stop()
        time.sleep(self.chance.choice([0.0, 3.0]))
        self.fleet.server.start()

    def kill_server(self, _):
        self.fleet.server.kill()
        self.fleet.server.start()

    def fail_over(self, _):
        self.fleet.server.fail_over()
        self.fleet.server.stand_by()


def run(seed, minutes, rate, tell=print):
    """Run it. Returns figures by name."""
    chance, place = random.Random(seed), Path(tempfile.mkdtemp())
    pair = Pair()
    fleet = Fleet(pair, pair.spool(), place)
    fleet.sandbox.mode(latency=0.1)
    try:
        faults = Faults(fleet, ["one", "two"], chance, tell)
        until = time.monotonic() + minutes * 60
        with fleet.load(lambda: list(faults.nodes.values()), rate=rate):
            while time.monotonic() < until:
                time.sleep(chance.uniform(1.0, 6.0))
                faults.one()
            fleet.more()
        node = faults.nodes["one"]
        report = eventually(lambda: (r := node.report_or_none()) and r["pending"] == 0 and r, DRAIN)
        delivered = Counter(fleet.sandbox.received()["delivered"])
        return {
            "accepted": len(fleet.accepted),
            "refused": dict(fleet.refused),
            "delivered": len(delivered),
            "lost": len(set(fleet.accepted) - set(delivered)),
            "twice": sum(count > 1 for count in delivered.values()),
            "in the air of the killed, at most": faults.in_air,
            "counted": report["attempts"],
            "failed": report["failures"],
            "counters are exact": report["attempts"] == len(delivered) + report["failures"],
            "longest without an ok, s": round(max(fleet.gaps), 1),
        }
    except BaseException:
        for node in fleet.nodes:
            tell(node.log()[-4000:])
        raise
    finally:
        fleet.end()
        pair.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=500)
    given = parser.parse_args()
    began = time.monotonic()
    found = run(
        given.seed, given.minutes, given.rate, lambda what: print(f"{time.monotonic() - began:6.1f}", what, flush=True)
    )
    print(found)
