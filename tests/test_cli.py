"""The command line: Go's spelling, one clear line for each mistake, the documented exit codes."""

import os
import re
import socket

import pytest
from conftest import FORM, Http, Program, eventually, form

from gocm_lib import settings
from gocm_lib.settings import Exit, SettingsError


def parse(*words, **environ):
    given = settings.parse(settings.Settings, words, environ)
    settings.check(given)
    return given


@pytest.mark.short
@pytest.mark.parametrize(
    "words",
    [
        ["-apikey", "K", "-port", "7"],
        ["-apikey=K", "-port=7"],
        ["--apikey", "K", "--port", "7"],
        ["--apikey=K", "--port=7"],
    ],
)
def test_go_s_spelling_works(words):
    assert (parse(*words).apikey, parse(*words).port) == ("K", 7)


@pytest.mark.short
def test_go_s_other_flags():
    assert parse("-apikey", "K", "-ipaddress", "::1", "-logto", "/x").host == "::1"
    assert parse("-apikey", "K", "-host", "127.0.0.2").host == "127.0.0.2"


@pytest.mark.short
def test_the_command_line_is_above_the_environment():
    assert parse("--apikey", "K", GOCM_PORT="8", GOCM_SENDERS="2").port == 8
    assert parse("--apikey", "K", "--port", "9", GOCM_PORT="8").port == 9
    assert parse(GOCM_SANDBOX="true").sandbox is True


BAD = [
    ([], 78, "--apikey"),
    (["--apikey", "K", "--port", "70000"], 78, "--port"),
    (["--apikey", "a b"], 78, "--apikey"),
    (["--apikey", "K\n"], 78, "--apikey"),
    (["--apikey", "K", "--port", "x"], 78, "--port"),
    (["--apikey", "K", "--gcm-url", "ftp://x/"], 78, "--gcm-url"),
    (["--apikey", "K", "--gcm-url", "x"], 78, "--gcm-url"),
    (["--apikey", "K", "--gcm-url", "http://example.org/gcm/send"], 78, "--gcm-url"),
    (["--apikey", "K", "--gcm-url", "https://u:p@h/"], 78, "--gcm-url"),
    (["--apikey", "K", "--gcm-url", "https://h:99999/"], 78, "--gcm-url"),
    (["--apikey", "K", "--host", "0.0.0.0"], 78, "--host"),
    (["--apikey", "K", "--max-attempts", "0"], 78, "--max-attempts"),
    (["--apikey", "K", "--retry-base", "nan"], 78, "--retry-base"),
    (["--apikey", "K", "--upstream-ca", "/nowhere"], 78, "--upstream-ca"),
    (["--apikey", "K", "--log-level", "loud"], 78, "--log-level"),
    (["--token-command", "x"], 78, "--fcm-project"),
    (["--token-command", "x", "--fcm-project", "A b"], 78, "--fcm-project"),
    (["--token-command", "x", "--fcm-metadata", "--fcm-project", "my-project"], 78, "--token-command"),
    (["--apikey", "K", "--fcm-rate", "-1"], 78, "--fcm-rate"),
    (["--apikey-file", "/nowhere"], 78, "--apikey-file"),
    (["--apikey", "K", "--prot", "1"], 2, "--prot"),
    (["serve"], 2, "serve"),
    (["--apikey"], 2, "apikey"),
]


@pytest.mark.short
@pytest.mark.parametrize("words, code, named", BAD, ids=range(len(BAD)))
def test_mistakes_are_told_in_one_line(words, code, named):
    with pytest.raises(SettingsError) as caught:
        parse(*words)
    assert caught.value.code == code
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.short
def test_a_mistake_in_the_environment_is_told_by_its_name():
    with pytest.raises(SettingsError, match="GOCM_PORT must be a number from 0 to 65535"):
        parse(GOCM_PORT="x", GOCM_APIKEY="K")


@pytest.mark.short
def test_the_default_spool():
    assert settings.default_spool({"STATE_DIRECTORY": "/var/lib/gocm"}, False) == "/var/lib/gocm/gocm.db"
    assert settings.default_spool({"HOME": "/home/me"}, False) == "/home/me/.local/state/gocm/gocm.db"
    assert settings.default_spool({"HOME": "/home/me"}, True) == "/home/me/.local/state/gocm/sandbox.db"


def ends(*words, environ=None):
    """(exit code, the lines on stderr) of a command that must end by itself within two seconds."""
    program = Program(*words, environ=environ)
    try:
        return program.wait(10), program.lines
    finally:
        program.kill_group()


def test_no_key_is_one_line(tmp_path):
    assert ends() == (
        Exit.CONFIG,
        [
            "gocm: --apikey is missing, and so is --credentials: give a key for GCM or credentials for FCM, "
            "or --sandbox to try GoCM without Google"
        ],
    )


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = ends("--apikey", "K", "--port", str(port), "--spool", str(tmp_path / "s.db"))
    assert (code, lines) == (
        Exit.ADDRESS,
        [f"gocm: cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port or --host"],
    )
    assert not os.path.exists(tmp_path / "s.db")


def test_an_unwritable_spool_is_one_line():
    code, lines = ends("--apikey", "K", "--port", "0", "--spool", "/proc/nowhere/gocm.db")
    assert code == Exit.SPOOL_UNWRITABLE
    assert lines[-1].startswith("gocm: cannot write the spool /proc/nowhere/gocm.db: ") and len(lines) == 1


def test_a_damaged_spool_is_one_line(tmp_path):
    (tmp_path / "s.db").write_text("something else")
    code, lines = ends("--apikey", "K", "--port", "0", "--spool", str(tmp_path / "s.db"))
    assert code == Exit.SPOOL_DAMAGED and len(lines) == 1 and "damaged" in lines[0]
    assert (tmp_path / "s.db").read_text() == "something else"


def test_an_unwritable_log_is_one_line():
    code, lines = ends("--apikey", "K", "--port", "0", "--logto", "/proc/nowhere")
    assert code == Exit.SPOOL_UNWRITABLE and len(lines) == 1 and "--logto" in lines[0]


def test_a_ca_file_without_certificates_stops_the_start(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    code, lines = ends(
        "--apikey",
        "K",
        "--port",
        "0",
        "--spool",
        ":memory:",
        "--gcm-url",
        "https://localhost/",
        "--upstream-ca",
        str(tmp_path / "ca.pem"),
    )
    assert code == Exit.SENDER and "--upstream-ca" in lines[-1]


def test_neither_key_nor_token_is_in_the_log(tmp_path, sandbox):
    log, token = tmp_path / "log", "gone-" + "t" * 150
    server = Program(
        "--apikey",
        "S3CRET",
        "--port",
        "0",
        "--spool",
        ":memory:",
        "--log-level",
        "debug",
        "--gcm-url",
        sandbox.url(),
        "--logto",
        str(log),
    )
    try:
        [port] = eventually(lambda: log.exists() and re.findall(r"listens on \S+ port (\d+)", log.read_text()))
        Http(int(port)).ask("POST", "/gcm/send", form([token]), FORM)
        eventually(lambda: "NotRegistered" in log.read_text())
        server.terminate()
    finally:
        server.kill_group()
    everything = log.read_text() + server.log()
    assert "S3CRET" not in everything and token not in everything
    assert "one is gone-t..." in everything
