"""`gocm bench`: its output has its shape and its counts are right. Times are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT, eventually

from gocm_lib.tools.bench import SCENARIOS

pytestmark = pytest.mark.alone


def bench(*words):
    return subprocess.run([sys.executable, str(ROOT / "gocm.py"), "bench", *words], capture_output=True, text=True)


@pytest.mark.slow
def test_every_scenario_has_its_figures():
    ended = bench("--json", "--messages", "1000", "--latency", "0.01")
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    assert list(results) == list(SCENARIOS)
    for floor in (results.pop("floor"), results.pop("floor2")):
        assert floor["cpu_us"]["total"] > 0 and floor["delivered_per_s"] > 0
    for name, result in results.items():
        assert result["refused"] == {} and result["delivered_per_s"] > 0, name
        assert result["accept_ms"]["p50"] <= result["accept_ms"]["p90"] <= result["accept_ms"]["p99"]
        assert set(result["cpu_us"]) == {"front", "state", "senders", "total"}
        parts = [part for part in result["cpu_us"] if part != "total"]
        assert (
            [len(result["cpu_us"][part]) for part in parts]
            == [len(result["pss_mb"][part]) for part in parts]
            == [1, 1, 2]
        )
        assert result["cpu_us"]["total"] == pytest.approx(sum(sum(result["cpu_us"][part]) for part in parts))
        assert result["cpu_us"]["total"] > 0
        assert all(mb > 5 for part in parts for mb in result["pss_mb"][part])
    assert results["single"]["accept_ms_at_half_rate"]["p99"] > 0


def test_the_table_has_a_line_for_each_scenario():
    ended = bench("--scenarios", "multicast", "--messages", "2000", "--plain", "--latency", "0")
    assert ended.returncode == 0, ended.stderr
    titles, figures = ended.stdout.splitlines()
    assert titles.split()[0] == "scenario" and figures.split()[0] == "multicast"


def test_it_runs_no_code_that_lies_where_it_is_started(tmp_path):
    (tmp_path / "argparse.py").write_text("open('ran', 'w')\n")
    words = [sys.executable, str(ROOT / "gocm.py"), "bench", "--scenarios", "single", "--messages", "100", "--plain"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists()


def test_an_unknown_scenario_is_one_line():
    ended = bench("--scenarios", "singel")
    assert ended.returncode == 78
    assert ended.stderr.startswith("gocm: --scenarios singel is not known; there are single, single-1,")


def test_what_a_bench_started_ends_with_it(tmp_path):
    words = [sys.executable, str(ROOT / "gocm.py"), "bench", "--directory", str(tmp_path), "--messages", "100"]
    with subprocess.Popen(words) as ended:
        eventually(lambda: any(tmp_path.glob("*/sandbox.log")))
        ended.terminate()
    assert list(tmp_path.iterdir()) == []
    # Its grandchildren are killed, too, but it cannot wait for them.
    eventually(lambda: not [pid for pid in Path("/proc").glob("[0-9]*") if str(tmp_path) in command_line(pid)])


def command_line(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has just ended
        return ""


def test_a_directory_that_is_not_there_is_one_line():
    ended = bench("--directory", "/nowhere")
    assert ended.returncode == 78
    assert ended.stderr == "gocm: --directory /nowhere: No such file or directory; see gocm help bench\n"
