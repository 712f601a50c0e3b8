"""Are the sessions in a text true? python tests/session.py FILE COMMAND...: like gocm, or python3 gocm.pyz.

Starts the command with its sandbox in the current directory, runs each `$` line of the text's console blocks, and
compares what it prints with what is written below it; then looks at the pages, and stops it. Exit code 0 if all went
well. CI runs it with README, for the built wheel and for the single file, in a folder that is not the checkout.
"""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

LIMIT = 30.0  # seconds for each step
ID, TIME = r"[0-9a-f]{16}", r"[0-9]{10}\.[0-9]+"  # what differs from one run to the next


def ask(url):
    with urllib.request.urlopen(url, None, LIMIT) as answer:
        return answer.read()


def alike(text):
    return re.sub(f"{ID}|{TIME}", "*", text.replace("\r", "")).strip()


def steps(text):
    """(words that the server is started with, the commands and what each prints). They stand in blocks that begin
    with ```console and those words.
    """
    blocks = re.findall(r"^```console ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    found = [step for _, block in blocks for step in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)]
    return blocks[0][0].split(), found


@contextlib.contextmanager
def played(text, command, extra=()):
    """The server's address and the lines of its log, which grow, after all of a text's sessions were run. Raises
    AssertionError where one is not true.
    """
    words, found = steps(text)
    with tempfile.TemporaryDirectory() as place:
        words = ["--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", f"{place}/gocm.db", *words, *extra]
        server = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
        silent = threading.Timer(10 * LIMIT, server.kill)
        silent.start()
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(iter(server.stderr.readline, "")), daemon=True)
        reader.start()
        try:
            ports = {
                "5601": _logged(server, lines, r"listens on \S+ port (\d+)"),
                "5602": _logged(server, lines, r"http://127.0.0.1:(\d+)/sandbox/received"),
            }
            _run(found, ports)
            yield f"http://127.0.0.1:{ports['5601']}", lines
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(LIMIT)
            silent.cancel()
        assert code == 0, f"it ended with {code}"


def _logged(server, lines, pattern):
    deadline = time.monotonic() + LIMIT
    while not (found := [match for line in list(lines) if (match := re.search(pattern, line))]):
        assert time.monotonic() < deadline and server.poll() is None, f"never logged: {pattern}\n{''.join(lines)}"
        time.sleep(0.02)
    return found[0][1]


def _run(found, ports):
    ids = {}  # as they are written, and as they are here
    for line, expected in found:
        command = line.removeprefix("sleep 1; ").replace("curl ", "curl -s ")
        for written, real in (*ids.items(), *((f":{port}", f":{real}") for port, real in ports.items())):
            command = command.replace(written, real)
        _settled(ports["5601"])
        printed = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=LIMIT).stdout
        assert alike(printed) == alike(expected), f"{command}\n{printed}"
        ids |= zip(re.findall(ID, expected), re.findall(ID, printed))


def _settled(port):
    """Wait until nothing is pending: what a reader sleeps for."""
    deadline = time.monotonic() + LIMIT
    while b'"pending":0' not in (report := ask(f"http://127.0.0.1:{port}/gcm/report")):
        assert time.monotonic() < deadline, report
        time.sleep(0.02)


if __name__ == "__main__":
    with played(Path(sys.argv[1]).read_text(), sys.argv[2:]) as (address, _):
        assert b"GoCM" in ask(f"{address}/status") and b"openapi" in ask(f"{address}/openapi.json")
        assert b"phone" in ask(f"{address}/help/sending")
