"""What is told of tokens: the upstream's ids, what is no token, what was left out of a list, and to whom as JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, accept, claim, eventually, form, new_job, new_state

from gocm_lib.front.posts import _wants_json
from gocm_lib.message import job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import DELIVERED, Outcome, Result, Verdict, address, join

short = pytest.mark.short
JSON = {"Content-Type": "application/json"}


def fate(server, name, query=""):
    return server.http().json("GET", f"/gcm/jobs/{name}{query}")


# ------------------------------------------------------------------------------------------------ the upstream's ids


@pytest.mark.parametrize("upstream", ["fcm", "gcm"])
def test_each_token_has_the_upstream_s_id(start_both, upstream):
    server = start_both()
    tokens = [f"{'gone' if n % 10 == 3 else 'canonical' if n % 10 == 5 else 'phone'}-{n}" for n in range(250)]
    name = server.send(tokens, upstream=upstream)
    server.settled()
    ids = {}
    for query in ("?limit=1000", "?limit=7&after=99", "?limit=1&after=248", "?state=delivered&limit=40&after=100"):
        told = fate(server, name, query)
        for result in told["results"]:
            assert ("message_id" in result) == (result["state"] == "delivered")
            assert ids.setdefault(result["n"], result.get("message_id")) == result.get("message_id")
    pattern = "projects/sandbox-project/messages/0:" if upstream == "fcm" else "0:"
    given = [receipt for receipt in ids.values() if receipt]
    assert len(given) == 225 and all(receipt.startswith(pattern) for receipt in given)
    if upstream == "fcm":
        assert len(set(given)) == 225


def test_a_topic_s_message_has_one_too(start_both):
    server = start_both()
    names = [
        json.loads(server.http().ask("POST", "/gcm/send", body, {**FORM, "Accept": "application/json"})[2])["job"]
        for body in ("topic=news&payload={}&upstream=gcm", "topic=news&payload={}&upstream=fcm")
    ]
    server.settled()
    for name in names:
        assert fate(server, name)["results"][0]["message_id"]


def test_an_id_is_forgotten_with_its_message(start):
    server = start("--max-kept", "0")
    name = server.send(["a", "b"])
    server.settled()
    eventually(lambda: server.http().ask("GET", f"/gcm/jobs/{name}")[0] == 410)


@short
def test_of_what_is_forgotten_no_id_stays_and_none_comes_later():
    state = new_state()
    whole = Result("gcm", 1, 0, 1, DELIVERED, 2, ("x", "y"))
    accept(state, [new_job(1, ["a", "b"])._replace(skipped=(job.Skip(2, "is empty"),))])
    claim(state)
    state.settle(1, [whole], 1000.0)
    assert [fate.receipt for fate in state.status(1, "", -1, 9).fates] == ["x", "y"]
    state.settle(1, [whole], 1001.0)  # it comes again
    assert state.store.db.execute("SELECT count(*) FROM ended").fetchone() == (1,)
    assert state.store.forget_jobs(math.inf, 0)
    state.settle(1, [whole], 1002.0)  # and once more, late
    for table in ("ended", "pack", "body"):
        assert state.store.db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


receipts = st.text("abc:0", max_size=3)


@short
@given(st.lists(st.tuples(st.booleans(), receipts), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_results_are_joined_with_their_ids_in_order(answers, random):
    told = [
        Outcome(Verdict.DELIVERED, receipt=text) if good else Outcome(Verdict.REJECTED, "r") for good, text in answers
    ]
    each = [Slice("fcm", "token", "{}", [Run(1, n, 1, ("t",))]) for n in range(len(told))]
    found = [result for part, outcome in zip(each, told) for result in address(part, [outcome])]
    random.shuffle(found)
    whole = address(Slice("fcm", "token", "{}", [Run(1, 0, 1, ("t",) * len(told))]), told)
    for results in (join(found), join(whole)):
        flat = {}
        for result in results:
            assert not result.outcome.receipt and len(result.receipts) in (0, result.span)
            for n in range(result.span):
                flat[result.n + n] = result.outcome.verdict, (result.receipts or ("",) * result.span)[n]
        assert flat == {n: (outcome.verdict, outcome.receipt) for n, outcome in enumerate(told)}


@short
def test_what_has_no_id_is_joined_as_before():
    parts = [Result("gcm", 1, n, 1, DELIVERED) for n in range(5)]
    assert join(reversed(parts)) == [Result("gcm", 1, 0, 1, DELIVERED, 5)]


# ------------------------------------------------------------------------------------------- what is no token of ours


def test_invalid_and_foreign_tokens_have_a_list(start_both):
    server = start_both()
    http, path = server.http(), "/gcm/report/invalid"
    assert http.ask("GET", path)[2] == b'{"tokens":null}'
    server.send(["invalid-1", "phone-1", "mismatch-2", "gone-3"])
    server.send(["invalid-4", "mismatch-5", "canonical-6"], upstream="gcm")
    server.send(["invalid-1"])
    server.settled()
    kinds = {"invalid-1": "invalid_token", "mismatch-2": "wrong_sender"} | {
        "invalid-4": "invalid_token",
        "mismatch-5": "wrong_sender",
    }
    told = http.json("GET", path + "?peek=1")["tokens"]
    assert {entry["token"]: entry["reason"] for entry in told} == kinds and len(told) == 4
    assert http.json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": ["gone-3"]}
    first = http.ask("GET", path + "?ack=0&limit=1")
    assert json.loads(first[2])["tokens"] == told[:1]
    assert http.json("GET", f"{path}?ack={first[1]['GoCM-Cursor']}&limit=1")["tokens"] == told[1:2]
    cursor = http.ask("GET", path + "?peek=1&limit=1")[1]["GoCM-Cursor"]
    assert json.loads(http.ask("POST", path + "/ack", f"ack={cursor}", FORM)[2]) == {"acknowledged": int(cursor)}
    assert http.json("GET", path)["tokens"] == told[2:]
    assert http.ask("GET", path)[2] == b'{"tokens":null}'
    assert 'gocm_report_entries{list="invalid"} 0' in http.ask("GET", "/metrics")[2].decode()


def test_a_refused_apns_key_has_a_reason_of_its_own(start_fcm):
    server = start_fcm()
    name = server.send(["error-third_party", "error-bad_value"])
    server.settled()
    reasons = [result["reason"] for result in fate(server, name)["results"]]
    assert reasons == ["third_party_auth", "bad_message"]
    assert server.http().json("GET", "/gcm/report/invalid") == {"tokens": None}


# ------------------------------------------------------------------------------------------------ what was left out


BAD = ["", "a,b", 'x"y', "undefined", "a\u0000b".replace("\u0000", "\u0001"), "x" * 5000]


@short
def test_which_were_left_out_and_why():
    body = {"tokens": ["a", *BAD, 5, None, "b"], "payload": {}, "skip_invalid": True}
    draft = job.parse("application/json", json.dumps(body).encode(), 100)
    assert draft.tokens == ("a", "b")
    assert [place for place, _ in draft.skipped] == list(range(1, 9))
    assert all(why for _, why in draft.skipped)
    kept = job.accept(draft, upstream="fcm", message="{}", now=0.0, max_age=9.0)
    assert list(kept.places) == [0, 9] and kept.skipped == draft.skipped


@short
@pytest.mark.parametrize(
    "change, field",
    [
        ({"skip_invalid": False}, "tokens"),
        ({"tokens": BAD}, "tokens"),  # nothing would be left
        ({"skip_invalid": "yes"}, "skip_invalid"),
        ({"skip_invalid": 1}, "skip_invalid"),
        ({"skip_invalid": None}, "skip_invalid"),
    ],
)
def test_the_others_are_taken_only_if_that_was_asked_for(change, field):
    body = {"tokens": ["a", "b,c"], "payload": {}, "skip_invalid": True, **change}
    with pytest.raises(BadRequest) as caught:
        job.parse("application/json", json.dumps(body).encode(), 100)
    assert caught.value.field == field


def test_it_is_told_in_the_answer_and_in_the_job(start):
    server = start()
    http = server.http()
    tokens = [f"phone-{n}" if n % 3 else f"a,{n}" for n in range(9)]
    assert http.ask("POST", "/gcm/send", form(tokens, "{}"), FORM)[0] == 400
    status, headers, body = http.ask("POST", "/gcm/send", form(tokens, "{}", skip_invalid="true"), FORM)
    told = json.loads(body)
    assert status == 200 and headers["Content-Type"] == "application/json" and told["job"] == headers["X-GoCM-Job"]
    assert told["tokens"] == 6 and [each["n"] for each in told["skipped"]] == [0, 3, 6]
    assert all("one tokens= for each" in each["error"] for each in told["skipped"])
    server.settled()
    found = fate(server, told["job"])
    assert found["tokens"] == found["states"]["delivered"] == 6 and found["skipped"] == told["skipped"]
    assert [(each["n"], each["token"]) for each in found["results"]] == [(n, tokens[n]) for n in range(9) if n % 3], (
        "places are those of the list"
    )
    page = fate(server, told["job"], "?limit=2&after=2")
    assert [each["n"] for each in page["results"]] == [4, 5] and [each["n"] for each in page["skipped"]] == [3]
    assert [each["n"] for each in fate(server, told["job"], "?limit=2&after=5")["skipped"]] == [6]
    assert http.ask("POST", "/gcm/send", form(["a"], "{}", skip_invalid="true"), FORM)[2] == b"ok\n"
    lines = "\n".join(json.dumps({"tokens": [t, "b"], "payload": {}, "skip_invalid": True}) for t in ("a", "x,y"))
    answer = http.ask("POST", "/gcm/send", lines, {"Content-Type": "application/x-ndjson"})[2].splitlines()
    assert "skipped" not in json.loads(answer[0]) and json.loads(answer[1])["skipped"][0]["n"] == 0


def test_it_survives_a_kill(start, run):
    server = start(url="http://127.0.0.1:9/gcm/send")
    _, headers, _ = server.http().ask("POST", "/gcm/send", form(["a,b", "c"], "{}", skip_invalid="true"), FORM)
    server.kill_group()
    again = start()
    again.settled()
    found = fate(again, headers["X-GoCM-Job"])
    assert [each["n"] for each in found["skipped"]] == [0] and found["results"][0]["token"] == "c"


# ------------------------------------------------------------------------------------------------- to whom as JSON


@short
@pytest.mark.parametrize(
    "accept, expected",
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/json, application/problem+json", True),
        ("application/json;q=0.5", True),
        ("application/json, text/plain;q=0", True),
        ("", False),
        ("*/*", False),
        ("application/json, */*;q=0.1", False),
        ("application/json, text/plain, */*", False),  # axios
        ("text/html, application/json", False),
        ("application/json;q=0", False),
        ("application/json;q=0.000", False),
        ("application/x-ndjson", False),
        ("application/jsonp", False),
    ],
)
def test_who_takes_json_only(accept, expected):
    assert _wants_json(accept) is expected


def test_json_only_where_it_is_asked_for(start):
    server = start()
    http = server.http()
    for wanted in ({}, {"Accept": "*/*"}, {"Accept": "application/json, text/plain, */*"}):
        _, headers, body = http.ask("POST", "/gcm/send", form(["a"], "{}"), {**FORM, **wanted})
        assert (body, headers["Content-Type"]) == (b"ok\n", "text/html")
    key = {**FORM, "Accept": "application/json", "Idempotency-Key": "k"}
    bodies = [http.ask("POST", "/gcm/send", form(["a", "b"], "{}"), key) for _ in range(2)]
    told = json.loads(bodies[0][2])
    assert told == {"job": bodies[0][1]["X-GoCM-Job"], "upstream": "gcm", "tokens": 2, "skipped": []}
    assert bodies[1][2] == bodies[0][2] and bodies[1][1]["Idempotency-Replayed"] == "true"
