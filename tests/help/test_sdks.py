"""The help's recipes for SDKs, run with the SDKs themselves. TESTED_SDKS names a folder that has them: a virtual
environment of Python in which node_modules is, too. Without it, nothing is tried.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT, Http, Program, Server

from gocm_lib.help.topics import source

RECIPES = re.findall(r"^```(python|javascript|go) (\S+)\n((?:.*\n)*?)```$", source("sandbox"), re.MULTILINE)
SENT, GONE = "projects/sandbox-project/messages/0:", "messaging/registration-token-not-registered"
SAID = {
    ("python", "firebase-admin"): [SENT, "UnregisteredError"],
    ("python", "async-firebase"): [SENT, "UnregisteredError"],
    ("python", "pyfcm"): [SENT],
    ("python", "python-gcm"): ["'NotRegistered': ['gone-phone-2']", "'canonical': {'canonical-3': 'new-3'}", "phone-1"],
    ("go", "firebase-admin"): [SENT, "false", "true"],
    ("javascript", "firebase-admin"): [SENT, GONE],
    ("javascript", "node-gcm"): ['"success":1,"failure":1', "NotRegistered"],
    ("javascript", "fcm-node"): ['"success": 1, "failure": 0'],
}
SDKS = os.environ.get("TESTED_SDKS", "")
there = pytest.mark.skipif(not SDKS, reason="TESTED_SDKS names no folder with SDKs")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    place = tmp_path_factory.mktemp("sdks")
    program = Program("sandbox", "--port", "0", "--write-credentials", str(place / "fcm.json"))
    yield place, program.logged(r"sandbox listens on 127.0.0.1 port (\d+)")
    program.kill_group()


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A sandbox that takes any token."""
    program = Program("sandbox", "--port", "0", "--any-token")
    yield tmp_path_factory.mktemp("easy"), program.logged(r"sandbox listens on 127.0.0.1 port (\d+)")
    program.kill_group()


def run(language, name, code, place, port):
    """What a program prints that is written for the sandbox at port 5602."""
    environ = {**os.environ, "NODE_PATH": str(Path(SDKS, "node_modules")), "PYTHONWARNINGS": "ignore"}
    if language == "go":
        if not (shutil.which("go") and Path(SDKS, "go/go.mod").exists()):
            pytest.skip("no Go here, or none of its modules")
        recipe = Path(SDKS, "go", name, "main.go")
        recipe.parent.mkdir(exist_ok=True)
        words, where = ["go", "build", "-mod=mod", "-o", str(place / name), "./" + name], recipe.parent.parent
    else:
        interpreter = str(Path(SDKS, "bin/python")) if language == "python" else shutil.which("node")
        if not interpreter:
            pytest.skip("no node here")
        recipe, where = place / f"{name}-{language}", place
        words = [interpreter, str(recipe)]
    recipe.write_text(code.replace("5602", port))
    ended = subprocess.run(words, cwd=where, capture_output=True, text=True, timeout=180, env=environ)
    if language == "go" and ended.returncode == 0:
        ended = subprocess.run([str(place / name)], cwd=place, capture_output=True, text=True, timeout=60, env=environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.short
def test_every_recipe_is_tried():
    assert {(language, name) for language, name, _ in RECIPES} == set(SAID)


@there
@pytest.mark.parametrize("language, name, code", RECIPES, ids=[f"{name}-{language}" for language, name, _ in RECIPES])
def test_a_recipe(language, name, code, sandbox, easy):
    place, port = easy if language == "javascript" else sandbox
    printed = run(language, name, code, place, port)
    assert all(each in printed for each in SAID[language, name]), printed


LEGACY = [each for each in RECIPES if each[1] in ("python-gcm", "node-gcm", "fcm-node")]


@there
@pytest.mark.parametrize("language, name, code", LEGACY, ids=[name for _, name, _ in LEGACY])
def test_a_library_for_the_legacy_protocol_sends_by_us(language, name, code, easy, tmp_path):
    """The same program, which has GoCM's address instead of the sandbox's, prints the same."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("any-key")
    words = ("--gcm-url", f"http://127.0.0.1:{easy[1]}/gcm/send", "--apikey-file", str(key))
    # Turned by the way it connects, fcm-node goes on calling the server by Google's name.
    server = Server(tmp_path / "gocm.db", *words, "--allowed-hosts", "fcm.googleapis.com")
    try:
        printed = run(language, name, code, tmp_path, str(server.port))
        assert all(each in printed for each in SAID[language, name]), printed
        assert server.settled()["attempts"] == len(re.findall(r"(?:phone|canonical)-\d", code))
    finally:
        server.kill_group()


V1 = [each for each in RECIPES if each[:2] in set(SAID) - {("javascript", "firebase-admin")} and each not in LEGACY]


@there
@pytest.mark.parametrize("language, name, code", V1, ids=[f"{name}-{language}" for language, name, _ in V1])
def test_an_sdk_for_v1_sends_by_us(language, name, code, easy, tmp_path):
    """The same program, with GoCM's address and an account file of ours, prints the same. Node's, which speaks HTTP/2
    without TLS here, is not among them.
    """
    tokens, account = tmp_path / "tokens", tmp_path / "fcm.json"
    tokens.touch(0o600)
    tokens.write_text("operator-token-0123456789\n")
    sandbox = f"127.0.0.1:{easy[1]}"
    words = ("--fcm-url", f"http://{sandbox}", "--fcm-metadata", "--metadata-host", sandbox)
    server = Server(tmp_path / "gocm.db", *words, "--auth-token-file", str(tokens))
    try:
        made = ("token", "new", "app", "--file", tokens, "--write-credentials", account, "--project", "sandbox-project")
        to = ("--to", f"http://127.0.0.1:{server.port}")
        subprocess.run([sys.executable, ROOT / "gocm.py", *made, *to], check=True, timeout=60)
        server.process.send_signal(signal.SIGHUP)
        server.logged("SIGHUP: keys, tokens")
        printed = run(language, name, code, tmp_path, str(server.port))
        assert all(each in printed for each in SAID[language, name]), printed
    finally:
        server.kill_group()


# --------------------------------------------------------------------------------------------------- more of each SDK

PYTHON = """
import asyncio, firebase_admin
from firebase_admin import credentials, messaging
from firebase_admin.messaging import _MessagingService

_MessagingService.FCM_URL = "http://127.0.0.1:5602/v1/projects/{0}/messages:send"
_MessagingService.IID_URL = "http://127.0.0.1:5602"
app = firebase_admin.initialize_app(credentials.Certificate("fcm.json"))
messaging._get_messaging_service(app)._fcm_topic_url = "http://127.0.0.1:5602/v1/projects/sandbox-project/registrations"
tokens = ["phone-1", "gone-2", "mismatch-3", "invalid-4", "quota-5", "error-third_party", "error-internal-7"]
messages = [messaging.Message(token=token, data={"title": "Hello"}) for token in tokens]


def told(answer):
    print(*(type(each.exception).__name__ if each.exception else "sent" for each in answer.responses))


print(messaging.send(messages[0]), messaging.send(messages[0], dry_run=True))
told(messaging.send_each(messages[:6]))
told(messaging.send_each_for_multicast(messaging.MulticastMessage(tokens=tokens[:6], data={"a": "b"})))


async def main():
    told(await messaging.send_each_async(messages[:6]))
    told(await messaging.send_each_for_multicast_async(messaging.MulticastMessage(tokens=tokens[:6])))


asyncio.run(main())
answer = messaging.subscribe_to_topic(["phone-1", "phone-2", "gone-3"], "news")
print(answer.success_count, answer.failure_count, answer.errors[0].index)
messaging.unsubscribe_from_topic(["phone-2"], "news")
messaging.send(messaging.Message(topic="news", data={"a": "b"}))
messaging.send(messaging.Message(condition="'news' in topics && !('other' in topics)", data={"a": "b"}))
"""
CLASSES = "sent UnregisteredError SenderIdMismatchError InvalidArgumentError QuotaExceededError ThirdPartyAuthError"


@there
def test_firebase_admin_for_python(sandbox):
    place, port = sandbox
    http = Http(int(port))
    http.ask("POST", "/sandbox/reset", b"")
    lines = run("python", "whole", PYTHON, place, port).splitlines()
    assert lines[0].startswith(SENT) and lines[0].endswith(" projects/sandbox-project/messages/fake_message_id")
    assert lines[1:5] == [CLASSES] * 4
    assert lines[5] == "2 1 2"
    received = http.json("GET", "/sandbox/received")["delivered"]
    assert received["news"] == 1 and "phone-2" not in received
    assert received["phone-1"] == 1 + 4 + 2, "its own, and what came by the topic and the condition"


NODE = """
const https = require("https"), http = require("http"), request = https.request;
https.request = (options, ...rest) => /googleapis.com$/.test(options.host || options.hostname)
  ? http.request({...options, protocol: "http:", host: "127.0.0.1", hostname: "127.0.0.1", port: 5602,
                  agent: undefined}, ...rest)
  : request(options, ...rest);
const http2 = require("http2"), connect = http2.connect;
http2.connect = (url, ...rest) => connect(/googleapis.com/.test(url) ? "http://127.0.0.1:5602" : url, ...rest);
const admin = require("firebase-admin");
admin.initializeApp({
  projectId: "sandbox-project",
  credential: {getAccessToken: async () => ({access_token: "any", expires_in: 3600})},
});
const messaging = admin.messaging();
LEGACY
const tokens = ["phone-1", "gone-2", "mismatch-3", "invalid-4", "error-third_party"];
(async () => {
  const told = answer => console.log(answer.responses.map(each => each.success ? "sent" : each.error.code).join(" "));
  console.log(await messaging.send({token: "phone-1", data: {a: "b"}}));
  told(await messaging.sendEach(tokens.map(token => ({token, data: {a: "b"}}))));
  told(await messaging.sendEachForMulticast({tokens, data: {a: "b"}}));
  const answer = await messaging.subscribeToTopic(["phone-1", "gone-2"], "news");
  console.log(answer.successCount, answer.failureCount);
  const many = await messaging.sendEach([...Array(250).keys()].map(n => ({token: `many-${n}`, data: {a: "b"}})));
  console.log(many.successCount);
})();
"""


@there
@pytest.mark.parametrize("legacy", ["", "messaging.enableLegacyHttpTransport();"], ids=["HTTP/2", "HTTP/1.1"])
def test_firebase_admin_for_node(easy, legacy):
    lines = run("javascript", "whole", NODE.replace("LEGACY", legacy), *easy).splitlines()
    assert lines[0].startswith(SENT)
    codes = ["sent", "registration-token-not-registered", "mismatched-credential", "invalid-argument"]
    codes = [codes[0], *(f"messaging/{code}" for code in (*codes[1:], "third-party-auth-error"))]
    assert lines[1].split() == lines[2].split() == codes
    assert lines[3] == "1 1"
    assert lines[4] == "250", "a hundred at once, and one more before it knows"


GCM = """
const gcm = require("node-gcm");
const sender = new gcm.Sender("any-key", {uri: "http://127.0.0.1:5602/gcm/send"});
const send = to => new Promise(done => sender.send(
  new gcm.Message({data: {a: "b"}}), to, (error, answer) => done(console.log(error || JSON.stringify(answer)))));
(async () => {
  await send({to: "phone-1"});
  await send({to: "gone-2"});
  await send({topic: "/topics/news"});
  await send({registrationTokens: ["phone-1", "canonical-2"]});
})();
"""


@there
def test_node_gcm(easy):
    lines = run("javascript", "gcm", GCM, *easy).splitlines()
    first, gone, topic, several = map(json.loads, lines)
    assert (first["success"], first["failure"], len(first["results"])) == (1, 0, 1)
    assert gone["results"] == [{"error": "NotRegistered"}]
    assert isinstance(topic["message_id"], int)
    assert (several["success"], several["canonical_ids"]) == (2, 1)


PLAIN = """
from gcm import GCM
gcm = GCM("any-key")
gcm.url = "http://127.0.0.1:5602/gcm/send"
print(gcm.plaintext_request(registration_id="canonical-1", data={"a": "b"}))
print(gcm.plaintext_request(registration_id="phone-1", data={"a": "b"}))
try:
    gcm.plaintext_request(registration_id="gone-1", data={"a": "b"})
except Exception as error:
    print(type(error).__name__)
print(gcm.send_topic_message(topic="news", data={"a": "b"}))
"""


@there
def test_python_gcm(sandbox):
    lines = run("python", "plain", PLAIN, *sandbox).splitlines()
    assert lines[0] == "new-1" and lines[1] == "None" and lines[2] == "GCMNotRegisteredException", lines


GO = """
package main

import (
	"context"
	"fmt"

	firebase "firebase.google.com/go/v4"
	"firebase.google.com/go/v4/messaging"
	"google.golang.org/api/option"
)

func main() {
	ctx, sandbox := context.Background(), option.WithEndpoint("http://127.0.0.1:5602/v1")
	app, err := firebase.NewApp(ctx, nil, option.WithCredentialsFile("fcm.json"), sandbox)
	must(err)
	client, err := app.Messaging(ctx)
	must(err)
	name, err := client.Send(ctx, &messaging.Message{Token: "phone-1", Data: map[string]string{"a": "b"}})
	must(err)
	dry, err := client.SendDryRun(ctx, &messaging.Message{Topic: "news"})
	must(err)
	fmt.Println(name, dry)
	tokens := []string{"phone-1", "gone-2", "mismatch-3", "invalid-4", "quota-5", "error-third_party"}
	answer, err := client.SendEachForMulticast(ctx, &messaging.MulticastMessage{Tokens: tokens})
	must(err)
	for _, each := range answer.Responses {
		fmt.Println(each.Success, messaging.IsUnregistered(each.Error), messaging.IsSenderIDMismatch(each.Error),
			messaging.IsInvalidArgument(each.Error), messaging.IsQuotaExceeded(each.Error),
			messaging.IsThirdPartyAuthError(each.Error))
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
"""


@there
def test_firebase_admin_for_go(sandbox):
    first, *others = run("go", "whole", GO, *sandbox).splitlines()
    assert first.startswith(SENT) and first.endswith("fake_message_id")
    assert [line.split().index("true") for line in others] == [0, 1, 2, 3, 4, 5], others
