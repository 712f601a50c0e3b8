"""gcm: for any status and any bytes exactly one outcome per token, and never unregistered without NotRegistered."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message import gcm, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import DELIVERED, Outcome, Verdict

pytestmark = pytest.mark.short

NOW = 1e9

NOW = 1_800_000_000.5


def judge(status, body, count, headers=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return gcm.outcomes(claimed(count), status, headers or {}, raw, NOW)


words = st.sampled_from(["NotRegistered", "Unavailable", "InternalServerError", "InvalidRegistration", "", "Odd"])
results = st.lists(
    st.one_of(
        st.fixed_dictionaries({"error": words}),
        st.fixed_dictionaries({"message_id": st.text(max_size=4)}),
        st.fixed_dictionaries({"message_id": st.just("1"), "registration_id": st.text(max_size=4) | st.integers()}),
        st.none(),
        st.integers(),
        st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    ),
    max_size=8,
)
bodies = st.binary(max_size=80) | results.map(lambda r: json.dumps({"results": r}).encode())


@given(st.integers(100, 599), bodies, st.integers(1, 8), st.none() | st.text(max_size=9))
def test_one_outcome_for_each_token(status, body, count, retry_after):
    found = judge(status, body, count, {} if retry_after is None else {"retry-after": retry_after})
    assert len(found) == count and all(isinstance(outcome, Outcome) for outcome in found)
    if any(outcome.verdict is Verdict.UNREGISTERED for outcome in found):
        assert status == 200 and b"NotRegistered" in body
        assert len(json.loads(body)["results"]) == count


@given(results, st.integers(1, 8))
def test_a_dead_token_is_the_one_that_was_named(results, count):
    for result, outcome in zip(results, judge(200, {"results": results}, count)):
        if outcome.verdict is Verdict.UNREGISTERED:
            assert result["error"] == "NotRegistered"


# The reference's tables: result errors, then HTTP statuses.
@pytest.mark.parametrize(
    "result, verdict, reason",
    [
        ({"message_id": "1:08"}, Verdict.DELIVERED, ""),
        ({"error": "NotRegistered"}, Verdict.UNREGISTERED, "NotRegistered"),
        ({"error": "Unavailable"}, Verdict.PUT_OFF, "Unavailable"),
        ({"error": "InternalServerError"}, Verdict.PUT_OFF, "InternalServerError"),
        ({"error": "DeviceMessageRateExceeded"}, Verdict.HELD, "DeviceMessageRateExceeded"),
        ({"error": "InvalidRegistration"}, Verdict.REJECTED, "InvalidRegistration"),
        ({"error": "MissingRegistration"}, Verdict.REJECTED, "MissingRegistration"),
        ({"error": "MismatchSenderId"}, Verdict.REJECTED, "MismatchSenderId"),
        ({"error": "InvalidPackageName"}, Verdict.REJECTED, "InvalidPackageName"),
        ({"error": "MessageTooBig"}, Verdict.REJECTED, "MessageTooBig"),
        ({"error": "InvalidDataKey"}, Verdict.REJECTED, "InvalidDataKey"),
        ({"error": "InvalidTtl"}, Verdict.REJECTED, "InvalidTtl"),
        ({"error": "InvalidApnsCredential"}, Verdict.REJECTED, "InvalidApnsCredential"),
        ({"error": "SomethingNew"}, Verdict.REJECTED, "SomethingNew"),
        ({"error": "DeprecatedApi"}, Verdict.UPSTREAM_CONFIG, "DeprecatedApi"),
        ({}, Verdict.DEFERRED, "result without message_id"),
    ],
)
def test_results(result, verdict, reason):
    [outcome] = judge(200, {"results": [result]}, 1)
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


@pytest.mark.parametrize(
    "status, verdict, wait",
    [
        (201, Verdict.DEFERRED, None),
        (301, Verdict.UPSTREAM_CONFIG, None),
        (307, Verdict.UPSTREAM_CONFIG, None),
        (400, Verdict.REJECTED, None),
        (401, Verdict.UPSTREAM_CONFIG, None),
        (403, Verdict.UPSTREAM_CONFIG, None),
        (404, Verdict.UPSTREAM_CONFIG, None),
        (413, Verdict.REJECTED, None),
        (429, Verdict.DEFERRED, None),
        (500, Verdict.DEFERRED, None),
        (502, Verdict.DEFERRED, None),
        (503, Verdict.DEFERRED, None),
        (599, Verdict.DEFERRED, None),
    ],
)
def test_statuses(status, verdict, wait):
    told = {400: "bad_message", 413: "bad_message", 401: "unauthorized", 408: "unavailable", 429: "quota"}
    cause = told.get(status, "unavailable" if status >= 500 else "")
    expected = Outcome(verdict, f"HTTP {status}", retry_after=wait, garbled=status == 201, cause=cause)
    assert judge(status, b"<html>", 2) == [expected] * 2


def test_retry_after_is_passed_on():
    assert judge(503, b"", 1, {"retry-after": "7"})[0].retry_after == 7
    assert judge(429, b"", 1, {"retry-after": "0"})[0].retry_after == 0


def test_the_reference_s_own_example():
    body = {
        "multicast_id": 216,
        "success": 3,
        "failure": 3,
        "canonical_ids": 1,
        "results": [
            {"message_id": "1:0408"},
            {"error": "Unavailable"},
            {"error": "InvalidRegistration"},
            {"message_id": "1:1516"},
            {"message_id": "1:2342", "registration_id": "32"},
            {"error": "NotRegistered"},
        ],
    }
    assert [outcome.verdict for outcome in judge(200, body, 6)] == [
        Verdict.DELIVERED,
        Verdict.PUT_OFF,
        Verdict.REJECTED,
        Verdict.DELIVERED,
        Verdict.DELIVERED,
        Verdict.UNREGISTERED,
    ]
    assert judge(200, body, 6)[4].canonical == "32"


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_wrong_number_of_results_reports_no_token_dead_and_replaces_none(count):
    body = {"results": [{"error": "NotRegistered"}, {"message_id": "1", "registration_id": "new"}, {"message_id": "2"}]}
    found = judge(200, body, count)
    assert len(found) == count
    assert {outcome.verdict for outcome in found} <= {Verdict.DELIVERED, Verdict.DEFERRED}
    assert all(outcome == DELIVERED for outcome in found[1:3])


def claimed(count, message='{"data":{"a":"b"}}', target="token"):
    return Slice("gcm", target, message, [Run(1, 0, 1, [f"t{n}" for n in range(count)])])


def places(part):
    """Of each token: its job, place, attempt and itself."""
    return [(run.job, n, run.attempt, token) for run in part.runs for n, token in enumerate(run.tokens, run.first)]


@given(st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 9)), min_size=1, max_size=6))
def test_requests_cover_each_token_once_in_order(runs):
    runs = [Run(job, first, 1, [f"{job}-{n}" for n in range(count)]) for job, (count, first) in enumerate(runs)]
    whole = claimed(1)._replace(runs=runs)
    parts = list(gcm.requests(whole))
    assert [place for part, _ in parts for place in places(part)] == places(whole)
    for part, body in parts:
        message = json.loads(body)
        assert message["registration_ids"] == [token for *_, token in places(part)]
        assert 1 <= part.size <= 1000 and message["data"] == {"a": "b"}
    assert len(parts) == -(-whole.size // 1000), "no more than are needed"


@pytest.mark.parametrize("status", [400, 413])
def test_what_a_shared_request_is_refused_for_may_be_one_of_its_messages(status):
    runs = [Run(1, 0, 1, ["a", "b"]), Run(2, 0, 1, ["c"])]
    shared = gcm.outcomes(claimed(1)._replace(runs=runs), status, {}, b"", NOW)
    assert [outcome.verdict for outcome in shared] == [Verdict.SHARED] * 3
    own = gcm.outcomes(claimed(1)._replace(runs=[runs[0], Run(1, 5, 1, ["d"])]), status, {}, b"", NOW)
    assert [outcome.verdict for outcome in own] == [Verdict.REJECTED] * 3


def draft(**given):
    return job.parse("application/json", json.dumps({"payload": {"a": "b"}, **given}).encode(), 10)


def test_options_go_beside_the_data():
    message = gcm.message(draft(tokens=["t0"], collapse_key="k", time_to_live=0), NOW)
    [(_, body)] = gcm.requests(claimed(1, message))
    assert json.loads(body) == {"registration_ids": ["t0"], "data": {"a": "b"}, "collapse_key": "k", "time_to_live": 0}


@pytest.mark.parametrize("target, to", [("topic", {"to": "/topics/t0"}), ("condition", {"condition": "t0"})])
def test_topics_and_conditions_are_one_request(target, to):
    [(_, body)] = gcm.requests(claimed(1, target=target))
    assert json.loads(body) == {**to, "data": {"a": "b"}}
    [outcome] = gcm.outcomes(claimed(1, target=target), 200, {}, b'{"message_id": 123}', NOW)
    assert outcome == Outcome(Verdict.DELIVERED, receipt="123")
    [outcome] = gcm.outcomes(claimed(1, target=target), 200, {}, b'{"error": "InvalidRegistration"}', NOW)
    assert outcome.cause == "rejected", "there is no token to be invalid"
    [outcome] = gcm.outcomes(claimed(1, target=target), 200, {}, b'{"error": "NotRegistered"}', NOW)
    assert outcome.verdict is Verdict.REJECTED, "there is no token to be unregistered"


@pytest.mark.parametrize("given, field", [({"fid": ["x"]}, "fid"), ({"tokens": ["x"], "message": {}}, "message")])
def test_what_only_v1_has_is_refused(given, field):
    with pytest.raises(BadRequest) as caught:
        gcm.message(draft(**given), NOW)
    assert caught.value.field == field
