"""`gocm send` and `gocm watch`: tokens from everywhere, each posted once whatever happens; what a terminal shows."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import ROOT, Program, ends, eventually, output, secret

from gocm_lib.config import values
from gocm_lib.config.settings import Fatal, SendSettings
from gocm_lib.tools import send as campaign
from gocm_lib.tools import watch

short = pytest.mark.short
DATA = ("--data", "title=Hi")


def there(server):
    return "--to", f"http://127.0.0.1:{server.port}"


def tokens_file(tmp_path, count, name="tokens.txt"):
    path = tmp_path / name
    path.write_text("".join(f"t{n}\n" for n in range(count)))
    return str(path)


# ------------------------------------------------------------------------------------------------------------- sending


def test_words_and_a_file_become_messages(server, sandbox, tmp_path):
    path = tokens_file(tmp_path, 25)
    code, printed = output("send", *there(server), "word", "--file", path, "--data", "title=Hi", "--batch", "10")
    assert code == 0 and re.fullmatch(r"taken: 26 tokens as 3 messages; run [0-9a-f]{12}\n", printed)
    server.settled()
    assert set(sandbox.received()["delivered"]) == {"word", *(f"t{n}" for n in range(25))}


def test_one_message_is_named_and_can_be_looked_up(server, tmp_path):
    (tmp_path / "payload").write_text('{"a": 1, "title": "No"}')
    words = ("gone-1", "--payload", str(tmp_path / "payload"), "--data", "title=Hi", "--field", "time_to_live=60")
    code, printed = output("send", *there(server), *words)
    job = re.fullmatch(r"taken: 1 token as message ([0-9a-f]{16}); run \w+\n", printed)[1]
    server.settled()
    found = server.http().json("GET", f"/gcm/jobs/{job}")
    assert code == 0 and found["states"]["failed"] == 1 and 59 < found["expires_at"] - found["accepted_at"] < 61


def test_over_a_unix_socket_with_a_token_as_json(start, tmp_path):
    path = secret(tmp_path / "tokens", "0123456789abcdef\n")
    server = start("--auth-token-file", path, unix=str(tmp_path / "s"))
    code, printed = output(
        "send", "--to", server.place, "--auth-token-file", path, "a", "b", *DATA, "--batch", "1", "--json"
    )
    assert code == 0 and [(line["tokens"], line["before"]) for line in map(json.loads, printed.splitlines())] == [
        (1, False),
        (1, False),
    ]
    assert ends("send", "--to", server.place, "a", *DATA)[1][0].startswith("gocm: a token is needed")


def test_a_run_that_was_killed_goes_on_and_no_token_gets_it_twice(start, sandbox, tmp_path):
    server = start("--fcm-rate", "0")
    words = ("send", *there(server), "--file", tokens_file(tmp_path, 9000), "--batch", "10", "--run", "monday", *DATA)
    first = Program(*words)
    eventually(lambda: server.report()["attempts"] > 200)
    first.kill_group()
    code, printed = output(*words)
    before = int(re.search(r"([\d,]+) of them before", printed)[1].replace(",", ""))
    assert code == 0 and 200 <= before < 9000, printed
    server.settled()
    delivered = sandbox.received()["delivered"]
    assert len(delivered) == 9000 and set(delivered.values()) == {1}
    assert output(*words)[1] == "taken: 9,000 tokens as 900 messages, 9,000 of them before; run monday\n"
    assert server.settled()["attempts"] == 9000


def test_an_interrupt_says_how_to_go_on(start, sandbox, tmp_path):
    sandbox.mode(silent=True)
    server = start("--max-pending", "50", "--upstream-timeout", "60")
    words = ("send", *there(server), "--file", tokens_file(tmp_path, 100), "--batch", "10", *DATA)
    program = Program(*words)
    eventually(lambda: server.report()["pending"] == 5)
    program.process.send_signal(signal.SIGINT)
    assert program.wait() == 1
    [line] = program.lines
    assert re.fullmatch(
        r"gocm: interrupted \([45]0 of 100 tokens were taken; go on with the same command and --run [0-9a-f]{12}\)",
        line,
    )


def test_a_server_that_is_full_is_waited_for(start, sandbox, tmp_path):
    sandbox.mode(latency=0.3)
    server = start("--max-pending", "20")
    server.send([f"before-{n}" for n in range(20)])  # so that it knows how fast it is
    server.settled()
    code, printed = output("send", *there(server), "--file", tokens_file(tmp_path, 60), "--batch", "10", *DATA)
    assert code == 0 and "60 tokens" in printed
    server.settled()
    assert set(sandbox.received()["delivered"].values()) == {1} and len(sandbox.received()["delivered"]) == 80


@pytest.mark.alone
def test_a_server_that_is_restarted_is_waited_for(start, run, sandbox, tmp_path):
    server = start()
    port = server.port
    server.kill_group()
    program = Program("send", "--to", f"http://127.0.0.1:{port}", "a", "b", *DATA, stdout=True)
    try:
        with socket.create_server(("127.0.0.1", port)) as nobody:
            nobody.accept()[0].close()  # it has asked in vain
        assert program.process.poll() is None
        start("--port", str(port)).settled()
        assert program.wait() == 0 and "2 tokens" in program.printed()
    finally:
        program.kill_group()


def test_another_message_under_the_same_run_is_refused(server):
    assert output("send", *there(server), "a", "--run", "r", *DATA)[0] == 0
    code, lines = ends("send", *there(server), "b", "--run", "r", *DATA)
    assert code == 1 and "run r sent something else as message 1: the tokens, the message" in lines[0]


@pytest.mark.parametrize(
    "words, code, told",
    [
        ((), 2, "no tokens: give some as words"),
        (("a",), 2, "nothing to send: give --data, --payload, or --field message={...}"),
        (("a b", *DATA), 78, "token 1 of the command line: the token has a space"),
        (("a", "", *DATA), 78, "token 2 of the command line: the token is empty"),
        (("a", "--data", "x"), 78, "--data x must be NAME=VALUE"),
        (("a", *DATA, "--field", "prioritty=high"), 78, "prioritty: unknown field; did you mean priority?"),
        (("a", *DATA, "--field", "priority=higher"), 78, "priority: priority must be normal or high"),
        (("a", "--field", "time_to_live=x"), 78, "--field time_to_live is not valid JSON"),
        (("a", "--field", "tokens=x"), 78, "--field tokens: give tokens as words"),
        (("a", "--payload", "/nowhere"), 78, "--payload /nowhere cannot be read: No such file"),
        (("--file", "/nowhere"), 78, "--file /nowhere cannot be read: No such file"),
        (("a", *DATA, "--run", "a b"), 78, "--run is a name of"),
        (("a", "--batch", "0"), 78, "--batch must be a number"),
        (("a", "--bathc", "1"), 2, "--bathc; did you mean --batch?"),
        (
            ("a", "--data", "big=" + "x" * 5000),
            78,
            "payload: payload and notification have 5003 bytes; 4096 is Google's limit",
        ),
        (("a", "--to", "http://127.0.0.1:1/", "--ca", "/nowhere"), 78, "--ca cannot read the file"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(words, code, told):
    found, [line] = ends("send", *words)
    assert found == code and line.startswith("gocm: ") and told in line, line


# ------------------------------------------------------------------------------------------------------- what to send


def read(text, words=(), column=""):
    return [each.token for each in campaign.read_tokens(words, "-", column, io.StringIO(text))]


@short
def test_tokens_from_lines_and_from_csv(tmp_path):
    assert read("a\n\n b \r\na\n", ["w", "a"]) == ["w", "a", "b"], "each once, in the order in which they come"
    assert read('name,token\nAnn,"x"\nBob,\nCyd,y\n', column="token") == ["x", "y"]
    path = tmp_path / "devices.CSV"
    path.write_bytes(b"\xef\xbb\xbftoken,os\r\na,1\r\nb,2\r\n")
    assert [each.token for each in campaign.read_tokens([], str(path), "", io.StringIO())] == ["a", "b"]
    path.write_text("registration\na\n")
    with pytest.raises(Fatal, match="no column 'token': its first line has registration"):
        campaign.read_tokens([], str(path), "", io.StringIO())
    path.write_bytes(b"token\n\xff\xfe\n")
    with pytest.raises(Fatal, match="it is no UTF-8 text"):
        campaign.read_tokens([], str(path), "", io.StringIO())
    with pytest.raises(Fatal, match="no tokens"):
        read("\n\n")


def test_stdin_is_read_as_any_file_is():
    def send(given, *words):
        command = [sys.executable, str(ROOT / "gocm.py"), "send", "--to", "http://127.0.0.1:1", "--data", "a=b", *words]
        return subprocess.run([*command, "--file", "-"], input=given, capture_output=True).stderr.decode()

    assert "stdin cannot be read: it is no UTF-8 text" in send(b"a\n\xff\n")
    assert "line 2 of stdin: the token has a space" in send(b"\xef\xbb\xbfa\nb c\n"), "not the first, for its mark"
    assert "stdin is no CSV after line 1: unexpected end" in send(b'token\n"a\nb\n', "--column", "token")


@short
def test_words_may_begin_with_a_dash_after_two():
    given_ = values.parse(SendSettings, ["a", "--data", "x=y", "--", "-b", "--to"], {}, words="TOKEN")
    assert given_.words == ("a", "-b", "--to") and given_.settings.data == ("x=y",)


def test_a_closed_stdin_is_missed_only_by_who_wants_it():
    for words, complaint in (("'bad token'", "the token has a space"), ("--file -", "no tokens")):
        command = f"{sys.executable} {ROOT / 'gocm.py'} send --to http://127.0.0.1:1 --data a=b {words} <&-"
        ended = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
        assert complaint in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("told", [b"{}", b"[]", b"<html>"])
def test_what_is_no_gocm_is_told_so(upstream, told):
    def behave(upstream, sock, number):
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))

    place = f"http://127.0.0.1:{upstream(behave).listener.getsockname()[1]}"
    for words in (
        ("send", "a", "--data", "a=b"),
        ("watch", "--once"),
        ("failed", "list"),
        ("failed", "replay", "--all"),
    ):
        code, [line] = ends(*words, "--to", place)
        assert code == 1 and "no GoCM" in line


@pytest.mark.parametrize("below", ["", "/", "/push", "/push/"])
def test_a_server_below_a_path(upstream, below):
    heard = []

    def behave(upstream, sock, number):
        heard.append(sock.recv(65536).split()[1].decode())
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")

    place = f"http://127.0.0.1:{upstream(behave).listener.getsockname()[1]}{below}"
    assert ends("watch", "--once", "--to", place)[0] == 1
    assert heard == [below.rstrip("/") + "/api/status"]


def test_an_output_that_nobody_reads_or_that_is_full(server, tmp_path):
    path = tokens_file(tmp_path, 200)
    words = ("send", *there(server), "--file", path, "--data", "a=b", "--batch", "1", "--json")
    program = Program(*words, stdout=True)
    program.process.stdout.readline()
    program.process.stdout.close()
    assert program.wait() == 1
    [line] = program.lines
    assert "Broken pipe" in line and "go on with the same command and --run" in line
    for words in (("send", "a", "--data", "a=b"), ("watch", "--once")):
        with open("/dev/full", "w") as full:
            command = [sys.executable, str(ROOT / "gocm.py"), *words, *there(server)]
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "No space left" in ended.stderr


@short
def test_a_bad_token_is_named_by_its_line():
    found = campaign.read_tokens([], "-", "", io.StringIO("".join(f"t{n}\n" for n in range(2500)) + "bad token\n"))
    with pytest.raises(Fatal, match="line 2501 of stdin: the token has a space"):
        campaign.make_batches(found, {"payload": {}}, 1000)
    found = campaign.read_tokens([], "-", "token", io.StringIO("token\n" + "x" * 5000 + "\n"))
    with pytest.raises(Fatal, match="line 2 of stdin: the token is longer than 4096 bytes"):
        campaign.make_batches(found, {"payload": {}}, 1000)


@short
@given(st.lists(st.text("abc", min_size=1), min_size=1, unique=True), st.integers(1, 5))
def test_batches_hold_each_token_once_in_order(tokens, size):
    found = [campaign.Found(token, "") for token in tokens]
    batches = campaign.make_batches(found, {"payload": {"a": 1}}, size)
    assert [token for batch in batches for token in json.loads(batch.body())["tokens"]] == tokens
    assert [batch.number for batch in batches] == list(range(1, len(batches) + 1))
    assert all(len(batch.tokens) == size for batch in batches[:-1])


@short
def test_a_message_from_data_payload_and_fields(tmp_path):
    (tmp_path / "p").write_text('{"a": {"b": 1}, "c": "d"}')
    given_ = SendSettings(payload=str(tmp_path / "p"), data=("c=e=f",), field=("dry_run=true", "collapse_key=5"))
    assert campaign.read_message(given_) == {
        "payload": {"a": {"b": 1}, "c": "e=f"},
        "dry_run": True,
        "collapse_key": "5",
    }
    whole = SendSettings(field=('message={"notification":{"title":"x"}}',))
    assert campaign.read_message(whole) == {"message": {"notification": {"title": "x"}}}
    (tmp_path / "p").write_text("[]")
    with pytest.raises(Fatal, match="must hold a JSON object"):
        campaign.read_message(given_)


# ---------------------------------------------------------------------------------------------------------- a terminal


@short
def test_the_bar():
    assert campaign.bar(0, 100, 0.0, "") == f"[{'.' * 30}] 0 of 100 tokens  "
    assert campaign.bar(50, 100, 2.0, "") == f"[{'#' * 15}{'.' * 15}] 50 of 100 tokens  25/s, 2 s left"
    assert campaign.bar(100, 100, 4.0, "why") == f"[{'#' * 30}] 100 of 100 tokens  why"


class Terminal:
    """A command in a terminal of 100 columns and 30 lines."""

    def __init__(self, *words):
        self.ours, theirs = pty.openpty()
        environ = {**os.environ, "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "gocm.py"), *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
        )
        os.close(theirs)
        self.shown = ""

    def read(self):
        """All that was shown so far; the end of the command is no error."""
        try:
            self.shown += os.read(self.ours, 65536).decode()
        except OSError:
            self.process.wait(10)
        return self.shown

    def close(self):
        self.process.kill()
        self.process.wait(10)
        os.close(self.ours)


def test_a_progress_bar_in_a_terminal(server, tmp_path):
    terminal = Terminal("send", *there(server), "--file", tokens_file(tmp_path, 500), "--batch", "10", *DATA)
    try:
        eventually(lambda: "taken: 500 tokens as 50 messages" in terminal.read())
        assert "] 500 of 500 tokens" in terminal.shown and "[#" in terminal.shown
    finally:
        terminal.close()


def test_watch_shows_the_report_live(server):
    terminal = Terminal("watch", *there(server), "--interval", "0.2")
    try:
        eventually(lambda: "All is well, and nothing is waiting" in terminal.read())
        server.send(["a", "gone-b"])
        eventually(lambda: re.search(r"unregistered +1 +1 not read yet", terminal.read()))
        assert "delete these tokens" in terminal.shown
        server.kill_group()
        eventually(lambda: "no GoCM answers at" in terminal.read())
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) == 0 and "Traceback" not in terminal.read()
    finally:
        terminal.close()


def test_watch_without_a_terminal_is_lines(server):
    server.send(["a"])
    server.settled()
    code, printed = output("watch", *there(server), "--once")
    assert (
        code == 0
        and printed.startswith("0 to be sent, ")
        and "1 delivered, 0 failed, 0 unregistered: All is" in printed
    )
    program = Program("watch", *there(server), "--interval", "0.2", stdout=True)
    try:
        assert [program.process.stdout.readline().count("delivered") for _ in range(3)] == [1, 1, 1]
        program.process.stdout.close()
        assert program.wait() == 1 and program.lines == [], "nobody reads on: no reason to complain"
    finally:
        program.kill_group()
    assert ends("watch", "--to", "http://127.0.0.1:1")[0] == 1


@short
def test_a_screen_is_cut_to_its_terminal():
    told = {"version": "1", "sentence": "x" * 500 + "\x1b[2J", "pending": None, "upstreams": [], "failures": None}
    told |= {"senders": {"ready": 1, "died": 0}, "trend": {"points": []}}
    assert max(map(len, watch.screen(told, 80, 24))) == 80
    assert len(watch.screen(told, 80, 3)) == 2
    assert "\x1b" not in "".join(watch.screen(told, 1000, 24))


@short
def test_a_line_of_sparks():
    assert watch.sparkline([0, 1, 2, 4, 8], 60) == " ▁▂▄█" and watch.sparkline([0, 0], 9) == "  "
    assert watch.sparkline([1] * 99, 9) == "█" * 9 and watch.sparkline([], 9) == ""
