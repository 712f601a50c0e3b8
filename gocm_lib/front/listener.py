"""The sockets that clients connect to, TCP, UNIX or opened by systemd, and TLS for them.

Promises that a UNIX socket is never open to everybody, not even for a moment; that a socket on which another server
listens is not taken from it; and that we remove no socket but our own.
"""

import calendar
import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gocm_lib.config.settings import Exit, Fatal

BACKLOG = 1024
ALL = "::"  # all addresses, of both families
PATIENCE = 5.0  # seconds to wait for another GoCM that is making a socket in the same directory


class Listener(NamedTuple):
    """A listening socket. `host` is its address, or the path of a UNIX socket. `made`: device and inode of the file
    that we made for it; None: we made none.
    """

    sock: socket.socket
    host: str
    made: tuple[int, int] | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a UNIX socket: the file's mode says who may connect, and no browser can."""
        return self.sock.family == socket.AF_UNIX

    def __str__(self) -> str:
        return self.host if self.is_local else f"{self.host} port {self.sock.getsockname()[1]}"

    def remove(self) -> None:
        """Remove the file that we made, unless another is in its place."""
        if self.made:
            with contextlib.suppress(OSError):
                found = os.stat(self.host)
                if (found.st_dev, found.st_ino) == self.made:
                    os.unlink(self.host)


def inherited(sock: socket.socket) -> Listener:
    """The Listener of a socket that was opened for us."""
    name = sock.getsockname()
    return Listener(sock, name[0] if isinstance(name, tuple) else str(name))


def tcp(hosts: Sequence[str], port: int) -> list[Listener]:
    """Listen on these addresses, on the same port of each (0: a free one). Raises Fatal."""
    made: list[Listener] = []
    for host in hosts:
        # Both families, unless the other is listened to by itself.
        both = host == ALL and not any(":" not in other for other in hosts) and socket.has_dualstack_ipv6()
        try:
            made.append(_tcp(host, port, both))
        except Fatal:
            for each in made:
                each.sock.close()
            raise
        port = made[0].sock.getsockname()[1]
    return made


def _tcp(host: str, port: int, both: bool) -> Listener:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        return Listener(sock, host)
    except UnicodeError:  # of a name with an empty or overlong part
        raise Fatal(f"cannot listen on {host}: that is no host name; give another --host", Exit.ADDRESS) from None
    except OSError as error:
        # Python adds to the text what we say ourselves.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise Fatal(
            f"cannot listen on {host} port {port}: {reason}; give another --port or --host", Exit.ADDRESS
        ) from None


def unix(path: str, mode: int, group: str) -> Listener:
    """Listen on a UNIX socket with this mode, and this group if one is named. Raises Fatal."""
    path = os.path.abspath(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        with _alone(path + ".lock"), _private(os.path.dirname(path)) as directory:
            _check_place(path)
            # Given its group and mode where nobody else can put another file in its place; then put into its own.
            fresh = f"/proc/self/fd/{directory}/socket"
            sock.bind(fresh)
            if group:
                shutil.chown(fresh, group=group)
            os.chmod(fresh, mode)
            sock.listen(BACKLOG)
            found = os.stat(fresh)
            os.rename(fresh, path)
    except (OSError, LookupError) as error:
        sock.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Fatal(f"cannot listen on the socket {path}: {reason}", Exit.ADDRESS) from None
    return Listener(sock, path, (found.st_dev, found.st_ino))


@contextlib.contextmanager
def _private(parent: str) -> Iterator[int]:
    """A descriptor of a new directory inside `parent` that only our user may use, whatever becomes of its name."""
    path = tempfile.mkdtemp(prefix=".gocm-", dir=parent)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "somebody puts other directories there")
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.unlink("socket", dir_fd=descriptor)
        os.close(descriptor)
        os.rmdir(path)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Hold a lock, so that of two servers that start at once the second sees the first one's socket. The lock is a file
    of our own: anybody who may read the directory could hold a lock on that.
    """
    held = -1
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Not if who had it before has removed it: then another is made, and locked by others.
                if os.path.samestat(os.fstat(held), os.stat(path)):
                    break
            os.close(held)
            held = -1
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, f"another program holds {path}")
            time.sleep(0.01)
        try:
            yield
        finally:
            os.unlink(path)
    finally:
        if held >= 0:
            os.close(held)


def _check_place(path: str) -> None:
    """Raise OSError unless nothing is at the path, or a socket that nobody listens on."""
    if not os.path.lexists(path):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # A file that is no socket refuses, too.
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                return
            raise OSError(errno.EEXIST, "there is something that is no socket: move it away") from None
        except TimeoutError:
            pass  # its backlog is full: somebody is there
    raise OSError(errno.EADDRINUSE, "another server listens on it")


def tls_context(cert: str, key: str, client_ca: str = "") -> ssl.SSLContext:
    """A context for TLS 1.2 or later. With `client_ca` only clients with a certificate of these authorities are served.
    Raises Fatal when the files are not a certificate and its key, or hold no certificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2 those that RFC 9325, 4.2 names; 1.3 has no others
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # Asked for by OpenSSL for an encrypted key; without an answer it would ask at the terminal.
        context.load_cert_chain(cert, key or None, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        reason = reason or "they are no PEM certificate and its key"
        raise Fatal(f"--tls-cert {cert} with --tls-key {key} cannot be used: {reason}", topic="security") from None
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError):
            raise Fatal(f"--tls-client-ca {client_ca} holds no PEM certificates", topic="security") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def certificate_end(cert: str) -> float | None:
    """When the first certificate in a PEM file ends, in seconds since 1970; None when that cannot be read."""
    try:
        with open(cert, encoding="latin-1") as file:
            found = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", file.read(), re.DOTALL)
        return _not_after(ssl.PEM_cert_to_DER_cert(found[0])) if found else None
    except (OSError, ValueError, IndexError):
        return None


def _not_after(der: bytes) -> float:
    """RFC 5280, 4.1: certificate -> tbsCertificate -> [version], serial, signature, issuer, validity -> notAfter."""
    parts = _parts(_parts(_parts(der)[0][1])[0][1])
    validity = parts[4 if parts[0][0] == 0xA0 else 3][1]
    kind, text = _parts(validity)[1]
    form = "%y%m%d%H%M%SZ" if kind == 0x17 else "%Y%m%d%H%M%SZ"  # UTCTime, or GeneralizedTime from 2050 on
    return float(calendar.timegm(time.strptime(text.decode("ascii"), form)))


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """The elements in a row of DER: tag and content of each (X.690, 8.1)."""
    found = []
    while der:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start])
        found.append((tag, der[start : start + length]))
        der = der[start + length :]
    return found
