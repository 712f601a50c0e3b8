"""What every Store must do (module store), tried on each there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import KEEPING, new_job

from gocm_lib.message.job import Skip
from gocm_lib.state import packs, turns
from gocm_lib.state.contract import BEFORE_ALL, Conflict, Count, Deferred, Full, Known, Past, Which
from gocm_lib.state.packs import Key, lowest, pack, read, runs, span, without, write
from gocm_lib.state.sqlite.store import SqliteStore
from gocm_lib.state.store import FAILED, OVER, Changed, End, Finish, Single, Spot
from gocm_lib.state.waves import Bucket, Tally

pytestmark = pytest.mark.short

EVERY = Which(0, "", "", 1e12)


@pytest.fixture(params=["in memory", "in a file", "postgres"])
def store(request, tmp_path):
    if request.param == "postgres":
        made = request.getfixturevalue("postgres_store")(KEEPING)
    else:
        made = SqliteStore.open(":memory:" if request.param == "in memory" else str(tmp_path / "s.db"), KEEPING)
    yield made
    made.close()


def keep(store, *jobs):
    kept = pack(jobs)
    store.keep(kept, {Count("accepted_messages", "gcm"): len(jobs)})
    return kept


def single(job, n, due_at, **more):
    fields = {"waits": True, "attempts": 1, **more}
    return Single(job, n, "gcm", turns.rank(0, due_at * 1e6), due_at, **fields)


def test_packs_are_read_in_their_order_and_no_more_than_asked_for(store):
    for job in range(1, 21, 2):
        keep(store, new_job(job, ["a", "b"]), new_job(job + 1, ["c"]))
    assert [each.id for each in store.fresh("gcm", 0, 0, 7)] == [1, 3, 5]
    assert [each.id for each in store.fresh("gcm", 0, 5, 100)] == [7, 9, 11, 13, 15, 17, 19]
    assert store.fresh("gcm", 1, 0, 100) == store.fresh("other", 0, 0, 100) == []
    assert [each.id for each in store.newest("gcm", 0, 9, 2)] == [7, 5]
    assert [each.fresh for each in store.packs([1, 3])] == [3, 3]
    assert store.pack_of(8).id == 7 and store.pack_of(0) is None and store.pack_of(99) is None
    assert store.has(20) and not store.has(21) and store.last_job() == 20
    assert store.totals.jobs == 20 and store.totals.tokens == 30 and store.totals.open == {"gcm": 30}
    assert store.counts()[0] == {Count("accepted_messages", "gcm"): 20}


def test_what_has_left_a_pack_is_known_and_an_empty_one_is_not_read(store):
    keep(store, new_job(1, ["a", "b"]), new_job(2, ["c"]))
    store.finish(Finish(1001.0, [Changed(1, 0b101, -2, -1, -1, 1)], {"gcm": -1}, singles=[single(1, 0, 1100.0)]))
    [stored] = store.fresh("gcm", 0, 0, 9)
    assert (stored.gone, stored.fresh, stored.singles) == (0b101, 1, {1: 1})
    store.finish(Finish(1002.0, [Changed(1, 0, -1, -1, 0, 0)], {"gcm": -1}, ends=[End(1, 0b10, 1002.0, ["id"])]))
    assert store.fresh("gcm", 0, 0, 9) == []
    [stored] = store.packs([1])
    assert stored.gone == 0b111, "nothing is in it, so all has left"
    assert store.totals.tokens == 1 and store.totals.over == 2 and store.totals.jobs == 1


def test_singles_come_by_their_turns(store):
    keep(store, *[new_job(job, ["a", "b"]) for job in range(1, 6)])
    late, early, other = single(1, 0, 1300.0), single(2, 0, 1100.0), single(3, 1, 1200.0)
    held = single(4, 0, 1150.0, state=OVER)
    store.finish(Finish(1000.0, singles=[late, early, other, held]))
    at = turns.rank(0, 1250e6)
    assert store.due("gcm", Spot(0), at, 9, 0) == [early, other]
    assert store.due("gcm", Spot(0), at, 1, 0) == [early]
    assert store.due("gcm", Spot(early.rank, 2, 0), at, 9, 0) == [other]
    assert store.due("gcm", Spot(0), at, 9, 2) == [other], "of jobs above"
    assert store.next_rank("gcm", Spot(other.rank, 3, 1), 1 << 60, 0) == late.rank
    assert store.next_rank("gcm", Spot(late.rank, 1, 0), 1 << 60, 0) is None
    assert store.open_singles(2) == [early] and store.open_singles(4) == []
    assert store.deferred("gcm", [(Spot(0), 1 << 60)], 2) == Deferred(2, 1100.0)
    assert store.deferred("gcm", [(Spot(early.rank, 2, 0), 1 << 60)], 9) == Deferred(2, 1200.0)


def test_a_change_of_many_things_is_made_at_once_or_not_at_all(store):
    keep(store, new_job(1, ["a", "b"]))
    before = store.totals, store.counts()[0], store.packs([1])
    change = Finish(
        1001.0,
        [Changed(1, 0, -2, -2, -1, 2)],
        {"gcm": -2},
        singles=[single(1, 0, 1001.0, state=FAILED, waits=False, failure="attempts", reason="x")],
        ends=[End(1, 0b10, 1001.0, ["id"])],
        counts={Count("delivered", "gcm"): 1},
        invalid=[("t", "invalid_token", "gcm")],
        answers={"gcm": (Bucket(1, Tally(2, 1), 1), True)},
    )
    with pytest.raises(Full), store.turn():
        store.finish(change)
        assert store.totals.failed == 1
        raise Full
    assert (store.totals, store.counts()[0], store.packs([1])) == before
    with store.turn():
        store.finish(change)
        keep(store, new_job(2, ["c"]))
    assert (store.totals.failed, store.totals.over, store.totals.finished, store.totals.jobs) == (1, 1, 2, 1)
    assert store.totals.listed["invalid"] == 1 and store.answers("gcm") == [Bucket(1, Tally(2, 1), 1)]
    found = store.status(1, set(), set(), "", -1, 9)
    assert [(fate.token, fate.state, fate.receipt) for fate in found.fates] == [
        ("a", "failed", ""),
        ("b", "delivered", "id"),
    ]
    assert found.finished == 1001.0
    [failed] = store.failed(EVERY, BEFORE_ALL, 9)
    assert (failed.token, failed.failure, failed.failed_at) == ("a", "attempts", 1001.0)
    assert store.failed(EVERY._replace(failure="expired"), BEFORE_ALL, 9) == store.failed(EVERY, (1, 0), 9) == []


def test_who_has_what_is_told_by_who_asks(store):
    keep(store, new_job(1, ["a", "b", "c"]))
    store.finish(Finish(1000.0, [Changed(1, 0b100, -1, 0, 0, 0)], singles=[single(1, 2, 1100.0)]))

    def states(sending, queued):
        return [fate.state for fate in store.status(1, sending, queued, "", -1, 9).fates]

    assert states({0}, set()) == ["sending", "ready", "deferred"]
    assert states({0, 2}, set()) == ["sending", "ready", "sending"] and states(set(), {2})[2] == "ready"
    assert [fate.n for fate in store.status(1, {0}, set(), "ready", -1, 9).fates] == [1]


def test_finished_jobs_are_forgotten_by_themselves_though_a_pack_has_others(store):
    keep(store, new_job(1, ["a"]), new_job(2, ["b", "c"]), new_job(3, ["d"]))
    store.finish(Finish(1000.0, [Changed(1, 0b0001, -1, -1, -1, 1)], {"gcm": -1}, ends=[End(1, 1, 1000.0, ["x"])]))
    failed = single(2, 1, 1050.0, state=FAILED, waits=False, failure="attempts")
    ends = [End(1, 0b0010, 1050.0, ["y"])]
    store.finish(Finish(1050.0, [Changed(1, 0b0111, -2, -2, -1, 2)], {"gcm": -2}, singles=[failed], ends=ends))
    assert store.forget_jobs(1010.0, 100) and not store.forget_jobs(1010.0, 100)
    assert isinstance(store.status(1, set(), set(), "", -1, 9), Past)
    assert store.status(2, set(), set(), "", -1, 9).fates[0].receipt == "y"
    assert [list(each.receipts) for each in store.rows.ends(1)] == [["y"]]
    assert store.forget_jobs(1060.0, 100)
    assert [fate.token for fate in store.status(2, set(), set(), "", -1, 9).fates] == ["c"], "it failed, and is kept"
    assert store.totals.failed == 1 and store.totals.over == 0 and store.totals.finished == 0
    assert [each.fresh for each in store.fresh("gcm", 0, 0, 9)] == [1], "what is to be sent is where it was"
    assert "a" not in read(store.packs([1])[0].body)[0].tokens
    assert store.discard(EVERY, 9) == 1 and store.totals.finished == 2 and store.totals.over == 1
    assert store.forget_jobs(2000.0, 0) and isinstance(store.status(2, set(), set(), "", -1, 9), Past)


def test_a_key_is_known_until_its_time_is_over(store):
    job = new_job(1, ["a"])._replace(key=(b"k" * 16, b"b" * 16))
    keep(store, job)
    assert store.known([Key(2, b"k" * 16, b"b" * 16, 1001.0)]) == {2: Known(1)}
    assert store.known([Key(2, b"k" * 16, b"c" * 16, 1001.0)]) == {2: Conflict()}
    assert store.known([Key(2, b"k" * 16, b"c" * 16, 1e6)]) == {}
    twins = [Key(5, b"n" * 16, b"b" * 16, 1.0), Key(6, b"n" * 16, b"b" * 16, 1.0), Key(7, b"n" * 16, b"c" * 16, 1.0)]
    assert store.known(twins) == {6: Known(5), 7: Conflict()}
    store.prune_keys(1e6)
    assert store.totals.keys == 0


def test_a_clock_that_is_set_back_brings_turns_forward(store):
    keep(store, new_job(1, ["a", "b", "c"], now=9000.0))
    store.finish(Finish(9000.0, singles=[single(1, 0, 9100.0), single(1, 1, 1e9), single(1, 2, 8999.0, waits=False)]))
    assert store.last_accepted() == 9000.0
    store.set_back(5000.0, 4000.0, 5000.0)
    found = {each.n: each for each in store.open_singles(1)}
    assert found[0].due_at == 4100.0 and turns.came(found[0].rank) == 4100e6
    assert found[1].due_at == 4000.0 and turns.came(found[2].rank) == 4000e6, "what does not wait is due now"
    assert store.last_accepted() == 4000.0


# ------------------------------------------------------------------------------------------------------------- packs

texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n"), min_size=1, max_size=5)
jobs = st.lists(
    st.builds(
        lambda job, tokens, now, left_out: new_job(job, tokens, now)._replace(
            skipped=tuple(Skip(n, "why") for n in sorted(left_out) if n <= len(tokens))
        ),
        st.integers(1, 1 << 61),
        st.lists(texts, min_size=1, max_size=15),
        st.floats(0, 1e10),
        st.sets(st.integers(0, 3), max_size=2),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda job: job.id,
)


@given(jobs, st.sets(st.integers(0, 5)))
def test_a_body_holds_what_was_put_into_it(given_jobs, gone):
    made = pack(given_jobs)
    found = {each.job: each for one in made for each in read(one.body)}
    for job in given_jobs:
        each = found[job.id]
        assert list(each.tokens) == list(job.tokens) and each.message == job.message
        assert (each.accepted_at, each.expires_at) == (job.accepted_at, job.expires_at)
        assert [each.place(index) for index in range(len(job.tokens))] == list(job.places)
        assert all(each.index_of(each.place(index)) == index for index in range(len(job.tokens)))
    for one in made:
        assert one.body == write(read(one.body)) and one.size == sum(size for _, size, _ in packs.heads(one.body))
        assert one.id == one.jobs[0][0] and one.last == one.jobs[-1][0]
    chosen = {job.id: None for index, job in enumerate(sorted(given_jobs)) if index in gone}
    left = {job for one in without(made, chosen) for job, _, _ in one.jobs}
    assert left == {job.id for job in given_jobs} - chosen.keys()


@given(st.integers(0, 1 << 200), st.integers(0, 100))
def test_bitmaps_say_what_is_in_them(bits, count):
    positions = [at for low, high in runs(bits) for at in range(low, high)]
    assert positions == [at for at in range(bits.bit_length()) if bits >> at & 1]
    assert [at for low, high in runs(lowest(bits, count)) for at in range(low, high)] == positions[:count]
    assert sum(span(low, high - low) for low, high in runs(bits)) == bits
    assert packs.from_bytes(packs.to_bytes(bits)) == bits
