"""width: a path that allows few connections."""

import json
import re
import socket
import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import answer, eventually

from gocm_lib.senders.width import LONGEST_WAIT, Width

short = pytest.mark.short


def turned_away(width, others, times, now=0.0):
    for _ in range(times):
        width.note(False, others, now)


@short
def test_it_is_what_works_and_one_more_now_and_then():
    width = Width(1000)
    turned_away(width, 64, 10)
    assert width.room == 64 and width.is_narrow
    tries, now = [], 0.0
    while now < 600:
        if width.allowed(64, now) > 64:
            tries.append(now)
            turned_away(width, 64, 1, now)
        now += 0.5
    assert 8 < len(tries) < 20 and tries[-1] - tries[-2] >= LONGEST_WAIT


@short
def test_it_grows_again_when_the_limit_is_gone():
    width, now = Width(1000), 0.0
    turned_away(width, 64, 10)
    while width.is_narrow:
        width.allowed(width.room, now)
        width.note(True, width.room, now)
        now += 0.1
    assert 10 < now < 60


@short
@given(st.lists(st.booleans(), max_size=100), st.integers(1, 50))
def test_what_breaks_some_is_no_limit(works, others):
    width = Width(100)
    for n, each in enumerate(works):
        width.note(True, others, float(n))
        width.note(each, others, float(n))
    assert not width.is_narrow


@short
def test_an_upstream_that_is_away_is_no_limit():
    width = Width(100)
    turned_away(width, 10, 8)
    turned_away(width, 0, 1)
    assert not width.is_narrow


class Narrow:
    """An upstream behind something that resets connections above a number."""

    def __init__(self, most):
        self.most, self.alive, self.turned_away = most, 0, 0
        self.lock = threading.Lock()

    def __call__(self, upstream, sock, _number):
        with self.lock:
            self.alive += 1
            full = self.alive > self.most
        try:
            if full:
                self.turned_away += 1
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            while tokens := upstream.read(sock):
                time.sleep(0.2)
                sock.sendall(answer(tokens))
        finally:
            with self.lock:
                self.alive -= 1


def test_a_path_that_allows_few_connections_is_used_as_it_is(start, upstream):
    narrow = Narrow(8)
    server = start("--senders", "1", url=upstream(narrow).url())
    for n in range(600):
        server.send([f"t{n}"], json.dumps({"a": n}))  # each its own, so that they share no request
    report = eventually(lambda: (found := server.report())["pending"] == 0 and found, limit=60)
    assert report["failures"] == 0 and narrow.turned_away < 100, narrow.turned_away
    told = server.http().ask("GET", "/metrics")[2].decode()
    burnt = re.search(r"gocm_retries_total\{[^}]*gcm[^}]*connection[^}]*\} (\d+)", told)
    assert int(burnt[1]) <= 32, "those before it was known"
