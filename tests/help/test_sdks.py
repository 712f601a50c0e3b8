"""The help's recipes for SDKs, run with the SDKs themselves. TESTED_SDKS names a folder that has them: a virtual
environment of Python in which node_modules is, too. Without it, nothing is tried.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from kit import Program

from gocm_lib.help.topics import source

RECIPES = re.findall(r"^```(python|javascript) (\S+)\n((?:.*\n)*?)```$", source("sandbox"), re.MULTILINE)
SAID = {
    ("python", "firebase-admin"): ["projects/sandbox-project/messages/", "UnregisteredError"],
    ("javascript", "firebase-admin"): [
        "projects/sandbox-project/messages/",
        "messaging/registration-token-not-registered",
    ],
    ("python", "pyfcm"): ["projects/sandbox-project/messages/"],
    ("python", "python-gcm"): ["'NotRegistered': ['gone-phone-2']", "'canonical': {'canonical-3': 'new-3'}", "phone-1"],
    ("javascript", "node-gcm"): ['"success":1,"failure":1', "NotRegistered"],
}
SDKS = os.environ.get("TESTED_SDKS", "")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    place = tmp_path_factory.mktemp("sdks")
    program = Program("sandbox", "--port", "0", "--write-credentials", str(place / "fcm.json"))
    yield place, program.logged(r"sandbox listens on 127.0.0.1 port (\d+)")
    program.kill_group()


@pytest.mark.short
def test_every_recipe_is_tried():
    assert {(language, name) for language, name, _ in RECIPES} == set(SAID)


@pytest.mark.skipif(not SDKS, reason="TESTED_SDKS names no folder with SDKs")
@pytest.mark.parametrize("language, name, code", RECIPES, ids=[f"{name}-{language}" for language, name, _ in RECIPES])
def test_a_recipe(language, name, code, sandbox):
    place, port = sandbox
    interpreter = str(Path(SDKS, "bin/python")) if language == "python" else shutil.which("node")
    if not interpreter:
        pytest.skip("no node here")
    recipe = place / f"{name}-{language}"
    recipe.write_text(code.replace("5602", port))
    environ = {**os.environ, "NODE_PATH": str(Path(SDKS, "node_modules")), "PYTHONWARNINGS": "ignore"}
    words = [interpreter, str(recipe)]
    ended = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=60, env=environ)
    assert ended.returncode == 0, ended.stderr
    assert all(each in ended.stdout for each in SAID[language, name]), ended.stdout
