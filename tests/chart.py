"""A chart of CPU per message against the rate, of what `gocm bench --json` prints: python tests/chart.py < FILE

Its lines go into gocm_lib/help/bench.md by hand, with the machine that they are of.
"""

import json
import sys

WIDTH = 60  # characters for the dearest
ROWS = {
    "rate-100": "100/s",
    "rate-300": "300/s",
    "rate-1000": "1,000/s",
    "rate-3000": "3,000/s",
    "single": "16 clients",
    "single-64": "64 clients",
    "fanout": "fan-out",
}
PARTS = {"front": "f", "state": "s", "senders": "x"}


def chart(results):
    """The lines: of each row the CPU of each process as so many of its letter, and the sum in microseconds."""
    found = {label: results[name]["cpu_us"] for name, label in ROWS.items() if name in results}
    dearest = max(cpu["total"] for cpu in found.values())
    for label, cpu in found.items():
        bar = "".join(letter * round(sum(cpu[part]) * WIDTH / dearest) for part, letter in PARTS.items())
        yield f"{label:>10} {bar} {cpu['total']:,.0f}"


if __name__ == "__main__":
    print("\n".join(chart(json.load(sys.stdin))))
