"""job: whatever bytes arrive, a sound Job or a BadRequest that names the field."""

import json
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit import form

from gocm_lib.message import fcm, gcm, job
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.strict_json import compact, read_json

pytestmark = pytest.mark.short

FORM, JSON = "application/x-www-form-urlencoded", "application/json"

NOW = 1_800_000_000.5


def parse(content_type, body):
    return job.parse(content_type, body, 100_000)


def life(draft):
    taken = job.accept(draft, upstream="gcm", message="{}", now=1000.0, max_age=86400.0)
    return taken.expires_at - taken.accepted_at


def sound(found):
    assert found.tokens and all(isinstance(t, str) and t and len(t.encode()) <= 4096 for t in found.tokens)
    assert found.payload is None or job.weigh(found.payload) <= 4096
    assert isinstance(found.options, dict) and found.target in job.TARGETS.values()
    assert 0 < life(found) <= 86400.0


@given(st.sampled_from([FORM, JSON]), st.binary(max_size=300))
def test_any_bytes_give_a_job_or_a_bad_request(content_type, body):
    try:
        sound(parse(content_type, body))
    except BadRequest as problem:
        assert problem.error and "\n" not in problem.error and 400 <= problem.status < 500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.fixed_dictionaries(
        {}, optional={name: values | st.lists(st.text(max_size=4)) for name in (*job.FIELDS, "surprise")}
    )
)
@example({"tokens": ["a"], "payload": {"x": float("inf")}})
@example({"tokens": ["\ud800"], "payload": {}})
@example({"tokens": ["a"], "payload": {"x": "\ud800"}})
@example({"tokens": ["a"], "payload": {}, "time_to_live": True})
def test_any_json_gives_a_job_or_a_bad_request(fields):
    try:
        sound(parse(JSON, json.dumps(fields).encode()))
    except BadRequest as problem:
        assert problem.error and "\n" not in problem.error


NO_TOKEN = " \"'`[]{}(),;\\"
characters = st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters=NO_TOKEN)
words = {"undefined", "null", "none", "nil", "nan"}
tokens = st.lists(
    st.text(characters, min_size=1, max_size=40).filter(lambda text: text.lower() not in words), min_size=1, max_size=5
)
payloads = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8),
    values.filter(lambda v: "Infinity" not in json.dumps(v) and "NaN" not in json.dumps(v)),
    max_size=4,
)


@given(tokens, payloads)
def test_form_and_json_say_the_same(tokens, payload):
    try:
        by_json = parse(JSON, json.dumps({"tokens": tokens, "payload": payload}).encode())
    except BadRequest as problem:
        assert "surrogate" in problem.error or "character" in problem.error or "4096" in problem.error
        return
    by_form = parse(FORM, form(tokens, json.dumps(payload)).encode())
    assert by_form == by_json
    assert by_json.tokens == tuple(tokens) and json.loads(compact(by_json.payload, "")) == payload


@pytest.mark.parametrize("wrong", [*NO_TOKEN, "\t", "\u3000"])
@pytest.mark.parametrize("place", ["{}a", "a{}", "a{}b", "{}"])
def test_what_no_token_has_is_refused(wrong, place):
    body = json.dumps({**GOOD, "tokens": ["good-1", place.replace("{}", wrong)]}).encode()
    with pytest.raises(BadRequest) as caught:
        parse(JSON, body)
    assert caught.value.field == "tokens" and caught.value.error.startswith("token number 2 has ")


@pytest.mark.parametrize(
    "given",
    [
        "tokens=" + quote('["a","b"]'),
        "tokens=a,b",
        "tokens='a'",
        "tokens=a%20b",
        "tokens=a;b",
        "tokens=undefined",
        "tokens=null",
        "tokens=None",
        "tokens=nil",
        "tokens=NULL",
        "tokens=NaN",
        "tokens=" + quote("[object Object]"),
    ],
)
def test_a_list_in_one_field_and_a_variable_that_was_empty_are_refused(given):
    with pytest.raises(BadRequest) as caught:
        parse(FORM, f"{given}&payload=%7B%7D".encode())
    assert caught.value.field == "tokens" and caught.value.status == 400
    assert any(hint in caught.value.error for hint in ("one tokens= for each", "variable was empty", "%2B"))


def test_an_upstream_that_is_empty_is_a_mistake():
    with pytest.raises(BadRequest) as caught:
        parse(JSON, json.dumps({**GOOD, "upstream": ""}).encode())
    assert caught.value.field == "upstream"


@pytest.mark.parametrize("word", ["undefined-1", "nullable", "Nonesuch"])
def test_what_only_begins_like_such_a_word_is_a_token(word):
    assert parse(JSON, json.dumps({**GOOD, "tokens": [word]}).encode()).tokens == (word,)


@pytest.mark.parametrize("target, most", [("tokens", 4096), ("topic", 2048), ("condition", 2048)])
@pytest.mark.parametrize("letter", ["x", "é", '"', "\\", "\u2028"])
def test_sizes_are_counted_as_google_does(target, most, letter):
    """Names and values in UTF-8, however JSON writes them; what is shown counts, too."""
    to = {"tokens": ["a"], "topic": "a", "condition": "'a' in topics"}[target]
    room = (most - len("key") - len("title")) // len(letter.encode()) * len(letter.encode())
    fits = {target: to, "payload": {"key": letter * (room // len(letter.encode()))}, "notification": {"title": ""}}
    for upstream in (fcm, gcm):
        upstream.message(parse(JSON, json.dumps(fits).encode()), NOW)
    fits["notification"]["title"] = "xxx"
    with pytest.raises(BadRequest, match=f"{most} is Google's limit") as caught:
        parse(JSON, json.dumps(fits).encode())
    assert caught.value.field == "payload"


def test_what_is_nested_counts_as_the_text_that_it_becomes():
    inner = {"quoted": '"' * 2000}
    found = parse(JSON, json.dumps({"tokens": ["a"], "payload": {"a": inner}}).encode())
    assert len(json.loads(fcm.message(found, NOW))["message"]["data"]["a"]) + 1 == job.weigh(found.payload) < 4096


DIGITS = (
    '{"price":1.10,"lat":52.5200081234567891234,"big":123456789012345678901234567890,"e":1e5,"in":[0.10,{"x":-0.0}]}'
)


@pytest.mark.parametrize("content_type", [FORM, JSON])
def test_numbers_keep_their_digits(content_type):
    by_json = f'{{"tokens":["a"],"payload":{DIGITS}}}'.encode()
    found = parse(content_type, by_json if content_type == JSON else f"tokens=a&payload={quote(DIGITS)}".encode())
    assert compact(found.payload, "") == DIGITS
    assert json.loads(fcm.message(found, NOW))["message"]["data"] == {
        **{"price": "1.10", "lat": "52.5200081234567891234", "big": "123456789012345678901234567890"},
        **{"e": "1e5", "in": '[0.10,{"x":-0.0}]'},
    }
    assert f'"data":{DIGITS}' in gcm.message(found, NOW)


@pytest.mark.parametrize("content_type", [FORM, JSON, job.LINES])
def test_a_byte_order_mark_is_named(content_type):
    body = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
    with pytest.raises(BadRequest, match="byte order mark"):
        job.parse_lines(body, 10) if content_type == job.LINES else parse(content_type, body)


GOOD = {"tokens": ["a"], "payload": {"a": 1}}

BAD_JSON = [
    (b"", ""),
    (b"[]", ""),
    (b"null", ""),
    (b"{", ""),
    (b"\xff", ""),
    (b'{"a":NaN}', ""),
    (b"{}\0", ""),
    (b"[" * 100_000, ""),
    (b'{"tokens":' + b"[" * 50_000 + b"]" * 50_000 + b"}", ""),
    (b'{"tokens":["a"],"tokens":["b"],"payload":{}}', ""),
    ({**GOOD, "tokens": []}, "tokens"),
    ({**GOOD, "tokens": "abc"}, "tokens"),
    ({**GOOD, "tokens": [""]}, "tokens"),
    ({**GOOD, "tokens": [1]}, "tokens"),
    ({**GOOD, "tokens": ["a\nb"]}, "tokens"),
    ({"payload": {}}, "tokens"),
    ({**GOOD, "tokens": ["a" * 4097]}, "tokens"),
    ({**GOOD, "tokens": ["é" * 2049]}, "tokens"),
    ({**GOOD, "tokens": ["a"] * 100_001}, "tokens"),
    ({"tokens": ["a"]}, "payload"),
    ({**GOOD, "payload": None}, "payload"),
    ({**GOOD, "payload": "x"}, "payload"),
    ({**GOOD, "payload": {"a": "x" * 4096}}, "payload"),
    ({"condition": "'a' in topics &&", "payload": {}}, "condition"),
    ({"condition": ["'a' in topics"], "payload": {}}, "condition"),
    ({**GOOD, "time_to_live": -1}, "time_to_live"),
    ({**GOOD, "time_to_live": 2419201}, "time_to_live"),
    ({**GOOD, "time_to_live": 1.5}, "time_to_live"),
    ({**GOOD, "priority": "urgent"}, "priority"),
    ({**GOOD, "dry_run": "yes"}, "dry_run"),
    ({**GOOD, "notification": []}, "notification"),
    ({**GOOD, "collapse_key": ""}, "collapse_key"),
    ({**GOOD, "token": ["a"]}, "token"),
]


@pytest.mark.parametrize("body, field", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_names_the_field(body, field):
    with pytest.raises(BadRequest) as caught:
        parse(JSON, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.field == field


BAD_FORMS = [
    (b"", "tokens"),
    (b"payload={}", "tokens"),
    (b"tokens=&payload={}", "tokens"),
    (b"tokens&payload={}", "tokens"),
    (b"tokens=a", "payload"),
    (b"tokens=a&payload=", "payload"),
    (b"tokens=a&payload={", "payload"),
    (b"tokens=a&payload=[]", "payload"),
    (b"tokens=a&payload={}&payload={}", "payload"),
    (b"tokens=a&payload=" + b"[" * 100_000, "payload"),
    (b"tokens=%zz&payload={}", "tokens"),
    (b"tokens=%e4&payload={}", "tokens"),
    (b"tokens=a%00&payload={}", "tokens"),
    (b"tokens=a\0&payload={}", ""),
    (b"tokens=a&payload=%", "payload"),
    (b"tokens=a&payload={}&tokenz=b", "tokenz"),
    (b"tokens=a&payload={}&time_to_live=x", "time_to_live"),
    (b"tokens=a&payload={}&dry_run=", "dry_run"),
    (b"a=1&" * 200_000, ""),
    (b"tokens=a+b&payload={}", "tokens"),
]


@pytest.mark.parametrize("body, field", BAD_FORMS, ids=range(len(BAD_FORMS)))
def test_bad_forms_name_the_field(body, field):
    with pytest.raises(BadRequest) as caught:
        parse(FORM, body)
    assert caught.value.field == field


def test_a_wrong_content_type_is_415():
    with pytest.raises(BadRequest) as caught:
        parse("text/plain", b"tokens=a&payload={}")
    assert (caught.value.status, caught.value.field) == (415, "Content-Type")


@pytest.mark.parametrize("content_type, before", [(JSON, b"[]" * 40), (FORM, b"tokens=a&payload=" + b"[]" * 40)])
def test_an_unclosed_string_is_read_once(content_type, before):
    """Half a megabyte: what scanned it again from each quote would take an hour and let no other thread run."""
    with pytest.raises(BadRequest):
        parse(content_type, before + b'"' + b'\\"' * 250_000 + b"\\")


@pytest.mark.parametrize("topic", ["/topics/a", "a b", "", 7])
def test_a_topic_is_a_bare_name(topic):
    with pytest.raises(BadRequest) as caught:
        parse(JSON, json.dumps({"topic": topic, "payload": {}}).encode())
    assert caught.value.field == "topic"


def test_a_near_miss_is_named():
    with pytest.raises(BadRequest, match="did you mean tokens"):
        parse(FORM, b"token=a&payload={}")


def test_options_are_kept_and_shorten_the_life():
    found = parse(
        FORM, form(["a"], time_to_live="60", collapse_key="k", dry_run="true", notification='{"title":"T"}').encode()
    )
    assert found.options == {
        "time_to_live": 60,
        "collapse_key": "k",
        "dry_run": True,
        "notification": {"title": "T"},
    }
    assert life(found) == 60.0


def test_now_or_never_survives_our_own_queue():
    assert life(parse(FORM, form(["a"], time_to_live="0").encode())) == job.SHORTEST_LIFE


def test_duplicate_tokens_are_kept():
    assert parse(FORM, b"tokens=a&tokens=a&payload={}").tokens == ("a", "a")


def test_a_body_of_lines_has_so_many_and_no_more():
    """Empty ones count: each would cost memory, and a line of the answer."""
    line = b'{"tokens":["t"],"payload":{}}\n'
    assert len(job.parse_lines(line * job.MAX_LINES, 100_000)) == job.MAX_LINES
    for body in (line * (job.MAX_LINES + 1), b"\n" * (job.MAX_LINES + 1)):
        with pytest.raises(BadRequest) as caught:
            job.parse_lines(body, 100_000)
        assert caught.value.status == 413


@given(
    st.recursive(
        st.none() | st.text(max_size=5) | st.integers(0, 9),
        lambda part: st.lists(part) | st.dictionaries(st.text(max_size=3), part),
    )
)
def test_values_are_counted_before_they_are_built(value):
    def count(part):
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 + sum(map(count, inner))

    source, most = json.dumps(value), count(value)
    assert read_json(source, "") == value
    # By what begins lists and objects, and parts their values.
    read_json(source, "", 2 * most)
    if most >= 4:
        with pytest.raises(BadRequest, match="has more than"):
            read_json(source, "", most // 4 - 1)


@pytest.mark.parametrize(
    "body, kind",
    [
        (b'{"tokens":["a"],"message":{"x":[%b1]}}' % (b"{}," * 130_000), "application/json"),
        (b'{"tokens":["a"],"payload":{"x":[%b1]}}' % (b"1," * 130_000), "application/json"),
        (
            b'{"tokens":["a"],"payload":{%b"a":1}}' % b"".join(b'"%d":1,' % n for n in range(130_000)),
            "application/json",
        ),
        (b'tokens=a&payload={"x":[%b1]}' % (b"1," * 30_000), "application/x-www-form-urlencoded"),
    ],
)
def test_more_values_than_any_message_has_are_refused(body, kind):
    with pytest.raises(BadRequest, match="has more than [0-9]+ values") as caught:
        job.parse(kind, body, 100_000)
    assert caught.value.status == 413


def test_as_many_tokens_as_are_allowed_are_no_more_values_than_that():
    tokens = [f"token-{n}" for n in range(100_000)]
    body = json.dumps({"tokens": tokens, "payload": {"text": ",[{" * 1000}}).encode()
    assert len(job.parse("application/json", body, 100_000).tokens) == 100_000
    lines = b"\n".join([json.dumps({"tokens": ["a"], "payload": {str(n): n for n in range(25)}}).encode()] * 10_000)
    assert not any(isinstance(draft, BadRequest) for draft in job.parse_lines(lines, 100_000))
