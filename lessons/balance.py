"""What the load-balancing loss is for: training with it, without it, and without experts.

    python lessons/balance.py balanced=tiny/log.csv unbalanced=off.csv dense=dense.csv \
        --out lessons/balance.svg

Draws logs that tiny/train.py wrote (without balancing: --aux-coef 0; without experts: --dense):
held-out loss, and the largest and the smallest share of a layer's choices that an expert got, which
would both be 1 / E if the load were even. An expert without tokens learns nothing, so that it gets
no tokens either: only the auxiliary loss, which rises with load times probability (arXiv
2101.03961), pulls the router back. Needs matplotlib.
"""

import argparse
import csv
import math
from pathlib import Path

from common import command, new_figure

Log = dict[str, list[float]]
PANELS = {
    "held_out_loss": "held-out loss, nats a token",
    "max_share": "share of the busiest expert",
    "min_share": "share of the idlest expert",
}


def read_log(path: Path, limit: float) -> Log:
    """A log's columns, up to `limit` tokens. Raises ValueError where it is no such log."""
    try:
        with path.open(newline="") as file:
            rows = [{n: float(row[n]) for n in ("tokens", *PANELS)} for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a training log: {error}") from None
    rows = [row for row in rows if row["tokens"] <= limit]
    if not rows:
        raise ValueError(f"{path}: no rows")
    return {name: [row[name] for row in rows] for name in rows[0]}


def draw(logs: dict[str, Log], out: Path) -> None:
    """A panel for each of PANELS, side by side. Raises ValueError where matplotlib is missing."""
    figure = new_figure(figsize=(10, 3.2))
    for axes, (column, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for i, (name, log) in enumerate(logs.items()):
            if column == "held_out_loss" or min(log["min_share"]) < 1:  # one expert has no choice
                millions = [tokens / 1e6 for tokens in log["tokens"]]
                axes.plot(millions, log[column], label=name, color=f"C{i}")
        axes.set(title=title, xlabel="million tokens")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot training logs side by side.")
    parser.add_argument("logs", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--tokens", type=float, default=math.inf, help="leave out what comes after")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args()
    pairs = [entry.partition("=") for entry in args.logs]
    logs = {name: read_log(Path(path), args.tokens) for name, _, path in pairs}
    draw(logs, args.out)
    for name, log in logs.items():
        tokens, loss, most, least = (values[-1] for values in log.values())
        shares = f"largest share {most:.1%}, smallest {least:.1%}"
        print(f"{name}: after {tokens:.0f} tokens loss {loss:.3f}, {shares}")


if __name__ == "__main__":
    command(main)
