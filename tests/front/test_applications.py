"""Several applications on one server: upstreams by name, tokens that are for one of them, holds, tags, other times."""

import datetime
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
from kit import FORM, ROOT, Sandbox, eventually, form, memory

from gocm_lib.front.auth import Grant
from gocm_lib.front.rates import Rates

SHOP, NEWS, OPS = "shop-token-0123456789", "news-token-9876543210", "ops-token-abcdefghij"
short = pytest.mark.short


@pytest.fixture
def applications(sandbox, run, tmp_path):
    """A server with two applications, each with an upstream and a token of its own, and a token of the operator's."""
    config, tokens = tmp_path / "gocm.toml", tmp_path / "tokens"
    url = f"http://127.0.0.1:{sandbox.port}"
    config.write_text(
        f'metadata-host = "127.0.0.1:{sandbox.port}"\n'
        f'[upstream.shop]\nmetadata = true\nproject = "sandbox-shop"\nurl = "{url}"\n'
        f'[upstream.news]\ndialect = "gcm"\napikey = "news-key"\nurl = "{url}/gcm/send"\n'
    )
    hashed = hashlib.sha256(NEWS.encode()).hexdigest()
    tokens.write_text(f"{SHOP} name=shop upstream=shop\nsha256:{hashed} name=news upstream=news\n{OPS} name=ops\n")
    for file in (config, tokens):
        file.chmod(0o600)
    server = run("--config", str(config), "--auth-token-file", str(tokens), "--retry-base", "0.1")
    server.tokens, server.config = tokens, config
    return server


def ask(server, token, method, path, fields=None, **more):
    body = None if fields is None else form(**fields) if "tokens" in fields else urllib.parse.urlencode(fields)
    headers = {"Authorization": f"Bearer {token}", **(FORM if body is not None else {}), **more}
    status, got, answer = server.http().ask(method, path, body, headers)
    return status, answer if not answer.startswith(b"{") else json.loads(answer), got


def send(server, token, tokens, **more):
    status, answer, headers = ask(server, token, "POST", "/gcm/send", {"tokens": tokens, **more})
    assert status == 200, answer
    return headers["X-GoCM-Job"]


def ended(server, token, job):
    return eventually(lambda: ask(server, token, "GET", f"/gcm/jobs/{job}?wait=5")[1]["ended_at"])


def test_each_application_has_its_own_upstream_and_sees_no_other(applications, sandbox):
    server = applications
    mine, other = send(server, SHOP, ["phone-1"]), send(server, NEWS, ["gone-2"])
    ended(server, SHOP, mine), ended(server, NEWS, other)
    assert sandbox.received()["arrived"] == {"phone-1": 1, "gone-2": 1}
    told = ask(server, SHOP, "GET", f"/gcm/jobs/{mine}")[1]
    assert (told["upstream"], told["by"]) == ("shop", "shop")
    for method, path in (("GET", f"/gcm/jobs/{other}"), ("DELETE", f"/gcm/jobs/{other}")):
        assert ask(server, SHOP, method, path)[0] == 403
    status, answer, _ = ask(server, SHOP, "POST", "/gcm/send", {"tokens": ["a"], "upstream": "news"})
    assert (status, answer["field"]) == (403, "upstream")
    assert ask(server, NEWS, "GET", "/gcm/report")[1] == {
        "attempts": 1, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 1}  # fmt: skip
    assert ask(server, SHOP, "GET", "/gcm/report")[1]["failures"] == 0
    assert ask(server, OPS, "GET", "/gcm/report")[1]["attempts"] == 2


def test_a_list_that_one_clears_is_there_for_the_other(applications):
    server = applications
    for token in (SHOP, NEWS):
        ended(server, token, send(server, token, [f"gone-{token[:4]}"]))
    assert ask(server, SHOP, "GET", "/gcm/report/notregistered")[1] == {"tokens": ["gone-shop"]}
    assert ask(server, SHOP, "GET", "/gcm/report/notregistered")[1] == {"tokens": None}
    _, answer, headers = ask(server, NEWS, "GET", "/gcm/report/notregistered?peek=1")
    assert answer == {"tokens": ["gone-news"]}
    acked = ask(server, NEWS, "POST", "/gcm/report/notregistered/ack", {"ack": headers["GoCM-Cursor"]})
    assert acked[0] == 200 and ask(server, OPS, "GET", "/gcm/report/notregistered")[1] == {"tokens": None}
    assert ask(server, SHOP, "GET", "/gcm/report/notregistered?upstream=news")[0] == 403
    assert ask(server, SHOP, "GET", "/metrics")[0] == 403, "it shows all of them"


def test_what_has_failed_is_told_and_dealt_with_by_whose_it_is(applications, sandbox):
    server = applications
    sandbox.mode(status=500)
    for token in (SHOP, NEWS):
        job = send(server, token, [f"of-{token[:4]}"], time_to_live=10)
        assert ask(server, token, "GET", f"/gcm/jobs/{job}")[1]["states"]["failed"] == 0
    sandbox.mode(status=200)
    assert ask(server, SHOP, "GET", "/gcm/failed?by=shop")[0] == 200
    assert ask(server, SHOP, "GET", "/gcm/failed?upstream=news")[0] == 403
    assert ask(server, OPS, "GET", "/gcm/failed?by=no%20name")[1]["field"] == "by"


def test_a_key_belongs_to_whose_token_it_came_with(applications):
    key = {"Idempotency-Key": "order-17"}
    first = ask(applications, SHOP, "POST", "/gcm/send", {"tokens": ["a"]}, **key)
    assert (
        ask(applications, SHOP, "POST", "/gcm/send", {"tokens": ["a"]}, **key)[2]["X-GoCM-Job"]
        == first[2]["X-GoCM-Job"]
    )
    other = ask(applications, NEWS, "POST", "/gcm/send", {"tokens": ["b"]}, **key)
    assert other[0] == 200 and other[2]["X-GoCM-Job"] != first[2]["X-GoCM-Job"]


def test_a_held_upstream_takes_messages_and_sends_none(applications, sandbox):
    server = applications
    assert ask(server, SHOP, "POST", "/gcm/upstreams/news/hold", {})[0] == 403
    assert ask(server, OPS, "POST", "/gcm/upstreams/nothing/hold", {})[0] == 404
    assert ask(server, OPS, "POST", "/gcm/upstreams/shop/hold", {})[1] == {"upstream": "shop", "held": True}
    held = send(server, SHOP, ["phone-1"])
    ended(server, NEWS, send(server, NEWS, ["phone-2"]))
    assert "somebody holds it, ops" in ask(server, SHOP, "GET", f"/gcm/jobs/{held}")[1]["paused"]
    told = ask(server, OPS, "GET", "/readyz")[1]
    assert told["status"] == "degraded" and re.match("upstream shop is held since .*: resume it", told["notes"][0])
    shown = ask(server, OPS, "GET", "/api/status")[1]
    assert [(each["name"], bool(each["held"])) for each in shown["upstreams"]] == [("news", False), ("shop", True)]
    assert b'gocm_upstream_held{upstream="shop"} 1' in ask(server, OPS, "GET", "/metrics")[1]
    assert sandbox.received()["arrived"] == {"phone-2": 1}
    assert ask(server, OPS, "POST", "/gcm/upstreams/shop/resume", {})[1] == {"upstream": "shop", "held": False}
    ended(server, SHOP, held)
    assert "held upstream shop" in "".join(server.find("held upstream shop"))


def test_messages_with_a_tag_are_found_and_cancelled_together(applications):
    server = applications
    ask(server, OPS, "POST", "/gcm/upstreams/shop/hold", {})
    ids = [send(server, SHOP, [f"{n}-{k}" for k in range(3)], tag="spring") for n in range(3)]
    send(server, SHOP, ["other"], tag="summer")
    page = ask(server, SHOP, "GET", "/gcm/jobs?tag=spring&limit=2")[1]
    assert [each["job"] for each in page["jobs"]] == ids[:2] and page["next"] == ids[1]
    assert [each["job"] for each in ask(server, SHOP, "GET", f"/gcm/jobs?tag=spring&after={ids[1]}")[1]["jobs"]] == ids[
        2:
    ]
    assert ask(server, NEWS, "GET", "/gcm/jobs?tag=spring")[1]["jobs"] == []
    assert ask(server, NEWS, "POST", "/gcm/jobs/cancel", {"tag": "spring"})[1]["jobs"] == 0
    done = ask(server, SHOP, "POST", "/gcm/jobs/cancel", {"tag": "spring"})[1]
    assert done == {"tag": "spring", "jobs": 3, "cancelled": 9, "in_air": 0, "elsewhere": 0}
    assert {each["cancelled"] for each in ask(server, SHOP, "GET", "/gcm/jobs?tag=spring")[1]["jobs"]} == {3}
    assert ask(server, SHOP, "GET", "/gcm/report")[1]["pending"] == 1
    for wrong in ("a b", "", "x" * 65):
        assert ask(server, SHOP, "POST", "/gcm/send", {"tokens": ["a"], "tag": wrong})[1]["field"] == "tag"


def test_what_others_have_hides_nothing_and_is_not_shown(applications):
    """Lists end where one's own messages do, and the status page has nothing of the others."""
    server = applications
    at = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)).isoformat()
    for n in range(5):
        send(server, SHOP, [f"of-shop-{n}"], tag="t", send_at=at)
    mine = send(server, NEWS, ["of-news"], tag="t", send_at=at)
    for wanted in ("tag=t", "scheduled=1"):
        page = ask(server, NEWS, "GET", f"/gcm/jobs?{wanted}&limit=2")[1]
        assert [each["job"] for each in page["jobs"]] == [mine] and page["next"] == mine
        assert ask(server, NEWS, "GET", f"/gcm/jobs?{wanted}&limit=2&after={mine}")[1] == {"jobs": [], "next": None}
    ended(server, SHOP, send(server, SHOP, ["gone-of-shop"]))
    told = ask(server, NEWS, "GET", "/api/status")[1]
    assert [each["name"] for each in told["upstreams"]] == ["news"] and "shop" not in json.dumps(told)
    assert told["pending"]["tokens"] == 1 and told["totals"]["notregistered"] == 0
    assert "gone-" in json.dumps(ask(server, OPS, "GET", "/api/status")[1])
    assert "replayed_at" not in ask(server, NEWS, "GET", f"/gcm/jobs/{mine}")[1]


def test_a_name_is_for_the_same_upstreams_wherever_it_stands(applications):
    server = applications
    server.tokens.write_text(f"{SHOP} name=shop upstream=shop\n{NEWS} name=shop upstream=news\n")
    server.process.send_signal(signal.SIGHUP)
    server.logged("nothing is changed: .* line 2: the name shop is on a line before with other upstreams")


def test_a_message_for_another_time_is_sent_then(applications, sandbox):
    server = applications
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    job = send(server, SHOP, ["later"], send_at=soon.isoformat())
    now = send(server, SHOP, ["now"], send_at=(soon - datetime.timedelta(seconds=60)).isoformat())
    ended(server, SHOP, now)
    [listed] = ask(server, SHOP, "GET", "/gcm/jobs?scheduled=1")[1]["jobs"]
    assert listed["job"] == job and listed["send_at"] == pytest.approx(soon.timestamp(), abs=0.01)
    assert ask(server, NEWS, "GET", "/gcm/jobs?scheduled=1")[1]["jobs"] == []
    assert sandbox.received()["arrived"] == {"now": 1}
    assert ended(server, SHOP, job) >= soon.timestamp()
    for wrong in (
        "tomorrow",
        "2026-13-01T00:00:00Z",
        "2026-12-01T00:00:00",
        "2020-01-01T00:00:00Z",
        "2999-01-01T00:00:00Z",
    ):
        status, answer, _ = ask(server, SHOP, "POST", "/gcm/send", {"tokens": ["a"], "send_at": wrong})
        assert (status, answer["field"]) == (400, "send_at"), wrong


def test_who_sends_too_fast_is_told_when_to_come_again(applications):
    server = applications
    server.tokens.write_text(f"{SHOP} name=shop upstream=shop rate=10/s\n{OPS}\n")
    server.process.send_signal(signal.SIGHUP)
    server.logged("SIGHUP: keys, tokens")
    send(server, SHOP, [f"t{n}" for n in range(50)])
    status, answer, headers = ask(server, SHOP, "POST", "/gcm/send", {"tokens": ["one-more"]})
    assert status == 429 and 3 <= int(headers["Retry-After"]) <= 5 and "rate" in answer["error"]
    send(server, OPS, ["somebody-else"], upstream="shop")
    assert b'gocm_rejected_total{cause="over_rate"} 1' in ask(server, OPS, "GET", "/metrics")[1]


@short
def test_a_rate_is_kept_to_over_time():
    rates, shop = Rates(), Grant(b"s", rate=10.0)
    taken = sum(not rates.take(shop, 1, 1, now / 100) for now in range(10_000))
    assert taken == pytest.approx(1000, abs=15)
    assert rates.take(Grant(b"other"), 10**6, 1, 0.0) == rates.take(Grant(b"other"), 10**6, 1, 0.0) == 0
    fast = Grant(b"f", rate=10.0)
    assert sum(not rates.take(fast, 1, 2, now / 100) for now in range(10_000)) == pytest.approx(500, abs=15), (
        "of two nodes"
    )
    slow = Grant(b"m", rate=0.001)
    assert rates.take(slow, 100, 1, 0.0) == 0 and rates.take(slow, 1, 1, 1.0) == 3600


def test_from_the_command_line(applications, tmp_path):
    server, operator = applications, tmp_path / "ops"
    operator.write_text(OPS)
    operator.chmod(0o600)
    to = ("--to", f"http://127.0.0.1:{server.port}", "--auth-token-file", str(operator))

    def gocm(*words):
        done = subprocess.run([sys.executable, ROOT / "gocm.py", *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    assert gocm("hold", "shop", *to)[:2] == (0, "shop is held: its messages are kept")
    ids = [send(server, SHOP, ["a", "b"], tag="t") for _ in range(2)]
    assert gocm("cancel", ids[0], *to)[:2] == (0, f"{ids[0]}: 2 tokens cancelled, 0 were on their way")
    assert gocm("cancel", "--tag", "t", *to)[:2] == (0, "1 messages: 2 tokens cancelled, 0 were on their way")
    assert gocm("cancel", "0" * 15 + "1", *to)[0] == 1
    assert gocm("resume", "shop", *to)[:2] == (0, "shop is sent to")
    assert gocm("hold", "nothing", *to)[0] == 1 and gocm("hold", *to)[0] == 2 and gocm("cancel", *to)[0] == 2
    code, token, said = gocm(
        "token", "new", "mail", "--may", "send", "--upstream", "news", "--file", str(server.tokens)
    )
    assert code == 0 and len(token) == 43 and "SIGHUP" in said and token not in server.tokens.read_text()
    server.process.send_signal(signal.SIGHUP)
    server.logged("SIGHUP: keys, tokens")
    send(server, token, ["x"])
    assert ask(server, token, "GET", "/gcm/report")[0] == 403
    assert gocm("token", "new", "a b")[0] == 2 and gocm("token", "new", "x", "--may", "everything")[0] == 2


def test_one_that_is_silent_keeps_nobody_s_messages_waiting(sandbox, run, tmp_path):
    """Not even in the senders' queue, where they lie behind its own."""
    silent = Sandbox.take()
    silent.mode(silent=True)
    config = tmp_path / "gocm.toml"
    named = (
        f'[upstream.{name}]\ndialect = "gcm"\napikey = "k"\nurl = "{each.url()}"\n'
        for name, each in (("silent", silent), ("good", sandbox))
    )
    config.write_text("".join(named))
    config.chmod(0o600)
    server = run("--config", str(config), "--connections", "4", "--senders", "1")
    for n in range(30):  # different ones, or they would be one request
        server.send([f"lost-{n}"], payload=json.dumps({"n": str(n)}), upstream="silent")
    eventually(lambda: server.http().json("GET", "/api/status")["pending"]["sending"] >= 8)
    began = time.monotonic()
    for n in range(5):
        server.send([f"phone-{n}"], payload=json.dumps({"n": str(n)}), upstream="good")
    eventually(lambda: len(sandbox.received()["delivered"]) == 5)
    assert time.monotonic() - began < 5
    silent.kill_group()


@pytest.mark.alone
def test_fifty_upstreams_cost_nothing_when_idle(sandbox, run, tmp_path):
    def used(count):
        config = tmp_path / f"{count}.toml"
        named = (
            f'[upstream.app-{n}]\nurl = "https://127.0.0.1"\ntoken-command = "echo t"\nproject = "app-{n:03}"\n'
            for n in range(count)
        )
        config.write_text("".join(named))
        server = run("--config", str(config), "--spool", str(tmp_path / f"{count}.db"))
        eventually(lambda: len(server.find("new access token")) == count)
        pids = [server.process.pid, *server.children(".*")]
        threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids)
        found = memory(pids), threads
        server.kill_group()
        return found

    (few, threads), (many, more_threads) = used(1), used(50)
    assert many - few <= 4 and more_threads <= threads + 1
