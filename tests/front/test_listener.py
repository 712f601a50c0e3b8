"""UNIX sockets: never open to everybody, never stolen, never left behind; and who may connect."""

import contextlib
import fcntl
import grp
import multiprocessing
import os
import signal
import socket
import stat
import sys

import pytest
from kit import LIMIT, Http, Program, Server, ends, eventually

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.front import listener

short = pytest.mark.short
SEEN = []  # (event, mode) of files in the directory that is watched, when something is about to happen to one
WATCHED = []


def _watch(event, arguments):
    if WATCHED and event in ("os.chmod", "os.chown", "os.rename"):
        for name in [name for name in os.listdir(WATCHED[0]) if not name.endswith(".lock")]:
            SEEN.append((event, stat.S_IMODE(os.lstat(os.path.join(WATCHED[0], name)).st_mode)))


@pytest.fixture
def made():
    """Listeners that are closed after the test."""
    found = []
    yield found
    for each in found:
        each.sock.close()


@short
def test_it_is_for_nobody_else_until_it_has_its_mode(tmp_path, made):
    sys.addaudithook(_watch)
    group = grp.getgrgid(os.getgid()).gr_name
    before = os.umask(0)
    WATCHED.append(str(tmp_path))
    try:
        made.append(listener.unix(str(tmp_path / "s"), 0o660, group))
    finally:
        WATCHED.clear()
        os.umask(before)
    assert {event for event, _ in SEEN} == {"os.chown", "os.chmod", "os.rename"}
    assert {mode for _, mode in SEEN} == {0o700}, "only a directory is seen, in which nobody else can put anything"
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o660 and os.listdir(tmp_path) == ["s"]


@short
def test_no_other_file_is_given_the_mode_that_is_for_the_socket(tmp_path, made):
    """By whoever else may rename there: the key could then be read."""
    sys.addaudithook(_swap)
    victim = tmp_path / "key"
    victim.write_text("secret")
    victim.chmod(0o600)
    (tmp_path / "shared").mkdir()
    SWAPPED[:] = [str(tmp_path / "shared"), str(victim)]
    try:
        made.append(listener.unix(str(tmp_path / "shared" / "s"), 0o666, ""))
    except Fatal:
        pass  # rather
    finally:
        SWAPPED.clear()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert list((tmp_path / "shared").glob("*.away")), "it was tried"


SWAPPED: list[str] = []  # where files are replaced, and by a link to what


def _swap(event, arguments):
    if SWAPPED and event == "os.chmod":
        directory, victim = SWAPPED
        SWAPPED.clear()
        for name in os.listdir(directory):
            if not name.endswith(".lock"):
                path = os.path.join(directory, name)
                os.rename(path, path + ".away")
                os.symlink(victim, path)


@short
def test_a_live_one_is_not_taken_and_a_stale_one_is_replaced(tmp_path, made):
    path = str(tmp_path / "s")
    made.append(listener.unix(path, 0o600, ""))
    with pytest.raises(Fatal, match="another server listens on it"):
        listener.unix(path, 0o600, "")
    made.pop().sock.close()
    made.append(listener.unix(path, 0o600, ""))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    assert os.listdir(tmp_path) == ["s"]


@short
@pytest.mark.parametrize("what", ["a file", "a directory", "a link to a file", "a dangling link"])
def test_what_is_no_socket_is_left_alone(tmp_path, what):
    path = tmp_path / "s"
    (tmp_path / "other").write_text("mine")
    match what:
        case "a file":
            path.write_text("mine")
        case "a directory":
            path.mkdir()
        case "a link to a file":
            path.symlink_to(tmp_path / "other")
        case _:
            path.symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path)), os.lstat(path).st_ino
    with pytest.raises(Fatal, match="cannot listen on the socket"):
        listener.unix(str(path), 0o600, "")
    assert (sorted(os.listdir(tmp_path)), os.lstat(path).st_ino) == before
    assert (tmp_path / "other").read_text() == "mine"


def make_each(directory, ready, counts, turns):
    """Try to listen on each of many paths, at the same moments as others do; how often that worked is noted."""
    held = []
    for turn in range(turns):
        ready.wait()
        with contextlib.suppress(Fatal):
            held.append(listener.unix(os.path.join(directory, str(turn)), 0o600, ""))
            with counts.get_lock():
                counts[turn] += 1
    ready.wait()  # and nobody's is stale until all are done


def test_of_many_that_start_at_once_one_has_it(tmp_path):
    context, turns = multiprocessing.get_context("forkserver"), 40
    ready, counts = context.Barrier(4), context.Array("i", turns)
    processes = [context.Process(target=make_each, args=(str(tmp_path), ready, counts, turns)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert list(counts) == [1] * turns


@short
def test_an_unknown_group_is_told(tmp_path):
    with pytest.raises(Fatal, match="no such group"):
        listener.unix(str(tmp_path / "s"), 0o600, "nosuchgroup")
    assert os.listdir(tmp_path) == []


@short
def test_another_s_socket_in_its_place_is_not_removed(tmp_path, made):
    path = str(tmp_path / "s")
    first = listener.unix(path, 0o600, "")
    first.sock.close()
    made.append(listener.unix(path, 0o600, ""))
    first.remove()
    assert os.listdir(tmp_path) == ["s"]
    made[0].remove()
    assert os.listdir(tmp_path) == []


def test_a_server_on_a_socket_alone(sandbox, key_file, tmp_path):
    path = str(tmp_path / "s")
    words = ("--host", "none", "--socket", path, "--socket-mode", "0600", "--gcm-url", sandbox.url())
    words += ("--apikey-file", key_file, "--spool", str(tmp_path / "gocm.db"))
    server = Program(*words, "--access-log")
    try:
        server.logged(f"listens on {path}, keeps")
        assert Http(path).json("GET", "/gcm/report")["pending"] == 0
        server.logged("access .*client=local")
        other = ("--spool", str(tmp_path / "other.db"))
        assert ends(*words, *other) == (
            Exit.ADDRESS,
            [f"gocm: cannot listen on the socket {path}: another server listens on it; see gocm help options"],
        )
        assert Http(path).json("GET", "/gcm/report")["pending"] == 0
        ping = Program("ping", "--host", "none", "--socket", path)
        assert ping.wait() == 0
        server.kill_group()
        assert os.path.exists(path), "nobody could remove it"
        server = Program(*words)
        eventually(lambda: server.find("listens on"))
        assert Http(path).json("GET", "/gcm/report")["pending"] == 0
        assert server.terminate() == 0 and not os.path.exists(path)
    finally:
        server.kill_group()


def test_tcp_and_a_socket_at_once(start, tmp_path):
    server = start(unix=str(tmp_path / "s"))
    server.send(["a"])
    server.send(["b"], client=Http(server.port))
    assert isinstance(server, Server) and server.settled()["attempts"] == 2
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
FAMILIES = {"127.0.0.1": socket.AF_INET, "127.0.0.2": socket.AF_INET, "::1": socket.AF_INET6}


@pytest.mark.alone
@ipv6
@pytest.mark.parametrize(
    "hosts, reached",
    [
        (["::"], {"127.0.0.1", "127.0.0.2", "::1"}),
        (["0.0.0.0", "::"], {"127.0.0.1", "127.0.0.2", "::1"}),
        (["::1", "127.0.0.2"], {"127.0.0.2", "::1"}),
        (["127.0.0.1"], {"127.0.0.1"}),
    ],
)
def test_it_listens_on_one_address_or_several(hosts, reached):
    made = listener.tcp(hosts, 0)
    port = made[0].sock.getsockname()[1]
    found = set()
    for host, family in FAMILIES.items():
        with socket.socket(family) as client:
            found |= {host} if client.connect_ex((host, port)) == 0 else set()
    for each in made:
        each.sock.close()
    assert found == reached


@ipv6
def test_a_server_on_two_addresses(start):
    server = start("--host", "127.0.0.1", "--host", "::1", "--access-log")
    server.logged(r"listens on 127\.0\.0\.1 port \d+ and ::1 port \d+")
    with socket.create_connection(("::1", server.port)) as client:
        client.sendall(b"GET /gcm/report HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200") and b"\r\nKeep-Alive: timeout=75\r\n" in answer
    server.send(["a"])
    server.settled()
    server.logged("access .*client=::1 ")


@pytest.mark.alone
def test_an_address_taken_among_several_is_told():
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fatal, match=f"127.0.0.2 port {port}: Address already in use"):
            listener.tcp(["127.0.0.1", "127.0.0.2"], port)
        for each in listener.tcp(["127.0.0.1"], port):  # which was let go
            each.sock.close()


@short
def test_nobody_else_can_keep_a_socket_from_being_made(temporary, monkeypatch):
    """Whoever may read a directory may hold its lock."""
    monkeypatch.setattr(listener, "PATIENCE", 0.5)
    held = os.open(temporary, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    made = listener.unix(str(temporary / "gocm.sock"), 0o600, "")
    made.sock.close()
    made.remove()
    assert not list(temporary.iterdir())
    (temporary / "gocm.sock.lock").symlink_to(temporary / "elsewhere")
    with pytest.raises(Fatal):
        listener.unix(str(temporary / "gocm.sock"), 0o600, "")
    assert not (temporary / "elsewhere").exists()
    os.close(held)
