"""A load of one-token messages, all different, from kept-alive clients, cheap enough not to be what is measured."""

import socket
import threading


def _client(port, tokens, accepted):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for token in tokens:
            body = b"tokens=%b&payload=%%7B%%22a%%22%%3A%%22%b%%22%%7D" % (token.encode(), token.encode())
            sock.sendall(
                b"POST /gcm/send HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            answer = sock.recv(65536)
            if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"ok\n")):
                return
            accepted.append(token)


def post_from_clients(port, clients, messages):
    """The tokens that were accepted, of `messages` posted by so many clients at once."""
    accepted = []
    threads = [
        threading.Thread(target=_client, args=(port, [f"t{k}-{n}" for n in range(messages // clients)], accepted))
        for k in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return accepted
