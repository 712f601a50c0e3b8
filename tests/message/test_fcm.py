"""fcm: what is posted, and what each answer means. Never an unregistered token without FcmError UNREGISTERED."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gocm_lib.message import fcm, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import Run, Slice
from gocm_lib.message.outcome import Outcome, Verdict, readable
from gocm_lib.tools import pretend_answers

pytestmark = pytest.mark.short

NOW = 1e9
REPLIES = Path(__file__).parent / "replies"


def draft(**given):
    return job.parse("application/json", json.dumps({"tokens": ["t"], "payload": {}, **given}).encode(), 10)


def message(**given):
    return json.loads(fcm.message(draft(**given), NOW))


def bodies(text, tokens=("t",), target="token"):
    claimed = Slice("fcm", target, text, [Run(1, 0, 1, tokens)])
    return [json.loads(body) for _, body in fcm.requests(claimed)]


def judge(status, body, headers=None):
    part = Slice("fcm", "token", "", [Run(1, 0, 1, ["t"])])
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    [outcome] = fcm.outcomes(part, status, headers or {}, raw, NOW)
    return outcome


# ----------------------------------------------------------------------------------------------------- the request


def test_every_value_becomes_a_text():
    payload = {"s": "x", "t": True, "f": False, "i": 1, "d": 1.5, "o": {"a": [1, "ü"]}, "l": [], "n": None}
    texts = {"s": "x", "t": "true", "f": "false", "i": "1", "d": "1.5", "o": '{"a":[1,"ü"]}', "l": "[]", "n": "null"}
    assert message(payload=payload)["message"]["data"] == texts


def test_options_are_put_where_v1_has_them():
    found = message(collapse_key="k", time_to_live=60, priority="high", restricted_package_name="p", dry_run=True,
                    notification={"title": "T", "body": "B", "icon": "i", "android_channel_id": "c"})  # fmt: skip
    assert found["validate_only"] is True and set(found) == {"validate_only", "message"}
    assert found["message"]["notification"] == {"title": "T", "body": "B"}
    assert found["message"]["android"] == {
        "collapse_key": "k", "ttl": "60s", "priority": "HIGH", "restricted_package_name": "p",
        "notification": {"icon": "i", "channel_id": "c"},
    }  # fmt: skip


def test_a_template_is_merged_under_the_target_and_counts_more_than_options():
    template = {"apns": {"headers": {"apns-expiration": "5"}}, "android": {"ttl": "1s", "direct_boot_ok": True}}
    text = fcm.message(draft(message=template, time_to_live=9), NOW)
    [body] = bodies(text)
    assert body["message"] == {**template, "webpush": {"headers": {"TTL": "9"}}, "data": {}, "token": "t"}


def test_a_template_alone_needs_no_payload():
    found = job.parse("application/json", b'{"tokens":["t"],"message":{"notification":{"title":"T"}}}', 10)
    assert json.loads(fcm.message(found, NOW)) == {"message": {"notification": {"title": "T"}}}


@pytest.mark.parametrize("target", ["token", "fid", "topic", "condition"])
@pytest.mark.parametrize("given", [{}, {"payload": {"a": 1}}, {"dry_run": True}])
def test_the_target_is_spliced_in(target, given):
    whole = json.loads(fcm.message(draft(**given), NOW))
    [body] = bodies(fcm.message(draft(**given), NOW), ['a"b\\ü'], target)
    assert body["message"].pop(target) == 'a"b\\ü'
    assert body == whole


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=20))
def test_one_request_for_each_token_in_order(tokens):
    assert [body["message"]["token"] for body in bodies(fcm.message(draft(), NOW), tokens)] == tokens


@pytest.mark.parametrize("args", [["x", "y"], '["x","y"]'])
def test_arguments_of_texts_become_lists(args):
    found = message(notification={"body_loc_key": "k", "body_loc_args": args})
    assert found["message"]["android"]["notification"]["body_loc_args"] == ["x", "y"]


@pytest.mark.parametrize("given, field", [
    ({"message": {"android": {"notification": "x"}}, "notification": {"icon": "i"}}, "message"),
    ({"notification": {"title": 5}}, "notification"), ({"notification": {"body_loc_args": "x"}}, "notification"),
    ({"payload": {"from": "x"}}, "payload"), ({"payload": {"message_type": "x"}}, "payload"),
    ({"payload": {"google.x": "x"}}, "payload"), ({"payload": {"gcm.notification.x": "x"}}, "payload"),
    ({"message": {"data": {"from": "x"}}, "payload": None}, "payload"),
    ({"message": {"token": "x"}}, "message"), ({"message": {"surprise": {}}}, "message"),
    ({"message": {"android": 1}}, "message"), ({"message": {"data": {"a": 1}}}, "message"),
    ({"message": {"data": {"a": "1"}}}, "payload"), ({"notification": {"odd": "x"}}, "notification"),
    ({"payload": {"a": "x" * 4000}, "notification": {"title": "y" * 200}}, "payload"),
    ({"payload": {"a": ['"' * 2100]}}, "payload"),
])  # fmt: skip
def test_what_fcm_would_refuse_is_refused_before(given, field):
    with pytest.raises(BadRequest) as caught:
        fcm.message(draft(**given), NOW)
    assert caught.value.field == field


@pytest.mark.parametrize("given, field", [
    ({"topic": "x"}, "topic"), ({"fid": "x"}, "fid"), ({"time_to_live": 2419201}, "time_to_live")])  # fmt: skip
def test_two_targets_or_a_wrong_option_are_refused(given, field):
    with pytest.raises(BadRequest) as caught:
        draft(**given)
    assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------ the answer


codes = st.sampled_from(["UNREGISTERED", "INVALID_ARGUMENT", "SENDER_ID_MISMATCH", "QUOTA_EXCEEDED", "INTERNAL", "ODD"])
details = st.lists(st.one_of(
    st.builds(lambda c: {"@type": pretend_answers.FCM_ERROR, "errorCode": c}, codes),
    st.builds(lambda f: {"@type": pretend_answers.BAD_REQUEST, "fieldViolations": [{"field": f}]},
              st.sampled_from(["message.token", "message.data", 1, None])),
    st.builds(lambda d: {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": d},
              st.sampled_from(["1s", "0.5s", "x", 3, "99999999999s"])),
    st.none(), st.integers(), st.just({"@type": 7}),
    st.just({"@type": pretend_answers.BAD_REQUEST, "fieldViolations": 7})),
    max_size=3)  # fmt: skip
errors = st.builds(lambda d, m, w: json.dumps({"error": {"details": d, "message": m, "status": w}}).encode(),
                   details | st.none(), st.text(max_size=9) | st.integers(), codes)  # fmt: skip


@given(
    st.integers(100, 599), errors | st.binary(max_size=60) | st.just(b'{"name":"x"}'), st.none() | st.text(max_size=5)
)
def test_any_answer_is_one_outcome_and_dead_only_by_fcm_s_word(status, body, retry_after):
    outcome = judge(status, body, {} if retry_after is None else {"retry-after": retry_after})
    assert isinstance(outcome, Outcome) and outcome.verdict in Verdict
    if outcome.verdict is Verdict.UNREGISTERED:
        assert status == 404 and b"UNREGISTERED" in body and b"FcmError" in body
    if outcome.verdict is Verdict.DELIVERED:
        assert status == 200


REPLY_FILES = sorted(REPLIES.glob("*.json"))


@pytest.mark.parametrize("path", REPLY_FILES, ids=lambda path: path.stem)
def test_recorded_answers(path):
    """Each file: an answer as Google was seen to give it, and the outcome it must have."""
    reply = json.loads(path.read_text())
    body = reply["body"] if isinstance(reply["body"], str) else json.dumps(reply["body"])
    outcome = judge(reply["status"], body.encode(), reply.get("headers"))
    told = {"verdict": str(outcome.verdict), "reason": outcome.reason}
    told |= {"retry_after": outcome.retry_after} if outcome.retry_after is not None else {}
    told |= {"rejects_message": True} if outcome.rejects_message else {}
    assert told == reply["outcome"]


def test_there_are_recorded_answers():
    assert len(REPLY_FILES) >= 25


def test_every_answer_of_the_sandbox_is_understood():
    """The pretend FCM's answers were written from the same records, by other code: none may be a surprise."""
    for name, forms in pretend_answers.ANSWERS.items():
        for form in forms:
            outcome = judge(form.status, form.body)
            assert (outcome.verdict is Verdict.UNREGISTERED) == (name == "unregistered"), name
            assert (outcome.verdict is Verdict.UPSTREAM_CONFIG) == (
                name in ("permission_denied", "expired", "not_found_page", "not_found_json")), name  # fmt: skip
            if name in ("quota_device", "quota_topic"):
                assert outcome.verdict is Verdict.HELD, name
            elif form.status >= 500 or form.status == 429:
                assert outcome.verdict is Verdict.DEFERRED, name


@pytest.mark.parametrize("target, cause", [("token", "wrong_sender"), ("fid", "wrong_sender"), ("topic", "rejected")])
def test_a_topic_is_no_token_of_another_sender(target, cause):
    [answer] = pretend_answers.ANSWERS["sender_mismatch"]
    part = Slice("fcm", target, "{}", [Run(1, 0, 1, ("x",))])
    [outcome] = fcm.outcomes(part, answer.status, {}, answer.body, NOW)
    assert outcome.cause == cause


def test_what_was_taken_has_google_s_name_and_a_refused_key_a_reason():
    part = Slice("fcm", "token", "{}", [Run(1, 0, 1, ("x",))])
    [outcome] = fcm.outcomes(part, 200, {}, b'{"name":"projects/p/messages/0:1%2"}', NOW)
    assert outcome == Outcome(Verdict.DELIVERED, receipt="projects/p/messages/0:1%2")
    [outcome] = fcm.outcomes(part, 200, {}, b'{"name":"a b"}', NOW)
    assert outcome == Outcome(Verdict.DELIVERED), "what cannot be told is left out"
    [answer] = pretend_answers.ANSWERS["third_party"]
    [outcome] = fcm.outcomes(part, answer.status, {}, answer.body, NOW)
    assert (outcome.verdict, outcome.cause) == (Verdict.REJECTED, "third_party_auth")


PIECES = [
    '"name"',
    '"x"',
    '"projects/p/messages/1"',
    '"a\\u0041"',
    '"\u00e9"',
    '"',
    "{",
    "}",
    ":",
    ",",
    " ",
    "\n",
    "\t",
]
PIECES += ["\x0b", "\\", "1", "null", "[", "]", '""', "\x00", '{"name":"', '"}']


@example('{"name":"a"b"}')
@example('{"name":"a\\"b"}')
@example('{"name":"\\u0041"}')
@example('{"name":"a\\"}')
@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_the_quick_look_at_an_answer_sees_what_the_parser_sees(body):
    try:
        name = json.loads(body)["name"]
    except (ValueError, KeyError, TypeError):
        name = None
    part = Slice("fcm", "token", "{}", [Run(1, 0, 1, ("x",))])
    [outcome] = fcm.outcomes(part, 200, {}, body.encode(), 0.0)
    assert (outcome.verdict is Verdict.DELIVERED) == isinstance(name, str)
    assert outcome.receipt == (readable(name) if isinstance(name, str) else "")
