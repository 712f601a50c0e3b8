"""The sandbox's own doors: who may tell it what to do, and what it takes."""

import http.client
import json

import pytest
import requests
from kit import Http, Program, Sandbox

from gocm_lib.config.settings import Exit


def told(sandbox, **headers):
    return Http(sandbox.port).ask("POST", "/sandbox/mode", b'{"latency": 0}', headers)[0]


def test_no_page_that_somebody_looks_at_may_set_or_read_it(sandbox):
    for headers, expected in (
        ({}, 200),
        ({"Host": "127.0.0.1:5602"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://localhost:5602", "Host": "localhost:5602"}, 200),
    ):
        assert told(sandbox, **headers) == expected, headers
        for path in ("/sandbox/received", "/sandbox/counts", "/sandbox/messages", "/sandbox/messages?wait=1"):
            assert Http(sandbox.port).ask("GET", path, None, headers)[0] == expected
        assert Http(sandbox.port).ask("POST", "/sandbox/reset", b"", headers)[0] == expected


@pytest.mark.parametrize(
    "mode",
    [
        b'{"latency": NaN}',
        b'{"latency": Infinity}',
        b'{"latency": -1}',
        b'{"latency": 1e300}',
        b'{"retry_after": "1\\r\\nX-Evil: 1"}',
        b'{"retry_after": "\\u2028"}',
        b'{"status": 99}',
        b'{"status": 100}',
        b'{"token_life": 1%s}' % (b"0" * 400),
        b'{"capacity": NaN}',
        b'{"device_quota": -Infinity}',
        b'{"capacity": 9%s}' % (b"9" * 400),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(sandbox, mode):
    status, _, answer = Http(sandbox.port).ask("POST", "/sandbox/mode", mode)
    assert status == 400 and json.loads(answer)["field"] == next(iter(json.loads(mode)))
    sandbox.mode(status=503, retry_after=7)
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port)
    connection.request("POST", "/gcm/send", b"{}", {"Content-Type": "application/json", "Authorization": "key=k"})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Retry-After"], answer.headers["X-Evil"]) == (503, "7", None)


@pytest.mark.parametrize("host", ["0.0.0.0"])
def test_it_is_for_this_machine_unless_one_says_otherwise(host):
    program = Program("sandbox", "--port", "0", "--host", host)
    assert program.wait() == Exit.CONFIG and "--no-auth" in program.log()
    open_to_all = Sandbox("--host", host, "--no-auth")
    try:
        assert told(open_to_all, Host=f"127.0.0.1:{open_to_all.port}") == 200
    finally:
        open_to_all.kill_group()


def test_it_refuses_a_message_as_google_does(sandbox):
    token = requests.get(
        f"http://127.0.0.1:{sandbox.port}/computeMetadata/v1/instance/service-accounts/default/token",
        headers={"Metadata-Flavor": "Google"},
        timeout=10,
    ).json()["access_token"]

    def send(body):
        url, headers = (
            f"http://127.0.0.1:{sandbox.port}/v1/projects/sandbox-project/messages:send",
            {"Authorization": f"Bearer {token}"},
        )
        return requests.post(url, data=body, headers=headers, timeout=10)

    wrong = {"token": "a", "android": {"ttl": 5, "data": {"n": 1}}, "notification": {"sound": "s"}}
    answer = send(json.dumps({"message": wrong}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    [detail] = error["details"]
    assert detail["@type"].endswith("google.rpc.BadRequest")
    assert [violation["field"] for violation in detail["fieldViolations"]] == [
        "message.android.ttl",
        "message.android.data[0].value",
        "message.notification",
    ]
    assert "Invalid value at 'message.android.data[0].value' (TYPE_STRING), 1" in error["message"]
    assert """Unknown name "sound" at 'message.notification': Cannot find field.""" in error["message"]
    for body in ("[]", "{", '{"message":[]}', '{"message":{"token":"a"},"dryRun":true}', "null", '{"message":null}'):
        assert send(body).status_code == 400, body
    assert not sandbox.received()["delivered"]
    assert send(json.dumps({"message": {"token": "a", "android": {"ttl": "5s"}}})).status_code == 200
