"""The help's nginx and HAProxy, as Debian has them, before a real server: what they are told there is enough."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from kit import FORM, Http, eventually, form, free_port

from gocm_lib.help.topics import source

RECIPES = dict(re.findall(r"^```(nginx|haproxy)\n((?:.*\n)*?)```$", source("proxies"), re.MULTILINE))
NAME = {"Host": "push.example.org"}


def nginx(place, text):
    """nginx's words to begin with a configuration."""
    user = f"user {pwd.getpwuid(os.getuid()).pw_name};\n" if os.getuid() == 0 else ""  # its own may not write here
    (place / "nginx.conf").write_text(
        user + f"worker_processes 1; daemon off; pid {place}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {place}/b; proxy_temp_path {place}/p;\n"
        f"fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;\n{text}\n}}\n"
    )
    return ["nginx", "-e", "stderr", "-p", str(place), "-c", str(place / "nginx.conf")]


def haproxy(place, text):
    (place / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", str(place / "haproxy.cfg")]


@pytest.fixture
def proxy(tmp_path):
    """A function that starts a proxy before a server, by the help's recipe; returns its port."""
    running = []

    def begin(make, port):
        name = make.__name__
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")
        mine = free_port()
        text = RECIPES[name].replace("5601", str(port)).replace("8080", str(mine))
        running.append(subprocess.Popen(make(tmp_path, text), stderr=subprocess.PIPE, stdout=subprocess.PIPE))
        eventually(lambda: running[0].poll() is not None or _is_open(mine))
        assert running[0].poll() is None, running[0].stderr.read()
        return mine

    yield begin
    for each in running:
        each.terminate()
        each.wait()


def _is_open(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.alone
@pytest.mark.parametrize("make", [nginx, haproxy])
def test_posts_go_through_it(start, proxy, make):
    server = start("--allowed-hosts", "push.example.org")
    port = proxy(make, server.port)
    for n in range(30):
        status, headers, body = Http(port).ask("POST", "/gcm/send", form([f"t{n}"]), {**FORM, **NAME})
        assert (status, body) == (200, b"ok\n") and headers["X-GoCM-Job"]
    assert 1 <= connections(server.port) <= 8, "they are kept, and not one for each post"
    big = form([f"token-{n:06}" for n in range(20_000)])
    assert Http(port).ask("POST", "/gcm/send", big, {**FORM, **NAME})[0] == 200
    server.settled()
    assert server.report()["attempts"] == 20_030


def connections(port):
    """How many connections there are to a port of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.alone
def test_nginx_without_the_name_is_told_so(start, proxy, monkeypatch):
    monkeypatch.setitem(RECIPES, "nginx", re.sub(r"proxy_set_header Host .*", "", RECIPES["nginx"]))
    server = start("--allowed-hosts", "push.example.org")
    port = proxy(nginx, server.port)
    assert Http(port).ask("GET", "/gcm/report", None, NAME)[0] == 421, "it says `gocm`, its own name for the upstream"


@pytest.mark.alone
def test_haproxy_queues_what_would_be_refused(start, proxy):
    """Eighty clients at once, and a server that takes forty connections: nobody is refused."""
    server = start("--allowed-hosts", "push.example.org", "--max-connections", "40")
    recipe = RECIPES["haproxy"]
    RECIPES["haproxy"] = recipe.replace("maxconn 400 pool-max-conn 64", "maxconn 24 pool-max-conn 8")
    try:
        port = proxy(haproxy, server.port)
    finally:
        RECIPES["haproxy"] = recipe
    seen = []

    def client(n):
        http = Http(port)
        seen.extend(http.ask("POST", "/gcm/send", form([f"c{n}-{k}"]), {**FORM, **NAME})[0] for k in range(5))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(80)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert seen == [200] * 400
    server.settled()
    assert server.report()["attempts"] == 400
