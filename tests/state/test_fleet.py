"""Several nodes on one spool in PostgreSQL: leases, rescue, what is shared, and what a broken connection leaves."""

import contextlib
import math
import random
import threading
import time

import pytest
from kit import KEEPING, accept, claim, eventually, keep, new_job, tally

psycopg = pytest.importorskip("psycopg")

from postgres import open_store  # noqa: E402

from gocm_lib.config.settings import Fatal  # noqa: E402
from gocm_lib.message.job import first_id, job_time, next_id  # noqa: E402
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict  # noqa: E402
from gocm_lib.state import backlog  # noqa: E402
from gocm_lib.state.contract import (  # noqa: E402
    BEFORE_ALL,
    Cancelled,
    Conflict,
    Count,
    Known,
    Lost,
    Overtaken,
    Passing,
    Status,
    Unsure,
    Which,
)
from gocm_lib.state.packs import pack  # noqa: E402
from gocm_lib.state.postgres import node, schema  # noqa: E402
from gocm_lib.state.postgres.database import Database, connect, reason  # noqa: E402
from gocm_lib.state.postgres.node import Identity, join  # noqa: E402
from gocm_lib.state.postgres.schema import Durability  # noqa: E402
from gocm_lib.state.store import Finish, Spot  # noqa: E402

pytestmark = pytest.mark.short
GONE = Outcome(Verdict.UNREGISTERED, "NotRegistered", cause="unregistered")
LATER = Outcome(Verdict.DEFERRED, "x", retry_after=30.0)


@pytest.fixture
def address(postgres):
    return postgres.spool()


@pytest.fixture
def quick(monkeypatch):
    """Leases that end soon."""
    for name, seconds in (("LEASE", 1.2), ("BEAT", 0.1), ("HOLD", 0.4), ("LOOK", 0.02)):
        monkeypatch.setattr(node, name, seconds)


@pytest.fixture
def enter(address):
    """A function that makes a State on the spool, as the node of a name."""
    stores = []

    def new_node(name, keeping=KEEPING, upstreams=("gcm",), gave_up=None):
        stores.append(open_store(address, keeping, upstreams, name, gave_up))
        return keep(stores[-1], upstreams, keeping)

    yield new_node
    for store in stores:
        store.close()


def fall_silent(state):
    """The node is not heard of any more, and does not leave."""
    state.store.member._stopped.set()


_last = [0]


def ids(state, count):
    """New job ids of a node."""
    found = []
    for _ in range(count):
        _last[0] = next_id(first_id(_last[0], state.store.number), time.time())
        found.append(_last[0])
    return found


def jobs(state, *tokens):
    return [new_job(job, each, now=time.time()) for job, each in zip(ids(state, len(tokens)), tokens)]


def sql(address, statement, *values):
    with contextlib.closing(connect(address)) as db:
        cursor = db.execute(statement, values)
        return cursor.fetchall() if cursor.description else None


# ----------------------------------------------------------------------------------------------------------- who is who


def test_nodes_have_numbers_and_ids_say_whose_they_are(enter):
    one, two = enter("one"), enter("two")
    assert (one.store.number, two.store.number) == (1, 2)
    [job] = ids(two, 1)
    assert job & 255 == 2 and abs(job_time(job) - time.time()) < 60
    assert next_id(first_id(job, 1), 0.0) > job and first_id(job, 1) & 255 == 1


def test_a_name_is_one_node(address, quick):
    def enter(run, machine):
        return join(address, Identity("a", run, machine), lambda _: waited.append(1) or time.sleep(0.05))

    waited = []
    number, epoch, _ = enter("run 1", "machine")
    assert enter("run 1", "other") == (number, epoch + 1, False) and not waited, "its own next state process"
    assert enter("run 2", "other") == (number, epoch + 2, False) and not waited, "the lock says that the other is gone"
    assert enter("run 3", "machine") == (number, epoch + 3, False) and len(waited) > 5, "else its lease has to end"


def test_a_second_gateway_of_a_name_is_refused(tmp_path):
    first = node.identify("a", "x", str(tmp_path))
    assert first.machine and node.identify("b", "x", str(tmp_path)).machine != first.machine
    with pytest.raises(Fatal, match="another GoCM runs here as node a"):
        node.identify("a", "y", str(tmp_path))


def test_numbers_of_nodes_that_left_long_ago_are_free_again(enter, address):
    state = enter("one")
    enter("old").close()
    sql(address, "UPDATE node SET lease = now() - interval '2 days' WHERE name = 'old'")
    state.store.member._folded_at = -1e9
    state.store.member._beat()
    assert sql(address, "SELECT name FROM node") == [("one",)] and enter("new").store.number == 2


# ------------------------------------------------------------------------------------------------------ leases, rescue


def test_what_a_silent_node_had_is_sent_by_another_and_counts_once(enter, quick):
    told = []
    silent, other = enter("silent", gave_up=told), enter("other")
    new = jobs(silent, "abc", "de")
    accept(silent, new)
    now = time.time()
    held = claim(silent, now=now)
    assert len(held) == 5 and claim(other, now=now) == {}
    silent.settle(1, [Result("gcm", new[0].id, 0, 1, LATER), Result("gcm", new[0].id, 1, 1, DELIVERED)], now)
    fall_silent(silent)
    taken = eventually(lambda: claim(other, now=now + 60))
    taken |= claim(other, now=now + 60)
    assert taken.keys() == held.keys() - {(new[0].id, 1)}
    for job, n in taken:
        attempt = 2 if (job, n) == (new[0].id, 0) else 1
        other.settle(1, [Result("gcm", job, n, attempt, DELIVERED)], now + 60)
    with pytest.raises(Lost):
        silent.settle(1, [Result("gcm", new[1].id, 0, 1, DELIVERED)], now + 60)
    with pytest.raises(Lost):
        accept(silent, jobs(silent, "x"))
    counters = other.snapshot().counters
    assert (counters["accepted_tokens"], counters["delivered"]) == (5, 5)
    eventually(lambda: tally(other)["tokens"] == 0 and tally(other)["over"] == 5)


def test_who_cannot_beat_gives_up_when_its_lease_ends(enter, quick, postgres):
    told = []
    state = enter("one", gave_up=told)
    state.store.member._connection.close()
    state.store.member._address = "postgresql://owner@/none?host=/nowhere"
    began = time.monotonic()
    eventually(lambda: told)
    assert "was not reached" in told[0] and 0.8 * node.LEASE < time.monotonic() - began < 2 * node.LEASE


def test_a_lease_that_another_has_ended_is_noticed(enter, address, quick):
    told = []
    enter("one", gave_up=told)
    sql(address, "UPDATE node SET epoch = epoch + 1")
    eventually(lambda: told)
    assert "another node has ended our lease" in told[0]


def test_nobody_is_rescued_by_one_who_was_away_as_well(enter, address, quick):
    one = enter("one")
    enter("two")
    fall_silent(one)
    member = one.store.member
    member._held_since = time.monotonic()
    sql(address, "UPDATE node SET lease = now() - interval '1 hour' WHERE name = 'two'")
    member._beat()
    assert sql(address, "SELECT fenced FROM node WHERE name = 'two'") == [(False,)]


def test_a_node_that_leaves_leaves_at_once(enter):
    leaver, stayer = enter("leaver"), enter("stayer")
    accept(leaver, jobs(leaver, "abc"))
    leaver.close()
    stayer.store.member._held_since -= node.LEASE
    stayer.store.member._beat()
    assert len(claim(stayer, now=time.time())) == 3


def test_who_comes_back_goes_on_with_what_it_had(enter):
    state = enter("one")
    accept(state, jobs(state, "abc"))
    state.close()
    again = enter("one")
    assert again.store.number == state.store.number and len(claim(again, now=time.time())) == 3


class Machines:
    """Nodes, one after the other, that die with all that they have in hand whenever that has a token of `deadly`."""

    def __init__(self, enter, address, deadly):
        self.enter, self.address, self.deadly = enter, address, deadly
        self.died, self.delivered, self.now = 0, set(), time.time()
        self.witness = enter("witness")
        self.node = enter("machine 0")

    def die(self):
        """A machine is gone for ever, the witness takes note, and the next one comes."""
        self.died += 1
        fall_silent(self.node)
        name = f"machine {self.died - 1}"
        sql(self.address, "UPDATE node SET lease = now() - interval '1 second' WHERE name = %s", name)
        self.rescue()
        self.node = self.enter(f"machine {self.died}")

    def rescue(self):
        member = self.witness.store.member
        member._held_since -= node.LEASE
        member._beat()

    def work(self, room=100):
        """Send what there is until nothing is left or the machine dies. Returns whether it lives."""
        for _ in range(1000):
            held = claim(self.node, now=self.now, room=room)
            if any(job in self.deadly for job, _ in held):
                return False
            for (job, n), token in held.items():
                self.node.settle(1, [Result("gcm", job, n, token.attempt, DELIVERED)], self.now)
                self.delivered.add((job, n))
            if not self.node.store.totals.tokens:
                return True
            self.now += 0.1
        raise AssertionError(f"something is left: {tally(self.node)}")


@pytest.mark.parametrize("tokens, deaths", [("x", 5), ("xyz", 6)])
def test_a_message_that_ends_machines_does_not_end_all_of_them(enter, address, tokens, deaths):
    deadly = set()
    machines = Machines(enter, address, deadly)
    new = jobs(machines.node, *["ab"] * 20, tokens, *["ab"] * 20)
    deadly.add(new[20].id)
    accept(machines.node, new)
    while not machines.work():
        machines.die()
        assert machines.died <= deaths
    failed = machines.node.failed(Which(0, "", "", math.inf), BEFORE_ALL, 100)
    assert {each.job for each in failed} == deadly and len(failed) == len(tokens)
    assert {(each.failure, each.reason) for each in failed} == {("killed_senders", "every node that sent it died")}
    assert machines.died == deaths and len(machines.delivered) == 80, "no innocent token was set aside"


def test_what_machines_died_with_by_chance_is_all_sent(enter, address):
    machines = Machines(enter, address, set())
    accept(machines.node, jobs(machines.node, *["abcde"] * 30))
    for _ in range(4):
        assert claim(machines.node, now=machines.now, room=100)
        machines.die()
    assert machines.work() and len(machines.delivered) == 150
    assert machines.node.failed(Which(0, "", "", math.inf), BEFORE_ALL, 10) == []


def test_who_leaves_did_not_die_and_who_was_killed_did(enter, address):
    def losses():
        return sql(address, "SELECT DISTINCT losses FROM pack")

    stayer, leaver = enter("stayer"), enter("leaver")
    accept(leaver, jobs(leaver, "abc"))
    leaver.close()
    assert enter("leaver").store.number == leaver.store.number and losses() == [(0,)]
    sql(address, "UPDATE node SET lease = now() WHERE name = 'leaver'")
    join(address, Identity("leaver", "another run", ""), time.sleep)
    assert losses() == [(1,)], "it comes again and had not left"
    sql(address, "UPDATE node SET lease = now(), departed = true WHERE name = 'leaver'")
    stayer.store.member._held_since -= node.LEASE
    stayer.store.member._beat()
    assert sql(address, "SELECT node, losses FROM pack") == [(0, 1)]


class TwoNodes:
    """Random verbs at two nodes, of which either may die, be rescued and come back. Every token ends once."""

    def __init__(self, enter, address, seed):
        self.enter, self.address, self.chance = enter, address, random.Random(seed)
        self.now = time.time()
        self.states = {name: self.start(name) for name in ("one", "two")}
        self.held = {name: [] for name in self.states}  # places and attempts
        self.last = {name: [] for name in self.states}  # what was settled last: it may be repeated
        self.tokens = self.ended = 0

    def start(self, name):
        state = self.enter(name)
        state.store.member._held_since -= node.LEASE
        state.begin(1)
        return state

    def step(self):
        name = self.chance.choice(list(self.states))
        state = self.states[name]
        self.now += self.chance.choice([0.0, 0.5, 20.0])
        match self.chance.choice(["accept", "accept", "claim", "claim", "settle", "settle", "repeat", "beat", "die"]):
            case "accept":
                new = jobs(state, *("abcd"[: self.chance.randint(1, 4)] for _ in range(self.chance.randint(1, 3))))
                assert accept(state, new) == {}
                self.tokens += sum(len(job.tokens) for job in new)
            case "claim":
                found = claim(state, now=self.now, room=self.chance.choice([1, 5, 100]))
                self.held[name] += [(*place, token.attempt) for place, token in found.items()]
            case "settle":
                some = [each for each in self.held[name] if self.chance.random() < 0.7]
                self.held[name] = [each for each in self.held[name] if each not in some]
                self.settle(name, some)
            case "repeat":
                state.settle(1, self.last[name], self.now)
            case "beat":
                state.store.member._beat()
                state.keep_house(self.now)
            case "die":
                self.die(name)

    def settle(self, name, some):
        outcomes = [DELIVERED, DELIVERED, LATER, GONE]
        self.last[name] = [Result("gcm", job, n, t, self.chance.choice(outcomes)) for job, n, t in some]
        self.states[name].settle(1, self.last[name], self.now)

    def die(self, name):
        """It is gone; the other one may rescue what it had, or it comes back before."""
        fall_silent(self.states[name])
        other = next(each for each in self.states if each != name)
        if self.chance.random() < 0.5:
            sql(self.address, "UPDATE node SET lease = now() - interval '1 second' WHERE name = %s", name)
            self.states[other].store.member._beat()
        if self.chance.random() < 0.3:  # it does not know it yet
            with contextlib.suppress(Lost):
                self.states[name].settle(1, [Result("gcm", *each, DELIVERED) for each in self.held[name]], self.now)
        self.states[name].store.db.close()
        self.states[name] = self.start(name)
        self.held[name], self.last[name] = [], []

    def drain(self):
        """Deliver the rest."""
        for _ in range(60):
            for name, state in self.states.items():
                state.store.member._beat()
                self.held[name] += [(*p, t.attempt) for p, t in claim(state, now=self.now, room=1000).items()]
                state.settle(1, [Result("gcm", *each, DELIVERED) for each in self.held[name]], self.now)
                self.held[name] = []
            self.now += 60.0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_two_nodes_do_each_token_ends_once(enter, address, seed, monkeypatch):
    monkeypatch.setattr(backlog, "WINDOW", 6)
    two = TwoNodes(enter, address, seed)
    for _ in range(150):
        two.step()
    two.drain()
    for state in two.states.values():
        snapshot = state.snapshot()
        counters = snapshot.counters
        assert counters["accepted_tokens"] == two.tokens == counters["delivered"] + counters["failures"]
        assert (snapshot.pending, snapshot.tokens, counters["attempts"]) == (0, 0, two.tokens)
    open_, size = sql(address, "SELECT sum(open), sum(size) FROM pack")[0]
    assert (open_, size) == (0, two.tokens)


# ------------------------------------------------------------------------------------------------------------- sharing


def test_a_backlog_is_shared(enter, monkeypatch):
    monkeypatch.setattr(backlog, "WINDOW", 4)
    busy, idle = enter("busy"), enter("idle")
    accept(busy, jobs(busy, *(["xyz"] * 5)))
    claim(busy, now=time.time(), room=1)
    accept(busy, jobs(busy, *(["xyz"] * 5)))
    for each in (busy, idle):
        each.store.member._beat()
    busy.keep_house(time.time() + 5)
    idle.store.member._beat()
    theirs, mine = claim(idle, now=time.time() + 5, room=1000), claim(busy, now=time.time() + 5, room=1000)
    assert mine and theirs and not mine.keys() & theirs.keys()
    both = mine.keys() | theirs.keys() | claim(idle, now=time.time() + 6, room=1000).keys()
    both |= claim(busy, now=time.time() + 6, room=1000).keys()
    assert len(both) == 29, "one was claimed before"


def test_a_paused_node_lets_others_send(enter):
    """Its key may be wrong, or its network."""
    paused, other = enter("paused"), enter("other")
    new = jobs(paused, *(["x"] * 30))
    for job in new:
        accept(paused, [job])
    for each in (paused, other):
        each.store.member._beat()
    now = time.time()
    no = Outcome(Verdict.UNREACHABLE, "refused", answered=False)
    for job, n in claim(paused, now=now, room=5):
        paused.settle(1, [Result("gcm", job, n, 1, no)], now)
    assert paused.pacing.pauses
    paused.keep_house(now + 2)
    other.store.member._beat()
    assert len(claim(other, now=now + 2, room=1000)) >= 20


def test_the_rate_is_for_all(enter):
    one = enter("one")
    whole = one.pacing.standings["gcm"].pace.limit
    enter("two")
    one.store.member._beat()
    one.keep_house(time.time())
    assert one.pacing.standings["gcm"].pace.limit == whole / 2


def test_when_one_is_refused_too_much_all_slow_down(enter, monkeypatch):
    monkeypatch.setattr(node, "BEAT", 3600.0)  # it is told at once
    one, two = enter("one"), enter("two")
    begun = now = time.time()
    accept(one, jobs(one, *["x" * 100] * 5))
    for each in (one, two):
        each.store.member._beat()
        claim(each, now=now, room=1)  # it has heard what was told before it came
    refused = Outcome(Verdict.DEFERRED, "429 QUOTA_EXCEEDED", cause="quota")
    while one.pacing.standings["gcm"].pace.is_quiet:
        now += 0.5
        held = claim(one, now=now, room=100)
        assert now < begun + 60
        for index, ((job, n), token) in enumerate(held.items()):
            outcome = refused if index % 3 else DELIVERED
            one.settle(1, [Result("gcm", job, n, token.attempt, outcome)], now)
    slowed = one.pacing.standings["gcm"].pace.rate
    before = two.pacing.standings["gcm"].pace.rate
    eventually(lambda: sql(two.store.member._address, "SELECT 1 FROM node WHERE name = 'one' AND slowed <> '{}'"))
    two.store.member._beat()
    claim(two, now=now, room=1)
    assert two.pacing.standings["gcm"].pace.rate <= slowed * 1.1 < before


def test_a_message_is_cancelled_whichever_node_has_it(enter, address):
    one, two = enter("one"), enter("two")
    [mine, nobodys] = jobs(one, "abc", "de")
    accept(one, [mine])
    accept(one, [nobodys])
    held = claim(one, now=time.time(), room=1)
    sql(address, "UPDATE pack SET node = 0 WHERE id = %s", nobodys.id)
    assert two.cancel(nobodys.id, time.time()) == Cancelled(2, 0), "it was nobody's"
    assert two.cancel(mine.id, time.time()) == Cancelled(0, 0, elsewhere=True)
    one.store.member._beat()
    one.keep_house(time.time() + 2)
    assert sql(address, "SELECT * FROM cancelled") == []
    assert two.status(mine.id, "", -1, 9).states["cancelled"] == 2
    one.settle(1, [Result("gcm", *place, 1, LATER) for place in held], time.time())
    assert two.status(mine.id, "", -1, 9).states["cancelled"] == 3
    assert two.snapshot().counters["cancelled"] == 5
    assert two.cancel(mine.id, time.time()) == Cancelled(0, 0)


def test_who_holds_an_upstream_holds_it_at_every_node(enter):
    one, two = enter("one"), enter("two")
    accept(two, jobs(two, "ab"))
    one.hold("gcm", "ops", 1000.0)
    two.store.member._beat()
    assert claim(two, now=time.time()) == {} and two.snapshot().held_upstreams == {"gcm": (1000.0, "ops")}
    assert two.let_go("gcm")
    one.store.member._beat()
    assert one.snapshot().held_upstreams == {} and len(claim(two, now=time.time() + 1)) == 2


def test_what_is_for_another_time_is_sent_by_whoever_is_there_then(enter):
    one, two = enter("one"), enter("two")
    now = time.time()
    soon, cancelled = (each._replace(send_at=now + 50, accepted_at=now + 50) for each in jobs(one, "ab", "cd"))
    assert accept(one, [soon]) == accept(one, [cancelled]) == {}
    assert [each.job for each in two.jobs("", 0, 9)] == [soon.id, cancelled.id]
    assert two.cancel(cancelled.id, now) == Cancelled(2, 0), "it was nobody's"
    fall_silent(one)
    two.store.member._beat()
    assert claim(two, now=now + 1) == {}
    assert {place[0] for place in claim(two, now=now + 52)} == {soon.id}
    assert two.status(soon.id, "", -1, 9).accepted_at == pytest.approx(now, abs=5) and two.jobs("", 0, 9) == []
    one.store.member._beat()
    assert claim(one, now=now + 60) == {}


def test_a_tag_is_known_at_every_node(enter):
    one, two = enter("one"), enter("two")
    mine = [each._replace(tag="spring", by="shop") for each in jobs(one, "ab", "c")]
    assert accept(one, mine) == {}
    assert [(each.job, each.by, each.pending) for each in two.jobs("spring", 0, 9)] == [
        (mine[0].id, "shop", 2), (mine[1].id, "shop", 1)]  # fmt: skip


def test_a_key_is_known_at_every_node(enter):
    one, two = enter("one"), enter("two")
    [first], [second] = jobs(one, "a"), jobs(two, "a")
    first, second = (each._replace(key=(b"k" * 16, b"b" * 16)) for each in (first, second))
    accept(one, [first])
    assert accept(two, [second]) == {second.id: Known(first.id)}
    other = second._replace(id=ids(two, 1)[0], key=(b"k" * 16, b"c" * 16))
    assert accept(two, [other]) == {other.id: Conflict()}


def test_the_same_key_at_two_nodes_at_once_is_one_job(enter):
    one, two = enter("one"), enter("two")
    [first], [second] = jobs(one, "a"), jobs(two, "a")
    first, second = (each._replace(key=(b"k" * 16, b"b" * 16)) for each in (first, second))
    found = []
    with one.turn():
        accept(one, [first])
        one.store.db.ask("SELECT 1")  # what waits for the pipeline is at the server
        thread = threading.Thread(target=lambda: found.append(accept(two, [second])))
        thread.start()
        eventually(lambda: sql(one.store.member._address, "SELECT 1 FROM pg_locks WHERE NOT granted"))
    thread.join()
    assert found == [{second.id: Known(first.id)}]
    with pytest.raises(Overtaken), two.turn():
        two.store.keep(pack([second]), {})


def test_reports_and_jobs_are_the_same_at_every_node(enter):
    one, two = enter("one"), enter("two")
    [job] = jobs(one, "abc")
    accept(one, [job])
    now = time.time()
    dead = Outcome(Verdict.REJECTED, "no", cause="rejected")
    for (number, n), outcome in zip(claim(one, now=now), (DELIVERED, GONE, dead)):
        one.settle(1, [Result("gcm", number, n, 1, outcome)], now)
    for state in (one, two):
        found = state.status(job.id, "", -1, 9)
        assert isinstance(found, Status) and found.states["delivered"] == 1 and found.states["failed"] == 2
        assert state.snapshot().counters["notregistered"] == 1
        assert [entry.token for entry in state.page("notregistered", 0, 9)] == ["b"]
    two.store.member._beat()
    assert tally(one) == tally(two) and two.store.totals.listed["notregistered"] == 1


def test_numbers_of_a_list_come_in_the_order_of_commits(enter):
    """Else who has read up to 10 would clear 9 unseen, when its transaction ends later."""
    one, two = enter("one"), enter("two")
    thread = threading.Thread(
        target=lambda: two.store.finish(Finish(1.0, unregistered=[("late", "gcm", False, False)]))
    )
    with one.turn():
        one.store.finish(Finish(1.0, unregistered=[("early", "gcm", False, False)]))
        thread.start()
        eventually(lambda: sql(one.store.member._address, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        assert two.page("notregistered", 0, 9) == [] if not thread.is_alive() else True
    thread.join()
    assert [entry[:2] for entry in one.page("notregistered", 0, 9)] == [(1, "early"), (2, "late")]


def test_ids_of_nodes_come_between_each_other(enter):
    """What is asked of a pack is not asked of another node's, which has ids among its own."""
    one, two = enter("one"), enter("two")
    base = next_id(0, time.time())
    mine = [new_job(base + (n << 8) + 1, "ab", now=time.time()) for n in (0, 2, 4)]
    others = [new_job(base + (n << 8) + 2, "cd", now=time.time()) for n in (1, 3)]
    accept(one, mine)
    accept(two, others)
    now = time.time()
    for state in (one, two):
        for job, n in claim(state, now=now):
            state.settle(1, [Result("gcm", job, n, 1, LATER if n else DELIVERED)], now)
    for job in (*mine, *others):
        assert one.status(job.id, "", -1, 9).states["deferred"] == 1, job.id
    for job, n in claim(one, now=now + 60):
        one.settle(1, [Result("gcm", job, n, 2, DELIVERED)], now + 60)
    assert one.store.forget_jobs(now + 100, 0)
    assert [two.status(job.id, "", -1, 9).states["deferred"] for job in others] == [1, 1]
    assert len(claim(two, now=now + 60)) == 2


def test_failed_tokens_are_replayed_and_discarded_from_any_node(enter):
    one, two = enter("one"), enter("two")
    accept(one, jobs(one, "ab"))
    now = time.time()
    for job, n in claim(one, now=now):
        outcome = Outcome(Verdict.DEFERRED, "x", retry_after=1e9)
        one.settle(1, [Result("gcm", job, n, 1, outcome)], now)
    assert len(two.failed(Which(0, "", "", 1e12), (0, -1), 9)) == 2
    two.store.member._beat()
    assert two.replay(Which(0, "", "", 1e12), now) == 2
    assert len(claim(two, now=now)) == 2 and claim(one, now=now) == {}


# --------------------------------------------------------------------------------------------- broken connections


def fail_some(state, count=6):
    """Messages of two tokens that have failed."""
    accept(state, jobs(state, *["xy"] * count))
    now, no = time.time(), Outcome(Verdict.DEFERRED, "x", answered=False)
    while tally(state)["tokens"]:
        for (job, n), token in claim(state, now=now, room=1000).items():
            state.settle(1, [Result("gcm", job, n, token.attempt, no)], now)
        state.pacing.pauses.clear()
        now += 200
    assert tally(state)["failed"] == 2 * count


def exact(*states):
    """How much there is, asked of each node, and by counting rows."""
    for each in states:
        each.store.member._beat()
        each.store.counts()
    [found] = {tuple(sorted(tally(each).items())) for each in states}
    return dict(found)


@pytest.mark.parametrize("verbs", [("replay", "replay"), ("replay", "discard"), ("discard", "discard")])
def test_two_nodes_deal_with_failed_tokens_at_once(enter, address, verbs):
    """Each token is dealt with by one of them, and counted once."""
    one, two = enter("one"), enter("two")
    fail_some(one)
    every = Which(0, "", "", math.inf)
    done = dict.fromkeys(("one", "two"), 0)

    def deal(name, state, verb):
        while count := state.replay(every, time.time()) if verb == "replay" else state.discard(every):
            done[name] += count

    pairs = zip(done, (one, two), verbs)
    threads = [threading.Thread(target=deal, args=each) for each in pairs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(done.values()) == 12, done
    found = exact(one, two)
    [[open_, failed]] = sql(address, "SELECT (SELECT sum(open) FROM pack), count(*) FROM single WHERE state = -2")
    assert (found["tokens"], found["failed"]) == (open_, failed) and failed == 0
    replayed = one.snapshot().counters["replayed"]
    assert replayed == open_ and found["jobs"] == sql(address, "SELECT sum(jobs) FROM pack")[0][0]


def test_a_list_is_handed_out_by_one_node_at_a_time(enter, address, quick):
    one, two = enter("one"), enter("two")
    accept(one, jobs(one, "abc"))
    one.settle(1, [Result("gcm", *place, 1, GONE) for place in claim(one, now=time.time())], time.time())
    entries = one.hand_out("notregistered", 100)
    assert len(entries) == 3 and two.hand_out("notregistered", 100) is None
    assert one.hand_out("notregistered", 100) == entries, "its next state process may ask again"
    assert two.hand_out("canonical", 100) == [] == one.hand_out("canonical", 100), "of nothing nobody keeps others"
    one.handed_out("notregistered", 0)
    assert two.hand_out("notregistered", 100) == entries, "nobody has them"
    two.handed_out("notregistered", entries[1].number)
    assert [each.number for each in one.hand_out("notregistered", 100)] == [entries[2].number]
    fall_silent(one)
    assert eventually(lambda: two.hand_out("notregistered", 100)), "who is gone keeps nobody"


def test_who_has_left_is_no_node_that_is_gone(enter):
    one = enter("one")
    enter("two").close()
    one.store.member._beat()
    assert [(each.name, each.alive) for each in one.store.nodes()] == [("one", True)]


@pytest.mark.parametrize(
    "said, told",
    [
        ('connection failed: connection to server at "a" failed: refused\n\tIs the server running there?', "refused"),
        ("x failed: one\nAll failures were:\n- host: a: one\n- host: b: two", "host: a: one; host: b: two"),
        ("", "OperationalError"),
    ],
)
def test_why_a_server_cannot_be_asked_is_told_in_a_line(said, told):
    found = reason(psycopg.OperationalError(said))
    assert told in found and "running" not in found and "\n" not in found


def end_sessions(address, which="true"):
    sql(address, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND {which}")


def test_a_session_that_ends_between_two_calls_costs_one_call(enter, address):
    state = enter("one")
    end_sessions(address, "datname = current_database()")
    with pytest.raises(Passing):
        state.page("notregistered", 0, 9)
    assert state.page("notregistered", 0, 9) == []
    assert accept(state, jobs(state, "a")) == {}


def test_nobody_knows_what_became_of_a_commit_without_an_answer(enter, address):
    state = enter("one")
    with pytest.raises(Unsure), state.turn():
        accept(state, jobs(state, "a"))
        end_sessions(address, "datname = current_database()")


def test_a_commit_that_was_cancelled_while_it_waited_for_a_standby_is_no_ok(postgres, address, enter):
    """The server says that it is done, though only one disk has it."""
    state = enter("one")
    sql(address, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    sql(address, "SELECT pg_reload_conf()")
    try:
        found = []

        def post():
            with pytest.raises(Unsure) as caught:
                while not found:  # until the server has taken note
                    accept(state, jobs(state, "a"))
            found.append(str(caught.value))

        thread = threading.Thread(target=post)
        thread.start()
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        [[pid]] = eventually(lambda: sql(address, waiting))
        state.store.member._beat()  # our lease does not wait for the standby
        assert thread.is_alive() and not found
        sql(address, "SELECT pg_cancel_backend(%s)", pid)
        thread.join(10)
        assert found and "wait for synchronous replication" in found[0]
    finally:
        sql(address, "ALTER SYSTEM RESET synchronous_standby_names")
        sql(address, "SELECT pg_reload_conf()")


def test_what_a_server_has_forgotten_that_it_had_committed_is_told(enter, caplog):
    """A standby was promoted that had not received it."""
    state = enter("one")
    [job] = jobs(state, "a")
    accept(state, [job])
    told, cell = [], [0.0, float(job.id >> 8)]
    assert state.store.member._cell[1] == cell[1]
    state.store.start(cell, told.append)
    assert not caplog.records
    state.store.start([0.0, cell[1] + 1], told.append)
    assert "does not have message" in caplog.text


def test_what_is_wrong_with_a_server_is_said(address):
    with contextlib.closing(connect(address)) as db:
        durability = Durability(lambda statement: db.execute(statement).fetchall())
    problems = durability.problems("standby")
    assert any("fsync" in each for each in problems) and any("synchronous_standby_names" in each for each in problems)


# ----------------------------------------------------------------------------------------------------- hot statements


_DEAD = """
INSERT INTO pack (id, last, upstream, lane, since, size, fresh, open, jobs, node)
SELECT n << 8 | 1, n << 8 | 1, 'gcm', 0, 1, 1, 1, 1, 1, n %% 2 FROM generate_series(1, 100000) AS n
"""


@pytest.mark.alone
def test_statements_are_quick_beside_many_dead_rows(enter, address):
    """A snapshot that somebody holds keeps 100,000 dead rows. What a claim reads does not grow with them."""
    state, pages = enter("one"), []
    with contextlib.closing(psycopg.connect(address)) as holder:
        sql(address, _DEAD)
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT count(*) FROM gocm.pack")
        sql(address, "UPDATE pack SET done = true, fresh = 0, open = 0")
        [job] = jobs(state, "abc")
        accept(state, [job])
        state.store.spool._floors.update({("gcm", 0): (job.id, 1e12), ("", 0): (job.id, 1e12)})
        state.store._pool.add(("gcm", 0))
        original = Database._run

        def explained(self, statement, values):
            if not statement.lstrip().startswith(("SELECT", "WITH")):
                return original(self, statement, values)
            rows = original(self, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement, values).fetchall()
            plan = rows[0][0][0]["Plan"]
            pages.append((plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], statement))
            return original(self, statement, values)

        state.store.db._run = explained.__get__(state.store.db)
        assert state.store.fresh("gcm", 0, job.id - 1, 100)
        state.store.due("gcm", Spot(0), 1 << 60, 100, 0)
        state.store.next_rank("gcm", Spot(0), 1 << 60, 0)
        state.store.take("gcm", 0, 100)
        assert state.store.oldest() and state.store.pack_of(job.id)
        holder.execute("ROLLBACK")
    assert len(pages) >= 6
    assert max(count for count, _ in pages) < 100, [(count, statement[:80]) for count, statement in pages]


# ------------------------------------------------------------------------------------------------------- formats


def spool_command(address, *words):
    from gocm_lib.state.postgres import administration

    return administration.command([*words, "--spool", address], {})


def test_nodes_of_two_formats_work_side_by_side_until_the_last_old_one_has_gone(enter, address, monkeypatch, capsys):
    """A made-up next format: it adds a column."""
    old = enter("old")
    accept(old, jobs(old, "ab"))
    with monkeypatch.context() as next_version:
        next_version.setattr(schema, "FORMAT", 3)
        next_version.setattr(schema, "STEPS", {2: "ALTER TABLE pack ADD COLUMN colour text NOT NULL DEFAULT 'red'"})
        assert spool_command(address, "upgrade") == 0
        assert "nodes of format 2 run: replace them, and do this again" in capsys.readouterr().out
        new = enter("new")
        accept(new, jobs(new, "cd"))
        accept(old, jobs(old, "ef"))
        now = time.time()
        for state in (old, new):
            for job, n in claim(state, now=now):
                state.settle(1, [Result("gcm", job, n, 1, DELIVERED)], now)
        assert new.snapshot().counters["delivered"] == 6 and old.snapshot().pending == 0
        assert schema.unfit(3, 2) == ""
        old.close()
        assert spool_command(address, "upgrade") == 0 and "replace them" not in capsys.readouterr().out
    assert schema.unfit(*sql(address, "SELECT format, works_with FROM meta")[0]).endswith("run a newer version")
    assert spool_command(address, "check") == 1


def test_a_spool_of_format_1_becomes_one_of_2(address, enter, capsys):
    for which in ("canonical", "invalid"):
        sql(address, f"ALTER TABLE {which} DROP COLUMN upstream")
    sql(address, "DROP INDEX notregistered_upstream")
    sql(address, "DROP TABLE label, later, hold, meaning")
    sql(address, "UPDATE meta SET format = 1, works_with = 1")
    assert spool_command(address, "check") == 1 and "gocm spool upgrade" in capsys.readouterr().out
    assert spool_command(address, "upgrade") == 0
    spool_command(address, "check")
    assert "not for this version" not in capsys.readouterr().out
    state = enter("one")
    accept(state, [each._replace(tag="t") for each in jobs(state, "ab")])
    assert len(claim(state, now=time.time())) == 2 and state.jobs("t", 0, 9)[0].pending == 2


def test_a_newer_version_on_an_old_spool_asks_for_the_upgrade(monkeypatch):
    monkeypatch.setattr(schema, "FORMAT", 4)
    monkeypatch.setattr(schema, "READS_FROM", 3)
    assert schema.unfit(2, 1).endswith("gocm spool upgrade") and schema.unfit(3, 2) == ""


def test_counters_are_folded_and_the_same_as_before(enter, address):
    state = enter("one")
    for _ in range(20):
        accept(state, jobs(state, "ab"))
    before = state.store.counts()[0], tally(state)
    assert sql(address, "SELECT count(*) FROM tally")[0][0] > 50
    state.store.member._folded_at = -1e9
    state.store.member._beat()
    assert sql(address, "SELECT count(*) FROM tally") == [(0,)]
    assert (state.store.counts()[0], tally(state)) == before
    assert state.store.counts()[0][Count("accepted_tokens", "gcm")] == 40
    state.store.db.close()
