"""Does an installed GoCM deliver a push? python tests/delivers.py COMMAND...: like gocm, or python3 gocm.pyz.

Starts it with its sandbox in the current directory, sends, reads the report and the page, stops it. Exit code 0 if all
went well. CI runs it with the built wheel and the single file, in a folder that is not the checkout.
"""

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

LIMIT = 30.0  # seconds for each step


def ask(url, body=None):
    with urllib.request.urlopen(url, body, LIMIT) as answer:
        return answer.read()


def deliver(command):
    """Raise AssertionError when a push is not delivered by a server that this command starts."""
    with tempfile.TemporaryDirectory() as place:
        words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", f"{place}/gocm.db")
        server = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
        silent = threading.Timer(4 * LIMIT, server.kill)
        silent.start()
        try:
            lines = iter(server.stderr.readline, "")
            found = next(found for line in lines if (found := re.search(r"listens on (\S+) port (\d+)", line)))
            url = "http://{}:{}".format(*found.groups())
            assert ask(f"{url}/gcm/send", b"tokens=phone-1&payload=%7B%22title%22:%22Hello%22%7D") == b"ok\n"
            deadline = time.monotonic() + LIMIT
            while b'"attempts":1,"failures":0,"pending":0' not in (report := ask(f"{url}/gcm/report")):
                assert time.monotonic() < deadline, report
                time.sleep(0.05)
            assert b"GoCM" in ask(f"{url}/status") and b"openapi" in ask(f"{url}/openapi.json")
        finally:
            server.send_signal(signal.SIGTERM)
            server.stderr.read()
            silent.cancel()
        assert server.wait(LIMIT) == 0


if __name__ == "__main__":
    deliver(sys.argv[1:])
