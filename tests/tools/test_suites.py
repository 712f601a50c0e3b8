"""Applications' test suites in several languages, with SDKs as Google publishes them: `gocm sandbox exec` before each.

TESTED_SDKS names a folder that has SDKs: a virtual environment of Python with pytest, node_modules, and Go's modules in
go. What Java and Rust need they fetch themselves. What is absent is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from kit import ROOT

SDKS = os.environ.get("TESTED_SDKS", "")
pytestmark = [
    pytest.mark.sdk,
    pytest.mark.skipif(not SDKS, reason="TESTED_SDKS names no folder with SDKs"),
]
PATIENCE = 280  # seconds for a compiler that has all its libraries to fetch
ERRORS = ("UNREGISTERED", "SENDER_ID_MISMATCH", "QUOTA_EXCEEDED", "THIRD_PARTY_AUTH_ERROR", "INVALID_ARGUMENT")
ALL_ERRORS = {*ERRORS, "UNAVAILABLE", "INTERNAL"}


class Suite(NamedTuple):
    """A folder of tests/sdks: what it needs of the SDKs, how it is made ready, how it is run; what is refused in it."""

    needs: tuple[str, ...]
    made: tuple[str, ...]
    run: tuple[str, ...]
    refused: set[str] = ALL_ERRORS
    options: tuple[str, ...] = ()


SUITES = {
    "python": Suite((), (), (str(Path(SDKS, "bin/python")), "-m", "pytest", "-q", "-W", "ignore", "pushes.py")),
    "node": Suite(("node_modules",), (), ("node", "--test", "pushes.test.mjs")),
    "go": Suite(("go/go.mod", "go/go.sum"), ("go", "vet", "-mod=mod"), ("go", "test", "-mod=mod")),
    # Its runner is fetched only when there is something to run.
    "java": Suite((), ("mvn", "-q", "-B", "test-compile"), ("mvn", "-q", "-B", "test"), options=("--pass",)),
    "rust": Suite((), ("cargo", "build", "-q"), ("target/debug/pushes",), {"UNREGISTERED"}),
}


@pytest.mark.parametrize("language", SUITES)
def test_a_suite(language, tmp_path):
    suite = SUITES[language]
    tool = suite.made[0] if suite.made else suite.run[0]
    if not shutil.which(tool) or not all(Path(SDKS, name).exists() for name in suite.needs):
        pytest.skip(f"no {tool} here, or not what its suite needs")
    place = tmp_path / language
    shutil.copytree(ROOT / "tests/sdks" / language, place)
    for name in suite.needs:
        (place / Path(name).name).symlink_to(Path(SDKS, name))
    if suite.made and subprocess.run(suite.made, cwd=place, capture_output=True, timeout=PATIENCE).returncode:
        pytest.skip(f"{tool} cannot make the suite: what it needs is not to be fetched")
    words = [sys.executable, str(ROOT / "gocm.py"), "sandbox", "exec", *suite.options, "--", *suite.run]
    ended = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert set(re.findall(r"\d+ ([A-Z_]+)", ended.stderr.splitlines()[-1])) == suite.refused
