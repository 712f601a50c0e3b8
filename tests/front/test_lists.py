"""The two lists that applications read: each entry once, and none lost where answers are."""

import json
import random
import socket
import threading

import pytest
from kit import Http

COUNT = 10_000


def dead_tokens(server, per_message=100):
    """Post messages to COUNT tokens that are all unregistered, from a thread."""

    def post():
        client = server.http()
        for start in range(0, COUNT, per_message):
            server.send([f"gone-{n}" for n in range(start, start + per_message)], client=client)

    posting = threading.Thread(target=post)
    posting.start()
    return posting


def all_told(server, posting):
    return not posting.is_alive() and server.report()["notregistered"] == COUNT and server.report()["pending"] == 0


@pytest.mark.slow
def test_two_readers_who_poll_while_tokens_die_get_each_once(server):
    posting = dead_tokens(server)
    found = [[], []]

    def poll(mine):
        client, last = server.http(), False
        while True:
            got = client.json("GET", "/gcm/report/notregistered")["tokens"] or []
            mine += got
            if last and not got:
                return
            last = all_told(server, posting)

    readers = [threading.Thread(target=poll, args=(mine,)) for mine in found]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found[0]) + len(found[1]) == COUNT
    assert set(found[0] + found[1]) == {f"gone-{n}" for n in range(COUNT)}
    assert found[0] and found[1], "both had work"


def cut_off(server, path, chance):
    """Ask, and hang up in the middle of the answer."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        sock.recv(chance.randint(1, 400))


@pytest.mark.slow
def test_with_500_answers_cut_off_the_cursor_loses_none(server):
    posting = dead_tokens(server)
    chance, client, cursor, found, cut = random.Random(7), Http(server.port), "0", [], 0
    while True:
        path = f"/gcm/report/notregistered?ack={cursor}&limit=100"
        for _ in range(chance.choice([0, 5, 10]) if cut < 500 else 0):
            cut_off(server, path, chance)
            cut += 1
        done = cut >= 500 and all_told(server, posting)
        status, headers, body = client.ask("GET", path)
        assert status == 200
        got = json.loads(body)["tokens"] or []
        found += got
        cursor = headers["GoCM-Cursor"]
        if done and not got:
            break
    assert cut >= 500 and sorted(found) == sorted(f"gone-{n}" for n in range(COUNT)), "each once, and all"
    assert server.http().json("GET", "/gcm/report/notregistered?peek=1") == {"tokens": None}
