"""The code against its own documents: imports run one way, README's tables and session are true."""

import ast
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
from conftest import ROOT, Http, Program, eventually
from test_watching import Carbon

from gocm_lib import bench, cli, metrics, outcome, pretend, service, settings

# Each module imports only from those above it: the reading order, and the reason there are no cycles.
ORDER = tuple(
    "early deadline settings proxy config conceal logwriter log systemd listener cpu child job outcome pace blame gcm "
    "fcm credentials wire width upstream limits poison turns traffic spool history report idempotency database client "
    "state meter sender vitals intake feeder request access gate health metrics trend dashboard pages openapi service "
    "server feedback exporter strain pretend sandbox rundir supervisor bench bundle remote campaign watch init cli "
    "start".split()
)
PURE = {
    "job",
    "outcome",
    "pace",
    "blame",
    "turns",
    "width",
    "gcm",
    "fcm",
    "limits",
    "poison",
    "request",
    "pages",
    "meter",
    "health",
    "dashboard",
    "openapi",
    "strain",
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
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.short


def imports(name):
    """(our modules, other modules) that a module imports, anywhere in it."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((ROOT / "gocm_lib" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gocm_lib":
            ours |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("gocm_lib."):
            ours.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def test_every_module_has_its_place():
    assert {path.stem for path in (ROOT / "gocm_lib").glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    ours, others = imports(name)
    assert ours <= set(ORDER[: ORDER.index(name)])
    if name in PURE:
        assert not others & EDGE
    if name in ("pretend", "sandbox"):
        assert not ours & {"gcm", "fcm", "upstream", "wire", "outcome"}, "it would share their mistakes"


@pytest.mark.parametrize("name", ORDER)
def test_modules_say_what_they_are_and_annotate(name):
    tree = ast.parse((ROOT / "gocm_lib" / f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{name}.{node.name}"
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} does not fit a screen"


def test_the_reading_order_names_every_module():
    drawing = ast.get_docstring(ast.parse((ROOT / "gocm.py").read_text()))
    order = drawing[drawing.index("To read the code") : drawing.index("The promise")]
    named = [word for word in re.findall(r"\b[a-z]+\b", order) if word in ORDER]
    assert tuple(word for place, word in enumerate(named) if word not in named[:place]) == ORDER


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
    assert table("## Routes") == [[f"`{r.method} {r.path}`", r.meaning] for r in service.ROUTES]


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


def block(kind):
    """The lines of a fenced block of this kind in the README."""
    return re.search(rf"```{kind}\n(.*?)\n```", README, re.DOTALL)[1].splitlines()


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
