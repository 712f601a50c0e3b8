"""The machine fails: disks that fill up or break, clocks that jump, too few open files, others in our files."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from kit import FORM, ROOT, Program, check_ledger, eventually, form, four_clients, memory

from gocm_lib.config.settings import Exit

MB = 1 << 20
DAY = 86400


class Machine:
    """The faults of tests/faults.c, each on while it is set; and what a server needs to be under them."""

    def __init__(self, library, directory, disk):
        self.directory = directory
        self.disk = disk
        self.environ = {"LD_PRELOAD": library, "FAULTS": str(directory), "FAULTY_DISK": str(disk)}

    def set(self, fault, value=""):
        # Renamed into its place: nobody sees half a number.
        (self.directory / "new").write_text(str(value))
        (self.directory / "new").rename(self.directory / fault)

    def clear(self, fault):
        (self.directory / fault).unlink()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here to make faults.so with")
    made = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, ROOT / "tests/faults.c"], check=True)
    return str(made)


@pytest.fixture
def machine(library, tmp_path):
    for name in ("faults", "spool"):
        (tmp_path / name).mkdir()
    return Machine(library, tmp_path / "faults", tmp_path / "spool")


# --------------------------------------------------------------------------------------------------------- the disk


def post(client, tokens):
    """The status of a post, and its Retry-After."""
    status, headers, _ = client.ask("POST", "/gcm/send", form(tokens), FORM)
    return status, headers["Retry-After"]


def fill(client, name, most=10**6):
    """Post messages of 1,000 tokens until one is refused, or `most`: the tokens taken, the status, its Retry-After."""
    taken, status, retry_after = [], 200, None
    while status == 200 and len(taken) < most:
        tokens = [f"{name}-{len(taken)}-{n}-{'x' * 150}" for n in range(1000)]
        status, retry_after = post(client, tokens)
        taken += tokens if status == 200 else []
    return taken, status, retry_after


@pytest.mark.slow
@pytest.mark.parametrize(
    "least, keep, killed", [(0, 9999, False), (3 * MB, 1, True)], ids=["to the last byte", "and killed"]
)
def test_a_full_disk_refuses_drains_and_takes_again(start, sandbox, machine, least, keep, killed):
    sandbox.mode(silent=True)
    machine.set("disk", 34 * MB)
    words = ("--min-free-disk", str(least), "--upstream-timeout", "2", "--keep-jobs", str(keep))
    server = start(*words, environ=machine.environ)
    client = server.http()
    eventually(lambda: (machine.disk / "gocm.db.reserve").exists())
    accepted, _, _ = fill(client, "first", most=45_000)
    # Others take all that is left, so that even a settle finds no room but the reserve.
    left = 34 * MB - sum(path.stat().st_size for path in machine.disk.iterdir())
    (machine.disk / "of-others").write_bytes(b"x" * left)
    second, status, retry_after = fill(client, "second")
    accepted += second
    assert status == 507 and int(retry_after) > 0
    sandbox.mode(silent=False)
    if killed:  # a start needs the reserve, too
        server.kill_group()
        server = start(*words, environ=machine.environ)
        client = server.http()
    check_ledger(server, sandbox, accepted, twice=accepted)
    assert not server.find("died")
    if not killed:
        assert server.find("going on in the spool's reserve")
        eventually(lambda: post(client, ["t"])[0] == 200)  # in the room that became free in the spool itself
    (machine.disk / "of-others").unlink()
    eventually(lambda: post(client, ["v"])[0] == 200)
    eventually(lambda: (machine.disk / "gocm.db.reserve").exists())
    # Now we fill it ourselves.
    sandbox.mode(silent=True)
    more, status, retry_after = fill(client, "third")
    assert status == 507 and int(retry_after) > 0 and len(more) > 20_000
    sandbox.mode(silent=False)
    assert server.settled()["failures"] == 0
    assert set(accepted + more) < set(sandbox.received()["delivered"])
    eventually(lambda: post(client, ["u"])[0] == 200)
    server.settled()
    if keep == 1:  # a backlog that is forgotten takes no room
        eventually(lambda: (machine.disk / "gocm.db").stat().st_size < 5 * MB)


def test_a_failing_fsync_is_no_ok_and_ends_the_server(start, sandbox, machine):
    """What the kernel could not write it forgets, and the next fsync says all is well: never ask again."""
    sandbox.mode(latency=0.5)
    server = start(environ=machine.environ)
    accepted = []
    clients = four_clients(server, 2000, accepted)
    eventually(lambda: len(accepted) > 200)
    machine.set("fsync")
    assert server.wait() == Exit.SPOOL_FAILED
    assert server.find(r"gocm: the spool .* cannot be written any more")
    for client in clients:
        client.join()
    assert len(accepted) < 8000
    assert not server.children()
    machine.clear("fsync")
    sandbox.mode(latency=0)
    start(environ=machine.environ).settled()
    received = sandbox.received()
    assert accepted and set(accepted) <= set(received["delivered"]), "accepted and lost"


def test_a_disk_that_cannot_be_synced_is_found_at_the_start(start, machine):
    server = start(environ=machine.environ)
    assert server.terminate() == 0
    machine.set("fsync")
    refused = Program(*server.process.args[2:], environ=machine.environ)
    assert refused.wait() == Exit.SPOOL_UNWRITABLE
    told = f"gocm: cannot write the spool {server.spool}: disk I/O error; see gocm help options"
    assert refused.log().splitlines()[-1] == told


@pytest.mark.slow
def test_a_power_cut_loses_nothing(start, sandbox, machine):
    """The worst that a disk may do which honours flushes: all that was not fsynced is gone."""
    sandbox.mode(latency=0.2)
    server = start(environ=machine.environ)
    for path in machine.disk.iterdir():
        if path.suffix in (".db", ".db-wal"):
            shutil.copy(path, machine.directory / f"synced-{path.name}")
    machine.set("power")
    accepted = []
    clients = four_clients(server, 1000, accepted)
    # Several checkpoints, so that the log is begun anew; each fsync copies it, which takes its time.
    eventually(lambda: len(accepted) >= 1500, limit=120.0)
    server.kill_group()
    for client in clients:
        client.join()
    for path in machine.disk.iterdir():
        path.unlink()
    synced = list(machine.directory.glob("synced-*"))
    assert {path.name for path in synced} >= {"synced-gocm.db", "synced-gocm.db-wal"}
    for path in synced:
        shutil.copy(path, machine.disk / path.name.removeprefix("synced-"))
    machine.clear("power")
    start(environ=machine.environ).settled()
    lost = set(accepted) - set(sandbox.received()["delivered"])
    assert not lost, f"{len(lost)} of {len(accepted)}"


def test_a_read_only_spool_is_refused_and_untouched(start, sandbox, machine):
    sandbox.mode(silent=True)
    server = start(environ=machine.environ)
    server.send(["a"])
    server.kill_group()
    before = {path: path.read_bytes() for path in machine.disk.iterdir()}
    machine.set("readonly")
    refused = Program(*server.process.args[2:], environ=machine.environ)
    assert refused.wait() == Exit.SPOOL_UNWRITABLE
    told = f"gocm: cannot write the spool {server.spool}: Read-only file system; see gocm help options"
    assert refused.log().splitlines()[-1] == told
    assert {path: path.read_bytes() for path in machine.disk.iterdir()} == before
    machine.clear("readonly")
    sandbox.mode(silent=False)
    assert start(environ=machine.environ).settled()["failures"] == 0


# -------------------------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("offset", [-DAY, DAY])
def test_a_clock_that_jumps_by_a_day_between_runs(start, sandbox, machine, offset):
    sandbox.mode(status=503, retry_after=1)
    server = start("--max-age", str(7 * DAY), environ=machine.environ)
    tokens = [f"t{n}" for n in range(20)]
    for token in tokens[:10]:
        server.send([token])
    eventually(lambda: len(sandbox.received()["arrived"]) == 10)
    eventually(lambda: sandbox.received()["in_flight"] == 0)
    stopped = server.terminate()
    assert stopped == 0
    sandbox.mode(silent=True, status=200)
    server = start("--max-age", str(7 * DAY), "--upstream-timeout", "1", environ=machine.environ)
    for token in tokens[10:]:
        server.send([token])
    server.kill_group()
    machine.set("clock", offset)
    sandbox.mode(silent=False)
    server = start("--max-age", str(7 * DAY), environ=machine.environ)
    report = server.settled()
    assert report["failures"] == 0 and set(sandbox.received()["delivered"]) == set(tokens)
    server.send(["after"])
    assert server.settled()["failures"] == 0


def test_a_clock_that_is_set_back_while_running(start, sandbox, machine):
    sandbox.mode(silent=True)
    server = start("--upstream-timeout", "0.5", environ=machine.environ)
    for n in range(10):
        server.send([f"t{n}"])
    eventually(lambda: len(sandbox.received()["arrived"]) == 10)
    machine.set("clock", -DAY)
    sandbox.mode(silent=False)
    server.logged("the clock was set back by 86")
    server.send(["after"])
    assert server.settled()["failures"] == 0
    assert len(sandbox.received()["delivered"]) == 11


def test_what_expired_while_the_clock_jumped_is_listed_as_failed(start, sandbox, machine):
    sandbox.mode(silent=True)
    server = start(environ=machine.environ)
    server.send(["a", "b"])
    eventually(lambda: sandbox.received()["arrived"])
    server.kill_group()
    machine.set("clock", 2 * DAY)
    server = start(environ=machine.environ)
    assert server.settled()["failures"] == 2
    failed = server.http().json("GET", "/gcm/failed")["failed"]
    assert [(each["token"], each["detail"]) for each in failed] == [("a", "too old"), ("b", "too old")]


# ------------------------------------------------------------------------------------------------- open files, memory


def test_300_clients_where_96_files_may_be_open(start, sandbox):
    server = start("--senders", "2", files=96)
    assert server.find("96 files may be open")
    accepted = []

    def insist(token):
        while True:
            try:
                server.send([token])
            except (OSError, AssertionError):  # turned away, or told 503
                continue
            accepted.append(token)
            return

    clients = [threading.Thread(target=insist, args=(f"t{n}",)) for n in range(300)]
    holding = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    holding[0].settimeout(20)
    assert holding[0].recv(12) == b"", "who says nothing gives way at once"
    os.kill(server.children("sender.*")[0], signal.SIGKILL)  # there are files left for a new generation
    server.logged("sender-2.2 is process")
    for each in holding[:90]:
        each.close()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for each in holding:
        each.close()
    assert len(accepted) == 300
    check_ledger(server, sandbox, accepted)
    assert not server.find("state process died") and not server.find("Traceback")


def test_too_few_files_is_one_line():
    program = Program("--sandbox", "--port", "0", "--spool", ":memory:", "--senders", "4", files=64)
    assert program.wait() == Exit.CONFIG
    assert program.log().splitlines()[-1].startswith("gocm: 64 open files are too few for 4 senders")


@pytest.mark.alone
@pytest.mark.slow
def test_a_million_pending_tokens(start, sandbox):
    """They are on the disk, not in memory, and a kill and a restart with them take seconds."""
    sandbox.mode(silent=True)
    words = ("--senders", "2", "--upstream-timeout", "600")
    server = start(*words)
    client = server.http()
    for part in range(10):
        job = {"tokens": [f"{part}-{n:05d}-of-a-hundred-thousand" for n in range(100_000)], "payload": {"a": 1}}
        assert client.ask("POST", "/gcm/send", json.dumps(job), {"Content-Type": "application/json"})[0] == 200
    assert post(client, ["one-more"])[0] == 503
    eventually(lambda: sandbox.received()["in_flight"] > 15)
    used = memory(server.group())
    assert used <= 150, f"{used:.0f} MB"
    server.kill_group()
    began = time.monotonic()
    server = start(*words)
    assert server.report()["pending"] == 10
    assert time.monotonic() - began < 10, "5 s are promised; this machine may be busy"
    used = memory(server.group())
    assert used <= 150, f"{used:.0f} MB after the restart"


# ----------------------------------------------------------------------------------------------- others in our files


def shell(path, statement):
    """What another program gets from the spool."""
    program = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall())"
    return subprocess.run(
        [sys.executable, "-c", program, path, statement], capture_output=True, text=True, check=True
    ).stdout


def test_another_program_looks_into_the_spool(start, sandbox):
    """Its coming and going must not remove the log that holds what was accepted."""
    sandbox.mode(latency=0.2)
    server = start()
    accepted = []
    clients = four_clients(server, 300, accepted)
    looks = 0
    while any(client.is_alive() for client in clients):
        assert "single" in shell(server.spool, "SELECT name FROM sqlite_master")
        looks += 1
    assert looks > 2 and len(accepted) == 1200
    server.kill_group()
    start().settled()
    assert set(accepted) <= set(sandbox.received()["delivered"])


def test_another_program_locks_the_spool(start, sandbox):
    server = start()
    server.send(["a"])
    server.settled()
    [pid] = server.children("state")
    other = sqlite3.connect(server.spool, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    status, retry_after = post(server.http(), ["b"])
    assert status == 503 and int(retry_after) > 0
    assert post(server.http(), ["c"])[0] == 503
    other.execute("ROLLBACK")
    eventually(lambda: post(server.http(), ["d"])[0] == 200)
    server.settled()
    assert {"a", "d"} <= set(sandbox.received()["delivered"])
    assert server.children("state") == [pid], "it was told to come again, and did not die of it"


@pytest.mark.slow
def test_another_program_reads_on_and_on(start, sandbox, machine):
    """Meanwhile SQLite's log cannot begin anew, and grows until the disk is full; when it is done, all goes on."""
    machine.set("disk", 24 * MB)
    server = start("--min-free-disk", "0", environ=machine.environ)
    server.send(["a"])
    other = sqlite3.connect(server.spool, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM pack").fetchone()
    accepted, status, _ = fill(server.http(), "t")
    assert status == 507 and (machine.disk / "gocm.db-wal").stat().st_size > 10 * MB
    other.close()
    server.settled()
    assert set(accepted) <= set(sandbox.received()["delivered"])
    eventually(lambda: post(server.http(), ["b"])[0] == 200)
    server.settled()
    assert server.terminate() == 0


def test_another_program_locks_the_spool_while_the_state_process_starts(start, sandbox):
    server = start()
    server.send(["a"])
    server.settled()
    other = sqlite3.connect(server.spool, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    [pid] = server.children("state")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.children("state") not in ([], [pid]))
    for token in "bcd":
        assert post(server.http(), [token])[0] == 503
    other.execute("ROLLBACK")
    eventually(lambda: post(server.http(), ["e"])[0] == 200)
    server.settled()
    assert len(server.find("the state process died")) == 1


@pytest.mark.short
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_nobody_but_sqlite_opens_the_spool_in_its_process(tmp_path, suffix):
    """Closing it would drop SQLite's locks (POSIX), and the next program to look in would delete the log."""
    program = f"""
from gocm_lib.state.sqlite import database
db, _ = database.open_spool("s.db")
db.execute("BEGIN IMMEDIATE"), db.execute("DELETE FROM pack"), db.execute("COMMIT")
open("other", "w").close()
open("s.db{suffix}").close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 1 and f"RuntimeError: s.db{suffix} may be opened by SQLite only" in ended.stderr
