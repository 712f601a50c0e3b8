"""What is around GoCM and may be missing, shared with others, or taken away."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import eventually

from gocm_lib.rundir import MARK, RunDirectory

short = pytest.mark.short
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a namespace of its own, so root")


def run_directory(server, place):
    """Where a server has its sockets."""
    [path] = [path for path in Path(place).glob("gocm-*-*") if path.name.split("-")[1] == str(server.process.pid)]
    return path


@short
def test_only_what_is_ours_and_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backup = tmp_path / "gocm-20240101-backup"
    backup.mkdir()
    (backup / "dear").write_text("to somebody")
    link = tmp_path / "gocm-1-link"
    link.symlink_to(backup)
    alive = RunDirectory()
    left = tmp_path / "gocm-99999999-left"
    left.mkdir()
    (left / MARK).touch()
    other = RunDirectory()
    assert not left.exists() and Path(alive.path).exists() and (backup / "dear").exists() and link.is_symlink()
    other.remove()
    alive.remove()
    assert sorted(tmp_path.iterdir()) == [link, backup]


@root
def test_one_in_another_pid_namespace_leaves_our_sockets_alone(start, tmp_path):
    server = start(environ={"TMPDIR": str(tmp_path)})
    path = run_directory(server, tmp_path)
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", ":memory:")
    shielded = ("unshare", "--pid", "--fork", "--mount-proc", "timeout", "-s", "TERM", "3")
    found = subprocess.run(
        [*shielded, *server.command(words)], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert "listens on" in found.stderr, found.stderr
    assert path.exists() and [other for other in tmp_path.glob("gocm-*-*")] == [path]
    server.send(["a"])
    server.settled()


def test_what_was_taken_away_is_made_anew(start, tmp_path):
    server = start("--senders", "1", environ={"TMPDIR": str(tmp_path)})
    path = run_directory(server, tmp_path)
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
    assert server.terminate() == 0 and not list(tmp_path.glob("gocm-*-*"))


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
