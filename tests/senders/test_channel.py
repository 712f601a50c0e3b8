"""A Channel on real sockets: writes that are taken in part, answers that come early, tickets that come unasked."""

import select
import socket
import ssl
import threading

import pytest
import trustme

from gocm_lib.message.dialects import DIALECTS
from gocm_lib.senders.connection import Request, RequestHead
from gocm_lib.senders.upstream import Upstream

pytestmark = pytest.mark.short

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """The other end of a Channel, in a thread: does what it is told with the accepted socket."""

    def __init__(self, behave, tls, tmp_path):
        self.failure = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        context, ca = None, ""
        if tls:
            authority = trustme.CA()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(context)
            ca = str(tmp_path / "ca.pem")
            authority.cert_pem.write_to_path(ca)

        def serve():
            sock, _ = self.listener.accept()
            with context.wrap_socket(sock, server_side=True) if context else sock as sock:
                behave(sock)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        url = f"{'https' if tls else 'http'}://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.channel = Upstream(DIALECTS["gcm"], url, ca_file=ca).dial()

    def close(self):
        self.channel.close()
        self.listener.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
def peer(request, tmp_path):
    """A function that makes a Peer, over plain TCP and over TLS."""
    made = []

    def make(behave):
        made.append(Peer(behave, request.param, tmp_path))
        return made[-1]

    yield make
    for each in made:
        each.close()


def begin(channel, data):
    """Begin an exchange with this body; returns what ended at once."""
    channel.begin("key", Request(RequestHead(b"POST / HTTP/1.1\r\nHost: x", ()), data), 0.0)
    return channel.write()


def exchange(channel, data):
    """Write a request and read until the response is there."""
    return finish(channel, begin(channel, data))


def finish(channel, ended=()):
    while not ended:
        readable, writable, _ = select.select([channel], [channel] if channel.unsent else [], [], 10)
        assert readable or writable, "nothing happens any more"
        ended = (channel.write() if writable else []) or (channel.read(0.0) if readable else [])
    [(key, how)] = ended
    assert key == "key" and channel.takes(1) == (not channel.over)
    return how


def read_exactly(sock, count, step):
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(min(step, count - len(data)))
        assert piece, "it ended early"
        data += piece
    return bytes(data)


def test_what_is_taken_in_part_arrives_whole(peer):
    data, found, part = bytes(range(256)) * 64_000, [], threading.Semaphore(0)  # more than sockets hold

    def behave(sock):
        for _ in range(2):
            part.acquire()
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += read_exactly(sock, 1, 1)
            found.append(read_exactly(sock, len(data), 30_000))
            sock.sendall(OK)

    channel = peer(behave).channel
    for _ in range(2):
        assert not begin(channel, data) and channel.unsent, "it is taken in part"
        part.release()
        assert finish(channel).body == b"ok" and not channel.over
    assert found == [data, data]


def test_an_answer_before_the_request_was_written_is_given_and_ends_the_connection(peer):
    """RFC 9112 section 9.5: a server may answer early, 413 say; what is left unwritten cannot be made up for."""
    done = threading.Event()

    def behave(sock):
        sock.recv(10)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        done.wait(10)

    channel = peer(behave).channel
    response = exchange(channel, b"x" * 16_000_000)
    done.set()
    assert response.status == 413 and channel.over


def test_interim_answers_in_pieces_are_passed_over(peer):
    def behave(sock):
        for _ in range(2):
            sock.recv(1000)
            for piece in (b"HTTP/1.1 100 Con", b"tinue\r\n\r\nHTTP/1.1 103 E\r\nLink: x\r\n\r\nHT", OK[2:]):
                sock.sendall(piece)

    channel = peer(behave).channel
    assert [exchange(channel, b"x").body for _ in range(2)] == [b"ok", b"ok"]


def test_session_tickets_on_an_idle_connection_are_taken_in(tmp_path):
    """TLS 1.3 servers send them after the handshake, when no answer is due: they are neither answer nor end."""
    close = threading.Event()

    def behave(sock):
        sock.recv(1000)
        sock.sendall(OK)
        close.wait(10)

    peer = Peer(behave, True, tmp_path)
    try:
        channel = peer.channel
        assert channel.sock.version() == "TLSv1.3"
        assert select.select([channel], [], [], 10)[0], "there are tickets"
        assert channel.read(0.0) == []
        assert exchange(channel, b"x").status == 200 and channel.read(0.0) == []
        close.set()
        assert select.select([channel], [], [], 10)[0]
        assert channel.read(0.0) == [] and channel.over
    finally:
        peer.close()
