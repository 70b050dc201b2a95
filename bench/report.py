"""From bench.py's measurements to what a reader sees: derived figures, goals, tables, a picture.

python bench/report.py      draws cpu.svg anew, from the first such table of RESULTS.md
"""

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
    ("decode 1", "ours --compile", "times_llama", 1.05, 1.15),
    ("decode 8", "ours --compile", "times_llama", 1.25, 1.5),
    ("decode 1", "ours --compile", "times_best", 3, 3),
    ("decode 8", "ours --compile", "times_best", 2.5, 2.5),
    ("decode 1", "ours read", "times_best", 1, 1.15),
    ("decode 8", "ours read", "times_best", 1, 1.15),
)  # fmt: skip
GOALS = {  # of a released size: times as fast as others; those of a GPU are in gpu.py
    "cpu 1b": (
        *DECODE, ("prefill 512", "ours read", "times_best", 1.1, 1.2),
        ("prefill 2048", "ours read", "times_best", 1.2, 1.35),
        ("prefill 512", "ours --compile", "times_best", 1.1, 1.2),
        ("prefill 2048", "ours --compile", "times_best", 1.2, 1.35),
    ),
    "cpu 3b": DECODE,
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
    "against": (
        ("item", "item", 1, ""), ("side", "side", 1, ""),
        ("ms a step (lowest-highest)", "seconds", 1e-3, ".4g"),
        ("times ours, paired (lowest-highest)", "ratios", 1, ".3g"),
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
        for row in out.get(name, ()):
            lines.append([cell(row.get(key), unit, form) for _, key, unit, form in columns])
        if out.get(name):
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------- the picture
JOBS = {
    "decode 1": "one row",
    "decode 8": "eight rows",
    "prefill 512": "prompt of 512",
    "prefill 2048": "prompt of 2,048",
}
SIDES = {  # how the modes begin, the colour of a bar and of text on it
    "ours read": (("ours read",), "#54aeff", "#1f2328"),
    "ours --compile": (("ours --compile",), "#0550ae", "#ffffff"),
    "transformers' best": (("transformers",), "#afb8c1", "#1f2328"),
    "llama.cpp": (("llama.cpp",), "#d4a72c", "#1f2328"),
}
RENAMED = {"ours": "ours read", "ours compiled": "ours --compile"}  # in runs before 2026-11-28
LEFT, TOP, WIDE, BAR = 130, 84, 600, 18  # of the bars: 100 % are WIDE


def recorded(text: str) -> list[Row]:
    """Rows for draw from the first table of RESULTS.md that has a row for each mode and item."""
    table = text[text.index("| item | mode | ms a step") :].partition("\n\n")[0].splitlines()
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    rows = []
    for line in lines:
        cells = dict(zip(head, line, strict=True))
        row = {"item": cells["item"], "mode": RENAMED.get(cells["mode"], cells["mode"])}
        row["of_limit"] = float(cells["of limit"].rstrip("%")) / 100
        rows.append(row | {"tokens_per_second": float(cells["tokens/s"])})
    return rows


def bar(row: Row, y: int, color: str, on_it: str) -> str:
    """One bar with its figures: beside it or, where they would cross the limit's line, on it."""
    width, share = WIDE * row["of_limit"], row["of_limit"]
    speed = row["tokens_per_second"]
    words = f"{speed:,.{int(speed < 100)}f} tokens/s, {share:.0%}"
    place = f'x="{LEFT + width + 6:.0f}" fill="#1f2328"'
    if share > 0.7:
        place = f'x="{LEFT + width - 6:.0f}" fill="{on_it}" text-anchor="end"'
    size = f'width="{width:.0f}" height="{BAR - 2}"'
    drawn = f'<rect x="{LEFT}" y="{y}" {size} fill="{color}"/>\n'
    return drawn + f'<text {place} y="{y + 12}">{words}</text>'


def draw(rows: list[Row], title: str) -> str:
    """An SVG with a background of its own: of each job our two modes, and the two others."""
    parts, y, x = [], TOP + 14, LEFT
    for side, (_, color, _) in SIDES.items():
        parts.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 18}" y="46">{side}</text>')
        x += 150
    for item, job in JOBS.items():
        middle = y + BAR * len(SIDES) // 2 + 3
        parts.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{job}</text>')
        for begins, color, on_it in SIDES.values():
            found = [r for r in rows if r["item"] == item and r["mode"].startswith(begins)]
            if found:
                best = max(found, key=lambda row: row["tokens_per_second"])
                parts.append(bar(best, y, color, on_it))
            y += BAR
        y += 16
    for share in (0, 25, 50, 75, 100):
        x, color = LEFT + WIDE * share // 100, "#cf222e" if share == 100 else "#d0d7de"
        line = f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{y}" stroke="{color}"/>'
        parts.insert(0, line)  # behind the bars
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{share} %</text>')
    words = "the limit: what memory or arithmetic allows"
    parts.append(f'<text x="{LEFT + WIDE}" y="{TOP - 6}" text-anchor="end">{words}</text>')
    wide, high = LEFT + WIDE + 40, y + 30
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
    head += f'height="{high}" role="img" font-family="sans-serif" font-size="12" fill="#1f2328">'
    paper = f'<rect width="{wide}" height="{high}" fill="#ffffff"/>'
    named = f'<text x="{LEFT}" y="22" font-size="14" font-weight="bold">{title}</text>'
    return "\n".join((head, f"<title>{title}</title>", paper, named, *parts, "</svg>\n"))


def main() -> None:
    folder = Path(__file__).parent
    text = (folder / "RESULTS.md").read_text(encoding="utf-8")
    date = text.partition('"date": "')[2][:10]
    title = f"1b sizes in bfloat16 on two cores: share of the limit (ours as of {date})"
    (folder / "cpu.svg").write_text(draw(recorded(text), title), encoding="utf-8")


if __name__ == "__main__":
    main()
