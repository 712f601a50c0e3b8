"""Google's names for push, answered by ourselves: which they are, and certificates for them.

The authority is good for these names only (a critical name constraint) and for a limited time, so that whoever trusts
it trusts it for nothing else. Its key never leaves its folder. Making one needs cryptography; nothing else here does.
"""

import datetime
import ipaddress
import os
import re
import ssl
import tempfile
from typing import Any

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.message.bad_request import BadRequest

NAMES = (
    "fcm.googleapis.com",
    "iid.googleapis.com",
    "oauth2.googleapis.com",
    "www.googleapis.com",
    "android.googleapis.com",
    "accounts.google.com",
)
LIFE = datetime.timedelta(days=30)
RENEWED = datetime.timedelta(days=1)  # before its end, at the next start
_HOST = re.compile(r"[a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\]")
AUTHORITY, KEY, SERVER = "ca.pem", "ca.key", "server.pem"


def asked_for(head: bytes) -> tuple[str, int]:
    """The host, in lower case, and the port to which a CONNECT request with this head is to lead. Raises BadRequest."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3 or words[0] != b"CONNECT" or not words[2].startswith(b"HTTP/1."):
        raise BadRequest("malformed request line")
    host, _, port = words[1].decode("latin-1").lower().rpartition(":")
    if not _HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise BadRequest("CONNECT must name a host and a port")
    return host, int(port)


def is_ours(host: str, port: int) -> bool:
    """Whether this is where Google serves push."""
    return host in NAMES and port == 443


def elsewhere(more: str = "") -> BadRequest:
    """The answer to who asks for other hosts. `more` is what to do about it."""
    return BadRequest(f"only Google's names for push are served here: {', '.join(NAMES)}{more}", status=403)


def serve_as(folder: str, now: datetime.datetime, life: datetime.timedelta = LIFE) -> ssl.SSLContext:
    """What serves TLS under these names, by the authority in a folder, which is made for so long where there is none,
    or it ends soon. `now` is in UTC. Raises Fatal.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise Fatal("certificates for Google's names need cryptography: pip install 'gocm[fcm]'", Exit.SENDER) from None
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        found = os.stat(folder)
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
            raise Fatal(f"{folder} may be written by others, who could speak for Google then: chmod go-w", Exit.SENDER)
        known = _read(folder, now)
        if known is None:
            key = ec.generate_private_key(ec.SECP256R1())
            known = key, _certificate(key.public_key(), None, key, now, life)
            put(folder, KEY, _pem(key))
            put(folder, AUTHORITY, known[1].public_bytes(serialization.Encoding.PEM), 0o644)
        key, authority = known
        own = ec.generate_private_key(ec.SECP256R1())
        certificate: x509.Certificate = _certificate(own.public_key(), authority, key, now)
        put(folder, SERVER, _pem(own) + certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise Fatal(f"{folder} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(folder, SERVER))
    return context


def put(folder: str, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a file whole, or not at all. Raises OSError."""
    # mkstemp: where others may write into the folder, no link of theirs is followed.
    descriptor, new = tempfile.mkstemp(dir=folder)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
    os.rename(new, os.path.join(folder, name))


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form, nothing = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, form, nothing)
    return pem


def _read(folder: str, now: datetime.datetime) -> tuple[Any, Any] | None:
    """The key and the certificate of the authority in a folder; None: there is none that is good for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        with open(os.path.join(folder, KEY), "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Fatal(f"{folder}/{KEY} may be read by others, who could speak for Google then", Exit.SENDER)
            key = serialization.load_pem_private_key(file.read(), None)
        with open(os.path.join(folder, AUTHORITY), "rb") as file:
            authority = x509.load_pem_x509_certificate(file.read())
    except (FileNotFoundError, ValueError, TypeError):
        return None
    is_good = authority.public_key() == key.public_key() and authority.not_valid_after_utc > now + RENEWED
    return (key, authority) if is_good else None


def _certificate(public: Any, issuer: Any, key: Any, now: datetime.datetime, life: datetime.timedelta = LIFE) -> Any:
    """A certificate for our names, signed by the authority `issuer` with its `key`; the authority's own without one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "GoCM, in Google's place" if issuer else "GoCM")])
    names = [x509.DNSName(each) for each in NAMES]
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    ) | {"decipher_only": False, "crl_sign": issuer is None, "key_cert_sign": issuer is None}
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.subject if issuer else name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(issuer.not_valid_before_utc if issuer else now - RENEWED)
        .not_valid_after(issuer.not_valid_after_utc if issuer else now + life)
        .add_extension(x509.BasicConstraints(issuer is None, 0 if issuer is None else None), True)
        .add_extension(x509.KeyUsage(digital_signature=issuer is not None, **usage), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    )
    if issuer is None:
        addresses = [x509.IPAddress(ipaddress.ip_network(each)) for each in ("0.0.0.0/0", "::/0")]
        return made.add_extension(x509.NameConstraints(names, addresses), True).sign(key, hashes.SHA256())
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    made = made.add_extension(identifier, False).add_extension(x509.SubjectAlternativeName(names), False)
    server = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
    return made.add_extension(server, False).sign(key, hashes.SHA256())
