"""The command line, the configuration file, and their mistakes: one clear line each, with the documented exit codes."""

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import FORM, ROOT, TOKEN, Http, Program, ends, eventually, form, output, secret

from gocm_lib import cli
from gocm_lib.config import hide_key, settings, values
from gocm_lib.config.settings import Exit, Fatal, Settings

short = pytest.mark.short
KEY = ("--apikey", "K")


def parse(*words, **environ):
    return values.load(words, environ).settings


@short
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


@short
def test_go_s_other_flags():
    assert parse("-apikey", "K", "-ipaddress", "::1", "-logto", "/x").host == ("::1",)
    assert parse("-apikey", "K", "-host", "127.0.0.2").host == ("127.0.0.2",)
    assert parse("-apikey", "K", "-host", "[::1]").host == ("::1",)


@short
@given(st.sets(st.sampled_from(["words", "environ", "file"])), st.sampled_from(["max-attempts", "max_attempts"]))
def test_a_later_source_is_above_an_earlier_one(tmp_path_factory, sources, spelling):
    """The command line, then the environment, then the file, then the default."""
    path = tmp_path_factory.mktemp("config") / "gocm.toml"
    path.write_text(f"{spelling} = 11\n" if "file" in sources else "")
    words = ["--config", str(path), *KEY, *(["--max-attempts", "33"] if "words" in sources else [])]
    found = values.load(words, {"GOCM_MAX_ATTEMPTS": "22"} if "environ" in sources else {})
    wanted = [
        (33, "words", "--max-attempts"),
        (22, "environ", "GOCM_MAX_ATTEMPTS"),
        (11, "file", f"{spelling} in {path}"),
    ]
    value, name = next(((value, name) for value, source, name in wanted if source in sources), (5, "--max-attempts"))
    assert (found.settings.max_attempts, found.name("max_attempts")) == (value, name)


@short
def test_the_file_may_be_named_in_the_environment_and_has_every_kind(tmp_path):
    path = tmp_path / "gocm.toml"
    path.write_text(
        f'apikey-file = "{tmp_path}/key"\nport = 7\nretry_base = 1.5\naccess-log = true\n'
        'allowed-hosts = ["a", "B"]\nsocket_mode = "0600"\nsocket = "/tmp/s"\n'
    )
    secret(tmp_path / "key", "K")
    found = parse(GOCM_CONFIG=str(path), GOCM_PORT="8")
    assert (found.port, found.retry_base, found.access_log, found.allowed_hosts) == (8, 1.5, True, ("a", "b"))
    assert (found.socket_mode, found.apikey) == (0o600, "K")


# Each mistake: what is given (words; GOCM_ variables; the configuration file), the exit code, and what the line names.
MISTAKES = [
    ((), {}, "", 78, "--apikey-file is missing"),
    ((*KEY, "--port", "70000"), {}, "", 78, "--port must be a number from 0 to 65535"),
    ((*KEY, "--port", "x"), {}, "", 78, "--port"),
    (KEY, {"GOCM_PORT": "x"}, "", 78, "GOCM_PORT must be a number"),
    (KEY, {}, "port = -1", 78, "port in {file} must be a number"),
    (KEY, {}, "prot = 1", 78, "'prot in {file}' is no option; did you mean port?"),
    (KEY, {}, "port = [1]", 78, "port in {file} must be a text, a number"),
    (KEY, {}, "port = 1\n[more]\nx = 1", 78, "'more in {file}' is no option"),
    (KEY, {}, "max-age = 1\nmax_age = 2", 78, "in {file} is given twice"),
    (KEY, {}, "port = ", 78, "{file} is not TOML"),
    ((*KEY, "--config", "/nowhere"), {}, "", 78, "--config /nowhere cannot be read"),
    (KEY, {"GOCM_PROT": "1"}, "", 78, "GOCM_PROT is no option's variable; did you mean GOCM_PORT?"),
    ((*KEY, "--prot", "1"), {}, "", 2, "--prot; did you mean --port?"),
    (("serve",), {}, "", 2, "serve"),
    (("--apikey",), {}, "", 2, "apikey"),
    (("--apikey", "a b"), {}, "", 78, "--apikey must be printable"),
    (("--apikey", "K\n"), {}, "", 78, "--apikey"),
    ((*KEY, "--apikey-file", "{secret}"), {}, "", 78, "--apikey and --apikey-file both give the key"),
    ((*KEY, "--gcm-url", "https://:hidden@h/x"), {}, "", 78, "--gcm-url must have no user"),
    ((*KEY, "--feedback-url", "https://:hidden@h/x"), {}, "", 78, "--feedback-url must have no user"),
    (("--apikey-file", "{large}"), {}, "", 78, "{large} has more than 1048576 bytes: it is no secret"),
    (("--apikey-file", "/nowhere"), {}, "", 78, "--apikey-file cannot read the file /nowhere"),
    (("--apikey-file", "{open}"), {}, "", 78, "--apikey-file {open} is a secret that everybody here may read"),
    (("--apikey-file", "{empty}"), {}, "", 78, "--apikey-file {empty} is empty"),
    ((), {}, 'apikey = "K"', 78, "apikey in {file} is a secret, and everybody here may read that file"),
    ((*KEY, "--auth-token-file", "{open}"), {}, "", 78, "--auth-token-file {open} is a secret"),
    (("--credentials", "{open}"), {}, "", 78, "--credentials {open} is a secret"),
    ((*KEY, "--tls-cert", "{open}", "--tls-key", "{open}"), {}, "", 78, "--tls-key {open} is a secret"),
    ((*KEY, "--tls-cert", "{open}"), {}, "", 78, "--tls-cert needs --tls-key"),
    ((*KEY, "--tls-key", "{secret}"), {}, "", 78, "--tls-key needs --tls-cert"),
    ((*KEY, "--gcm-url", "ftp://x/"), {}, "", 78, "--gcm-url"),
    ((*KEY, "--gcm-url", "x"), {}, "", 78, "--gcm-url"),
    ((*KEY, "--gcm-url", "http://example.org/gcm/send"), {}, "", 78, "--gcm-url must be https"),
    (KEY, {"GOCM_FCM_URL": "http://fcm.googleapis.com"}, "", 78, "GOCM_FCM_URL must be https"),
    ((*KEY, "--gcm-url", "https://u:p@h/"), {}, "", 78, "--gcm-url"),
    ((*KEY, "--gcm-url", "https://h:99999/"), {}, "", 78, "--gcm-url"),
    ((*KEY, "--host", "0.0.0.0"), {}, "", 78, "--host 0.0.0.0 can be reached by other machines"),
    (KEY, {}, 'host = "::"', 78, "host in {file} :: can be reached by other machines"),
    ((*KEY, "--no-auth", "--auth-token-file", "{secret}"), {}, "", 78, "--no-auth and --auth-token-file contradict"),
    ((*KEY, "--socket", "/nowhere/gocm.sock"), {}, "", 78, "--socket cannot be made: there is no directory /nowhere"),
    ((*KEY, "--socket", "/tmp/" + "x" * 95), {}, "", 78, "--socket is longer than the 99 bytes"),
    ((*KEY, "--socket", "/tmp/s", "--socket-mode", "0666"), {}, "", 78, "--socket-mode 0666 lets everybody"),
    ((*KEY, "--socket", "/tmp/s", "--socket-mode", "rw"), {}, "", 78, "--socket-mode must be octal"),
    ((*KEY, "--socket-group", "root"), {}, "", 78, "--socket-group needs --socket"),
    ((*KEY, "--allowed-hosts", "a:80"), {}, "", 78, "--allowed-hosts 'a:80' is no host name"),
    ((*KEY, "--graphite", "carbon"), {}, "", 78, "--graphite must be HOST:PORT"),
    ((*KEY, "--statsd", "h:0"), {}, "", 78, "--statsd must be HOST:PORT"),
    ((*KEY, "--metrics-prefix", "a b"), {}, "", 78, "--metrics-prefix"),
    ((*KEY, "--log-format", "xml"), {}, "", 78, "--log-format must be auto, text, json or journal"),
    ((*KEY, "--log-level", "loud"), {}, "", 78, "--log-level"),
    ((*KEY, "--max-attempts", "0"), {}, "", 78, "--max-attempts"),
    ((*KEY, "--retry-base", "nan"), {}, "", 78, "--retry-base"),
    ((*KEY, "--retry-base", "9"), {"GOCM_RETRY_CAP": "8"}, "", 78, "--retry-base is more than GOCM_RETRY_CAP"),
    ((*KEY, "--upstream-ca", "/nowhere"), {}, "", 78, "--upstream-ca"),
    (("--token-command", "x"), {}, "", 78, "--fcm-project is missing"),
    (("--token-command", "x", "--fcm-project", "A b"), {}, "", 78, "--fcm-project"),
    (("--token-command", "x", "--fcm-project", "my-project"), {"GOCM_FCM_METADATA": "1"}, "", 78, "GOCM_FCM_METADATA"),
    ((*KEY, "--fcm-rate", "-1"), {}, "", 78, "--fcm-rate"),
    (("--sandbox", "--port", "5602"), {}, "", 78, "--sandbox-port is also --port"),
    ((*KEY, "--host", "none"), {}, "", 78, "--host none leaves nothing to listen on: give --socket"),
    ((*KEY, "--socket", "/tmp/s", "--socket-group", "nosuchgroup"), {}, "", 78, "there is no such group"),
    ((*KEY, "--feedback-url", "https://h/"), {}, "", 78, "--feedback-url needs --feedback-secret-file"),
    ((*KEY, "--feedback-secret-file", "{secret}"), {}, "", 78, "--feedback-secret-file needs --feedback-url"),
    ((*KEY, "--feedback-url", "ftp://h/", "--feedback-secret-file", "{secret}"), {}, "", 78, "--feedback-url must be"),
    ((*KEY, "--feedback-url", "https://u:p@h/"), {}, "", 78, "--feedback-url must have no user"),
    ((*KEY, "--feedback-secret-file", "{open}"), {}, "", 78, "--feedback-secret-file {open} is a secret"),
    (KEY, {}, 'logto = "a\\u0000b"', 78, "logto in {file} has a NUL"),
]


@short
@pytest.mark.parametrize("words, environ, text, code, named", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_told_in_one_line(tmp_path, words, environ, text, code, named):
    places = {
        "secret": secret(tmp_path / "secret"),
        "open": secret(tmp_path / "open", mode=0o644),
        "empty": secret(tmp_path / "empty", ""),
        "large": secret(tmp_path / "large", ""),
        "file": secret(tmp_path / "gocm.toml", text, 0o644),
    }
    os.truncate(places["large"], 1 << 32)
    words = [word.format(**places) for word in words] + (["--config", places["file"]] if text else [])
    with pytest.raises(Fatal) as caught:
        values.load(words, environ)
    assert caught.value.code == code
    assert named.format(**places) in str(caught.value) and "\n" not in str(caught.value)
    assert "x" * 20 not in str(caught.value), "a secret is in no error"


@short
def test_a_path_does_not_lead_through_where_it_was_given():
    """That may go away: a release's folder, with the spool beside it."""
    assert values.load((*KEY, "--spool", "../gocm.db"), {}, home="/srv/release").settings.spool == "/srv/gocm.db"


@short
def test_what_kubernetes_puts_into_the_environment_is_not_ours():
    theirs = {
        "GOCM_SERVICE_HOST": "10.0.0.1",
        "GOCM_PORT_5601_TCP": "tcp://10.0.0.1:5601",
        "GOCM_PORT": "tcp://10.0.0.1:80",
    }
    assert parse(*KEY, **theirs).port == 5601


@short
def test_of_two_keys_the_one_from_the_higher_source_counts(tmp_path):
    path = secret(tmp_path / "key", "FILE")
    assert parse("--apikey-file", path, GOCM_APIKEY="K").apikey == "FILE"
    assert parse("--apikey", "K", GOCM_APIKEY_FILE=path).apikey == "K"


@short
def test_systemd_s_credentials_are_found(tmp_path):
    for name in ("apikey", "auth-tokens", "tls-cert", "tls-key", "feedback-secret", "fcm.json"):
        secret(tmp_path / name, "0123456789abcdef")
    found = parse(CREDENTIALS_DIRECTORY=str(tmp_path))
    assert found.apikey == "0123456789abcdef"
    assert {found.auth_token_file, found.tls_cert, found.tls_key, found.credentials} == {
        str(tmp_path / name) for name in ("auth-tokens", "tls-cert", "tls-key", "fcm.json")
    }
    assert parse("--no-auth", CREDENTIALS_DIRECTORY=str(tmp_path)).auth_token_file == ""
    assert found.feedback_secret_file == "", "nobody asked for feedback"
    told = parse("--feedback-url", "https://app.example.org/", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert told.feedback_secret_file == str(tmp_path / "feedback-secret")


@short
def test_the_printed_configuration_gives_the_same_settings_again(tmp_path):
    path = secret(
        tmp_path / "gocm.toml",
        'logto = "a\\"b\\\\c"\nmax-age = 90.5\ndead-age=604800.25\nretry_base=0.1234567\n'
        'access_log = true\nallowed_hosts = "a,b"\n',
    )
    key = secret(tmp_path / "key", "S3CRET")
    found = values.load(["--config", path, "--apikey-file", key, "--port", "7"], {"GOCM_SENDERS": "3"})
    lines = list(values.describe(found))
    assert "S3CRET" not in "\n".join(lines) and "# apikey is hidden (--apikey-file)" in lines
    assert "port = 7  # --port" in lines and "senders = 3  # GOCM_SENDERS" in lines
    assert f"max_age = 90.5  # max-age in {path}" in lines and "drain = 25  # default" in lines
    again = secret(tmp_path / "again.toml", "\n".join(lines))
    assert tomllib.loads(Path(again).read_text())["logto"] == 'a"b\\c'
    repeated = values.load(["--config", again], {}).settings
    differ = {
        row.name for row in settings.rows(Settings) if getattr(repeated, row.name) != getattr(found.settings, row.name)
    }
    assert differ == {"config"}


@short
def test_the_default_spool():
    assert values.default_spool({"STATE_DIRECTORY": "/var/lib/gocm"}, False) == "/var/lib/gocm/gocm.db"
    assert values.default_spool({"HOME": "/home/me"}, False) == "/home/me/.local/state/gocm/gocm.db"
    assert values.default_spool({"HOME": "/home/me"}, True) == "/home/me/.local/state/gocm/sandbox.db"


# ---------------------------------------------------------------------------------------------------- the commands


def test_no_key_is_one_line():
    assert ends() == (
        Exit.CONFIG,
        [
            "gocm: --apikey-file is missing, and so is --credentials: give a key for GCM or credentials for FCM, "
            "or --sandbox to try GoCM without Google; see gocm help credentials"
        ],
    )


def test_a_port_in_use_is_one_line(tmp_path, key_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = ends("--apikey-file", key_file, "--port", str(port), "--spool", str(tmp_path / "s.db"))
    assert (code, lines) == (
        Exit.ADDRESS,
        [
            f"gocm: cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port or --host; "
            "see gocm help options"
        ],
    )
    assert not os.path.exists(tmp_path / "s.db")


def test_an_unwritable_spool_is_one_line(key_file):
    code, lines = ends("--apikey-file", key_file, "--port", "0", "--spool", "/proc/nowhere/gocm.db")
    assert code == Exit.SPOOL_UNWRITABLE
    assert lines[-1].startswith("gocm: cannot write the spool /proc/nowhere/gocm.db: ") and len(lines) == 1


def test_a_damaged_spool_is_one_line(tmp_path, key_file):
    secret(tmp_path / "s.db", "something else")
    code, lines = ends("--apikey-file", key_file, "--port", "0", "--spool", str(tmp_path / "s.db"))
    assert code == Exit.SPOOL_DAMAGED and len(lines) == 1 and "damaged" in lines[0]
    assert (tmp_path / "s.db").read_text() == "something else"


def test_an_unwritable_log_is_one_line(key_file):
    code, lines = ends("--apikey-file", key_file, "--port", "0", "--logto", "/proc/nowhere")
    assert code == Exit.SPOOL_UNWRITABLE and len(lines) == 1 and "--logto" in lines[0]


def test_a_ca_file_without_certificates_stops_the_start(tmp_path, key_file):
    (tmp_path / "ca.pem").write_text("nothing")
    words = ("--apikey-file", key_file, "--port", "0", "--spool", ":memory:", "--gcm-url", "https://localhost/")
    code, lines = ends(*words, "--upstream-ca", str(tmp_path / "ca.pem"))
    assert code == Exit.SENDER and "--upstream-ca" in lines[-1]


def test_check_config_says_what_a_start_would(tmp_path, key_file):
    good = ("check-config", "--apikey-file", key_file)
    assert output(*good) == (0, "the configuration is good; upstreams: gcm\n")
    assert output("check-config", "--sandbox")[0] == 0
    short_token = secret(tmp_path / "tokens", "# ours\nshort\n")
    assert ends(*good, "--auth-token-file", short_token) == (
        78,
        [
            f"gocm: --auth-token-file {short_token}, line 2: a token is 16 or more printable ASCII characters without "
            "spaces, like those of: openssl rand -hex 32; see gocm help security"
        ],
    )
    told = ["gocm: --logto /nowhere/log cannot be written; see gocm help options"]
    assert ends(*good, "--logto", "/nowhere/log") == (73, told)
    pair = ("--tls-cert", secret(tmp_path / "cert"), "--tls-key", secret(tmp_path / "key"))
    code, [line] = ends(*good, *pair)
    assert code == 78 and line.startswith(
        f"gocm: --tls-cert {tmp_path}/cert with --tls-key {tmp_path}/key cannot be used"
    )
    assert ends(*good, "--upstream-ca", secret(tmp_path / "ca"))[0] == 78


def test_print_config_and_ping(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    assert output("ping", "--port", str(server.port)) == (0, "ok: ready\n")
    assert output("ping", "--to", f"http://127.0.0.1:{server.port}") == (0, "ok: ready\n")
    code, printed = output("print-config", "--sandbox", "--port", "7")
    assert code == 0 and "port = 7  # --port\n" in printed
    with socket.socket() as deaf:  # its port is nobody else's, and nobody listens there
        deaf.bind(("127.0.0.1", 0))
        assert output("ping", "--port", str(deaf.getsockname()[1]))[0] == 1


def test_help_names_every_command():
    code, printed = output("--help")
    assert code == 0 and all(name in printed for name in cli.COMMANDS)
    assert re.fullmatch(r"gocm \S+ \(python 3\.\S+, urllib3 2\.\S+\)\n", output("--version")[1])


# ------------------------------------------------------------------------------------------------------- secrets


def everything_about(program):
    """What anybody on the machine can read of its processes: command lines and environments."""
    found = b""
    for pid in program.group():
        for what in ("cmdline", "environ"):
            try:
                found += Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                pass  # it has ended
    return found


@short
def test_two_keys_are_left_to_be_told():
    for words in (["--apikey", "K", "--apikey-file=F"], ["--apikey=K", "--apikey-file", "F"], ["--apikey", "a b"]):
        hide_key.restart(words, environ := {})
        assert not environ, "it has not started us anew"


@pytest.mark.parametrize("how", ["word", "go's word", "variable"])
def test_the_key_is_in_no_command_line_and_environment(run, sandbox, how):
    sandbox.mode(latency=5.0)
    words = {"word": ("--apikey", "S3CRET"), "go's word": ("-apikey=S3CRET",), "variable": ()}[how]
    environ = {"GOCM_APIKEY": "S3CRET"} if how == "variable" else None
    server = run("--gcm-url", sandbox.url(), *words, environ=environ)
    assert b"S3CRET" not in everything_about(server)
    assert ("warning: ps has shown the key" in server.log()) == (how != "variable")
    server.send(["a"])
    eventually(lambda: sandbox.received()["arrived"])
    assert "S3CRET" not in server.log()
    for pid in server.group():
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +1 +1 ", limits), "no core file may be written"


def test_a_variable_that_counts_for_nothing_is_taken_away_too(run, sandbox, tmp_path):
    path = secret(tmp_path / "k", "k")
    environ = {"GOCM_APIKEY": "S3CRET", "GOCM_APIKEY_FILE": path}
    server = run("--gcm-url", sandbox.url(), "--apikey-file", path, environ=environ)
    assert b"S3CRET" not in everything_about(server)


@pytest.mark.parametrize("name", ["ping", "check-config"])
def test_other_commands_hide_the_key_too(tmp_path, name):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = (name, "--apikey", "S3CRET", "--port", str(silent.getsockname()[1]))
        program = Program(*words)
        try:
            program.logged("warning: ps has shown the key")
            eventually(lambda: b"S3CRET" not in everything_about(program))
        finally:
            program.kill_group()
    assert "S3CRET" not in program.log()


@pytest.mark.parametrize("how", ["word", "variable", "file", "credential"])
def test_a_url_with_a_secret_is_hidden_like_the_key(run, sandbox, tmp_path, how):
    url = "http://127.0.0.1:9/feedback?token=S3CRET"
    path = secret(tmp_path / "feedback-url", url + "\n")
    words = {"word": ("--feedback-url", url), "file": ("--feedback-url-file", path)}.get(how, ())
    environ = {"variable": {"GOCM_FEEDBACK_URL": url}, "credential": {"CREDENTIALS_DIRECTORY": str(tmp_path)}}.get(
        how, {}
    )
    words = (
        *words,
        "--feedback-secret-file",
        secret(tmp_path / "signs", "x" * 32),
        "--apikey-file",
        secret(tmp_path / "k", "k"),
    )
    server = run("--gcm-url", sandbox.url(), *words, environ=environ)
    assert b"S3CRET" not in everything_about(server)
    assert ("warning: ps has shown the URL" in server.log()) == (how == "word")
    server.send(["gone-a"])
    server.logged("feedback does not reach 127.0.0.1")
    assert "S3CRET" not in server.log()
    shown = subprocess.run(
        [sys.executable, str(ROOT / "gocm.py"), "print-config", *words],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert "# feedback_url is hidden" in shown.stdout and "S3CRET" not in shown.stdout + shown.stderr


@short
def test_what_is_posted_to_another_machine_is_encrypted(tmp_path):
    signs, key = secret(tmp_path / "signs", "x" * 32), secret(tmp_path / "k", "k")
    words = ["--apikey-file", key, "--feedback-secret-file", signs]
    url = ["--feedback-url", "http://app.example/x"]
    with pytest.raises(Fatal, match="--feedback-url must be https"):
        parse(*words, *url)
    assert parse(*words, *url, "--feedback-plain").feedback_plain
    assert parse(*words, "--feedback-url", "http://localhost:1/x").feedback_url
    path = secret(tmp_path / "url", "https://app.example/x")
    assert parse(*words, "--feedback-url-file", path).feedback_url == "https://app.example/x"
    with pytest.raises(Fatal, match="both give"):
        parse(*words, "--feedback-url-file", path, *url)
    os.chmod(path, 0o604)
    with pytest.raises(Fatal, match="everybody here may read"):
        parse(*words, "--feedback-url-file", path)


def test_neither_key_nor_token_is_in_the_log(tmp_path, sandbox):
    log, token = tmp_path / "log", "gone-" + "t" * 150
    words = ("--port", "0", "--spool", ":memory:", "--log-level", "debug", "--gcm-url", sandbox.url())
    server = Program("--apikey", "S3CRET", *words, "--access-log", "--logto", str(log))
    try:
        [port] = eventually(lambda: log.exists() and re.findall(r"listens on \S+ port (\d+)", log.read_text()))
        http = Http(int(port))
        http.ask("POST", "/gcm/send", form([token], payload='{"a":"PAYL0AD"}'), FORM)
        http.ask("GET", f"/gcm/report?x={token}")
        http.ask("GET", f"/gcm/{token}")
        eventually(lambda: "NotRegistered" in log.read_text())
        server.terminate()
    finally:
        server.kill_group()
    everything = log.read_text() + server.log()
    assert not any(hidden in everything for hidden in ("S3CRET", token, "PAYL0AD"))
    assert "one is gone-t..." in everything


@short
def test_every_option_is_told_in_one_table():
    names = [row.name for row in settings.rows(Settings)]
    assert len(names) == len(set(names)) and all(row.metadata["help"] for row in settings.rows(Settings))
    hidden = {row.name for row in settings.rows(Settings) if row.metadata["hidden"]}
    assert (
        hidden == {"apikey", "feedback_url"} and settings.as_variable(settings.rows(Settings)[0].name) == "GOCM_CONFIG"
    )


@short
def test_an_option_may_be_given_several_times():
    assert parse(*KEY, "--host", "127.0.0.1", "--host", "[::1],127.0.0.2").host == ("127.0.0.1", "::1", "127.0.0.2")
    assert parse(*KEY, GOCM_HOST="127.0.0.1, ::1").host == ("127.0.0.1", "::1")
    with pytest.raises(Fatal, match="--host none contradicts"):
        parse(*KEY, "--host", "none", "--host", "127.0.0.1")
    with pytest.raises(Fatal, match="--host 0.0.0.0 can be reached"):
        parse(*KEY, "--host", "127.0.0.1", "--host", "0.0.0.0")


@short
def test_an_option_s_old_name_goes_on_working(tmp_path, capsys):
    file = tmp_path / "gocm.toml"
    file.write_text('max-dead = 7\napikey = "K"\n')
    file.chmod(0o600)
    assert parse(*KEY, "--max-dead", "5", "--dead-age=60").max_failed == 5
    assert parse(*KEY, GOCM_DEAD_AGE="60").failed_age == 60
    assert parse("--config", str(file)).max_failed == 7
    assert parse("--config", str(file), "--max-failed", "9").max_failed == 9, "what counts more, by either name"
    shown = "\n".join(values.describe(values.load([*KEY, "--max-dead", "5"], {"GOCM_DEAD_AGE": "60"})))
    assert "max_failed = 5  # --max-dead (old name of --max-failed)" in shown
    assert "failed_age = 60  # GOCM_DEAD_AGE (old name of GOCM_FAILED_AGE)" in shown
    with pytest.raises(SystemExit):
        parse("--help")
    assert "dead" not in capsys.readouterr().out


@short
@pytest.mark.parametrize(
    "words, environ, problem",
    [
        (["--max-dead", "x"], {}, r"--max-dead \(old name of --max-failed\) must be a number"),
        (["--max-dead", "1", "--max-failed", "1"], {}, "--max-dead is the old name of --max-failed: give one of them"),
        ([], {"GOCM_MAX_DEAD": "1", "GOCM_MAX_FAILED": "1"}, "GOCM_MAX_DEAD is the old name of GOCM_MAX_FAILED"),
        (["--max-dea", "1"], {}, "did you mean --max-(?!dead)"),
    ],
)
def test_old_names_that_make_no_sense(words, environ, problem):
    with pytest.raises(Fatal, match=problem):
        parse(*KEY, *words, **environ)
