"""Builds the single file: an executable zip with GoCM, urllib3 and their licences inside.

Promises the same bytes for the same sources, whichever Python builds it: files in order, uncompressed, all with one
time (SOURCE_DATE_EPOCH, else 1980) and one mode. An installed package goes in only if its files are the ones that pip
recorded. Beside the bundle it writes a list of the contents, with hashes. Needs only the standard library, and works
from a checkout, from an installation and from the single file itself.
"""

import base64
import csv
import hashlib
import io
import os
import re
import stat
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from gocm_lib.config import values
from gocm_lib.config.settings import BundleSettings, Exit, Fatal

SHEBANG = b"#!/usr/bin/env python3\n"
# What pip notes of one installation, and so differs from another's.
OF_AN_INSTALLATION = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
EARLIEST = 315532800  # 1980: a zip knows no time before
MAIN = b"""\
from gocm_lib.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
"""


def _walk(directory: Any, name: str) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, on disk or in a zip, by their paths in the bundle."""
    for each in directory.iterdir():
        if each.is_dir():
            if each.name != "__pycache__":
                yield from _walk(each, f"{name}/{each.name}")
        elif each.name not in OF_AN_INSTALLATION and not each.name.endswith(".pyc"):
            yield f"{name}/{each.name}", each.read_bytes()


def _check(place: Any, about: Any) -> None:
    """Raise Fatal unless each file of an installed package is the one that was installed, by the RECORD in its metadata
    (packaging.python.org/specifications/recording-installed-packages).
    """
    if not (about / "RECORD").is_file():
        if isinstance(place, Path):
            raise Fatal("urllib3's RECORD is missing: install it anew by pip, and bundle then", topic="install")
        return  # it is in a bundle, which was checked when it was made
    noted = {path: digest for path, digest, _ in csv.reader((about / "RECORD").read_text().splitlines())}
    for path, content in (*_walk(place / "urllib3", "urllib3"), *_walk(about, about.name)):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if noted.get(path) != f"sha256={digest}":
            raise Fatal(f"{path} is not what pip installed: install urllib3 anew, and bundle then", topic="install")


def _about(place: Any, package: str) -> Any:
    """The metadata folder of an installed package, beside it; None: there is none."""
    found = [each for each in place.iterdir() if re.fullmatch(rf"{package}-[^-]+\.dist-info", each.name)]
    return found[0] if found else None


def contents() -> dict[str, bytes]:
    """The contents of the bundle, by path. Raises Fatal when a licence is missing."""
    ours: Any = files("gocm_lib")
    theirs: Any = files("urllib3")
    found = {"__main__.py": MAIN, **dict(_walk(ours, "gocm_lib")), **dict(_walk(theirs, "urllib3"))}
    about = _about(theirs.parent, "urllib3")
    if about is not None:
        _check(theirs.parent, about)
        found |= dict(_walk(about, about.name))
    if not any(path.startswith("urllib3-") and "LICENSE" in path for path in found):
        raise Fatal("urllib3 has no licence beside it: bundle from a virtual environment made by pip", topic="install")
    own = _about(ours.parent, "gocm")
    places = [ours.parent / "LICENSE", *([own / "licenses" / "LICENSE", own / "LICENSE"] if own else [])]
    licence = next((place for place in places if place.is_file()), None)
    if licence is None:
        raise Fatal("GoCM's LICENSE is missing: bundle from a whole checkout or installation", topic="install")
    return found | {"LICENSE": licence.read_bytes()}


def build(found: Mapping[str, bytes], epoch: int) -> bytes:
    """The bundle of these files, with `epoch` (seconds since 1970) as their time."""
    target = io.BytesIO()
    target.write(SHEBANG)
    changed = time.gmtime(max(epoch, EARLIEST))[:6]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as bundle:
        for path in sorted(found):
            entry = zipfile.ZipInfo(path, changed)
            entry.create_system = 3  # Unix, on whatever it is built
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            bundle.writestr(entry, found[path])
    return target.getvalue()


def command(settings: BundleSettings, environ: Mapping[str, str]) -> int:
    """`gocm bundle`. Raises Fatal."""
    given = environ.get("SOURCE_DATE_EPOCH", "0")
    if not re.fullmatch("[0-9]{1,10}", given) or int(given) >= 1 << 32:
        raise Fatal("SOURCE_DATE_EPOCH must be a number of seconds", topic="install")
    found = contents()
    made = build(found, int(given))
    digest = hashlib.sha256(made).hexdigest()
    listed = {os.path.basename(settings.output): made, **found}
    lines = [f"{hashlib.sha256(listed[path]).hexdigest()}  {path}\n" for path in listed]
    _put(settings.output, made, 0o755)
    _put(settings.output + ".sha256", "".join(lines).encode(), 0o644)
    print(f"{settings.output}: {len(made)} bytes, SHA-256 {digest}")
    return Exit.OK


def _put(path: str, content: bytes, mode: int) -> None:
    """Write a file whole, then move it into place. Raises Fatal."""
    fresh = f"{path}.{os.getpid()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)  # by its name it might be another file by now
        os.rename(fresh, path)  # a server that runs from the old one keeps its file
    except OSError as error:
        raise Fatal(f"{path} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE, "install") from None


if __name__ == "__main__":
    try:
        given = values.parse(BundleSettings, sys.argv[1:], {}, "gocm bundle").settings
        raise SystemExit(command(given, os.environ))
    except Fatal as problem:
        print(f"gocm: {problem}", file=sys.stderr)
        raise SystemExit(problem.code) from None
