"""The single file: the same bytes from every Python, and all of GoCM in it."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import urllib3
from kit import FORM, ROOT, Http, Program, Server, eventually, form, kill, secret

SITE = str(Path(urllib3.__file__).parent.parent)


def build(python, target, **environ):
    """Build with this Python, which has nothing installed but finds our urllib3."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": SITE, **environ}
    command = [python, "-m", "gocm_lib.tools.bundle", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


def pythons():
    """Every Python from 3.11 on that is here."""
    places = [*Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3"), "python3"]
    found = {}
    for place in [sys.executable, *places, *(f"python3.{minor}" for minor in range(11, 20))]:
        what = "import sys; print(*sys.version_info[:2])"
        try:
            done = subprocess.run([str(place), "-c", what], capture_output=True, text=True)
        except OSError:
            continue
        version = tuple(map(int, done.stdout.split())) if done.returncode == 0 else (0,)
        if version >= (3, 11):
            found.setdefault(version, str(place))
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle in a folder of its own."""
    target = tmp_path_factory.mktemp("bundle") / "gocm.pyz"
    build(sys.executable, target)
    return target


def test_every_python_builds_the_same_bytes(bundle, tmp_path):
    for version, python in pythons().items():
        made = build(python, tmp_path / "made.pyz", TZ="Asia/Tokyo", PYTHONHASHSEED="7")
        assert made == bundle.read_bytes(), f"{version} builds another"
    epoch = build(sys.executable, tmp_path / "dated.pyz", SOURCE_DATE_EPOCH="1700000000")
    assert epoch != bundle.read_bytes() and len(epoch) == bundle.stat().st_size
    assert zipfile.ZipFile(tmp_path / "dated.pyz").infolist()[0].date_time[:3] == (2023, 11, 14)
    assert bundle.stat().st_mode & 0o777 == 0o755


def test_the_licences_are_inside(bundle):
    with zipfile.ZipFile(bundle) as found:
        names = found.namelist()
        assert found.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert any(name.startswith("urllib3-") and "LICENSE" in name for name in names)
        assert not any(name.endswith((".pyc", "RECORD", "INSTALLER")) or "__pycache__" in name for name in names)
        assert sorted(names) == names


def test_beside_it_is_what_is_in_it(bundle):
    first, *rest = (bundle.parent / "gocm.pyz.sha256").read_text().splitlines()
    assert first == f"{hashlib.sha256(bundle.read_bytes()).hexdigest()}  gocm.pyz"
    with zipfile.ZipFile(bundle) as found:
        told = {name: hashlib.sha256(found.read(name)).hexdigest() for name in found.namelist()}
    assert {line[66:]: line[:64] for line in rest} == told


def build_from(site, place):
    """Bundle with what is installed in a folder."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site)}
    words = [sys.executable, "-S", "-m", "gocm_lib.tools.bundle", "-o", str(place / "gocm.pyz")]
    return subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("change", ["urllib3/util/retry.py", "urllib3/added.py"])
def test_what_is_not_as_it_was_installed_is_not_bundled(tmp_path, change):
    site = tmp_path / "site"
    shutil.copytree(Path(SITE) / "urllib3", site / "urllib3")
    [about] = Path(SITE).glob("urllib3-*.dist-info")
    shutil.copytree(about, site / about.name)
    with open(site / change, "a") as file:
        file.write("# evil\n")
    done = build_from(site, tmp_path)
    assert done.returncode == 78 and f"{change} is not what pip installed" in done.stderr
    assert not list(tmp_path.glob("gocm.pyz*"))


def test_without_a_record_nothing_is_bundled(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(Path(SITE) / "urllib3", site / "urllib3")
    [about] = Path(SITE).glob("urllib3-*.dist-info")
    shutil.copytree(about, site / about.name)
    (site / about.name / "RECORD").unlink()
    done = build_from(site, tmp_path)
    assert done.returncode == 78 and "RECORD is missing" in done.stderr


class Single(Server):
    """A server that runs from the single file, by a Python that has nothing else installed."""

    bundle: Path

    def command(self, words):
        return [sys.executable, "-S", str(self.bundle), *words]


def test_a_session_through_the_single_file(bundle, sandbox, key_file, tmp_path):
    place = tmp_path / "opt"
    place.mkdir()
    shutil.copy(bundle, place / "gocm-1.pyz")
    (place / "gocm.pyz").symlink_to("gocm-1.pyz")
    os.chmod(place, 0o555)
    Single.bundle = place / "gocm.pyz"
    words = ("--gcm-url", sandbox.url(), "--apikey-file", key_file)
    server = Single(tmp_path / "gocm.db", *words, environ={"HOME": "/proc/nowhere", "PYTHONPATH": ""})
    try:
        server.send(["a", "canonical-b", "gone-c"])
        assert server.settled() == {"attempts": 3, "failures": 1, "pending": 0, "canonicals": 1, "notregistered": 1}
        assert server.http().json("GET", "/gcm/report/notregistered") == {"tokens": ["gone-c"]}
        os.chmod(place, 0o755)
        (place / "gocm-2.pyz").write_bytes(b"another version")
        os.replace(_link(place, "gocm-2.pyz"), place / "gocm.pyz")
        for name in ("sender.*", "state"):  # what takes their place is of the version that runs
            kill(server.children(name))
        eventually(lambda: server.report_or_none())
        server.send(["d"])
        assert server.settled()["attempts"] == 4
        for pid in server.children():
            assert "/work" not in Path(f"/proc/{pid}/maps").read_text().replace(str(tmp_path), "")
        assert "Traceback" not in server.log() and server.terminate() == 0
    finally:
        server.kill_group()


def _link(place, target):
    fresh = place / "fresh"
    fresh.symlink_to(target)
    return fresh


class Nobody(Program):
    """The single file run by a user without a home, a capability or a file, as the unit has it."""

    python = "/usr/bin/python3"
    bundle: Path

    def command(self, words):
        user = ("--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
        return ["setpriv", *user, self.python, str(self.bundle), *words]


def nobody_can_run():
    """Whether there is a Python, new enough, that every user may run, and we may become another."""
    found = [Nobody.python, "-c", "import sys, sqlite3, ssl; sys.exit(sys.version_info < (3, 11))"]
    return os.getuid() == 0 and bool(shutil.which("setpriv")) and subprocess.run(found).returncode == 0


@pytest.mark.skipif(not nobody_can_run(), reason="needs root, setpriv and a Python in /usr/bin")
def test_as_a_user_that_owns_nothing(bundle, sandbox):
    """Secrets are as systemd hands them over; nothing but the spool's directory can be written."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own are for us alone
        place = Path(name)
        place.chmod(0o755)
        Nobody.bundle = Path(shutil.copy(bundle, place))
        (place / "state").mkdir()
        (place / "credentials").mkdir()
        for part, text in (("apikey", "k"), ("auth-tokens", "0123456789abcdef")):
            secret(place / "credentials" / part, text, 0o400)
        for path in (place / "state", place / "credentials", *(place / "credentials").iterdir()):
            os.chown(path, 65534, 65534)
        environ = {"STATE_DIRECTORY": f"{place}/state", "CREDENTIALS_DIRECTORY": f"{place}/credentials", "HOME": "/no"}
        server = Nobody("--port", "0", "--gcm-url", sandbox.url(), environ=environ)
        try:
            http = Http(int(server.logged(r"port (\d+), keeps messages in \S+/state/gocm.db")))
            token = {"Authorization": "Bearer 0123456789abcdef"}
            assert http.ask("POST", "/gcm/send", form(["a"]), {**FORM, **token})[0] == 200
            assert http.ask("POST", "/gcm/send", form(["b"]), FORM)[0] == 401
            eventually(lambda: sandbox.received()["delivered"] == {"a": 1})
            assert server.terminate() == 0 and "Traceback" not in server.log()
        finally:
            server.kill_group()


class Copy(Server):
    """A server that runs from a copy of the code, by a Python for which another GoCM is installed."""

    place: Path

    def command(self, words):
        return [sys.executable, str(self.place / "gocm.py"), *words]


def test_children_run_the_code_that_their_parent_runs(sandbox, key_file, tmp_path):
    shutil.copy(ROOT / "gocm.py", tmp_path)
    shutil.copytree(ROOT / "gocm_lib", tmp_path / "gocm_lib")
    Copy.place, state = tmp_path, tmp_path / "gocm_lib" / "state" / "state.py"
    state.write_text(state.read_text().replace('"not delivered: ', '"this copy could not deliver: '))
    server = Copy(tmp_path / "gocm.db", "--gcm-url", sandbox.url(), "--apikey-file", key_file)
    try:
        server.send(["gone-a"])
        server.logged("state: this copy could not deliver")
    finally:
        server.kill_group()


def test_what_we_start_is_not_given_our_path(bundle, sandbox, tmp_path):
    """A token command may be a Python program, with libraries of its own."""
    Single.bundle = bundle
    command = f"sh -c 'echo \"[$PYTHONPATH]\" > {tmp_path}/seen; echo token'"
    words = ("--token-command", command, "--fcm-project", "my-project", "--fcm-url", f"http://127.0.0.1:{sandbox.port}")
    server = Single(tmp_path / "gocm.db", *words, environ={"PYTHONPATH": ""})
    try:
        eventually(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").read_text() == "[]\n")
    finally:
        server.kill_group()


def test_its_sandbox_and_other_commands(bundle, tmp_path):
    Single.bundle = bundle
    words = ("--sandbox", "--sandbox-port", "0")
    server = Single(tmp_path / "gocm.db", *words, environ={"HOME": "/proc/nowhere"})
    try:
        server.send(["phone-1", "gone-phone-2"])
        assert server.settled()["notregistered"] == 1
    finally:
        server.kill_group()
    for words, printed in ((["--version"], "gocm "), (["check-config", "--sandbox"], "the configuration is good")):
        done = subprocess.run([sys.executable, "-I", "-S", bundle, *words], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0 and done.stdout.startswith(printed), done.stderr
    again = tmp_path / "again.pyz"
    subprocess.run([bundle, "bundle", "-o", again], check=True, capture_output=True, cwd="/")
    assert again.read_bytes() == bundle.read_bytes(), "it can build itself"


def test_mistakes_are_told(tmp_path):
    program = Program("bundle", "-o", "/nowhere/gocm.pyz")
    assert program.wait() == 73 and program.lines == [
        "gocm: /nowhere/gocm.pyz cannot be written: No such file or directory; see gocm help install"
    ]
    program = Program("bundle", "-o", str(tmp_path / "x"), environ={"SOURCE_DATE_EPOCH": "now"})
    assert program.wait() == 78 and len(program.lines) == 1
