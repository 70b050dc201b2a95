"""From bench.py's measurements to what a reader sees: derived figures, goals, tables, a plot."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RATE = "tokens_per_second"
TIMES = {"times_best": "transformers' best", "times_llama": "llama.cpp"}
DECODE = (  # item, mode, key, must and target
    ("decode 1", "ours compiled", "times_llama", 1.05, 1.15),
    ("decode 8", "ours compiled", "times_llama", 1.25, 1.5),
    ("decode 1", "ours compiled", "times_best", 3, 3),
    ("decode 8", "ours compiled", "times_best", 2.5, 2.5),
    ("decode 1", "ours", "times_best", 1, 1.15), ("decode 8", "ours", "times_best", 1, 1.15),
)  # fmt: skip
GOALS = {  # of a released size: on a CPU times as fast as others, on a GPU tokens a second
    "cpu 1b": (
        *DECODE, ("prefill 512", "ours", "times_best", 1.1, 1.2),
        ("prefill 2048", "ours", "times_best", 1.2, 1.35),
        ("prefill 512", "ours compiled", "times_best", 1.1, 1.2),
        ("prefill 2048", "ours compiled", "times_best", 1.2, 1.35),
    ),
    "cpu 3b": DECODE,
    "cuda 1b": (  # of an H100
        ("decode 1", "ours compiled graph", RATE, 900, 1200),
        ("prefill 2048", "ours", RATE, 270e3, 330e3),
        ("decode 64", "ours compiled graph", RATE, 18e3, 24e3),
        ("prefill 8192", "ours", RATE, 250e3, 310e3),
    ),
    "cuda 3b": (
        ("decode 1", "ours compiled graph", RATE, 575, 750),
        ("prefill 2048", "ours", RATE, 150e3, 180e3),
        ("decode 64", "ours compiled graph", RATE, 10e3, 13e3),
        ("prefill 8192", "ours", RATE, 130e3, 160e3),
    ),
}  # fmt: skip
TABLES = {  # of what bench.py measured: heading, key, unit and form of each column
    "startup": (
        ("start-up, whole process", "side", 1, ""), ("s (lowest-highest)", "seconds", 1, ".3g"),
    ),
    "load": (
        ("load", "side", 1, ""), ("s (lowest-highest)", "load", 1, ".3g"),
        ("s to the first token", "first_token", 1, ".3g"), ("peak GB", "peak", 1e9, ".4g"),
        ("weights GB", "weights", 1e9, ".4g"),
    ),
    "rows": (
        ("item", "item", 1, ""), ("mode", "mode", 1, ""),
        ("ms a step (lowest-highest)", "seconds", 1e-3, ".4g"),
        ("tokens/s", "tokens_per_second", 1, ".1f"), ("GB/s", "gb_per_second", 1, ".3g"),
        ("TFLOP/s", "tflops", 1, ".3g"), ("of limit", "of_limit", 1, ".0%"),
        ("limit", "bound", 1, ""), ("experts", "experts", 1, ".1f"),
        ("x default", "times_default", 1, ".2f"), ("x best", "times_best", 1, ".2f"),
        ("x llama.cpp", "times_llama", 1, ".2f"),
        ("peak MB", "peak", 1e6, ".0f"), ("compile s", "compile_seconds", 1, ".1f"),
    ),
    "profile": (
        ("item", "item", 1, ""), ("mode", "mode", 1, ""), ("module", "module", 1, ""),
        ("operator", "operator", 1, ""), ("ms a step", "seconds", 1e-3, ".3g"),
        ("share", "share", 1, ".0%"),
    ),
    "goals": (
        ("goal", "goal", 1, ""), ("measured", "measured", 1, ".3g"), ("must", "must", 1, ".3g"),
        ("target", "target", 1, ".3g"), ("", "verdict", 1, ""),
    ),
}  # fmt: skip


def environment(device: torch.device) -> Row:
    """What a reader needs to judge or repeat the figures."""
    file = Path("/proc/cpuinfo")
    info = file.read_text() if file.exists() else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    peer, cuda = sys.modules.get("transformers"), device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": peer and peer.__version__,
        "cpu": names[0] if names else platform.machine(), "amx": "amx_tile" in info,
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # of the machine, this run included
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
    }  # fmt: skip


def derive(rows: list[Row], bytes_per_second: float, flops_per_second: float) -> None:
    """Add to each row what follows from it, the limits, and the other rows of its item."""
    for row in rows:
        seconds = row["median"] = statistics.median(row["seconds"])
        bounds = {"memory": row["bytes"] / bytes_per_second}
        bounds["compute"] = row["flops"] / flops_per_second
        row["bound"] = max(bounds, key=bounds.get)
        row["of_limit"] = max(bounds.values()) / seconds
        row["tokens_per_second"] = row["tokens"] / seconds
        row["gb_per_second"] = row["bytes"] / seconds / 1e9
        row["tflops"] = row["flops"] / seconds / 1e12
        row["compile_seconds"] = row["first"] and max(0.0, row["first"] - seconds)
    for row in rows:
        same = {other["mode"]: other["median"] for other in rows if other["item"] == row["item"]}
        if bare := same.get("bare read"):
            row["of_limit"] = max(bare, row["flops"] / flops_per_second) / row["median"]
        if row["mode"].startswith("ours") and "llama.cpp" in same:
            row["times_llama"] = same["llama.cpp"] / row["median"]
        peers = {mode: median for mode, median in same.items() if mode.startswith("transformers")}
        if peers and row["mode"].startswith("ours"):
            row["times_default"] = peers["transformers default"] / row["median"]
            row["times_best"] = min(peers.values()) / row["median"]


def goals(out: Row, kind: str, dims: str | None) -> list[Row]:
    """The project's goals as far as this run measured them: the higher the better, or the lower."""
    higher, lower = [], []
    for item, mode, key, must, target in GOALS.get(f"{kind} {dims}", ()):
        what = f"times {TIMES[key]}" if key in TIMES else "tokens/s"
        rows = [r for r in out["rows"] if (r["item"], r["mode"]) == (item, mode) and key in r]
        higher += [(f"{item}, {mode}: {what}", row[key], must, target) for row in rows]
    if kind == "cpu" and out["load"]:
        peak, size = (max(out["load"][0][key]) / 1e9 for key in ("peak", "weights"))
        lower.append(("peak memory, GB", peak, 1.15 * size + 0.5, 1.05 * size + 0.4))
    if out["startup"]:
        base, mine = (statistics.median(run["seconds"]) for run in out["startup"][:2])
        lower.append(("start to first token: times import torch", mine / base, 1.3, 1.1))
    rows = []
    for sign, found in ((1, higher), (-1, lower)):
        for goal, measured, must, target in found:
            row = {"goal": goal, "measured": measured, "must": must, "target": target}
            met = [sign * measured >= sign * least for least in (must, target)]
            rows.append(row | {"verdict": ("MISSED", "must met", "target met")[sum(met)]})
    return rows


def cell(value: Any, unit: float, form: str) -> str:
    """A number or text as it is, a list of numbers as their median, lowest and highest."""
    if isinstance(value, list) and form:
        middle, low, high = (f(value) / unit for f in (statistics.median, min, max))
        return f"{middle:{form}} ({low:{form}}-{high:{form}})" if low < high else f"{low:{form}}"
    return "" if value is None else f"{value / unit:{form}}" if form else str(value)


def markdown(out: Row) -> str:
    """What a run prints."""
    parts = [json.dumps(out["environment"])]
    if out["rows"]:
        reads, flops = out["limits"].values()
        parts.append(f"Limits: {reads / 1e9:.1f} GB/s, {flops / 1e12:.3g} TFLOP/s")
    for name, columns in TABLES.items():
        lines = [[heading for heading, *_ in columns], ["---"] * len(columns)]
        for row in out[name]:
            lines.append([cell(row.get(key), unit, form) for _, key, unit, form in columns])
        if out[name]:
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def draw(rows: list[Row], title: str, file: Path) -> None:
    """An SVG: of each item our fastest mode, and transformers' fastest and default."""
    import matplotlib
    from matplotlib.figure import Figure

    bars = []
    for item in dict.fromkeys(row["item"] for row in rows):
        found = sorted((r for r in rows if r["item"] == item), key=lambda row: row["median"])
        for side in ("ours", "transformers", "transformers default"):
            best = [row for row in found if row["mode"].startswith(side)][:1]
            bars += [row for row in best if row not in bars]
    names = [f"{row['item']}: {row['mode']}" for row in bars]
    colors = ["#0969da" if row["mode"].startswith("ours") else "#8c959f" for row in bars]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure((8, 1 + 0.25 * len(bars)), layout="constrained", facecolor="white")
        axes = figure.subplots()
        drawn = axes.barh(names, [100 * row["of_limit"] for row in bars], color=colors)
        speeds = [f"{row['tokens_per_second']:,.0f} tokens/s" for row in bars]
        axes.bar_label(drawn, speeds, padding=3)
        axes.axvline(100, color="#24292f", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(xlim=(0, 120), title=title, xlabel="% of what memory or arithmetic would allow")
        figure.savefig(file, format="svg")
