"""What programs in each language are given, so that Google's names lead to the sandbox: `gocm sandbox --google DIR`."""

import contextlib
import os
import re
import shlex
import ssl
import warnings

from gocm_lib.config.settings import Exit, Fatal
from gocm_lib.front import google
from gocm_lib.process import log
from gocm_lib.tools import account
from gocm_lib.tools.pretend_answers import PROJECT

TOKENS = "https://oauth2.googleapis.com/token"
PASSWORD = "changeit"  # Java's own for its trust store; it guards nothing, certificates are public
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
_NODE = """// node --require: what goes to Google's names for push goes to the sandbox.
const tls = require("node:tls"), connect = tls.connect, names = new Set(%s);
tls.connect = function (...given) {
  const told = given.find(each => each && typeof each == "object") || {};
  const host = typeof given[1] == "string" ? given[1] : told.servername || told.host;
  if (!names.has(host)) return connect.apply(this, given);
  const there = {...told, host: "127.0.0.1", port: %d, servername: host};
  return connect.call(this, there, given.find(each => typeof each == "function"));
};
require("node:module").syncBuiltinESMExports();
"""


def environment(folder: str, port: int, tls_port: int) -> dict[str, tuple[str, str]]:
    """The variables that lead programs to the sandbox: the value, and who reads it."""

    def at(name: str) -> str:
        return os.path.join(os.path.abspath(folder), name)

    proxy, trust, flag = f"http://127.0.0.1:{port}", at("bundle.pem"), "-Dhttps.proxy"
    java = f"{flag}Host=127.0.0.1 {flag}Port={port} -Djavax.net.ssl.trustStore={at('trust.p12')}"
    return {
        "HTTPS_PROXY": (proxy, "Python, Go, Ruby, Rust, curl"),
        "https_proxy": (proxy, "PHP, Perl, curl"),
        "SSL_CERT_FILE": (trust, "Go, Ruby, Rust, Python's httpx"),
        "REQUESTS_CA_BUNDLE": (trust, "Python's requests"),
        "CURL_CA_BUNDLE": (trust, "curl"),
        "NODE_EXTRA_CA_CERTS": (at(google.AUTHORITY), "Node"),
        "NODE_OPTIONS": (f"--require={at('node.cjs')}", f"Node, which goes to port {tls_port}"),
        "JAVA_TOOL_OPTIONS": (f"{java} -Djavax.net.ssl.trustStorePassword={PASSWORD}", "Java"),
        "GOOGLE_APPLICATION_CREDENTIALS": (at("account.json"), "Google's SDKs, for whom there is no other account"),
    }


def write(folder: str, port: int, tls_port: int) -> None:
    """Write them into the authority's folder, for a sandbox at these ports. Raises Fatal."""
    try:
        with open(os.path.join(folder, google.AUTHORITY), "rb") as file:
            authority = file.read()
        system = _system()
        google.put(folder, "bundle.pem", system + authority, 0o644)
        google.put(folder, "trust.p12", _for_java(system + authority), 0o644)
        names = "[" + ", ".join(f'"{name}"' for name in google.NAMES) + "]"
        google.put(folder, "node.cjs", (_NODE % (names, tls_port)).encode(), 0o644)
        lines = [
            f"export {name}={shlex.quote(value)}  # {who}\n"
            for name, (value, who) in environment(folder, port, tls_port).items()
        ]
        google.put(folder, "env", "".join(lines).encode(), 0o644)
    except OSError as error:
        raise Fatal(f"{folder} cannot be written: {error.strerror}", Exit.SENDER) from None
    if not os.path.exists(path := os.path.join(folder, "account.json")):
        account.write(path, PROJECT, "sandbox", TOKENS)


def _system() -> bytes:
    """The authorities that this system trusts, in PEM; nothing where it says none."""
    paths = ssl.get_default_verify_paths()
    for path in (os.environ.get(paths.openssl_cafile_env), paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if path and os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read().rstrip(b"\n") + b"\n"
    log.logger.warning("this system has no file of authorities: bundle.pem and trust.p12 have the sandbox's alone")
    return b""


def _for_java(certificates: bytes) -> bytes:
    """Authorities in PEM as a trust store of Java's; without those that are too odd for cryptography."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    found = []
    with warnings.catch_warnings(action="ignore"):
        for number, pem in enumerate(_CERTIFICATE.findall(certificates)):
            with contextlib.suppress(ValueError):
                found.append(pkcs12.PKCS12Certificate(x509.load_pem_x509_certificate(pem), b"%d" % number))
    return pkcs12.serialize_java_truststore(found, serialization.BestAvailableEncryption(PASSWORD.encode()))
