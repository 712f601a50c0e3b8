"""The address of a spool in PostgreSQL: what is refused, and what of it is shown."""

import pytest

from gocm_lib.config import spool_address

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:se%cret@h/db",  # libpq would quote it
        "postgresql://u:se/cret@h/db",
        "postgresql://u:secret/x@h:5432/db",
        "postgresql://u:secret/db",  # a port
        "postgresql://u:s#ecret@h/db",
        "postgresql://u:s?ecret@h/db",
    ],
)
def test_a_password_that_is_not_quoted_is_refused_and_told_to_nobody(url):
    with pytest.raises(ValueError, match="%25|USER@HOST") as caught:
        spool_address.check(url, with_password=True)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url, local",
    [
        ("postgresql://u@/db", True),
        ("postgresql://u:p%2Fw@[::1]:5432/db", True),
        ("postgresql://u@/db?host=/tmp/a,/tmp/b", True),
        ("postgresql://u@localhost,127.0.0.1:5433/db", True),
        ("postgresql://u:p@a.example:5432,b.example/db", False),
        ("postgresql://u@[2001:db8::1]/db?sslrootcert=/ca.pem", False),
    ],
)
def test_what_is_taken_is_checked_by_tls_unless_it_is_here(url, local):
    assert spool_address.check(url, with_password=True) == url and spool_address.is_local(url) is local
    assert ("sslmode=verify-full" in spool_address.complete(url)) is not local
    assert ":p" not in spool_address.shown(url).partition("//")[2].partition("@")[0] and "?" not in spool_address.shown(
        url
    )


@pytest.mark.parametrize(
    "url", ["postgresql://u:p@/db", "postgresql://u@/db?password=p", "postgresql://u@/db?sslpassword=p"]
)
def test_a_password_is_not_for_the_command_line(url):
    with pytest.raises(ValueError, match="--spool-file"):
        spool_address.check(url, with_password=False)
