"""A PostgreSQL of the tests' own: in a folder that goes with it, at a socket there, never one that the machine runs."""

import atexit
import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from gocm_lib.state.postgres.database import connect
from gocm_lib.state.postgres.node import Identity, join
from gocm_lib.state.postgres.schema import SCHEMA
from gocm_lib.state.postgres.store import PostgresStore

_PLACES = ["/usr/lib/postgresql", "/usr/pgsql", "/usr/local/pgsql"]


def programs():
    """Where the newest server's programs are; None: there is none here."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    made = [each.parent for place in _PLACES for each in Path(place).glob("*/bin/initdb")]
    return max(made, key=lambda each: int("".join(filter(str.isdigit, each.parent.name)) or 0), default=None)


class Postgres:
    """A server. Its superuser is `owner`, who needs no password at its socket."""

    def __init__(self, *settings, fsync=False, primary=None, network=None):
        """`settings` are lines of its configuration; it may be the standby of a `primary`, or in a Network."""
        self.network = network
        self.bin = programs()
        if self.bin is None:
            pytest.skip("there is no PostgreSQL here")
        self.numbers = itertools.count(1)
        self.place = Path(tempfile.mkdtemp(prefix="gocm-pg-", dir="/tmp"))  # a socket's path must be short
        # It refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:
            shutil.chown(self.place, self.user)
        if primary:
            self._run("pg_basebackup", "-D", self.data, "-h", primary.place, "-U", "owner", "-R", "-c", "fast", "-N")
        else:
            self._run("initdb", "-D", self.data, "-U", "owner", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        lines = [
            "listen_addresses = ''",
            f"unix_socket_directories = '{self.place}'",
            "max_connections = 50",
            *settings,
        ]
        if not fsync:
            lines += ["fsync = off", "full_page_writes = off"]
        with open(self.data / "postgresql.conf", "a") as file:
            file.write("\n".join(lines) + "\n")
        self.start()

    @property
    def data(self):
        return self.place / "data"

    def _run(self, program, *words):
        command = [str(self.bin / program), *map(str, words)]
        if os.geteuid() == 0:
            command = ["runuser", "-u", self.user, "--", *command]
        if self.network:
            command = ["ip", "netns", "exec", self.network.name, *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/tmp")
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        self._run("pg_ctl", "-D", self.data, "-w", "-l", self.place / "log", "start")

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def by_tls(self, authority, address):
        """Have it serve TLS in its network. Returns how a spool is reached so, by the authority's certificate."""
        made = authority.issue_cert(self.network.THERE)
        made.private_key_pem.write_to_path(self.data / "server.key")
        made.cert_chain_pems[0].write_to_path(self.data / "server.crt")
        authority.cert_pem.write_to_path(self.data / "ca.pem")
        for name in ("server.key", "server.crt"):
            shutil.chown(self.data / name, self.user)
            os.chmod(self.data / name, 0o600)
        os.chmod(self.place, 0o755)
        ca = self.place / "ca.pem"
        authority.cert_pem.write_to_path(ca)
        with open(self.data / "pg_hba.conf", "a") as file:
            file.write(f"hostssl all all {self.network.HERE}/32 trust\n")
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(f"listen_addresses = '{self.network.THERE}'\nssl = on\n")
        self.stop("fast")
        self.start()
        return address.replace("owner@/", f"owner@{self.network.THERE}/").partition("?")[0] + f"?sslrootcert={ca}"

    def address(self, name="postgres"):
        """Where a database of this server is."""
        return f"postgresql://owner@/{name}?host={self.place}"

    def spool(self):
        """The address of a new database with an empty spool in it."""
        name = f"spool{next(self.numbers)}"
        with contextlib.closing(connect(self.address())) as db:
            db.execute(f"CREATE DATABASE {name}")
        with contextlib.closing(connect(self.address(name))) as db, db.transaction():
            db.execute(SCHEMA)
        return self.address(name)

    def kill(self):
        """kill -9 of the server and all its children."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in [pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        while any(_lives(each) for each in [pid, *children]):
            time.sleep(0.01)
        # Where nobody reaps what is dead, its number is taken still, and seems to be a server's.
        (self.data / "postmaster.pid").unlink()
        for lock in self.place.glob(".s.PGSQL*"):
            lock.unlink()

    def close(self):
        with contextlib.suppress(AssertionError):  # it is not running
            self.stop()
        shutil.rmtree(self.place, ignore_errors=True)


class Network:
    """A network of its own, with a link that can go down without a word. Needs root."""

    HERE, THERE = "10.231.77.1", "10.231.77.2"

    def __init__(self):
        self.name = f"gocm-{os.getpid()}"
        self.link = f"gocm{os.getpid()}"
        if os.geteuid() or not shutil.which("ip") or subprocess.run(["ip", "netns", "add", self.name]).returncode:
            pytest.skip("no network of our own can be made here")
        self._ip("link", "add", self.link, "type", "veth", "peer", "name", "inside", "netns", self.name)
        self._ip("address", "add", f"{self.HERE}/30", "dev", self.link)
        self._ip("link", "set", self.link, "up")
        self._ip("-n", self.name, "address", "add", f"{self.THERE}/30", "dev", "inside")
        self._ip("-n", self.name, "link", "set", "inside", "up")

    @staticmethod
    def _ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def cut(self):
        self._ip("link", "set", self.link, "down")

    def mend(self):
        self._ip("link", "set", self.link, "up")

    def close(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "delete", self.link)
        self._ip("netns", "delete", self.name)


class Pair:
    """A primary and its synchronous standby: what is committed is on both."""

    def __init__(self):
        words = ("synchronous_standby_names = '*'", "synchronous_commit = remote_apply")
        self.primary = Postgres("synchronous_commit = remote_apply", fsync=True)
        self.words = words
        self.old, self.links = [], []
        self.standby = Postgres(*words, fsync=True, primary=self.primary)
        with contextlib.closing(connect(self.primary.address())) as db:
            db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            db.execute("SELECT pg_reload_conf()")

    def spool(self):
        """The address of a new spool, on whichever of the two is the primary, now and later."""
        address = self.primary.spool()
        return address.replace(f"host={self.primary.place}", f"host={self.primary.place},{self.standby.place}")

    def fail_over(self):
        """kill -9 of the primary and all its children, for ever; the standby takes its place."""
        self.primary.kill()
        self.old.append(self.primary)
        self.primary, self.standby = self.standby, None
        self.primary._run("pg_ctl", "-D", self.primary.data, "-w", "promote")

    def stand_by(self):
        """A new standby, where the old primary was."""
        gone = self.old.pop()
        gone.close()
        place = gone.place
        self.standby = Postgres(*self.words, fsync=True, primary=self.primary)
        os.symlink(self.standby.place, place)  # addresses name it so
        self.links.append(place)

    def stop(self):
        self.primary.stop()

    def kill(self):
        self.primary.kill()

    def start(self):
        self.primary.start()

    def close(self):
        for each in (self.primary, self.standby, *self.old):
            if each:
                each.close()
        for link in self.links:
            link.unlink(missing_ok=True)


def _lives(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def open_store(address, keeping, upstreams=("gcm", "fcm"), name="one", gave_up=None):
    """A Store on the spool at an address, as a node of this name."""
    store = PostgresStore.open(address, join(address, Identity(name, name, ""), time.sleep), upstreams, keeping)
    store.start([0.0, 0.0], [].append if gave_up is None else gave_up.append)
    return store


class Kept:
    """A spool that is used by one test after the other, emptied: to make one takes long."""

    server = address = store = None
    tables = "body pack single ended tally counter answers canonical notregistered invalid held idempotency node"
    tables += " label later hold meaning"


def empty_store(keeping, upstreams):
    """A Store on an empty spool. The one before it is closed."""
    if Kept.server is None:
        Kept.server = Postgres()
        atexit.register(Kept.server.close)
        Kept.address = Kept.server.spool()
    _leave()
    with contextlib.closing(connect(Kept.address)) as db:
        for table in Kept.tables.split():  # each by itself: who still ends the test before may be reading several
            db.execute(f"TRUNCATE {table}")
        db.execute("UPDATE list SET newest = 0")
        db.execute("UPDATE forgotten SET job = 0")
    Kept.store = open_store(Kept.address, keeping, upstreams)
    return Kept.store


def _leave():
    if Kept.store:
        Kept.store.close()
        Kept.store = None
