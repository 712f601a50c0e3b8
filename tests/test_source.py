"""The code against its own documents: imports run one way, README's tables and session are true."""

import ast
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from kit import README, ROOT, Carbon, Http, Program, block, eventually

from gocm_lib import cli
from gocm_lib.config import settings
from gocm_lib.front import routes
from gocm_lib.message import outcome
from gocm_lib.monitoring import metrics
from gocm_lib.tools import bench, pretend

# Each room imports only from those below it; front and senders, which are on one floor, never from each other.
FLOORS = ("supervisor", "tools", "front senders", "monitoring", "state", "process", "config message")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES = sorted(path.relative_to(ROOT / "gocm_lib") for path in (ROOT / "gocm_lib").rglob("*.py"))
ROOMS = [path for path in MODULES if path.name == "__init__.py" and len(path.parts) > 1]
PURE = {
    "message": {path.stem for path in MODULES if path.parts[0] == "message"},
    "state": {"contract", "admission", "pace", "blame", "turns"},
    "senders": {"quarantine", "crash_log", "width", "in_hand", "pool"},
    "process": {"restarts"},
    "front": {"request", "response", "query", "openapi"},
    "monitoring": {"counters", "health", "dashboard"},
    "tools": {"strain"},
}
EDGE = {
    "socket",
    "select",
    "selectors",
    "ssl",
    "os",
    "threading",
    "multiprocessing",
    "time",
    "random",
    "sqlite3",
    "subprocess",
    "urllib3",
}

pytestmark = pytest.mark.short


def tree(path):
    return ast.parse((ROOT / "gocm_lib" / path).read_text())


def imports(path):
    """(our modules, as paths like state.client; other modules) that a module imports, anywhere in it."""
    ours, others = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "gocm_lib":
            place = node.module.partition(".")[2]
            if len(node.module.split(".")) < 3 and node.module != "gocm_lib.supervisor":
                ours |= {f"{place}.{alias.name}".strip(".") for alias in node.names}
            else:
                ours.add(place)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours - {"__version__"}, others


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path):
    room = path.parts[0].removesuffix(".py")
    if room not in FLOOR:
        assert str(path) in ("__init__.py", "__main__.py", "cli.py")
        return
    ours, others = imports(path)
    for name in ours:
        there = name.split(".")[0]
        assert there == room or FLOOR[there] > FLOOR[room], name
        if there == "state" != room and room != "supervisor":
            assert name in ("state.contract", "state.client"), f"{name}: other rooms know the state by these two"
        if name.startswith("state.sqlite"):
            assert room == "state"
    assert "sqlite3" not in others or path.parts[:2] == ("state", "sqlite"), "errors of SQLite stay there"
    if path.stem in PURE.get(room, ()):
        assert not others & EDGE
    if path.stem in ("pretend", "sandbox"):
        assert not {name.split(".")[-1] for name in ours} & {"gcm", "fcm", "upstream", "connection", "outcome"}, (
            "it would share their mistakes"
        )


@pytest.mark.parametrize("path", ROOMS, ids=str)
def test_a_room_says_what_it_owns_and_loads_nothing(path):
    [docstring] = tree(path).body
    assert isinstance(docstring.value.value, str)


def test_imports_make_no_circle_within_a_room():
    names = {".".join(path.with_suffix("").parts): path for path in MODULES if path.name != "__init__.py"}
    left = {name: {found for found in imports(path)[0] if found in names} for name, path in names.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, "these wait for each other"


def test_the_server_s_own_process_loads_no_more_than_it_needs():
    """It names what its children run; SQLite, the senders' loop and urllib3 are theirs."""
    theirs = ("sqlite3", "gocm_lib.state.state", "gocm_lib.senders.loop", "urllib3")
    code = f"import sys, gocm_lib.cli, gocm_lib.supervisor; print([name for name in {theirs} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_say_what_they_are_and_annotate(path):
    assert ast.get_docstring(tree(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{path}: {node.name}"
            assert node.end_lineno - node.lineno < 50, f"{path}: {node.name} does not fit a screen"
        if isinstance(node, ast.ClassDef) and path.parts[0] != "state":
            assert node.end_lineno - node.lineno < 300, f"{path}: {node.name} is more than one thing"


def test_the_drawing_names_the_rooms_and_what_is_in_them():
    drawing = ast.get_docstring(ast.parse((ROOT / "gocm.py").read_text()))
    drawn, room = {}, ""
    for line in drawing[drawing.index("gocm_lib/\n") : drawing.index("The promise")].splitlines()[1:]:
        if found := re.match(r"    ([a-z]+)/ ", line):
            room = found[1]
            drawn[room] = set()
        elif found := re.match(r"        (?:sqlite/ +)?([a-z_]+(?: [a-z_]+)*)$", line):
            drawn[room] |= set(found[1].split())
    there = {path.parts[0]: set() for path in ROOMS}
    for path in MODULES:
        if len(path.parts) > 1 and path.name != "__init__.py":
            there[path.parts[0]].add(path.stem)
    assert drawn == there


def table(heading):
    """The rows of the first table after a heading in the README, its head left out."""
    part = README[README.index(f"\n{heading}\n") :]
    rows = re.search(r"\n\|.*\n\|[-| ]+\n((?:\|.*\n)+)", part)[1]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.strip().split("\n")]


@pytest.mark.parametrize(
    "heading, kind",
    [
        ("## Options", settings.Settings),
        ("## Sandbox", settings.SandboxSettings),
        ("## How fast is it here?", settings.BenchSettings),
        ("### One file", settings.BundleSettings),
        ("### Failed tokens", settings.FailedSettings),
        ("### From the command line", settings.SendSettings),
        ("### Watching it live", settings.WatchSettings),
    ],
)
def test_the_option_tables_are_the_code_s(heading, kind):
    part = README[README.index(f"\n{heading}\n") :]
    part = part[: re.search(r"\n##+ ", part[5:]).start() + 5]
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \| (.*) \|$", part, re.MULTILINE)
    assert rows == [
        (
            settings.option_flag(row),
            f"`{settings.show(row, row.default)}`" if row.default not in ("", ()) else "",
            row.metadata["help"],
        )
        for row in fields(kind)
    ]


def test_the_table_of_scenarios_is_the_code_s():
    part = README[README.index("\n## How fast is it here?\n") :]
    rows = re.findall(r"^\| `([a-z]+)` \| (.*) \|$", part[: part.index("\n## ", 5)], re.MULTILINE)
    assert rows == [(name, scenario.meaning) for name, scenario in bench.SCENARIOS.items()]


def test_the_table_of_commands_is_the_code_s():
    assert table("## Run it") == [[f"`{name}`", command.meaning] for name, command in cli.COMMANDS.items()]


def test_the_tables_of_metrics_and_reasons_are_the_code_s():
    part = README[README.index("\n## Watching it\n") :]
    part = part[: part.index("\n## ", 5)]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", part, re.MULTILINE)
    figures = [(m.name, f"{m.kind} | {', '.join(m.labels)} | {m.help}") for m in metrics.METRICS]
    assert rows == [*figures, *outcome.FAILURES.items(), *outcome.RETRIES.items()]


def test_what_sighup_changes_is_told():
    [sentence] = re.findall(r"follows what has\s+changed\s+of\s+([^;]*);", README)
    live = [row for row in fields(settings.Settings) if row.metadata["live"]]
    assert re.findall("`(.*?)`", sentence) == [settings.option_flag(row) for row in live]


def test_the_route_table_is_the_code_s():
    assert table("## Routes") == [[f"`{r.method} {r.path}`", r.meaning] for r in routes.ROUTES]


def test_the_exit_code_table_is_the_code_s():
    assert table("## Exit codes") == [[str(int(code)), code.meaning] for code in settings.Exit]
    said = (ROOT / "gocm.py").read_text()
    assert all(re.search(rf"\b{int(code)} ", said) for code in settings.Exit if code != settings.Exit.FAILED)


def test_the_table_of_fates_is_the_code_s():
    listed = [row[1] for row in table("## Sandbox")]
    assert listed[: len(pretend.FATES)] == [fate.meaning for fate in pretend.FATES]


def test_the_sandbox_s_answers_and_modes_are_all_named():
    part = README[README.index("\n## Sandbox\n") :]
    said = set(re.findall(r"`([a-z_]+)`", part))
    assert set(pretend.ANSWERS) <= said and set(pretend.Mode.FIELDS) <= said


# What differs from one run to the next, in log lines.
VARYING = (r"\d{4}-\d\d-\d\dT[\d:.]+Z", r"request_id=\S+", r"ms=\S+", r"job=\S+")


def alike(line):
    """A log line without what differs from one run to the next."""
    return re.sub("|".join(VARYING), "*", line)


def test_the_session_in_the_readme(tmp_path):
    """Each `$ curl` line of the README's session answers what the README says it answers, and what it shows of Graphite
    and the log is there.
    """
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    session = re.search(r"```console\n(.*?)```", README, re.DOTALL)[1]
    steps = re.findall(r"^\$ (?:sleep 1; )?(curl .*?)\n(.*?)(?=^\$ |\Z)", session, re.DOTALL | re.MULTILINE)
    assert len(steps) >= 10
    carbon = Carbon()
    words = ("--graphite", f"127.0.0.1:{carbon.port}", "--metrics-interval", "0.2", "--access-log")
    program = Program("--sandbox", "--port", "0", "--sandbox-port", "0", "--spool", str(tmp_path / "s.db"), *words)
    try:
        port = program.logged(r"listens on \S+ port (\d+)")
        pretend = program.logged(r"http://127.0.0.1:(\d+)/sandbox/received")
        for command, expected in steps:
            command = (
                command.replace(":5601", f":{port}").replace(":5602", f":{pretend}").replace("curl ", "curl -s ", 1)
            )
            found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20).stdout
            assert found.strip() == expected.strip(), command
            eventually(lambda: Http(int(port)).json("GET", "/gcm/report")["pending"] == 0)
        for line in block("graphite"):
            path, value, _ = line.split()
            eventually(lambda path=path, value=value: float(value) in carbon.values(path))
        assert {alike(line) for line in block("log")} <= {alike(line) for line in program.lines}
    finally:
        program.kill_group()
        carbon.close()
