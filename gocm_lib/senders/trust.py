"""Whom we believe that they are an upstream: TLS contexts, one for all upstreams that trust the same authorities.

A context with the system's authorities takes a megabyte, so upstreams share it.
"""

import functools
import ssl
from collections.abc import Iterable

from gocm_lib.config.settings import Fatal


class _Context(ssl.SSLContext):
    """urllib3 has every context offer HTTP/1.1 alone, as that is all it speaks itself; this one offers what it is told
    to. (Tried with urllib3 2.2 to 2.8; test_upstream watches it.)
    """

    def offer(self, protocols: Iterable[str]) -> None:
        """Offer these protocols to servers, the first one most."""
        super().set_alpn_protocols(protocols)

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        pass


@functools.cache
def context(ca_file: str, *protocols: str) -> ssl.SSLContext:
    """Verifies as ssl's default context does, with TLS 1.2 at least; no option turns this off. `ca_file` has the
    authorities ("": the system's). Offers `protocols`, the first one most. Raises Fatal.
    """
    made = _load(ca_file)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.__class__ = _Context  # so that it has what each Python makes of a default context
    assert isinstance(made, _Context)
    made.offer(protocols)
    return made


def check(ca_file: str) -> None:
    """Raise Fatal when a file has no authorities that we could trust."""
    _load(ca_file)


def _load(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise Fatal(f"--upstream-ca {ca_file} holds no usable PEM certificates: {error}", topic="credentials") from None
