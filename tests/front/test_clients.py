"""Clients that generators make of /openapi.json send, look up and replay.

TESTED_SDKS names a folder that has generators: a virtual environment of Python with node_modules, oapi-codegen in bin
and openapi-generator-cli.jar. What is not there is skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kit import Program

from gocm_lib.front import openapi, routes

SDKS = os.environ.get("TESTED_SDKS", "")
pytestmark = pytest.mark.skipif(not SDKS, reason="TESTED_SDKS names no folder with generators")
PATIENCE = 300  # seconds for a compiler that has all its libraries to fetch

PYTHON = """
import sys, time
from go_cm_client import Client
from go_cm_client.api.default import job, replay, send
from go_cm_client.models import TokensPush, TokensPushPayload, Upstream, Which, WhichReason

client = Client(base_url=sys.argv[1], headers={"Accept": "application/json"}, raise_on_unexpected_status=True)
payload = TokensPushPayload.from_dict({"title": "Hello"})
push = TokensPush(tokens=["phone-1", "flaky-99-x"], payload=payload, upstream=Upstream.GCM)
sent = send.sync(client=client, body=push)
while (found := job.sync(sent.job, client=client)).ended_at is None:
    time.sleep(0.05)
done = replay.sync(client=client, body=Which(job=sent.job, reason=WhichReason.ATTEMPTS))
print(sent.tokens, found.states.delivered, found.states.failed, done.replayed)
"""

TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { paths } from "./schema";

async function main(server: string) {
  const client = createClient<paths>({ baseUrl: server, headers: { Accept: "application/json" } });
  const sent = await client.POST("/gcm/send", {
    body: { tokens: ["phone-1", "flaky-99-x"], payload: { title: "Hello" }, upstream: "gcm" },
  });
  const id = sent.data!.job;
  let found;
  do {
    await new Promise(done => setTimeout(done, 50));
    found = (await client.GET("/gcm/jobs/{id}", { params: { path: { id } } })).data!;
  } while (found.ended_at === null);
  const done = await client.POST("/gcm/failed/replay", {
    body: { job: id, reason: "attempts" },
    bodySerializer: (body) => new URLSearchParams(body as Record<string, string>),
    headers: { "Content-Type": "application/x-www-form-urlencoded" },
  });
  console.log(sent.data!.tokens, found.states.delivered, found.states.failed, done.data!.replayed);
}
main(process.argv[2]);
"""

GO_OAPI = """
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"time"

	"example.org/tried/gocm"
)

func asJSON(_ context.Context, request *http.Request) error {
	request.Header.Set("Accept", "application/json")
	return nil
}

func main() {
	ctx := context.Background()
	client, err := gocm.NewClientWithResponses(os.Args[1], gocm.WithRequestEditorFn(asJSON))
	must(err)
	var body gocm.Push
	upstream := gocm.Upstream("gcm")
	must(body.FromTokensPush(gocm.TokensPush{Tokens: []string{"phone-1", "flaky-99-x"},
		Payload: map[string]interface{}{"title": "Hello"}, Upstream: &upstream}))
	sent, err := client.SendWithResponse(ctx, body)
	must(err)
	var found *gocm.JobResponse
	for {
		found, err = client.JobWithResponse(ctx, sent.JSON200.Job, &gocm.JobParams{})
		must(err)
		if found.JSON200.EndedAt != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	reason := gocm.WhichReason("attempts")
	done, err := client.ReplayWithFormdataBodyWithResponse(ctx, gocm.Which{Job: &sent.JSON200.Job, Reason: &reason})
	must(err)
	states := found.JSON200.States
	fmt.Println(sent.JSON200.Tokens, states.Delivered, states.Failed, done.JSON200.Replayed)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
"""

GO_OPENAPI = """
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"example.org/tried/gocm"
)

func main() {
	ctx := context.Background()
	settings := gocm.NewConfiguration()
	settings.Servers = gocm.ServerConfigurations{{URL: os.Args[1]}}
	api := gocm.NewAPIClient(settings).DefaultAPI
	push := gocm.NewTokensPush([]string{"phone-1", "flaky-99-x"}, map[string]interface{}{"title": "Hello"})
	push.SetUpstream("gcm")
	sent, _, err := api.Send(ctx).Push(gocm.TokensPushAsPush(push)).Execute()
	must(err)
	var found *gocm.Job
	for {
		found, _, err = api.Job(ctx, sent.Job).Execute()
		must(err)
		if found.EndedAt.IsSet() && found.EndedAt.Get() != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	done, _, err := api.Replay(ctx).Job(sent.Job).Reason("attempts").Execute()
	must(err)
	fmt.Println(sent.Tokens, found.States.Delivered, found.States.Failed, done.Replayed)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
"""

JAVA = """
package org.openapitools.client;

import java.util.*;
import org.openapitools.client.api.DefaultApi;
import org.openapitools.client.model.*;

public class Tried {
  public static void main(String[] words) throws Exception {
    ApiClient client = new ApiClient();
    client.updateBaseUri(words[0]);
    DefaultApi api = new DefaultApi(client);
    TokensPush push = new TokensPush().tokens(List.of("phone-1", "flaky-99-x")).payload(Map.of("title", "Hello"))
        .upstream(Upstream.GCM);
    Accepted sent = api.send(new Push(push));
    Job found;
    while ((found = api.job(sent.getJob(), null, null, null)).getEndedAt() == null) Thread.sleep(50);
    Replayed done = api.replay(sent.getJob(), "attempts", null, null, null);
    System.out.println(sent.getTokens() + " " + found.getStates().getDelivered() + " " + found.getStates().getFailed()
        + " " + done.getReplayed());
  }
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    words = ("--sandbox", "--port", "0", "--sandbox-port", "0", "--max-attempts", "1", "--spool", ":memory:")
    program = Program(*words)
    yield "http://127.0.0.1:" + program.logged(r"listens on \S+ port (\d+)")
    program.kill_group()


@pytest.fixture
def place(tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(openapi.document(routes.ROUTES, {"fcm": "fcm", "gcm": "gcm"})))
    return tmp_path


def found(*names):
    """The paths of generators in that folder, and of what is on the PATH; or the test is skipped."""
    paths = [Path(SDKS, name) if not name.isalpha() else shutil.which(name) for name in names]
    missing = [name for name, path in zip(names, paths) if path is None or not Path(path).exists()]
    if missing:
        pytest.skip(f"no {missing[0]} here")
    return [str(path) for path in paths]


def run(place, *words):
    ended = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, (words, ended.stdout[-3000:], ended.stderr[-3000:])
    return ended.stdout.split()


SAID = ["2", "1", "1", "1"]  # tokens, of which one was delivered and one failed, and was replayed


def test_python(place, server):
    python, generator = found("bin/python", "bin/openapi-python-client")
    run(place, generator, "generate", "--path", "openapi.json", "--output-path", "made", "--meta", "none")
    (place / "made").rename(place / "go_cm_client")
    (place / "tried.py").write_text(PYTHON)
    assert run(place, python, "tried.py", server) == SAID


def test_typescript(place, server):
    (node, *_) = found(
        "node", "node_modules/openapi-typescript", "node_modules/openapi-fetch", "node_modules/typescript"
    )
    (place / "node_modules").symlink_to(Path(SDKS, "node_modules"))
    run(place, node, "node_modules/openapi-typescript/bin/cli.js", "openapi.json", "-o", "schema.d.ts")
    (place / "tried.ts").write_text(TYPESCRIPT)
    options = ("--strict", "--target", "es2022", "--module", "nodenext", "--moduleResolution", "nodenext")
    run(place, node, "node_modules/typescript/bin/tsc", *options, "--skipLibCheck", "--types", "node", "tried.ts")
    assert run(place, node, "tried.js", server) == SAID


def in_go(place, server, code):
    (go,) = found("go")
    (place / "tried.go").write_text(code)
    run(place, go, "mod", "init", "example.org/tried")
    run(place, go, "mod", "tidy")
    assert run(place, go, "run", ".", server) == SAID


def test_go_by_oapi_codegen(place, server):
    generator, _ = found("bin/oapi-codegen", "go")
    (place / "gocm").mkdir()
    words = ("-generate", "types,client", "-package", "gocm", "-o", "gocm/gocm.go", "openapi.json")
    run(place, generator, *words)
    in_go(place, server, GO_OAPI)


def generated(place, language, options):
    java, jar = found("java", "openapi-generator-cli.jar")
    words = ("generate", "-i", "openapi.json", "-g", language, "-o", "gocm", "--additional-properties", options)
    run(place, java, "-jar", jar, *words)


def test_go_by_openapi_generator(place, server):
    generated(place, "go", "packageName=gocm,enumClassPrefix=true")
    shutil.rmtree(place / "gocm/test")
    (place / "gocm/go.mod").unlink()
    in_go(place, server, GO_OPENAPI)


def test_java_by_openapi_generator(place, server):
    (maven,) = found("mvn")
    generated(place, "java", "library=native")
    (place / "gocm/src/main/java/org/openapitools/client/Tried.java").write_text(JAVA)
    quiet = ("-q", "-B", "-Dmaven.test.skip=true")
    goals = ("compile", "dependency:build-classpath", "-Dmdep.outputFile=../classpath")
    run(place / "gocm", maven, *quiet, *goals)
    java = found("java")[0]
    classes = f"gocm/target/classes:{(place / 'classpath').read_text()}"
    assert run(place, java, "-cp", classes, "org.openapitools.client.Tried", server) == SAID
