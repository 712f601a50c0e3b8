"""logwriter: nobody waits for who reads the log, and what was dropped is told."""

import os
import select
import signal
import time

import pytest
from kit import Unread, eventually

from gocm_lib.process.logwriter import ROOM, STUCK, Writer

short = pytest.mark.short


class Pipe:
    """A writer to a fresh pipe: a file, as it sees it."""

    def __init__(self):
        self.reading, writing = os.pipe()
        self.writer = Writer(f"/proc/self/fd/{writing}", lambda count: b"dropped %d\n" % count)
        os.close(writing)

    def read(self):
        """What comes next, or what has come."""
        assert select.select([self.reading], [], [], 10)[0], "nothing comes"
        return os.read(self.reading, 1 << 20)


@short
def test_nobody_waits_for_a_full_pipe_and_what_was_dropped_is_told():
    pipe, found, put = Pipe(), b"", 40_000
    began = time.monotonic()
    for n in range(put):
        pipe.writer.put(b"line %06d %s\n" % (n, b"x" * 40))
    pipe.writer.flush(60.0)
    assert time.monotonic() - began < 20.0
    dropped = pipe.writer.dropped
    assert 0 < dropped < put - ROOM // 60
    while b"dropped" not in found:
        found += pipe.read()
    *lines, told = found.splitlines()
    assert told == b"dropped %d" % dropped and len(lines) == put - dropped
    assert lines == sorted(lines) and {len(line) for line in lines} == {52}, "in order, and whole"
    pipe.writer.put(b"again\n")
    assert pipe.read() == b"again\n"


@short
def test_what_nobody_will_ever_read_is_counted_once():
    pipe = Pipe()
    os.close(pipe.reading)
    for count in range(1, 4):
        pipe.writer.put(b"lost\n")
        eventually(lambda due=count: pipe.writer.dropped == due)
    used = time.process_time()
    pipe.writer.flush(STUCK)
    assert time.process_time() - used < STUCK / 2, "it does not try again and again to tell"


@short
def test_a_disk_that_was_full_is_told_of_when_there_is_another_file(tmp_path):
    link = tmp_path / "log"
    link.symlink_to("/dev/full")
    writer = Writer(str(link), lambda count: b"dropped %d\n" % count)
    for count in range(1, 4):
        writer.put(b"lost\n")
        eventually(lambda due=count: writer.dropped == due)
    link.unlink()
    writer.reopen(print)
    eventually(lambda: link.exists() and link.read_bytes() == b"dropped 3\n")
    assert writer.dropped == 3


@short
def test_after_it_is_told_to_it_goes_on_in_the_new_file(tmp_path):
    path, old = tmp_path / "log", tmp_path / "log.1"
    problems = []
    writer = Writer(str(path), lambda count: b"")
    writer.put(b"one\n")
    writer.flush(9.0)
    path.rename(old)
    writer.put(b"two\n")
    writer.reopen(problems.append)
    writer.put(b"three\n")
    writer.flush(9.0)
    assert (old.read_bytes(), path.read_bytes()) == (b"one\ntwo\n", b"three\n")
    path.unlink()
    path.mkdir()
    writer.reopen(problems.append)
    writer.flush(9.0)
    assert isinstance(problems[0], IsADirectoryError)


@pytest.fixture
def unread(sandbox, key_file, tmp_path):
    words = ("--gcm-url", sandbox.url(), "--apikey-file", key_file, "--log-level", "info")
    server = Unread(tmp_path / "gocm.db", *words, "--access-log")
    yield server
    server.is_read.set()
    server.kill_group()


@short
def test_a_pipe_without_a_reader_is_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        Writer(str(tmp_path / "pipe"), lambda count: b"")


def test_a_log_that_nobody_reads_holds_nothing(unread, sandbox):
    unread.is_read.clear()
    http = unread.http()
    for n in range(100):
        unread.send([f"t{n}"], client=http)
    for _ in range(4000):
        assert http.ask("GET", "/readyz")[0] == 200
    unread.settled()
    assert "gocm_log_dropped_total 0" not in unread.http().ask("GET", "/metrics")[2].decode()
    unread.is_read.set()
    unread.logged(r"warning front: \d+ lines before this one were dropped")
    unread.is_read.clear()
    for _ in range(4000):
        assert http.ask("GET", "/readyz")[0] == 200
    began = time.monotonic()
    unread.process.send_signal(signal.SIGTERM)
    assert unread.process.wait(30) == 0 and time.monotonic() - began < 10
