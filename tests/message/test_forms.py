"""Forms as browsers, curl and web stacks write them mean what they mean there; all else is refused with a reason."""

import json
import shutil
import subprocess
from urllib.parse import quote, unquote_to_bytes

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from kit import eventually

from gocm_lib.message import forms, job
from gocm_lib.message.bad_request import BadRequest

short = pytest.mark.short
PAYLOAD = '{"title":"H\u00e9llo & more"}'


def parse(content_type, body):
    return job.parse(content_type, body, 100)


def urlencoded(*pairs):
    return parse(job.FORM, "&".join(f"{name}={quote(value)}" for name, value in pairs).encode())


@short
@pytest.mark.parametrize(
    "names",
    [("tokens", "tokens"), ("tokens[]", "tokens[]"), ("tokens[0]", "tokens[1]"), ("tokens%5B%5D",) * 2, ("fid[]",) * 2],
)
def test_a_list_however_it_is_written(names):
    found = urlencoded((names[0], "a"), ("payload", PAYLOAD), (names[1], "b"))
    assert found.tokens == ("a", "b") and found.target == ("fid" if "fid" in names[0] else "token")


@short
@pytest.mark.parametrize(
    "name, field",
    [
        ("tokens[1]", "tokens"),  # where 0 was to come
        ("tokens[x]", "tokens[x]"),
        ("tokens[0][1]", "tokens[0][1]"),
        ("token[]", "token"),
        ("payload[]", "payload"),
        ("topic[0]", "topic"),
        ("tokens]", "tokens]"),
    ],
)
def test_what_is_no_such_list_is_refused(name, field):
    with pytest.raises(BadRequest) as caught:
        urlencoded((name, "a"), ("payload", PAYLOAD))
    assert caught.value.field == field


def multipart(*fields, **more):
    """What requests sends for these fields."""
    made = requests.Request("POST", "http://a/", files=[(name, value) for name, value in fields], **more).prepare()
    return made.headers["Content-Type"], made.body


@short
@pytest.mark.parametrize(
    "value",
    [(None, PAYLOAD), PAYLOAD, ("a.json", PAYLOAD, "application/json"), (None, PAYLOAD, "text/plain; charset=utf-8")],
)
def test_requests_files_are_fields(value):
    found = parse(*multipart(("tokens", (None, "a")), ("tokens", (None, "b")), ("payload", value)))
    assert found == urlencoded(("tokens", "a"), ("tokens", "b"), ("payload", PAYLOAD))


@short
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=3))
def test_any_text_in_a_part_is_the_text_of_a_field(texts):
    payload = json.dumps({str(n): text for n, text in enumerate(texts)}, ensure_ascii=False)
    found = parse(*multipart(("tokens[]", (None, "a")), ("payload", (None, payload))))
    assert found.payload == json.loads(payload)


TYPE = "multipart/form-data; boundary=xx"
BLANK = b"\r\n\r\n{"
PART = b'--xx\r\nContent-Disposition: form-data; name="tokens"\r\n\r\na\r\n'
REST = b'--xx\r\nContent-Disposition: form-data; name="payload"\r\n\r\n{}\r\n'


@short
def test_by_hand_it_is_taken():
    assert parse(TYPE, PART + REST + b"--xx--\r\n").tokens == ("a",)
    assert parse('multipart/form-data; boundary="xx"; a=b', PART + REST + b"--xx--").tokens == ("a",)


@short
@pytest.mark.parametrize(
    "content_type, body, field",
    [
        ("multipart/form-data", PART + REST + b"--xx--", "Content-Type"),
        (TYPE, PART + REST, ""),  # cut off
        (TYPE, PART, ""),
        (TYPE, b"", ""),
        (TYPE, b"--xx--", "tokens"),
        (TYPE, b"tokens=a&payload={}", ""),
        (TYPE, PART + REST.replace(b"--xx", b"--yy") + b"--xx--", "tokens"),  # all of it is the first field
        (TYPE, PART.replace(b"; name=", b"; nam=") + REST + b"--xx--", ""),
        (TYPE, PART.replace(b"form-data", b"attachment") + REST + b"--xx--", ""),
        (TYPE, PART.replace(b"tokens", b"toke") + REST + b"--xx--", "toke"),
        (
            TYPE,
            PART + REST.replace(BLANK, b"\r\nContent-Transfer-Encoding: base64" + BLANK) + b"--xx--",
            "payload",
        ),
        (
            TYPE,
            PART + REST.replace(BLANK, b"\r\nContent-Type: a; charset=utf-16" + BLANK) + b"--xx--",
            "payload",
        ),
        (TYPE, PART.replace(b"\r\n\r\na", b"\r\n\r\n\xff") + REST + b"--xx--", "tokens"),
        (TYPE, PART * 200 + REST + b"--xx--", ""),
    ],
)
def test_what_is_no_such_form_is_refused(content_type, body, field):
    with pytest.raises(BadRequest) as caught:
        parse(content_type, body)
    assert caught.value.field == field and caught.value.status in (400, 413)


@short
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_job_or_a_bad_request(noise, inside):
    try:
        parse(TYPE, PART + noise + REST + b"--xx--" if inside else noise)
    except BadRequest as problem:
        assert problem.error and problem.status in (400, 413)


def test_by_curl_and_node(start, sandbox):
    server = start()
    url, taken = f"http://127.0.0.1:{server.port}/gcm/send", []
    if shutil.which("curl"):
        words = ["curl", "-s", "-F", "tokens[]=by-curl", "-F", "tokens[]=by-curl-2", "-F", 'payload={"a":"1"}', url]
        assert subprocess.run(words, capture_output=True, text=True, timeout=20).stdout == "ok\n"
        taken += ["by-curl", "by-curl-2"]
    if shutil.which("node"):
        script = f"""
            const form = new FormData();
            form.append("tokens", "by-node");
            form.append("payload", JSON.stringify({{a: "1"}}));
            fetch("{url}", {{method: "POST", body: form}}).then(answer => answer.text()).then(console.log);
        """
        ended = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=20)
        assert ended.stdout == "ok\n\n", ended.stderr
        taken.append("by-node")
    eventually(lambda: server.report()["pending"] == 0)
    assert sorted(sandbox.received()["delivered"]) == taken


def test_a_compressed_body_is_named(server):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    status, _, answer = server.http().ask("POST", "/gcm/send", b"\x1f\x8b", headers)
    assert status == 415 and json.loads(answer)["field"] == "content-encoding"


@short
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=12).map(lambda data: data.replace(b"%", b"")),
            st.tuples(st.sampled_from("0123456789abcdefABCDEF"), st.sampled_from("0123456789abcdefABCDEF")).map(
                lambda digits: ("%" + "".join(digits)).encode()
            ),
            st.sampled_from([b"=", b"==", b"=\n", b"=\r\n", b" \n", b"\t\r\n", b"_", b".", b"\n.\n"]),
        ),
        max_size=30,
    )
)
def test_percent_encoding_is_decoded_as_urllib_does(parts):
    raw = b"".join(parts)
    assert forms._percent_decoded(raw) == unquote_to_bytes(raw)
