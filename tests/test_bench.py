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

BENCH = Path(__file__).resolve().parents[1] / "bench" / "bench.py"
MODES = {"ours", "transformers default", "transformers eager", "transformers batched_mm"}
NUMBERS = ("tokens_per_second", "gb_per_second", "tflops", "of_limit", "experts", "median")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCH), "--quick", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_quick_run(tmp_path):
    done = run("--dims", "tiny", "--peer", "transformers", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    items: dict[str, set[str]] = {}
    for row in out["rows"]:
        items.setdefault(row["item"], set()).add(row["mode"])
        assert len(row["seconds"]) >= 2 and all(row[name] > 0 for name in NUMBERS), row
        assert row["difference"] < 0.05, row  # logits of this mode and of ours, bfloat16
        assert (row["mode"] == "ours") == ("times_best" in row)
    few = MODES - {"transformers batched_mm"}
    assert items == {"prefill 32": few, "decode 1": MODES, "decode 3": MODES}
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
