"""bench/bench.py, run on a few tokens: what its JSON holds, and that both sides compute the same.

The times mean nothing here. Guards against a benchmark that no longer runs, or that compares two
models which are not the same.
"""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from conftest import needs_compiler, on_posix, thorough

BENCH = Path(__file__).resolve().parents[1] / "bench" / "bench.py"
sys.path.insert(0, str(BENCH.parent))

import report  # noqa: E402

SIDES = ("ours", "other checkout")
PROMPTS = {"ours read", "ours --compile", "transformers default", "transformers eager", "llama.cpp"}
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
    assert {(row["item"], row["mode"]) for row in rows} >= {("decode 1", "ours read")}
    for row in rows:
        assert row["item"] == "decode 1" and all(row[name] > 0 for name in NUMBERS), row
        assert row["mode"] == "bare read" or row["difference"] < 0.05, row
    assert "| decode 1 | ours read |" in done.stdout


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
    assert "| decode 1 | ours read |" in done.stdout and "peak memory, GB" in done.stdout


@thorough
def test_in_turn_with_another_checkout(tmp_path):
    """Each side runs by itself; this checkout beside itself is as fast as itself."""
    out = tmp_path / "out"
    how = ("--peer", "none", "--rounds", 2, "--json", out, "--only", "decode")
    done = run("--dims", "tiny", "--against", BENCH.parents[1], *how)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["against"]
    asked = [(item, side) for item in ("decode 1", "decode 3") for side in SIDES]
    assert [(row["item"], row["side"]) for row in rows] == asked
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert all(0.1 < ratio < 10 for row in rows for ratio in row["ratios"] or [])
    assert "| decode 3 | other checkout |" in done.stdout


def test_what_is_in_turn_must_be_a_checkout(tmp_path):
    done = run("--dims", "tiny", "--peer", "none", "--against", tmp_path, "--only", "decode 1")
    assert done.returncode == 1 and "--against: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("shown, row", [("fast", 1.0), ("slow", 0.1)])
def test_a_bar_and_its_figures(shown, row):
    """On the bar where they would cross the line of the limit, beside it elsewhere."""
    text = report.bar({"of_limit": row, "tokens_per_second": 12.34}, 0, "#000000", "#ffffff")
    assert f"12.3 tokens/s, {row:.0%}</text>" in text
    assert ('text-anchor="end"' in text) == (shown == "fast")


def test_the_picture_is_of_the_recorded_run():
    """All four sides of all four jobs, as RESULTS.md has them."""
    results = (BENCH.parent / "RESULTS.md").read_text(encoding="utf-8")
    rows, picture = report.recorded(results), BENCH.with_name("cpu.svg").read_text(encoding="utf-8")
    title = re.search("<title>(.+)</title>", picture)[1]
    assert report.draw(rows, title) == picture and results.partition('"date": "')[2][:10] in title
    assert picture.count(" tokens/s, ") == len(report.JOBS) * len(report.SIDES) == 16
    xml.etree.ElementTree.fromstring(picture)


def dry(tmp_path: Path, *arguments: str) -> tuple[str, list[dict]]:
    """gpu.sh on a CPU at toy sizes: what it says, and its figures."""
    env = os.environ | {"DRY": "1", "OUT": str(tmp_path / "out"), "PY": sys.executable}
    line = ["bash", str(BENCH.with_name("gpu.sh")), *arguments]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "!!!" not in done.stdout, done.stdout[-3000:] + done.stderr
    rows = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(row) for row in rows]


@on_posix
def test_some_of_the_minutes_on_a_card(tmp_path):
    """The sections that transformers has no part in, for one size."""
    said, rows = dry(tmp_path, "--dims", "1b", "--no-transformers", "first", "right", "profile")
    found = {row["item"] for row in rows}
    assert found >= {"limits", "first reply", "right: padded rows", "profile: 64 rows"}
    assert all(row["verdict"] == "must met" for row in rows if row["item"].startswith("right: o"))
    assert (tmp_path / "out" / "table.md").read_text() in said and "failed: nothing" in said


@on_posix
@thorough
def test_the_minutes_on_a_card(tmp_path):
    """Every line, both sizes: each side of each item has a figure, and each target a verdict."""
    said, rows = dry(tmp_path)
    sides = {"ours read", "ours --compile", "transformers default", "transformers eager"}
    for dims in ("1b", "3b"):
        mine = [row for row in rows if row["dims"] == dims]
        for item in ("1 row", "1 row after 16,000", "8 rows", "64 rows", "prompt of 8,192"):
            assert {row["what"] for row in mine if row["item"] == item} >= sides, item
        assert all(row["off"] < 0.05 for row in mine if row["what"] in sides)
    table = said.partition("cpu: targets")[2]
    for line in ("| 1b | 64 rows | ours --compile |", "| 3b | generate | adds, sampled |"):
        assert re.search(re.escape(line) + r".*(MISSED|met) \|", table), line
    assert table.count("| 32000 | 40000 | 48000 | MISSED |") == 1


@on_posix
def test_what_fails_on_a_card_says_so(tmp_path):
    """In a line, and the rest goes on; the same where time is over."""
    env = os.environ | {"DRY": "1", "OUT": str(tmp_path), "PY": sys.executable}
    line = ["bash", str(BENCH.with_name("gpu.sh")), "--seconds", "0", "--dims", "1b", "first"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "!!! environment: Late: left out" in done.stdout, done.stdout
    assert "failed: ['environment', '1b model']" in done.stdout
    assert "Traceback" in (tmp_path / "errors.log").read_text() and "Traceback" not in done.stdout
