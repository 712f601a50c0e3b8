"""From the spool to the upstream: retries, failing upstreams, TLS, connections."""

import datetime
import gzip
import json
import socket
import time

import pytest
import trustme
from kit import Sandbox, answer, eventually, memory

# ------------------------------------------------------------------------------------------------ retries and verdicts


def test_only_the_failed_subset_is_retried(server, sandbox):
    server.send(["a", "flaky-2-b", "c", "gone-d"])
    assert server.settled() == {"attempts": 4, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 1}
    assert sandbox.received()["arrived"] == {"a": 1, "flaky-2-b": 3, "c": 1, "gone-d": 1}


def test_like_messages_of_many_jobs_share_multicasts(start, sandbox):
    """Their results go to their own jobs, what is retried travels by itself, as do others."""
    server = start("--senders", "1")
    fates = ["gone-{}", "canonical-{}", "flaky-1-{}", "{}", "{}"]
    tokens = [fates[n % 5].format(n) for n in range(500)]
    lines = [json.dumps({"tokens": [token], "payload": {"a": 1}}) for token in tokens]
    lines += [json.dumps({"tokens": [f"other-{n}"], "payload": {"a": n + 2}}) for n in range(10)]
    kind = {"Content-Type": "application/x-ndjson"}
    assert server.http().ask("POST", "/gcm/send", "\n".join(lines), kind)[0] == 200
    assert server.settled() == {
        "attempts": 510,
        "failures": 100,
        "pending": 0,
        "canonicals": 100,
        "notregistered": 100,
    }
    received = sandbox.received()
    assert received["arrived"] == {
        **{token: 2 if token.startswith("flaky") else 1 for token in tokens},
        **{f"other-{n}": 1 for n in range(10)},
    }
    assert received["requests"] < 200, "a request for each job would be 610"
    lost = server.http().json("GET", "/gcm/report/notregistered")
    assert sorted(lost["tokens"]) == sorted(token for token in tokens if token.startswith("gone-"))


def test_one_token_that_spoils_a_shared_multicast_fails_alone(start, upstream):
    def behave(up, sock, number):
        while tokens := up.read(sock):
            sock.sendall(BAD_REQUEST if any(token.startswith("bad") for token in tokens) else answer(tokens))

    up = upstream(behave)
    server = start(url=up.url())
    lines = [json.dumps({"tokens": [token], "payload": {"a": 1}}) for token in ["bad", *map(str, range(60))]]
    kind = {"Content-Type": "application/x-ndjson"}
    assert server.http().ask("POST", "/gcm/send", "\n".join(lines), kind)[0] == 200
    assert server.settled() == {"attempts": 61, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 0}
    assert max(len(tokens) for _, tokens in up.requests) > 1, "they were to share a multicast"


BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"


def test_out_of_attempts_is_a_failure_and_kept(start, sandbox):
    server = start("--max-attempts", "3")
    server.send(["flaky-9-a"])
    assert server.settled() == {"attempts": 1, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 0}
    assert sandbox.received()["arrived"] == {"flaky-9-a": 3}
    assert server.logged("Unavailable, attempt 3 of 3: 1 tokens")


@pytest.mark.parametrize(
    "failure", [{"status": 503}, {"status": 500}, {"close": True}, {"status": 503, "retry_after": 1}]
)
def test_a_failing_upstream_is_retried_until_it_works(start, sandbox, failure):
    server = start("--max-attempts", "50")
    sandbox.mode(**failure)
    server.send(["a", "b"])
    eventually(lambda: sandbox.received()["arrived"].get("a", 0) >= 2)
    assert server.report()["pending"] == 1
    sandbox.mode(status=200, close=False)
    assert server.settled()["failures"] == 0
    assert sandbox.received()["delivered"] == {"a": 1, "b": 1}


def test_retry_after_is_honoured(start, sandbox):
    server = start()
    sandbox.mode(status=503, retry_after=2)
    began = time.monotonic()
    server.send(["a"])
    eventually(lambda: sandbox.received()["arrived"])
    sandbox.mode(status=200)
    server.settled()
    assert time.monotonic() - began >= 2.0
    assert sandbox.received()["arrived"] == {"a": 2}


def test_an_upstream_that_says_nothing_is_given_up_and_asked_again(start, sandbox):
    server = start("--upstream-timeout", "0.5")
    sandbox.mode(silent=True)
    server.send(["a"])
    eventually(lambda: sandbox.received()["arrived"].get("a"))
    sandbox.mode(silent=False)
    assert server.settled()["failures"] == 0
    assert sandbox.received()["delivered"] == {"a": 1}


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_wrong_key_or_url_pauses_and_loses_nothing(start, sandbox, status):
    server = start()
    sandbox.mode(status=status)
    server.send(["a", "gone-b"])
    server.send(["c"])
    server.logged(f"upstream gcm is paused for 2 s: HTTP {status}")
    assert server.report() == {"attempts": 0, "failures": 0, "pending": 2, "canonicals": 0, "notregistered": 0}
    sandbox.mode(status=200)
    assert server.settled() == {"attempts": 3, "failures": 1, "pending": 0, "canonicals": 0, "notregistered": 1}
    assert server.logged("upstream gcm answers again")


@pytest.mark.alone
def test_an_upstream_that_is_down_pauses_and_burns_no_attempts(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start("--max-attempts", "1", url=f"http://127.0.0.1:{port}/gcm/send")
    server.send(["a", "b"])
    server.logged("upstream gcm is paused for 1 s")
    sandbox = Sandbox("--port", str(port))
    try:
        assert server.settled()["failures"] == 0
        assert sandbox.received()["delivered"] == {"a": 1, "b": 1}
    finally:
        sandbox.kill_group()


# ----------------------------------------------------------------------------------- upstreams that break the protocol


def test_a_kept_connection_that_went_stale_costs_no_attempt(start, upstream):
    """The upstream closes at the moment of reuse: written again at once, on a fresh connection."""

    def behave(up, sock, number):
        tokens = up.read(sock)
        if tokens:
            sock.sendall(answer(tokens))
        if number == 1:
            up.read(sock)  # takes the second request and closes without a byte

    up = upstream(behave)
    server = start("--senders", "1", "--max-attempts", "1", url=up.url())
    server.send(["a"])
    server.settled()
    server.send(["b"])
    assert server.settled()["failures"] == 0
    assert [tokens for _, tokens in up.requests] == [["a"], ["b"], ["b"]]


def test_a_fresh_connection_that_closes_is_an_attempt(start, upstream):
    up = upstream(lambda up, sock, number: up.read(sock))
    server = start("--senders", "1", "--max-attempts", "2", url=up.url())
    server.send(["a"])
    assert server.settled()["failures"] == 1
    assert len(up.requests) == 2


def drip(up, sock, number):
    up.read(sock)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
        sock.sendall(bytes([byte]))
        time.sleep(0.1)


BOMB = gzip.compress(b"\0" * 300_000_000, 6)  # 300 MB from 300 KB

MISBEHAVIOUR = {
    "drips": drip,
    "endless headers": lambda up, sock, number: (
        up.read(sock),
        [sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 9999) for _ in range(999)],
    ),
    "endless chunks": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        [sock.sendall(b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n") for _ in range(9999)],
    ),
    "ten gigabytes": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"),
    ),
    "short body": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort"),
    ),
    "not http": lambda up, sock, number: (up.read(sock), sock.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")),
    "no body": lambda up, sock, number: (up.read(sock), sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")),
    "gzip": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"),
    ),
    "gzip bomb": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB),
    ),
    "more than it said": lambda up, sock, number: (
        up.read(sock),
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + b"x" * 100_000),
    ),
    "no results": lambda up, sock, number: sock.sendall(answer(up.read(sock), [])),
    "only interim": lambda up, sock, number: (up.read(sock), sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 99)),
}


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_a_broken_upstream_ends_in_a_failure_and_no_sender_dies(start, upstream, how):
    up = upstream(MISBEHAVIOUR[how])
    server = start("--senders", "1", "--max-attempts", "2", "--upstream-timeout", "1", url=up.url())
    before = memory(server.group())
    server.send(["a", "b"])
    assert server.settled() == {"attempts": 2, "failures": 2, "pending": 0, "canonicals": 0, "notregistered": 0}
    assert not server.find("died")
    assert memory(server.group()) < before + 20


def test_redirects_are_not_followed(start, upstream, sandbox):
    up = upstream(
        lambda up, sock, number: (
            up.read(sock),
            sock.sendall(b"HTTP/1.1 307 Go\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % sandbox.url().encode()),
        )
    )
    server = start(url=up.url())
    server.send(["a"])
    server.logged("paused for 2 s: HTTP 307")
    assert sandbox.received()["requests"] == 0


def test_more_results_than_tokens_and_fewer(start, upstream):
    def behave(up, sock, number):
        while tokens := up.read(sock):
            first = len(up.requests) == 1
            sock.sendall(answer(tokens, [{"error": "NotRegistered"}] * (len(tokens) + 1) if first else None))

    up = upstream(behave)
    server = start(url=up.url())
    server.send(["a", "b"])
    assert server.settled() == {"attempts": 2, "failures": 0, "pending": 0, "canonicals": 0, "notregistered": 0}


def test_what_is_written_is_what_the_reference_asks_for(start, upstream):
    up = upstream(lambda up, sock, number: sock.sendall(answer(up.read(sock))))
    start(url=up.url()).send(["a"])
    [(head, _tokens)] = eventually(lambda: up.requests)
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /gcm/send HTTP/1.1" and b"Authorization: key=k" in lines
    assert b"Content-Type: application/json" in lines and b"Host: " + up.url().encode().split(b"/")[2] in lines


# ---------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def tls(authority, tmp_path):
    """(sandbox over TLS with a certificate for the given name, the authority's file)"""
    made = []

    def make(name, expires=None):
        certificate = authority.issue_cert(name, not_after=expires)
        chain, key, ca = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(key))
        authority.cert_pem.write_to_path(str(ca))
        made.append(Sandbox("--tls-cert", str(chain), "--tls-key", str(key)))
        return made[-1], str(ca)

    yield make
    for each in made:
        each.kill_group()


def test_tls_carries_small_and_large_messages(start, tls):
    secure, ca = tls("127.0.0.1")
    server = start("--upstream-ca", ca, url=secure.url("https"))
    server.send([f"{n}-{'x' * 1000}" for n in range(1000)])  # 1 MB: many partial writes
    for n in range(50):
        server.send([f"small-{n}"])
    assert server.settled()["attempts"] == 1050
    from urllib3 import PoolManager

    received = (
        PoolManager(ca_certs=ca).request("GET", secure.url("https").replace("/gcm/send", "/sandbox/received")).json()
    )
    assert len(received["delivered"]) == 1050 and set(received["arrived"].values()) == {1}


def test_a_certificate_that_does_not_verify_pauses_and_sends_nothing(start, tls):
    secure, _ca = tls("127.0.0.1")
    server = start(url=secure.url("https"))  # the authority is not the system's
    server.send(["a"])
    assert "certificate" in server.logged(r"upstream gcm is paused for 2 s: (TLS: .*); its messages")
    assert server.report()["pending"] == 1


def test_a_certificate_for_another_name_pauses(start, tls):
    secure, ca = tls("example.org")
    server = start("--upstream-ca", ca, url=secure.url("https"))
    server.send(["a"])
    assert "127.0.0.1" in server.logged(r"upstream gcm is paused for 2 s: (TLS: .*); its messages")


def test_an_expired_certificate_pauses(start, tls):
    secure, ca = tls("127.0.0.1", datetime.datetime.now() - datetime.timedelta(days=2))
    server = start("--upstream-ca", ca, url=secure.url("https"))
    server.send(["a"])
    assert "expired" in server.logged(r"upstream gcm is paused for 2 s: (TLS: .*); its messages")


def test_plain_text_where_tls_was_expected_pauses(start, upstream):
    up = upstream(lambda up, sock, number: (sock.recv(9999), sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")))
    server = start(url=up.url().replace("http:", "https:"))
    server.send(["a"])
    server.logged("upstream gcm is paused for 2 s: TLS")
    assert not up.requests


# -------------------------------------------------------------------------------------------------------- connections


def test_connections_are_kept_and_as_few_as_are_needed(start, sandbox):
    server = start("--senders", "1")
    client = server.http()
    for n in range(60):
        server.send([f"t{n}"], client=client)
        eventually(lambda: server.report()["pending"] == 0)
    assert sandbox.received()["requests"] == 60
    # One client after the other's answer needs one connection; each look at the ledger is one, too.
    assert sandbox.received()["connections"] <= 2 + 2
