"""What programs in each language are given, so that Google's names lead here: files of `--google`, `--door-google`."""

import contextlib
import os
import re
import ssl
import warnings
from collections.abc import Mapping

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.front import google, google_variables
from gocm_lib.process import log

TRUSTED = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # files of authorities, where they are set already
FOR_NODE = "NODE_EXTRA_CA_CERTS"  # the same, beside those that Node has itself
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\r?\n?", re.DOTALL)
_NODE = """// node --require: what goes to Google's names for push goes to GoCM.
const tls = require("node:tls"), connect = tls.connect, names = new Set(%s);
tls.connect = function (...given) {
  const told = given.find(each => each && typeof each == "object") || {};
  const host = typeof given[1] == "string" ? given[1] : told.servername || told.host;
  if (!names.has(host) || told.host == "127.0.0.1") return connect.apply(this, given);
  const there = {...told, host: "127.0.0.1", port: %d, servername: host};
  return connect.call(this, there, given.find(each => typeof each == "function"));
};
require("node:module").syncBuiltinESMExports();
"""
_PYTHON = """# For what takes no proxy: Google's names for push have an address that leads to GoCM.
import importlib.machinery, importlib.util, os, socket, sys

folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "tls-port")) as file:  # a constant here would be compiled, and outlive a start
    here = "127.0.0.1", int(file.read())
names, place = frozenset(%r), "127.67.77.67"


def turned(address):
    return here if address[:1] == (place,) else address


def found(host, *given, **named):
    host = host.decode() if isinstance(host, bytes) else host
    return getaddrinfo(place if host in names else host, *given, **named)


others = [each for each in sys.path if os.path.abspath(each) != folder]
hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
try:
    if hidden and hidden.loader:
        hidden.loader.exec_module(importlib.util.module_from_spec(hidden))
finally:  # last, so that of two that lead, one within the other, the inner one does
    getaddrinfo, connect, connect_ex = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex
    socket.getaddrinfo = found
    socket.socket.connect = lambda self, address: connect(self, turned(address))
    socket.socket.connect_ex = lambda self, address: connect_ex(self, turned(address))
"""
_PHP = 'curl.cainfo="{0}"\nopenssl.cafile="{0}"\n'


def write(folder: str, port: int, tls_port: int, environ: Mapping[str, str], sandbox: bool = True) -> None:
    """Write them into the authority's folder, for who is led to these ports. Whom the environment has programs trust,
    they trust still. Raises Fatal.
    """
    if re.search(r"[\"'\n]", os.path.abspath(folder)):
        raise Fatal(f"{folder}: Java and Node cannot be told a name with a quotation mark in it: take another folder")
    found = google_variables.variables(folder, port, tls_port, sandbox)
    try:
        authority = _certificates(os.path.join(folder, google.AUTHORITY))
        trusted = _unique(_trusted(environ), authority)
        google.put(folder, "bundle.pem", b"".join(trusted), 0o644)
        google.put(folder, "extra.pem", b"".join(_unique(_certificates(environ.get(FOR_NODE, "")), authority)), 0o644)
        google.put(folder, "trust.p12", _for_java(trusted), 0o644)
        names = "[" + ", ".join(f'"{name}"' for name in google.NAMES) + "]"
        google.put(folder, "node.cjs", (_NODE % (names, tls_port)).encode(), 0o644)
        google.put(folder, "tls-port", b"%d\n" % tls_port, 0o644)
        google.put(folder, "sitecustomize.py", (_PYTHON % (google.NAMES,)).encode(), 0o644)
        google.put(folder, "php.ini", _PHP.format(os.path.join(os.path.abspath(folder), "bundle.pem")).encode(), 0o644)
        google.put(folder, "env", google_variables.for_a_shell(found).encode(), 0o644)
    except OSError as error:
        raise Fatal(f"{folder} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None


def _trusted(environ: Mapping[str, str]) -> list[bytes]:
    """The authorities that this system trusts and those that are named beside them, in PEM."""
    paths = ssl.get_default_verify_paths()
    system = () if environ.get("SSL_CERT_FILE") else (paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt")
    of_system = next((path for path in system if path and os.path.isfile(path)), "")
    named = [environ[name] for name in TRUSTED if environ.get(name)]
    if not (named or of_system):
        log.logger.warning("this system has no file of authorities: bundle.pem and trust.p12 have the sandbox's alone")
    return [each for path in (of_system, *named) for each in _certificates(path)]


def _certificates(path: str) -> list[bytes]:
    """The certificates of a file in PEM; none: it cannot be read."""
    try:
        with open(path, "rb") as file:
            return [each.rstrip() + b"\n" for each in _CERTIFICATE.findall(file.read())]
    except OSError as error:
        if path:
            log.logger.warning("the authorities in %s are left out: %s", path, error.strerror)
        return []


def _unique(*found: list[bytes]) -> list[bytes]:
    return list(dict.fromkeys(each for some in found for each in some))


def _for_java(certificates: list[bytes]) -> bytes:
    """Authorities in PEM as a trust store of Java's; without those that are too odd for cryptography."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    found = []
    with warnings.catch_warnings(action="ignore"):
        for number, pem in enumerate(certificates):
            with contextlib.suppress(ValueError):
                found.append(pkcs12.PKCS12Certificate(x509.load_pem_x509_certificate(pem), b"%d" % number))
    return pkcs12.serialize_java_truststore(
        found, serialization.BestAvailableEncryption(google_variables.PASSWORD.encode())
    )
