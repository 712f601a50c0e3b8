"""The API's description against its routes, and the server against its description: with what fits it, and what not."""

import datetime
import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from kit import Http, Program
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from gocm_lib import __version__
from gocm_lib.front import openapi, routes
from gocm_lib.message.job import FIELDS

short = pytest.mark.short
DOCUMENT = openapi.document(routes.ROUTES, {"fcm": "fcm", "gcm": "gcm"})


@short
def test_it_has_the_routes_and_no_others():
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == set(openapi.OPERATIONS) == {(route.method, route.path) for route in routes.ROUTES}
    assert DOCUMENT["info"]["version"] == __version__


@short
def test_it_has_the_fields_of_a_message():
    names = {
        name
        for kind, push in openapi.SCHEMAS.items()
        if kind.endswith(("Push", "Message"))
        for name in push.get("properties", ())
    }
    assert names >= set(FIELDS)


@short
def test_what_it_refers_to_is_there():
    text = json.dumps(DOCUMENT)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in DOCUMENT["components"]["schemas"]


def test_it_is_served(base):
    assert Http(int(base.rpartition(":")[2])).json("GET", "/openapi.json") == DOCUMENT


# -------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A server with its sandbox, and some of everything in it."""
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--max-attempts", "1", "--log-level", "error")
    spool = str(tmp_path_factory.mktemp("spool") / "s.db")
    program = Program(*words, "--spool", spool, "--log-level", "info")
    port = int(program.logged(r"listens on \S+ port (\d+)"))
    tokens = ["a", "gone-b", "flaky-1-c"]
    Http(port).ask(
        "POST", "/gcm/send", json.dumps({"tokens": tokens, "payload": {}}), {"Content-Type": "application/json"}
    )
    yield f"http://127.0.0.1:{port}"
    assert not program.find("Traceback")
    program.kill_group()


@pytest.fixture(scope="module")
def described(base):
    return schemathesis.openapi.from_url(f"{base}/openapi.json")


# Of Google's legacy fields only the tokens are described, and clients may make others, of which each has its own rules:
# what fits the description may be refused.
LEFT = {"/fcm/send": {"positive_data_acceptance"}}
FITS, DOES_NOT = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# What takes nothing cannot be asked wrongly.
TAKES = [
    route
    for route in routes.ROUTES
    if {"parameters", "requestBody"} & set(openapi.OPERATIONS[route.method, route.path])
]


@pytest.mark.parametrize(
    "mode, route",
    [
        pytest.param(mode, route, id=f"{route.method} {route.path} {mode.value}")
        for mode, table in ((FITS, routes.ROUTES), (DOES_NOT, TAKES))
        for route in table
    ],
)
def test_the_server_keeps_to_it(described, mode, route):
    operation = described[route.path][route.method.lower()]
    tomorrow = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(1)).isoformat()
    checks = [check for check in CHECKS.get_all() if check.__name__ in LEFT.get(route.path, ())]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def keeps_to_it(case):
        if mode is FITS and isinstance(case.body, dict) and "send_at" in case.body:
            case.body["send_at"] = tomorrow  # which times are taken depends on now, and no schema can say that
        response = case.call(headers={"Accept": "application/json"})
        if response.status_code != 411:  # a body sent in pieces, which is refused whatever it is
            case.validate_response(response, excluded_checks=checks)

    keeps_to_it()
