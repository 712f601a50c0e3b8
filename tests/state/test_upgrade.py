"""Spools of older formats become today's, whatever happens meanwhile. format9.sql is one that the version that wrote
that format made, with all that a spool can hold, and format9.json what that version said of it.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from kit import (
    KEEPING,
    ROOT,
    claim,
    eventually,
    keep,
    open_tokens,
    succeed,
    tally,
    tokens_of,
)

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.message.outcome import DELIVERED, Result
from gocm_lib.state.contract import BEFORE_ALL, LISTS, Known, Past, Which
from gocm_lib.state.packs import Key
from gocm_lib.state.sqlite import database, upgrade
from gocm_lib.state.sqlite.store import SqliteStore

HERE = Path(__file__).parent
TOLD = json.loads((HERE / "format9.json").read_text())
FIRST = 1_700_000_000_000_000  # no job's id


def old_spool(path, more=""):
    """The spool of the version before, changed by these statements."""
    db = sqlite3.connect(path)
    db.executescript((HERE / "format9.sql").read_text())
    db.executescript(f"PRAGMA application_id = {database.APPLICATION_ID}; PRAGMA user_version = 9; {more}")
    db.close()
    os.chmod(path, 0o600)
    return path


@pytest.fixture
def spool(tmp_path):
    return old_spool(tmp_path / "s.db")


def opened(path):
    return SqliteStore.open(str(path), KEEPING)


def statuses(state, job):
    """What is said of a job, as the version before told it."""
    found = state.status(job, "", -1, 1000)
    if isinstance(found, Past):
        return "Past"
    return [*found[:8], found.states, [list(fate) for fate in found.fates], [list(skip) for skip in found.skipped]]


def as_after_a_restart(told):
    """What was said of a job, when nobody has anything in hand any more."""
    if isinstance(told, str):
        return told
    *first, states, fates, skipped = told
    fates = [["ready" if column == "sending" else column for column in fate] for fate in fates]
    states |= {"ready": states["ready"] + states["sending"], "sending": 0, "cancelled": 0}
    return [*first, states, fates, skipped]


def state_of(store):
    state = keep(store, ("gcm", "fcm"))
    state.start(1500.0)
    return state


def check(state):
    """All is there that was there."""
    for job, told in TOLD["jobs"].items():
        assert statuses(state, int(job)) == as_after_a_restart(told), job
    assert [list(each) for each in state.failed(Which(0, "", "", 1e12), BEFORE_ALL, 1000)] == TOLD["failed"]
    for which in LISTS:
        assert [list(entry) for entry in state.page(which, 0, 100)] == TOLD["lists"][which]
        assert state.store.newest_entry(which) == TOLD["newest"][which], "numbers go on"
    assert sorted([*count, value] for count, value in state.store.counts()[0].items()) == TOLD["counts"]
    assert tally(state) == TOLD["tally"] and open_tokens(state) == TOLD["open"]
    assert state.store.totals.keys == TOLD["keys"] and state.last_job() == TOLD["last"]
    known = state.store.known([Key(1, b"k" * 16, b"b" * 16, 1500.0)])
    assert known == {1: Known(FIRST + 6)}, "a request that was made before is known"


@pytest.mark.short
def test_nothing_is_lost_and_all_is_said_as_before(spool):
    state = state_of(opened(spool))
    check(state)
    assert tally(state) == tally(succeed(state, upstreams=("gcm", "fcm")))
    expected = [
        (int(job), fate[0])
        for job, told in TOLD["jobs"].items()
        if told != "Past"
        for fate in told[9]
        if fate[2] in ("ready", "deferred", "sending")
    ]
    taken = {}
    for turn in range(20):
        found = claim(state, now=2000.0 + turn, room=2000)
        taken |= found
        for (job, n), token in found.items():
            status = state.status(job, "", -1, 1)
            state.settle(1, [Result(status.upstream, job, n, token.attempt, DELIVERED)], 2000.0 + turn)
    assert set(expected) == set(taken), set(expected) ^ set(taken)
    assert len(taken) == TOLD["tally"]["tokens"] and state.snapshot().tokens == 0
    delivered = {
        (int(job), fate[0]): fate[1] for job, told in TOLD["jobs"].items() if told != "Past" for fate in told[9]
    }
    assert all(token.token == delivered[place] for place, token in taken.items())
    assert taken[FIRST + 4, 1].attempt == 3 - 1 and taken[FIRST + 7, 0].attempt == 1


@pytest.mark.short
def test_what_was_replayed_expires_by_that_and_what_is_over_is_forgotten(spool):
    state = state_of(opened(spool))
    assert state.store.forget_jobs(1e12, 0)
    while state.store.forget_jobs(1e12, 0):
        pass
    assert tally(state) == TOLD["tally"] | {"over": tally(state)["over"], "finished": 0}
    assert state.status(FIRST + 5, "", -1, 9).finished == 1404.0, "it has a failed token"
    assert state.discard(Which(0, "", "", 1e12)) == TOLD["tally"]["failed"]
    while state.store.forget_jobs(1e12, 0):
        pass
    assert isinstance(state.status(FIRST + 5, "", -1, 9), Past) and isinstance(state.status(FIRST + 1, "", -1, 9), Past)
    assert tally(state)["failed"] == 0 and tally(state) == tally(succeed(state, upstreams=("gcm", "fcm")))


@pytest.mark.short
def test_the_old_one_is_kept_until_the_new_one_is_whole(spool, monkeypatch):
    before = spool.read_bytes()
    monkeypatch.setattr(upgrade, "_put_in_place", lambda beside, path: pytest.fail("whole already"))
    with pytest.raises(pytest.fail.Exception):
        opened(spool)
    after = spool.read_bytes()
    # It is not in WAL mode any more (bytes 18 and 19), for all of it must be in one file; any version sets that anew.
    assert len(after) == len(before) and sqlite3.connect(spool).execute("PRAGMA user_version").fetchone() == (9,)
    monkeypatch.undo()
    check(state_of(opened(spool)))
    assert not (spool.parent / "s.db.upgrade").exists()


@pytest.mark.short
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    """And takes nothing: what the new one had taken is given back."""
    spool = old_spool(tmp_path / "s.db", MORE)
    connect = upgrade._connect

    def small(beside):
        db = connect(beside)
        db.execute("PRAGMA max_page_count = 100")
        return db

    monkeypatch.setattr(upgrade, "_connect", small)
    with pytest.raises(Fatal, match="no room to convert it") as caught:
        opened(spool)
    assert caught.value.code == Exit.SPOOL_UNWRITABLE
    assert not [each for each in spool.parent.iterdir() if "upgrade" in each.name]
    monkeypatch.undo()
    assert tally(state_of(opened(spool)))["jobs"] == TOLD["tally"]["jobs"] + MANY


@pytest.mark.short
def test_one_that_another_program_reads_waits(spool, monkeypatch):
    monkeypatch.setattr(upgrade, "PATIENCE", 50)
    other = sqlite3.connect(spool, isolation_level=None)
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("BEGIN"), other.execute("SELECT count(*) FROM job").fetchone()
    with pytest.raises(Fatal, match="another program has it open"):
        opened(spool)
    other.close()
    check(state_of(opened(spool)))


@pytest.mark.short
def test_a_copy_of_another_state_is_begun_anew(spool, monkeypatch):
    """The old version was started again in between."""
    monkeypatch.setattr(upgrade, "AT_ONCE", 5)
    convert_some, turns = upgrade._convert_some, iter(range(2))
    monkeypatch.setattr(
        upgrade, "_convert_some", lambda db: convert_some(db) if next(turns) < 1 else os.stat("nowhere")
    )
    with pytest.raises(Fatal):
        opened(spool)
    assert (spool.parent / "s.db.upgrade").exists()
    monkeypatch.undo()
    copied = spool.stat().st_mtime_ns

    def run_the_old_one():
        with contextlib.closing(sqlite3.connect(spool, isolation_level=None)) as db:
            db.execute("UPDATE token SET token = 'changed' WHERE job = ? AND n = 0", (FIRST + 3,))
        return spool.stat().st_mtime_ns != copied  # the kernel's clock for files moves in steps

    eventually(run_the_old_one)
    assert state_of(opened(spool)).status(FIRST + 3, "", -1, 1).fates[0].token == "changed"


@pytest.mark.short
def test_a_newer_version_cannot_be_gone_back_from_unnoticed(spool):
    db = sqlite3.connect(spool)
    db.execute("PRAGMA user_version = 12")
    db.close()
    with pytest.raises(Fatal, match="has format 12, this GoCM knows 11: run the version that wrote it"):
        opened(spool)


TO_10 = (
    "DROP TABLE label; DROP TABLE later; DROP TABLE hold; DROP TABLE meaning; DROP INDEX notregistered_upstream;"
    "DROP INDEX canonical_upstream; DROP INDEX invalid_upstream;"
    "ALTER TABLE canonical DROP COLUMN upstream; ALTER TABLE invalid DROP COLUMN upstream; PRAGMA user_version = 10;"
)


@pytest.mark.short
def test_format_10_knew_no_names_no_tags_and_no_other_times(tmp_path):
    path = str(tmp_path / "s.db")

    def run(code):
        before = "import sys; sys.path.insert(0, 'tests'); from kit import *; from gocm_lib.message.outcome import *; "
        words = [sys.executable, "-c", before + code, path]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)

    run(
        "state = new_state(sys.argv[1]); accept(state, [new_job(1, ['a', 'b'])]);"
        "[place] = claim(state, room=1); now = Outcome(Verdict.DELIVERED, canonical='new-a');"
        "state.settle(1, [Result('gcm', *place, 1, now)], 1000.0)"
    )
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(TO_10)
    done = run(
        "state = new_state(sys.argv[1]); accept(state, [new_job(2, ['c'])._replace(tag='t', by='shop')]);"
        "print(len(claim(state)), [each.job for each in state.jobs('t', 0, 9)], state.page('canonical', 0, 9))"
    )
    assert done.stdout == "2 [2] [Replaced(number=1, original='a', canonical='new-a')]\n"


TO_7 = (
    "DROP TABLE idempotency; CREATE TABLE idempotency (key BLOB PRIMARY KEY, body BLOB NOT NULL,"
    " job INTEGER NOT NULL, accepted_at REAL NOT NULL) WITHOUT ROWID;"
    " CREATE INDEX idempotency_age ON idempotency (accepted_at);"
    "DROP TABLE receipt; DROP TABLE skipped; DROP TABLE invalid; DROP TABLE held; DROP TABLE answers;"
    "UPDATE token SET n = n - 1 WHERE job % 1000 = 3 AND n > 2;"  # nothing could be left out of a list then
    "ALTER TABLE notregistered DROP COLUMN upstream; ALTER TABLE notregistered DROP COLUMN wave;"
    "PRAGMA user_version = 7;"
)


@pytest.mark.short
def test_format_7_kept_whole_hashes(tmp_path):
    path = old_spool(tmp_path / "s.db", TO_7)
    whole = [hashlib.sha256(each).digest() for each in (b"k", b"b")]
    db = sqlite3.connect(path)
    db.execute("INSERT INTO idempotency VALUES (?, ?, ?, 1000.0)", (*whole, FIRST + 6))
    db.commit()
    db.close()
    state = state_of(opened(path))
    key, body = (each[:16] for each in whole)
    assert state.store.known([Key(1, key, body, 1500.0)]) == {1: Known(FIRST + 6)}
    assert tally(state) == TOLD["tally"]


OPEN = """\
import sys
from gocm_lib.state.sqlite import database
database.open_spool(sys.argv[1])
"""
MANY = 6_000
MORE = f"""\
WITH RECURSIVE number (k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM number WHERE k < {MANY})
INSERT INTO job
    SELECT {FIRST} + 1000 + k, 'gcm', 'token', '{{"data":{{"a":1}}}}', 1500, 1500, 9e9, 1, 1, 0, 0 FROM number;
WITH RECURSIVE number (k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM number WHERE k < {MANY})
INSERT INTO token (job, n, token, rank, due_at, upstream)
    SELECT {FIRST} + 1000 + k, 0, 'more' || k, {FIRST} + 1000 + k, 1500, 'gcm' FROM number;
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_is_killed_again_and_again(tmp_path, seed):
    """At fifty random moments together. It goes on where it was, and is right in the end, each time."""
    chance, kills, rounds, halfway = random.Random(seed), 0, 0, 0
    while kills < 17 or halfway < 4:  # fast machines are halfway for a moment only
        rounds += 1
        path = old_spool(tmp_path / f"{rounds}.db", MORE)
        while True:
            opening = subprocess.Popen([sys.executable, "-c", OPEN, str(path)], cwd=ROOT)
            try:
                assert opening.wait(chance.uniform(0.1, 0.4)) == 0
                break
            except subprocess.TimeoutExpired:
                opening.send_signal(signal.SIGKILL)
                opening.wait()
                kills += 1
                halfway += Path(f"{path}.upgrade").exists()
        state = state_of(opened(path))
        known = TOLD["tally"]
        assert tally(state) == known | {"jobs": known["jobs"] + MANY, "tokens": known["tokens"] + MANY}
        for job, told in TOLD["jobs"].items():
            assert statuses(state, int(job)) == as_after_a_restart(told), job
        slices, *_ = state.claim(1, 1, {"gcm": 2 * MANY}, {"gcm": 0.0}, 2000.0, 0.0)
        places = list(tokens_of(slices))
        assert len(places) == len(set(places)) == open_tokens(state)["gcm"]
        state.close()
