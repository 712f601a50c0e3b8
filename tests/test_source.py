"""The code against its own rules: imports run one way, modules say what they are, the drawing is true."""

import ast
import re
import subprocess
import sys

import pytest
from kit import ROOT

from gocm_lib.config import settings

# Each room imports only from those below it; front and senders, which are on one floor, never from each other.
FLOORS = ("supervisor", "tools", "front senders", "monitoring", "state", "process", "config message help http2")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES = sorted(path.relative_to(ROOT / "gocm_lib") for path in (ROOT / "gocm_lib").rglob("*.py"))
ROOMS = [path for path in MODULES if path.name == "__init__.py" and len(path.parts) > 1]
PURE = {
    "message": {path.stem for path in MODULES if path.parts[0] == "message"},
    "help": {path.stem for path in MODULES if path.parts[0] == "help"},
    "http2": {path.stem for path in MODULES if path.parts[0] == "http2"},
    "state": {"contract", "admission", "pace", "blame", "turns", "waves", "packs", "backlog", "schema"},
    "senders": {"quarantine", "crash_log", "width", "in_hand", "pool", "places", "appetite"},
    "process": {"restarts", "framing"},
    "front": {"deadlines", "request", "chunked", "response", "query", "openapi"},
    "config": {"spool_address", "proxy", "upstreams"},
    "monitoring": {"counters", "health", "dashboard"},
    "tools": {"lines", "strain", "pretend_schema", "pretend_answers", "pretend_groups"},
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
            assert name in ("state.contract", "state.client", "state.packs"), f"{name}: other rooms know these only"
        if name.startswith(("state.sqlite", "state.postgres")):
            assert room == "state"
    assert "sqlite3" not in others or path.parts[:2] == ("state", "sqlite"), "errors of SQLite stay there"
    assert "psycopg" not in others or path.parts[:2] == ("state", "postgres"), "and those of PostgreSQL"
    if path.stem in PURE.get(room, ()):
        assert not others & EDGE
    if path.stem.startswith(("pretend", "sandbox")):
        assert not {name.split(".")[-1] for name in ours} & {
            "gcm",
            "fcm",
            "upstream",
            "connection",
            "outcome",
            "v1_schema",
        }, "it would share their mistakes"


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
    theirs = ("sqlite3", "gocm_lib.state.server", "gocm_lib.senders.loop", "urllib3")
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
        if found := re.match(r"    ([a-z0-9]+)/ ", line):
            room = found[1]
            drawn[room] = set()
        elif found := re.match(r"        (?:(?:sqlite|postgres)/ +)?([a-z0-9_]+(?: [a-z0-9_]+)*)$", line):
            drawn[room] |= set(found[1].split())
    there = {path.parts[0]: set() for path in ROOMS}
    for path in MODULES:
        if len(path.parts) > 1 and path.name != "__init__.py":
            there[path.parts[0]].add(path.stem)
    assert drawn == there


def test_the_drawing_names_the_exit_codes():
    said = (ROOT / "gocm.py").read_text()
    assert all(re.search(rf"\b{int(code)} ", said) for code in settings.Exit if code != settings.Exit.FAILED)
