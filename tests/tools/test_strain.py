"""strain: the sandbox's bad days, each told apart by what it refuses, and by the sandbox itself over HTTP."""

import json
import random
import time

import pytest
from kit import Http, eventually

from gocm_lib.tools.strain import REMEMBERED, Strain

pytestmark = pytest.mark.short


def test_errors_strike_in_their_shares():
    chance = random.Random(7)
    errors = {"unavailable": 0.1, "silent": 0.02}
    kinds = [Strain.strike(errors, chance.random()) for _ in range(20_000)]
    assert 1800 < kinds.count("unavailable") < 2200 and 320 < kinds.count("silent") < 480
    assert Strain.strike({}, 0.0) == "" and Strain.strike({"internal": 1.0}, 0.999) == "internal"


def test_a_capacity_takes_so_many_a_second_whatever_comes():
    strain = Strain()
    taken = sum(not strain.overloads(1, 50.0, n / 1000) for n in range(10_000))
    assert 495 <= taken <= 510, "ten seconds' worth, and what is taken at once"
    assert not strain.overloads(1000, 50.0, 20.0), "a request larger than all that is taken at once still goes"
    assert strain.overloads(1, 50.0, 20.01)


def test_a_quota_is_one_target_s_alone():
    strain = Strain()
    assert [strain.exhausts("token", "a", 3, 0.0) for _ in range(5)] == [False, False, False, True, True]
    assert not strain.exhausts("token", "b", 3, 0.0) and not strain.exhausts("topic", "a", 3, 0.0)
    assert not strain.exhausts("token", "a", 3, 21.0), "one comes back every twenty seconds"
    for n in range(REMEMBERED + 10):
        strain.exhausts("token", str(n), 3, 30.0)
    assert len(strain._quotas) == REMEMBERED


def send(sandbox, target, kind="token"):
    """A message to the pretend FCM; status and error code."""
    body = json.dumps({"message": {kind: target, "data": {"a": "b"}}})
    bearer = {"Authorization": "Bearer " + token(sandbox)}
    status, _, answer = Http(sandbox.port).ask("POST", "/v1/projects/sandbox-project/messages:send", body, bearer)
    return status, b"QUOTA_EXCEEDED" in answer


def token(sandbox):
    path = "/computeMetadata/v1/instance/service-accounts/default/token"
    _, _, answer = Http(sandbox.port).ask("GET", path, None, {"Metadata-Flavor": "Google"})
    return json.loads(answer)["access_token"]


def test_the_sandbox_plays_them(sandbox):
    sandbox.mode(device_quota=2, topic_quota=1)
    assert [send(sandbox, "phone") for _ in range(3)] == [(200, False), (200, False), (429, True)]
    Http(sandbox.port).ask("POST", "/sandbox/reset")
    assert send(sandbox, "phone") == (200, False), "reset forgets quotas"
    sandbox.mode(device_quota=1, topic_quota=1)
    assert [send(sandbox, "phone")[0] for _ in range(2)] == [200, 429], "and what was sent without one is not counted"
    assert send(sandbox, "other") == (200, False)
    assert [send(sandbox, "news", "topic") for _ in range(2)] == [(200, False), (429, True)]
    sandbox.mode(device_quota=0, errors={"internal": 1})
    assert send(sandbox, "phone") == (500, False)
    sandbox.mode(errors={}, capacity=1, refusal="quota_project")
    begun = time.monotonic()
    assert [send(sandbox, "phone"), send(sandbox, "phone")] == [(200, False), (429, False)]
    eventually(lambda: send(sandbox, "phone")[0] == 200)
    assert time.monotonic() - begun > 0.8
    assert sandbox.received()["delivered"] == {"phone": 4, "other": 1, "news": 1}, "since the reset"


def test_the_sandbox_plays_them_to_legacy_clients_too(sandbox):
    def post(*tokens):
        body = json.dumps({"registration_ids": tokens, "data": {}})
        headers = {"Authorization": "key=k", "Content-Type": "application/json"}
        status, _, answer = Http(sandbox.port).ask("POST", "/gcm/send", body, headers)
        return status, [result.get("error") for result in json.loads(answer)["results"]] if status == 200 else []

    sandbox.mode(device_quota=1)
    assert post("a", "b") == (200, [None, None])
    assert post("a", "c") == (200, ["DeviceMessageRateExceeded", None])
    sandbox.mode(errors={"unavailable": 1.0})
    assert post("d")[0] == 503


@pytest.mark.parametrize(
    "field, value",
    [
        ("errors", {"unavailabel": 0.1}),
        ("errors", {"unavailable": 1.5}),
        ("errors", {"unavailable": 0.7, "internal": 0.7}),
        ("errors", {"unavailable": True}),
        ("errors", {"unavailable": float("nan")}),
        ("errors", 0.5),
        ("capacity", -1),
        ("capacity", float("inf")),
        ("device_quota", float("nan")),
        ("refusal", "no"),
        ("refusal", ""),
    ],
)
def test_a_mode_that_cannot_be_is_told_and_changes_nothing(sandbox, field, value):
    body = json.dumps({"latency": 5, field: value})
    status, _, answer = Http(sandbox.port).ask("POST", "/sandbox/mode", body)
    assert status == 400 and json.loads(answer)["field"] == field
    assert send(sandbox, "phone") == (200, False)
