"""bench/bench.py, run on a few tokens: what its JSON holds, and that both sides compute the same.

The times mean nothing here. Guards against a benchmark that no longer runs, or that compares two
models which are not the same.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_compiler, on_posix, thorough

BENCH = Path(__file__).resolve().parents[1] / "bench" / "bench.py"
PROMPTS = {"ours", "ours compiled", "transformers default", "transformers eager", "llama.cpp"}
MODES = PROMPTS | {"transformers batched_mm", "bare read"}
NUMBERS = ("tokens_per_second", "gb_per_second", "tflops", "of_limit", "experts", "median")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH), "--quick", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_the_quickest_run(tmp_path):
    """One item of ours alone."""
    done = run("--dims", "tiny", "--peer", "none", "--only", "decode 1", "--json", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert {(row["item"], row["mode"]) for row in rows} >= {("decode 1", "ours")}
    for row in rows:
        assert row["item"] == "decode 1" and all(row[name] > 0 for name in NUMBERS), row
        assert row["mode"] == "bare read" or row["difference"] < 0.05, row
    assert "| decode 1 | ours |" in done.stdout


@on_posix
@thorough
def test_a_quick_run(tmp_path):
    """llama.cpp's programs are stand-ins, which say what they would."""
    said = {"llama-bench": '{"avg_ts": 500.0}', "llama-batched-bench": '{"t_tg": 0.25}'}
    for name, line in said.items():
        (tmp_path / name).write_text(
            f"#!/bin/sh\necho \"$0 $*\" >> {tmp_path}/calls\necho '{line}'\n"
        )
        (tmp_path / name).chmod(0o755)
    other = ("--llama-bench", str(tmp_path / "llama-bench"), "--gguf", "a.gguf")
    how = ("--peer", "transformers", "--json", str(tmp_path / "out.json"), *other)
    done = run("--dims", "tiny", *how)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    items: dict[str, set[str]] = {}
    for row in out["rows"]:
        items.setdefault(row["item"], set()).add(row["mode"])
        assert len(row["seconds"]) >= 2 and all(row[name] > 0 for name in NUMBERS), row
        ours, other = row["mode"].startswith("ours"), row["mode"] in ("bare read", "llama.cpp")
        assert other or row["difference"] < 0.05, row  # of its logits and ours, bfloat16
        assert ours == ("times_best" in row) == ("times_llama" in row)
    assert items == {"prefill 32": PROMPTS, "decode 1": MODES, "decode 3": MODES}
    told = {(row["item"], row["mode"]): row["median"] for row in out["rows"]}
    assert told["prefill 32", "llama.cpp"] == 32 / 500 and told["decode 1", "llama.cpp"] == 1 / 500
    assert told["decode 3", "llama.cpp"] == 0.25 / 2
    calls = (tmp_path / "calls").read_text()
    assert "-p 32 -n 0" in calls and "-p 0 -n 2 -d 32" in calls and "-npp 32 -ntg 2 -npl 3" in calls
    assert {row["experts"] for row in out["rows"] if row["item"] == "decode 1"} == {8}
    assert {run["side"] for run in out["load"]} == {"ours", "transformers"}
    assert all(run["peak"][0] > run["weights"][0] > 0 for run in out["load"])
    assert all(limit > 0 for limit in out["limits"].values())
    assert [goal["goal"] for goal in out["goals"]] == ["peak memory, GB"]
    assert {"date", "torch", "transformers", "cpu", "threads"} <= out["environment"].keys()
    assert "| decode 1 | ours |" in done.stdout and "peak memory, GB" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("matplotlib"), reason="matplotlib is installed")
def test_a_plot_needs_matplotlib():
    done = run("--dims", "tiny", "--plot", "plot.svg")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "matplotlib" in done.stderr


@on_posix
def test_one_of_the_first_minutes_on_a_card(tmp_path):
    """A probe of gpu.sh, which reads as bash does."""
    env = os.environ | {"DRY": "1", "DIMS": "tiny", "OUT": str(tmp_path)}
    env["PYTHONPATH"] = str(BENCH.parents[1])
    line = [sys.executable, str(BENCH.with_name("gpu.py")), "plain"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert any(row["goal"].startswith("plain step") and row["measured"] > 0 for row in rows)
    subprocess.run(["bash", "-n", str(BENCH.with_name("gpu.sh"))], check=True)


@on_posix
@thorough
def test_the_first_minutes_on_a_card(tmp_path):
    """Every line of gpu.sh, on a CPU at toy sizes: each probe ends well and has its rows."""
    env = os.environ | {"DRY": "1", "OUT": str(tmp_path), "PY": sys.executable}
    script = BENCH.with_name("gpu.sh")
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "!!!" not in done.stdout + done.stderr, done.stdout
    table = (tmp_path / "log").read_text()
    steps = [
        f"{name} step, {n} rows" for name, n in (("captured", 1), ("compiled", 1), ("compiled", 64))
    ]
    for what in ("plain step", "memory growth", "decode 1, ours: times transformers eager", *steps):
        assert f"| {what}" in table, what
    for what in steps:
        assert f"{what}: launches a layer" in table and f"{what}, 32 tokens: error | 0 |" in table
