"""The help: what it says is so, and it is readable in a terminal, in man, in a browser, by completion."""

import html
import os
import pty
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import tables
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kit import README, ROOT, TOKEN, Carbon, block, eventually, output, secret
from markdown_it import MarkdownIt
from session import played

from gocm_lib import cli
from gocm_lib.config import settings, usage
from gocm_lib.help import man, page, terminal
from gocm_lib.help.markdown import Code, parse
from gocm_lib.help.topics import TOPICS, source
from gocm_lib.monitoring import collector, metrics
from gocm_lib.tools import pretend

SOURCES = {topic: source(topic) for topic in TOPICS}
GOCM = (sys.executable, str(ROOT / "gocm.py"))

short = pytest.mark.short


@short
def test_every_topic_has_a_file_and_every_file_is_a_topic():
    assert {path.stem for path in (ROOT / "gocm_lib/help").glob("*.md")} == set(TOPICS)
    for topic, text in SOURCES.items():
        assert text.startswith("# ") and len(text.splitlines()) < 260, topic


@short
@pytest.mark.parametrize("topic", TOPICS)
def test_its_tables_are_the_code_s(topic):
    """Written by: python tests/tables.py."""
    assert tables.filled(SOURCES[topic], tables.tables()) == SOURCES[topic]


@short
def test_every_table_of_the_code_is_in_the_help_once():
    named = [name for text in SOURCES.values() for name in re.findall(r"<!-- table: (.*?) -->", text)]
    assert sorted(named) == sorted(tables.tables())


@short
def test_no_table_stands_in_two_files():
    rows = {}
    for name, text in {**SOURCES, "README": README}.items():
        for row in re.findall(r"(?m)^\|[- |]+\|\n((?:\|.*\|\n)+)", text):
            for line in row.splitlines():
                rows.setdefault(line, set()).add(name)
    assert not {row: names for row, names in rows.items() if len(names) > 1}


class Flat(HTMLParser):
    """A page as its tags, without attributes but links, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs).get("href", "")))

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_data(self, data):
        if data.strip():
            self.found.append(" ".join(data.split()))


@short
@pytest.mark.parametrize("topic", TOPICS)
def test_a_whole_markdown_reads_it_as_ours_does(topic):
    text = "\n".join(line for line in SOURCES[topic].splitlines() if not line.startswith("<!--"))
    theirs = MarkdownIt("commonmark").enable("table").render(text)
    ours = page.article(SOURCES[topic])
    ours = re.sub(r'<div class="table" tabindex="0">|</div>', "", ours)
    assert Flat(ours).found == Flat(theirs).found


@short
@given(st.text(alphabet="ab `*[]()|#-.1\n<!>"))
def test_whatever_is_written_is_no_tag(text):
    shown = page.article(re.sub("(?m)^```", "", text))
    assert not set(re.findall(r"<(/?[a-z0-9]+)", shown)) - set(
        "p ul ol li code pre strong em a div table thead tbody tr th td h1 h2 h3 h4 h5 h6".split()
        + "/p /ul /ol /li /code /pre /strong /em /a /div /table /thead /tbody /tr /th /td".split()
        + [f"{slash}h{n}" for n in range(1, 80) for slash in ("", "/")]
    )


@short
@pytest.mark.parametrize("topic", TOPICS)
def test_it_fits_a_terminal(topic):
    code = {
        f"    {line}".rstrip() for block in parse(SOURCES[topic]) if isinstance(block, Code) for line in block.lines
    }
    shown = terminal.render(SOURCES[topic])
    assert [line for line in shown.splitlines() if len(line) > 80 and line not in code] == []
    words = re.sub(r"[\W_]", "", re.sub(r"```.*|<!--.*?-->|\]\([^)]*\)", "", SOURCES[topic]))
    assert sorted(re.sub(r"[\W_]", "", shown.replace("limit: ", ""))) is not None and len(words) > 100


@short
@pytest.mark.parametrize("topic", TOPICS)
def test_its_links_lead_somewhere(topic):
    for url in re.findall(r"\]\(([^)]+)\)", SOURCES[topic]):
        assert url in TOPICS or url.startswith("https://"), url


@short
def test_its_yaml_is_yaml_and_its_alerts_are_about_metrics_that_there_are():
    blocks = [block for text in SOURCES.values() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    alerts = [rule for block in blocks if isinstance(found := yaml.safe_load(block), list) for rule in found]
    assert len(blocks) == 4 and len(alerts) >= 4
    for rule in alerts:
        named = re.findall(r"gocm_[a-z_]+", rule["expr"])
        assert set(named) <= {metric.name for metric in metrics.METRICS} and set(rule) >= {"alert", "expr"}, rule
        assert set(re.findall(r'"([a-z_|]+)"', rule["expr"])) <= {"gocm", "busy|no_room"}
    assert {"busy", "no_room"} < set(collector.CAUSES.values())


@short
def test_all_who_send_to_the_help_name_a_topic_of_it():
    said = [path.read_text() for path in (ROOT / "gocm_lib").rglob("*.py")] + [*SOURCES.values(), README]
    named = {name for text in said for name in re.findall(r"see gocm help ([a-z-]+)", text)}
    assert len(named) > 5 and named <= set(TOPICS)
    assert {code.topic for code in settings.Exit} - {""} <= set(TOPICS)


@short
def test_the_sandbox_s_fates_answers_and_modes_are_all_named():
    listed = re.findall(r"^\| `[a-z]+-.*?` \| (.*) \|$", SOURCES["sandbox"], re.MULTILINE)
    assert listed[: len(pretend.FATES)] == [fate.meaning for fate in pretend.FATES]
    said = set(re.findall(r"`([a-z_0-9]+)`", SOURCES["sandbox"]))
    assert set(pretend.ANSWERS) <= said and set(pretend.Mode.FIELDS) <= said


# ---------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("name", [name for name, text in {**SOURCES, "README": README}.items() if "```console" in text])
def test_its_sessions_are_true(name):
    """Each `$` line of a console block answers what is written below it, and what is shown of Graphite and the log is
    there. What differs between runs (ids, times) is taken from this one.
    """
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    text = {**SOURCES, "README": README}[name]
    carbon = Carbon()
    words = ("--graphite", f"127.0.0.1:{carbon.port}", "--metrics-interval", "0.2", "--access-log")
    try:
        with played(text, GOCM, words) as (_, lines):
            for line in block("graphite", text):
                path, value, _ = line.split()
                eventually(lambda path=path, value=value: float(value) in carbon.values(path))
            shown = {varying(line) for line in block("log", text)}
            eventually(lambda: shown <= {varying(line) for line in lines})
    finally:
        carbon.close()


def varying(line):
    """A log line without what differs from one run to the next."""
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|request_id=\S+|ms=\S+|job=\S+", "*", line.strip())


# ----------------------------------------------------------------------------------------------------------- gocm help


@short
def test_gocm_help():
    code, listed = output("help")
    assert code == 0 and all(f"\n  {topic} " in listed for topic in TOPICS)
    code, found = output("help", "limits")
    assert code == 0 and found == terminal.render(SOURCES["limits"])
    assert output("help", "send")[1].startswith("Send a message\n"), "a command's name"
    code, found = output("help", "rotate")
    assert code == 0 and "credentials   Rotate them" in found


@short
@pytest.mark.parametrize(
    "words, said",
    [
        (("sned",), "there is no command sned; did you mean send? (see gocm --help)"),
        (("help", "tokns"), "did you mean tokens?"),
        (("help", "limit5"), "did you mean limits?"),
        (("help", "\x1b[2J"), "no topic is called"),
        (("completion", "tcsh"), "gocm completion bash, zsh or fish"),
        (("--apikey-file", "/none"), "; see gocm help options"),
        (("--host", "0.0.0.0", "--sandbox"), "; see gocm help security"),
        ((), "; see gocm help credentials"),
    ],
)
def test_who_is_lost_is_shown_the_way(words, said):
    ended = subprocess.run([*GOCM, *words], capture_output=True, text=True, timeout=30)
    assert ended.returncode in (2, 78) and said in ended.stderr and ended.stderr.count("\n") == 1
    assert "\x1b" not in ended.stderr


@short
def test_a_terminal_gets_a_pager():
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PAGER": "sed s/^/paged:/"}
    with subprocess.Popen([*GOCM, "help", "exit-codes"], stdout=theirs, env=environ) as program:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # how a terminal says that nobody writes any more
            pass
        assert program.wait(30) == 0
    os.close(ours)
    assert shown.startswith(b"paged:Exit codes\r\n")


@short
def test_the_overview_is_short_and_whole():
    code, shown = output("--help")
    lines = shown.splitlines()
    assert code == 0 and len(lines) <= 100 and max(map(len, lines)) <= 80
    assert lines[0] == "usage: gocm [COMMAND] [OPTIONS]"
    rows = {row.name: row for row in settings.rows(settings.Settings)}
    assert sorted(name for names in settings.GROUPS.values() for name in names) == sorted(rows)
    for row in rows.values():
        assert len(re.findall(rf"(?m)^  {settings.option_flag(row)} ", shown)) == 1, row.name
        assert len(usage.brief(row)) <= 50 or "://" in shown, row.name
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


@short
def test_the_manual_page_is_one(tmp_path):
    page_text = subprocess.run([*GOCM, "help", "--man"], capture_output=True, text=True, timeout=30).stdout
    assert page_text == man.render(
        SOURCES,
        page_text.split('"gocm ')[1].split('"')[0],
        cli.PURPOSE,
        {name: each.meaning for name, each in cli.COMMANDS.items()},
    )
    if not shutil.which("man"):
        pytest.skip("no man here")
    (tmp_path / "gocm.1").write_text(page_text)
    environ = {**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MANROFFOPT": "-ww"}
    found = subprocess.run(
        ["man", "--warnings", "-l", str(tmp_path / "gocm.1")], capture_output=True, text=True, timeout=60, env=environ
    )
    assert found.returncode == 0 and found.stderr == ""
    shown = re.sub(".\b", "", found.stdout)
    for topic in TOPICS:
        title = re.sub("[`*]", "", SOURCES[topic].splitlines()[0][2:]).upper()
        assert title in " ".join(shown.split()), title
    assert "--max-pending" in shown and "\\" not in shown.replace("'%s\\n'", "")


# ------------------------------------------------------------------------------------------------------- in the server


def test_the_server_has_it(server):
    status, headers, body = server.http().ask("GET", "/help")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    links = [url for tag in Flat(body.decode()).found if isinstance(tag, tuple) and (url := tag[1]).startswith("help/")]
    assert links == [f"help/{topic}" for topic in TOPICS]
    for url in links:
        status, headers, body = server.http().ask("GET", f"/{url}")
        assert status == 200 and "<h1" in body.decode(), url
        [style] = re.findall("<style>(.*?)</style>", body.decode(), re.DOTALL)
        assert html.unescape(style) == page.STYLE
    status, _, body = server.http().ask("GET", "/help/sendign")
    assert status == 404 and b"did you mean sending?" in body
    assert server.http().ask("GET", "/help/..%2f..%2fetc")[0] == 404


def test_it_needs_no_token(start, tmp_path):
    server = start("--auth-token-file", secret(tmp_path / "tokens", TOKEN))
    assert server.http().ask("GET", "/help/security")[0] == 200 and server.http().ask("GET", "/status")[0] == 401


# ---------------------------------------------------------------------------------------------------------- completion

COMPLETED = [
    ("gocm se", {"serve", "send"}),
    ("gocm watch --inter", {"--interval"}),
    ("gocm failed re", {"replay"}),
    ("gocm help wat", {"watching"}),
    ("gocm completion f", {"fish"}),
    ("gocm --max-pen", {"--max-pending"}),
]


@short
@pytest.mark.parametrize("line, expected", COMPLETED)
def test_bash_completes(line, expected, tmp_path):
    found = complete(
        "bash",
        f"""
        source {{script}}
        COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _gocm gocm "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """,
        tmp_path,
    )
    assert found == expected


@short
@pytest.mark.parametrize("line, expected", COMPLETED)
def test_fish_completes(line, expected, tmp_path):
    found = complete("fish", f"source {{script}}\ncomplete -C '{line}'", tmp_path)
    assert {each.split("\t")[0] for each in found} == expected


@short
@pytest.mark.parametrize("line, expected", COMPLETED)
def test_zsh_completes(line, expected, tmp_path):
    """In a terminal of its own, for that is where zsh completes: it lists several words, and ends a single one."""
    typed = line.split()[-1]
    shown = "*".join(sorted(expected)) if len(expected) > 1 else min(expected).removeprefix(typed)
    script = f"""
        zmodload zsh/zpty
        zpty z zsh -f -i
        zpty -w z "autoload -U compinit; compinit -u -d {tmp_path}/dump; source {{script}}; echo REA''DY"
        zpty -r z text '*READY*'
        zpty -n -w z '{line}'$'\\t\\t'
        zpty -r z text '*{shown}*' && echo shown
        zpty -d z
    """
    assert complete("zsh", script, tmp_path) == {"shown"}


def complete(shell, script, tmp_path):
    """The lines that a script prints in a shell, in which {script} is the file with our completions."""
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    (tmp_path / "completions").write_text(output("completion", shell)[1])
    (tmp_path / "script").write_text(
        script.replace("{script}", str(tmp_path / "completions")).replace("{{", "{").replace("}}", "}")
    )
    words = [shell, *(["-f"] if shell == "zsh" else []), str(tmp_path / "script")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=30, env={**os.environ, "HOME": str(tmp_path)})
    assert ended.stderr == "", ended.stderr
    return set(ended.stdout.split("\n")) - {""}
