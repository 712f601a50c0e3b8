"""Makes a release of what is committed: python tests/release.py DIRECTORY.

Puts the source distribution, the wheel and gocm.pyz there, with their SHA256SUMS. Promises the same bytes for the same
commit, on whatever machine and with whatever Python: the tools are those of PINNED, all times are the commit's, and
owners, modes and the order of files are the same.
"""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What ends up in the files: setuptools names itself in the wheel, urllib3 is in gocm.pyz. Look at what is new of both
# before a release.
PINNED = ("build==1.6.1", "setuptools==84.2.1", "urllib3==2.8.0")


def run(*words, cwd, **environ):
    return subprocess.run(
        words, cwd=cwd, env={**os.environ, **environ}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def normal(sdist, epoch):
    """The same source distribution, without what differs from one build to the next."""
    target = io.BytesIO()
    with tarfile.open(sdist) as found, tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for entry in sorted(found.getmembers(), key=lambda entry: entry.name):
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.pax_headers = epoch, 0, 0, "", "", {}
            entry.mode = 0o755 if entry.isdir() else 0o644
            made.addfile(entry, found.extractfile(entry) if entry.isfile() else None)
    return gzip.compress(target.getvalue(), mtime=epoch)


def release(place):
    """Make the files in this folder. Returns their names and hashes."""
    if run("git", "status", "--short", cwd=ROOT):
        sys.exit("there is something that is not committed: a release is a commit")
    epoch = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    os.umask(0o022)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkout, tools = Path(scratch, "gocm"), Path(scratch, "venv")
        run("git", "clone", "-q", str(ROOT), str(checkout), cwd=scratch)
        venv.create(tools, with_pip=True)
        python = str(tools / "bin/python")
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PINNED, cwd=scratch)
        times = {"SOURCE_DATE_EPOCH": epoch, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        run(python, "-m", "build", "-q", "--no-isolation", "--outdir", f"{scratch}/dist", cwd=checkout, **times)
        run(python, "-m", "gocm_lib.tools.bundle", "-o", f"{scratch}/dist/gocm.pyz", cwd=checkout, **times)
        made = {path.name: path.read_bytes() for path in Path(scratch, "dist").iterdir()}
        made |= {name: normal(Path(scratch, "dist", name), int(epoch)) for name in made if name.endswith(".tar.gz")}
    del made["gocm.pyz.sha256"]
    sums = "".join(f"{hashlib.sha256(made[name]).hexdigest()}  {name}\n" for name in sorted(made))
    for name, content in {**made, "SHA256SUMS": sums.encode()}.items():
        (place / name).write_bytes(content)
    (place / "gocm.pyz").chmod(0o755)
    return sums


if __name__ == "__main__":
    print(release(Path(sys.argv[1])), end="")
    print(f"check them: cd {sys.argv[1]} && sha256sum -c SHA256SUMS")
