"""What the tests share: GoCM and its sandbox as real processes on free ports, and waiting for conditions."""

import os
import re
import tempfile
from pathlib import Path

import hypothesis
import pytest
from kit import STARTED, Sandbox, Server, Upstream

# What is set on this machine for other programs, or for a GoCM, is not for those under test.
STEERING = re.compile(
    "(?i)GOCM_|(https?|all|no)_proxy$|SSL_CERT_|(STATE|CREDENTIALS|LOGS|RUNTIME)_DIRECTORY$|GOOGLE_|NOTIFY_SOCKET$|"
    "WATCHDOG_|LISTEN_|JOURNAL_STREAM$|COLUMNS$|LINES$|SOURCE_DATE_EPOCH$"
)
for name in [name for name in os.environ if STEERING.match(name)]:
    del os.environ[name]

hypothesis.settings.register_profile("gocm", deadline=None, print_blob=True)
hypothesis.settings.register_profile("brief", deadline=None, print_blob=True, max_examples=20)
hypothesis.settings.load_profile("gocm")


@pytest.fixture
def sandbox():
    program = Sandbox.take()
    yield program
    program.leave()


@pytest.fixture(scope="session")
def standing(tmp_path_factory):
    """A server for tests that change nothing in it, and send nothing."""
    program = Server(tmp_path_factory.mktemp("standing") / "gocm.db", "--sandbox", "--sandbox-port", "0")
    yield program
    program.kill_group()


@pytest.fixture
def run(tmp_path):
    """A function that starts a server on the test's spool with the words given."""
    running = []

    def start_server(*words, **how):
        running.append(Server(tmp_path / "spool" / "gocm.db", *words, **how))
        return running[-1]

    yield start_server
    for program in running:
        program.kill_group()


@pytest.fixture(scope="session")
def key_file(tmp_path_factory):
    """A file that holds an API key."""
    path = tmp_path_factory.mktemp("key") / "apikey"
    path.touch(0o600)
    path.write_text("k")
    return str(path)


@pytest.fixture
def start(sandbox, run, key_file):
    """A function that starts a server sending legacy GCM to the test's sandbox, or to `url`."""
    words = ("--apikey-file", key_file)
    return lambda *more, url=None, **how: run("--gcm-url", url or sandbox.url(), *words, *more, **how)


@pytest.fixture
def start_fcm(sandbox, run):
    """A function that starts a server sending FCM v1 to the test's sandbox."""
    host = f"127.0.0.1:{sandbox.port}"
    return lambda *words: run("--fcm-url", f"http://{host}", "--fcm-metadata", "--metadata-host", host, *words)


@pytest.fixture
def start_both(sandbox, run, key_file):
    """A function that starts a server sending both FCM v1, the default, and legacy GCM to the test's sandbox."""
    host = f"127.0.0.1:{sandbox.port}"
    fcm = ("--fcm-url", f"http://{host}", "--fcm-metadata", "--metadata-host", host)
    return lambda *words: run("--gcm-url", sandbox.url(), "--apikey-file", key_file, *fcm, *words)


@pytest.fixture
def temporary():
    """A directory for temporary files with a short name: that of a socket in it must not be long."""
    with tempfile.TemporaryDirectory(prefix="t-") as place:
        yield Path(place)


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def authority(tmp_path):
    """An authority whose certificate is in ca.pem."""
    import trustme

    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return made


@pytest.fixture
def upstream():
    made = []

    def make(behave):
        made.append(Upstream(behave))
        return made[-1]

    yield make
    for each in made:
        each.listener.close()


def pytest_sessionfinish():
    for program in STARTED:
        program.kill_group()


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")  # the tests' own clients are left to the end
    config.addinivalue_line("markers", "slow: takes over five seconds")
    config.addinivalue_line("markers", "short: the short suite, run on every Python")
    config.addinivalue_line(
        "markers", "sdk: takes SDKs of Google's, which TESTED_SDKS names, or what their languages can fetch"
    )
    config.addinivalue_line(
        "markers", "alone: measures time or CPU, or needs a port that nobody has: CI runs nothing beside"
    )


def pytest_collection_modifyitems(items):
    """What takes long begins first, so that no worker is alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL of the tests' own, quick and careless."""
    pytest.importorskip("psycopg")
    from postgres import Postgres

    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def postgres_store(postgres):
    """A function that opens a Store on a new spool in PostgreSQL, as its only node."""
    from postgres import open_store

    return lambda keeping, upstreams=("gcm", "fcm"): open_store(postgres.spool(), keeping, upstreams)
