"""Log lines: whole, one a record, in each format; reopened; with request ids."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit import FORM, Http, Program, eventually, form

from gocm_lib.front.render import request_id
from gocm_lib.process import log

short = pytest.mark.short


anything = st.text(max_size=60) | st.text(min_size=1, max_size=30).map(lambda text: text * 400)


@short
@example("json", "a\u2028b\u2029c\x85d", {})
@example("text", "a\u2028b\u2029c\x85d\ne", {"a": "\u2028"})
@given(st.sampled_from(sorted(log.FORMATS)), anything, st.dictionaries(st.sampled_from("abc"), st.text(max_size=9)))
def test_a_record_is_one_line_of_at_most_a_pipe_s_atom(form, message, fields):
    line = log.to_line(form, 1e9, "error", "front", message, fields)
    assert len(line) <= 4096 and line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1, "U+2028 and its like end no line, either"
    if form == "json":
        found = json.loads(line)
        assert message.startswith(found["message"]) and (found["message"] == message or len(line) > 3500)
        assert found["level"] == "error" and {name: found[name] for name in fields} == fields
    else:
        assert re.match(rb"<3>front: |\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z error front: ", line)


@short
def test_the_journal_is_recognised():
    stderr = os.fstat(2)
    ours = {"JOURNAL_STREAM": f"{stderr.st_dev}:{stderr.st_ino}"}
    assert log.resolve("auto", "", ours) == "journal"
    assert log.resolve("auto", "/some/file", ours) == "text"
    assert log.resolve("auto", "", {"JOURNAL_STREAM": "1:1"}) == "text"
    assert log.resolve("auto", "", {}) == "text"
    assert log.resolve("json", "", ours) == "json"


@short
@given(st.none() | st.text(max_size=200))
def test_a_request_id_is_the_client_s_or_a_new_one(given):
    found = request_id(given)
    assert re.fullmatch("[A-Za-z0-9._:-]{1,128}", found)
    assert found != request_id(None), "each its own"
    if given and re.fullmatch("[A-Za-z0-9._:-]{1,128}", given):
        assert found == given


def test_requests_have_ids_and_lines(start):
    server = start("--access-log", "--log-format", "json")
    http = server.http()
    job = http.ask("POST", "/gcm/send", form(["a"]), {**FORM, "X-Request-Id": "mine-7"})[1]
    assert job["X-Request-Id"] == "mine-7"
    odd = http.ask("GET", "/gcm/report?peek=secret", headers={"X-Request-Id": 'a" b'})
    made = odd[1]["X-Request-Id"]
    assert odd[0] == 200 and re.fullmatch("[0-9a-f]+-[0-9a-f]+", made)
    http.ask("GET", "/nowhere%E2%80%A8")
    http.ask("GET", job["Location"])
    http.ask("GET", "/gcm/jobs/some-device-s-token")
    eventually(lambda: server.log().count('"request_id"') == 5)
    lines = list(map(json.loads, server.lines))
    access = [line for line in lines if "request_id" in line]
    first = {"request_id": "mine-7", "method": "POST", "path": "/gcm/send", "status": 200, "bytes": 3}
    assert first.items() <= access[0].items() and access[0]["job"] == job["X-GoCM-Job"]
    assert access[0]["client"] == "127.0.0.1" and access[0]["ms"] > 0 and lines[0]["process"] == "front"
    assert access[1]["request_id"] == made and access[1]["path"] == "/gcm/report"
    assert access[2]["status"] == 404 and re.fullmatch(r"/nowhe\.\.\.[0-9a-f]{8}", access[2]["path"])
    assert access[3]["path"] == job["Location"] and access[4]["status"] == 400
    assert "secret" not in server.log() and "device-s-token" not in server.log()


def test_every_process_opens_its_log_anew(run, sandbox, key_file, tmp_path):
    path, old = tmp_path / "log", tmp_path / "log.1"
    words = ("--gcm-url", sandbox.url(), "--apikey-file", key_file, "--port", "0", "--spool", str(tmp_path / "gocm.db"))
    program = Program(*words, "--logto", str(path), "--log-level", "warning")
    try:
        eventually(path.exists)
        [port] = eventually(lambda: listening(program))
        http = Http(port)
        assert http.json("GET", "/gcm/report")["pending"] == 0  # every process is there, and has opened it
        path.rename(old)
        program.process.send_signal(signal.SIGHUP)
        eventually(path.exists)
        sandbox.mode(status=401)
        assert http.ask("POST", "/gcm/send", form(["a"]), FORM)[0] == 200
        eventually(lambda: "warning state: upstream gcm is paused" in path.read_text())
        assert "paused" not in old.read_text()
    finally:
        program.kill_group()


def listening(program):
    """The port that a server listens on whose log does not tell."""
    inodes = set()
    for link in Path(f"/proc/{program.process.pid}/fd").iterdir():
        try:
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
        except OSError:
            pass
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in inodes]


def test_the_level_changes_with_sighup(start, tmp_path):
    path = tmp_path / "gocm.toml"
    path.write_text("")
    server = start("--config", str(path), "--metrics-interval", "5")
    path.write_text("max_tokens = 2\nsenders = 9\naccess_log = true\n")
    server.process.send_signal(signal.SIGHUP)
    server.logged("SIGHUP: changed: access_log, max_tokens")
    server.logged("SIGHUP: these need a restart: senders")
    status = server.http().ask("POST", "/gcm/send", form(["a", "b", "c"]), FORM)[0]
    assert status == 413
    server.logged("access .*status=413")
    path.write_text("max_tokens = many")
    server.process.send_signal(signal.SIGHUP)
    server.logged("SIGHUP: nothing is changed: --config .* is not TOML")
    server.send(["a"])
    server.settled()
