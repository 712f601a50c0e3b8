"""The environment by which programs take us for Google: variables, and what becomes of those that are set. Pure."""

import os
import re
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from gocm_lib.config import proxy
from gocm_lib.front import google

PASSWORD = "changeit"  # Java's own for its trust store; it guards nothing, certificates are public
HERE = "localhost,127.0.0.1,::1"  # what programs find on this machine they find without a proxy


class Variable(NamedTuple):
    """What a variable is to be, and who reads it. What is set already is replaced; or kept, and this is added after a
    `joint`, or with `first` before it; or kept alone, if it `yields`.
    """

    value: str
    reader: str
    joint: str = ""
    first: bool = False
    yields: bool = False


def variables(folder: str, port: int, tls_port: int, sandbox: bool = True) -> dict[str, Variable]:
    """The variables for who is led to these ports of this machine, with files in a folder. For the `sandbox` there are
    an account and its address, too.
    """

    def at(name: str) -> str:
        return os.path.join(os.path.abspath(folder), name)

    here, trust, flag = f"http://127.0.0.1:{port}", at("bundle.pem"), "-Dhttps.proxy"
    store = f"-Djavax.net.ssl.trustStore={_word(at('trust.p12'))} -Djavax.net.ssl.trustStorePassword={PASSWORD}"
    found = {
        "HTTPS_PROXY": Variable(here, "Python, Go, Ruby, Rust, curl"),
        "https_proxy": Variable(here, "PHP, Perl, curl"),
        "NO_PROXY": Variable(HERE, "the same", ","),
        "no_proxy": Variable(HERE, "the same", ","),
        "SSL_CERT_FILE": Variable(trust, "Go, Ruby, Rust, Python's httpx"),
        "REQUESTS_CA_BUNDLE": Variable(trust, "Python's requests"),
        "HTTPLIB2_CA_CERTS": Variable(trust, "Python's httplib2"),
        "CURL_CA_BUNDLE": Variable(trust, "curl"),
        "NODE_EXTRA_CA_CERTS": Variable(at("extra.pem"), "Node"),
        "NODE_OPTIONS": Variable(f"--require={_word(at('node.cjs'))}", f"Node, which goes to port {tls_port}", " "),
        # First: its sitecustomize.py runs one that comes later, and others do not run ours.
        "PYTHONPATH": Variable(
            os.path.abspath(folder), f"Python, which finds Google at port {tls_port}", os.pathsep, first=True
        ),
        "JAVA_TOOL_OPTIONS": Variable(f"{flag}Host=127.0.0.1 {flag}Port={port} {store}", "Java", " "),
        # An empty one stands for the folder that PHP has itself.
        "PHP_INI_SCAN_DIR": Variable(f":{os.path.abspath(folder)}", "PHP: php.ini", ":"),
        "PERL_LWP_SSL_CA_FILE": Variable(trust, "Perl's LWP"),
        "PERL_LWP_ENV_PROXY": Variable("1", "Perl's LWP"),
    }
    if sandbox:
        found["GOOGLE_APPLICATION_CREDENTIALS"] = Variable(at("account.json"), "Google's SDKs", yields=True)
        found["GOCM_SANDBOX"] = Variable(here, "your tests: $GOCM_SANDBOX/sandbox/messages")
    return found


def _word(path: str) -> str:
    """A path as one word of NODE_OPTIONS and of JAVA_TOOL_OPTIONS, which are split at spaces."""
    return f'"{path}"' if re.search(r"\s", path) else path


def for_a_shell(found: Mapping[str, Variable]) -> str:
    """Lines that set them in a shell, each with who reads it."""
    lines = []
    for name, each in found.items():
        value = shlex.quote(each.value)
        if each.yields:
            line = f'[ -n "${{{name}:-}}" ] || export {name}={value}'
        elif each.first:
            line = f'export {name}={value}"${{{name}:+{each.joint}${name}}}"'
        elif each.joint:
            line = f'export {name}="${{{name}:+${name}{each.joint}}}"{value}'
        else:
            line = f"export {name}={value}"
        lines.append(f"{line}  # {each.reader}\n")
    return "".join(lines)


def led(found: Mapping[str, Variable], environ: Mapping[str, str]) -> dict[str, str]:
    """An environment with them, for programs that are led to the sandbox, and never past it to Google."""
    past = around(environ)
    kept = {name: ",".join(entry for entry in _exceptions(environ) if entry not in past) for name in proxy.EXCEPTIONS}
    new = {**environ, **kept}
    for name, each in found.items():
        before = new.get(name, "")
        if each.yields and before:
            continue
        parts = [each.value, before] if each.first else [before, each.value]
        new[name] = each.joint.join(parts) if each.joint and before else each.value
    return new


def around(environ: Mapping[str, str]) -> list[str]:
    """The entries of NO_PROXY that would have programs reach Google itself."""
    return [
        entry for entry in _exceptions(environ) if any(proxy.is_exception(entry, name, 443) for name in google.NAMES)
    ]


def _exceptions(environ: Mapping[str, str]) -> list[str]:
    """The entries of NO_PROXY in both its spellings."""
    return list(dict.fromkeys(re.findall(r"[^\s,]+", ",".join(environ.get(name, "") for name in proxy.EXCEPTIONS))))
