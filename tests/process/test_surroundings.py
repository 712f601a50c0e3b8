"""What is around GoCM and may be missing, shared with others, or taken away."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from kit import FORM, ROOT, Http, Program, eventually, form

from gocm_lib.process.run_directory import MARK, SEMAPHORES, RunDirectory

short = pytest.mark.short
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a namespace of its own, so root")


def run_directory(server, place):
    """Where a server has its sockets."""
    [path] = [path for path in Path(place).glob("gocm-*-*") if path.name.split("-")[1] == str(server.process.pid)]
    return path


@short
def test_only_what_is_ours_and_left_is_removed(temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in ("tempdir", "semprefix"):  # put back afterwards: multiprocessing is used in here, too
        monkeypatch.setitem(current_process()._config, name, current_process()._config.get(name))
    backup = temporary / "gocm-20240101-backup"
    backup.mkdir()
    (backup / "dear").write_text("to somebody")
    link = temporary / "gocm-1-link"
    link.symlink_to(backup)
    alive = RunDirectory()
    left = temporary / "gocm-99999999-left"
    left.mkdir()
    (left / MARK).touch()
    other = RunDirectory()
    assert not left.exists() and Path(alive.path).exists() and (backup / "dear").exists() and link.is_symlink()
    other.remove()
    alive.remove()
    assert sorted(temporary.iterdir()) == [link, backup]


@root
def test_one_in_another_pid_namespace_leaves_our_sockets_alone(start, temporary):
    server = start(environ={"TMPDIR": str(temporary)})
    path = run_directory(server, temporary)
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", ":memory:")
    shielded = ("unshare", "--pid", "--fork", "--mount-proc", "timeout", "-s", "TERM", "3")
    found = subprocess.run(
        [*shielded, *server.command(words)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert "listens on" in found.stderr, found.stderr
    assert path.exists() and [other for other in temporary.glob("gocm-*-*")] == [path]
    server.send(["a"])
    server.settled()


def test_what_was_taken_away_is_made_anew(start, temporary):
    server = start("--senders", "1", environ={"TMPDIR": str(temporary)})
    path = run_directory(server, temporary)
    shutil.rmtree(path)
    server.logged("made anew")
    server.logged("state process's socket: made anew")
    [sender] = server.children("sender-1.1")
    os.kill(sender, signal.SIGKILL)
    server.logged("sender-2.1 is process")
    server.send(["a"])
    eventually(lambda: (report := server.report_or_none()) and report["pending"] == 0)
    os.kill(server.children("state")[-1], signal.SIGKILL)
    server.logged("the state process died")
    eventually(lambda: server.http().ask("GET", "/readyz")[0] == 200)
    server.send(["b"])
    assert server.settled()["attempts"] == 2
    assert server.terminate() == 0 and not list(temporary.glob("gocm-*-*"))


@root
def test_what_others_put_in_its_place_is_not_spoken_to(start, temporary):
    """Where they may rename: they got calls that were unpickled, so they could run what they liked."""
    temporary.chmod(0o777)
    server = start("--senders", "1", environ={"TMPDIR": str(temporary)})
    path = run_directory(server, temporary)
    path.rename(temporary / "away")
    path.mkdir()
    heard = []
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path / "state"))
        os.seteuid(65534)  # who listens is who called listen(2)
        theirs.listen()
        os.seteuid(0)

        def greet():
            with Connection(theirs.accept()[0].detach()) as caller:
                try:
                    caller.send_bytes(b"#CHALLENGE#" + bytes(20))
                    heard.append(caller.recv_bytes())
                except (OSError, EOFError):
                    heard.append(b"")

        threading.Thread(target=greet, daemon=True).start()
        assert server.http().ask("GET", "/readyz")[0] in (200, 503)
        eventually(lambda: heard)
        server.logged("made anew")
    assert heard == [b""], "not a word"
    os.kill(server.children("sender-1.1")[0], signal.SIGKILL)
    server.logged("sender-2.1 is process")
    server.send(["a"])
    assert server.settled()["attempts"] == 1
    assert server.terminate() == 0


def test_semaphores_of_who_was_killed_are_removed(start, temporary):
    """In 64 KiB of shared memory, ten kills left no room for another start."""
    server = start(environ={"TMPDIR": str(temporary)})
    name = run_directory(server, temporary).name
    assert list(SEMAPHORES.glob(f"sem.{name}-*"))
    server.kill_group()
    start(environ={"TMPDIR": str(temporary)})
    assert not list(SEMAPHORES.glob(f"sem.{name}-*"))


NO_ROOM = "mount -t tmpfs -o size=4k tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/full bs=4k count=1"
MISSING = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"


@root
@pytest.mark.parametrize("mount", ["mount -t tmpfs -o ro tmpfs /dev/shm", NO_ROOM, MISSING])
def test_without_shared_memory_it_says_what_is_missing(server, mount):
    command = server.command(("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", ":memory:"))
    words = ["unshare", "--mount", "sh", "-c", f'{mount} 2>/dev/null; exec timeout 20 "$0" "$@"', *command]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 78 and "Traceback" not in found.stderr, found.stderr
    assert "/dev/shm must be there" in found.stderr.splitlines()[-1]


@short
def test_a_place_for_sockets_whose_name_is_too_long_is_told(temporary):
    place = temporary / ("x" * 80)
    place.mkdir()
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", ":memory:")
    found = subprocess.run(
        [sys.executable, str(ROOT / "gocm.py"), *words],
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 78 and "sockets allow: give another $TMPDIR" in found.stderr
    assert not list(place.iterdir())


class Elsewhere(Program):
    """One that is started in another directory, or in another way."""

    def __init__(self, *words, prefix=(), **how):
        self.prefix = prefix
        super().__init__(*words, **how)

    def command(self, words):
        return [*self.prefix, *super().command(words)]


IN = (sys.executable, "-c", "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])")
SANDBOX = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--retry-base", "0.05")


def test_where_it_was_started_may_go_away(tmp_path, temporary):
    """A release's folder: replaced by the next, while the old one runs."""
    release = tmp_path / "release"
    release.mkdir()
    (release / "gocm.toml").write_text("max_tokens = 2\n")
    words = (*SANDBOX, "--log-level", "debug", "--senders", "1", "--config", "gocm.toml", "--spool", "../gocm.db")
    program = Elsewhere(*words, prefix=(*IN, str(release)))
    try:
        http = Http(int(program.logged(r"gocm \S+ listens on \S+ port (\d+)")))
        shutil.rmtree(release)
        [sender] = program.find(r"sender-1.1 is process (\d+)")
        os.kill(int(sender), signal.SIGKILL)
        program.logged("sender-2.1 is process")
        eventually(lambda: http.ask("GET", "/readyz")[0] == 200)
        release.mkdir()
        (release / "gocm.toml").write_text("max_tokens = 3\n")
        program.process.send_signal(signal.SIGHUP)
        program.logged("SIGHUP: changed: max_tokens")
        assert (tmp_path / "gocm.db").exists()
    finally:
        program.kill_group()


def test_a_bundle_named_from_where_it_is_may_lose_that_place_too(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "gocm.py"), "bundle", "-o", str(tmp_path / "gocm.pyz")], check=True)
    (tmp_path / "here").mkdir()

    class Bundle(Elsewhere):
        def command(self, words):
            return [*self.prefix, sys.executable, "../gocm.pyz", *words]

    program = Bundle(*SANDBOX, "--spool", ":memory:", "--senders", "1", prefix=(*IN, str(tmp_path / "here")))
    try:
        http = Http(int(program.logged(r"gocm \S+ listens on \S+ port (\d+)")))
        shutil.rmtree(tmp_path / "here")
        assert b"<html" in http.ask("GET", "/status")[2] and http.ask("GET", "/readyz")[0] == 200
        assert program.terminate() == 0
    finally:
        program.kill_group()


@root
def test_as_process_1_it_buries_what_is_left_to_it(sandbox, tmp_path):
    command = tmp_path / "fetch"
    command.write_text("#!/bin/sh\n(setsid sleep 0.2 &) >/dev/null 2>&1\necho token\n")
    command.chmod(0o700)
    words = (
        "--token-command",
        str(command),
        "--fcm-project",
        "project-1",
        "--fcm-url",
        f"http://127.0.0.1:{sandbox.port}",
    )
    shielded = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    program = Elsewhere(*words, "--port", "0", "--spool", str(tmp_path / "gocm.db"), prefix=shielded)
    try:
        program.logged("listens on")
        [first] = children_of(program.process.pid)
        eventually(lambda: len(children_of(first)) == 1 and not [pid for pid in children_of(first) if is_zombie(pid)])
        os.kill(first, signal.SIGHUP)
        program.logged("SIGHUP: keys, tokens")
        os.kill(first, signal.SIGTERM)
        program.logged("stopping on SIGTERM")
        assert program.wait() == 0
    finally:
        program.kill_group()


def _stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["gone", "-1"]


def children_of(parent):
    return [int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if _stat(pid)[1] == str(parent)]


def is_zombie(pid):
    return _stat(pid)[0] == "Z"


def test_a_sighup_before_it_serves_is_not_deadly(tmp_path):
    program = Program(*SANDBOX, "--spool", ":memory:")
    try:
        # From when it is noted: a process that has not come to its own first lines cannot help it.
        caught = 1 << (signal.SIGHUP - 1)
        eventually(lambda: int(status(program.process.pid)["SigCgt"], 16) & caught, every=0.001)
        assert "_sqlite3" not in Path(f"/proc/{program.process.pid}/maps").read_text(), "before all that takes time"
        program.process.send_signal(signal.SIGHUP)
        program.logged("listens on")
        program.logged("SIGHUP: keys, tokens")
        assert program.terminate() == 0
    finally:
        program.kill_group()


def status(pid):
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


@short
@pytest.mark.parametrize("option", ["--apikey-file", "--tls-cert", "--auth-token-file"])
def test_a_pipe_is_no_key_file(tmp_path, option):
    os.mkfifo(tmp_path / "pipe", 0o600)
    words = ("check-config", "--sandbox", option, str(tmp_path / "pipe"))
    found = subprocess.run([sys.executable, str(ROOT / "gocm.py"), *words], capture_output=True, text=True, timeout=20)
    assert found.returncode == 78 and "pipe is no regular file" in found.stderr


@short
@pytest.mark.parametrize("command", ["no-such-program-here --x", "./nothing", "/nowhere/at/all", "''"])
def test_a_token_command_that_is_not_there_is_told(command):
    words = ("check-config", "--token-command", command, "--fcm-project", "project-1")
    found = subprocess.run([sys.executable, str(ROOT / "gocm.py"), *words], capture_output=True, text=True)
    assert found.returncode == 78 and "--token-command: there is no program" in found.stderr


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_without_stderr_it_has_its_log(tmp_path, closed):
    path = tmp_path / "log"
    prefix = ("sh", "-c", f'exec "$0" "$@" {closed}')
    program = Elsewhere(*SANDBOX, "--spool", str(tmp_path / "gocm.db"), "--logto", str(path), prefix=prefix)
    try:
        eventually(lambda: path.exists() and "listens on" in path.read_text())
        assert os.readlink(f"/proc/{program.process.pid}/fd/2") == "/dev/null"
        assert program.terminate() == 0 and "stopped" in path.read_text()
    finally:
        program.kill_group()


def test_it_is_not_ready_while_what_is_posted_cannot_be_kept(start):
    """Somebody has the spool locked: it can be read, and nothing more."""
    server = start()
    http = server.http()
    assert http.ask("GET", "/readyz")[0] == 200
    with contextlib.closing(sqlite3.connect(server.spool, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert http.ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 503
        status, _, body = http.ask("GET", "/readyz")
        assert status == 503 and "messages cannot be kept" in body.decode()
        other.execute("ROLLBACK")
    eventually(lambda: http.ask("GET", "/readyz")[0] == 200)
    server.send(["b"])
    server.settled()
