"""A spool moves from a file into PostgreSQL and back: whole, once, and whatever interrupts it."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit import KEEPING, ROOT, claim, tally
from test_upgrade import MANY, MORE, TOLD, check, old_spool, opened, state_of

psycopg = pytest.importorskip("psycopg")

from postgres import open_store  # noqa: E402

from gocm_lib.message.outcome import DELIVERED, Result  # noqa: E402

pytestmark = pytest.mark.short


@pytest.fixture
def address(postgres):
    return postgres.spool()


@contextlib.contextmanager
def node(address, name="one"):
    store = open_store(address, KEEPING, name=name)
    try:
        yield state_of(store)
    finally:
        store.close()


def gocm(*words, **environ):
    command = [sys.executable, str(ROOT / "gocm.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def move(here, there, problem=""):
    """What the command says."""
    done = gocm("spool", "move", here, there)
    assert (done.returncode == 0) == (not problem) and problem in done.stderr, done.stderr
    return done.stdout


def file_of(tmp_path, more=""):
    return old_spool(tmp_path / "s.db", more)


def test_all_is_said_as_before_there_and_back_again(address, tmp_path):
    path = file_of(tmp_path)
    assert "s.db.moved" in move(path, address)
    assert not path.exists()
    with node(address) as state:
        check(state)
    back = tmp_path / "back.db"
    move(address, back)
    check(state_of(opened(back)))


def test_what_has_moved_is_sent_by_any_node(address, tmp_path):
    move(file_of(tmp_path), address)
    with node(address) as state:
        taken = {}
        for turn in range(20):
            found = claim(state, now=2000.0 + turn, room=2000)
            taken |= found
            for (job, n), token in found.items():
                upstream = state.status(job, "", -1, 1).upstream
                state.settle(1, [Result(upstream, job, n, token.attempt, DELIVERED)], 2000.0 + turn)
        assert len(taken) == TOLD["tally"]["tokens"] and state.snapshot().tokens == 0


ANOTHER = """
import sys
from kit import accept, new_job, new_state
accept(new_state(sys.argv[1], ("gcm", "fcm")), [new_job(5 << 56, ["x", "y"])])
"""


def test_two_files_move_into_one_spool(address, tmp_path):
    """Machines that had a file each become nodes. What is counted is counted together."""
    move(file_of(tmp_path), address)
    other = tmp_path / "t.db"
    made = subprocess.run([sys.executable, "-c", ANOTHER, str(other)], cwd=ROOT / "tests")
    assert made.returncode == 0
    move(other, address)
    with node(address) as state:
        assert tally(state)["tokens"] == TOLD["tally"]["tokens"] + 2
        assert state.status(5 << 56, "", -1, 9).states["ready"] == 2


def test_nobody_runs_meanwhile_and_where_it_went_is_told(address, tmp_path):
    path = file_of(tmp_path)
    with node(address):
        move(path, address, "nodes run on the spool")
    move(path, address)
    back = tmp_path / "back.db"
    move(address, back)
    words = ("--sandbox", "--sandbox-port", "0", "--port", "0", "--spool", address)
    done = gocm(*words, STATE_DIRECTORY=str(tmp_path))
    assert done.returncode == 78 and f"moved to {back}" in done.stderr
    assert "all is moved already" in move(address, back)
    move(address, tmp_path / "elsewhere.db", "moved to")


@pytest.mark.parametrize("here, there", [("a.db", "b.db"), ("postgresql://a@/x", "postgresql://a@/y")])
def test_one_is_a_path_and_the_other_an_address(here, there):
    move(here, there, "one of the two must be a path")


def test_a_journal_that_an_interrupted_move_left_spoils_nothing(address, tmp_path):
    """SQLite would roll it back into whatever has the name that it was for."""
    move(file_of(tmp_path), address)
    back, making = tmp_path / "back.db", tmp_path / "back.db.moving"
    with contextlib.closing(sqlite3.connect(making, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")
        db.execute("CREATE TABLE t (x)")
        db.executemany("INSERT INTO t VALUES (?)", [("x" * 3000,)] * 20)
        db.execute("BEGIN")
        db.execute("UPDATE t SET x = x || 'y'")
        journal = Path(f"{making}-journal").read_bytes()
        db.execute("ROLLBACK")
    assert len(journal) > 10_000
    Path(f"{making}-journal").write_bytes(journal)
    move(address, back)
    check(state_of(opened(back)))


@pytest.mark.parametrize("seed", [1, 2])
def test_it_is_killed_again_and_again(address, tmp_path, seed):
    chance = random.Random(seed)
    path, back = file_of(tmp_path, MORE), tmp_path / "back.db"
    for here, there, over in ((path, address, lambda: not path.exists()), (address, back, back.exists)):
        kills = 0
        while not over():
            program = subprocess.Popen(
                [sys.executable, str(ROOT / "gocm.py"), "spool", "move", str(here), str(there)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            if kills < 8:
                program.stdout.readline() if chance.random() < 0.7 else time.sleep(chance.uniform(0.05, 0.4))
                time.sleep(chance.uniform(0.0, 0.02))
                program.send_signal(signal.SIGKILL)
                kills += 1
            _, problems = program.communicate(timeout=60)
            assert program.returncode in (0, -signal.SIGKILL), problems
        if there == address:
            with node(address) as state:
                assert tally(state)["tokens"] == TOLD["tally"]["tokens"] + MANY
                check_all_but_more(state)
    assert tally(state_of(opened(back)))["tokens"] == TOLD["tally"]["tokens"] + MANY


def check_all_but_more(state):
    """All is there that the smaller spool has, each once."""
    for job, told in TOLD["jobs"].items():
        found = state.status(int(job), "", -1, 1000)
        assert (told == "Past") == (not hasattr(found, "fates"))
        assert told == "Past" or len(found.fates) == len(told[9])
