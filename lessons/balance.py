"""What the load-balancing loss is for: training with it, without it, and without experts.

    python lessons/balance.py                            the six trainings of runs/, as tables
    python lessons/balance.py --train /tmp/runs          the same anew: an hour; run again to resume
    python lessons/balance.py --plot lessons/balance.svg

Three kinds, each with two seeds: balanced (with the auxiliary loss), off (without it), dense (one
block as large as the experts that a token uses). The same code, learning rates and tokens; kinds of
one seed read the same windows. A run is a folder with tiny/train.py's log.csv and report.json.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import Parser, command, file_name, markdown, new_figure, new_file_name

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path(__file__).resolve().parent / "runs"
KINDS = {"balanced": [], "off": ["--aux-coef", "0"], "dense": ["--dense"]}
SEEDS = ("0", "1")
NUMBERS = ("tokens_seen", "held_out_loss", "parameters", "active_parameters")
PANELS = {
    "held_out_loss": "held-out loss, nats a token",
    "max_share": "share of the busiest expert",
    "min_share": "share of the idlest expert",
}


class Run(NamedTuple):
    name: str  # its kind and its seed
    log: dict[str, list[float]]  # columns by name
    report: dict

    @property
    def kind(self) -> str:
        return self.name.rpartition("-")[0] or self.name

    @property
    def seed(self) -> str:
        return self.name.rpartition("-")[2]


def read_run(folder: Path) -> Run:
    """Raises ValueError where the folder is no run."""
    log, report = folder / "log.csv", folder / "report.json"
    try:
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [float(row[name]) for row in rows] for name in ("tokens", *PANELS)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{log}: not a training log: {error}") from None
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
        sum(told[name] for name in NUMBERS)  # raises TypeError if one is no number
        sum(sum(layer) / len(layer) for layer in told["expert_shares"]) / len(told["expert_shares"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{report}: not a training's report: {error}") from None
    if not rows:
        raise ValueError(f"{log}: no rows")
    return Run(folder.resolve().name, columns, told)


def train(out: Path) -> list[Path]:
    """The six trainings, one after another; those that are done already are left as they are."""
    folders = []
    for seed in SEEDS:
        for kind, options in KINDS.items():
            folders.append(folder := out / f"{kind}-{seed}")
            if (folder / "report.json").exists():
                continue
            line = [sys.executable, ROOT / "tiny" / "train.py", "--out", folder, "--seed", seed]
            print(f"{folder}:", flush=True)
            line += ["--tokens", "4e6", "--prompt-tokens", "0", *options]
            if subprocess.run(line).returncode:
                raise ValueError(f"{folder}: the training stopped; run again to go on")
    return folders


def loss_table(runs: list[Run]) -> str:
    """Each kind's losses at the end, how far its seeds are apart, and how far each is over the
    balanced training of the same seed."""
    base = {run.seed: run.report["held_out_loss"] for run in runs if run.kind == "balanced"}
    rows = []
    for kind in dict.fromkeys(run.kind for run in runs):
        some = [run for run in runs if run.kind == kind]
        losses = [run.report["held_out_loss"] for run in some]
        over = [run.report["held_out_loss"] - base[run.seed] for run in some if run.seed in base]
        sizes = [some[0].report[name] / 1e6 for name in ("parameters", "active_parameters")]
        apart = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else ""
        cells = [" ".join(f"{loss:.3f}" for loss in losses), f"{sum(losses) / len(losses):.3f}"]
        cells += [apart, " ".join(f"{x:+.3f}" for x in over)]
        rows.append([kind, *(f"{size:.1f} M" for size in sizes), *cells])
    head = ["kind", "parameters", "used by a token", "loss, by seed", "mean", "between seeds"]
    return markdown([*head, "over balanced, by seed"], rows)


def share_table(runs: list[Run]) -> str:
    """In each layer, the largest and the smallest share of the choices that an expert got."""
    rows = []
    for run in runs:
        shares = run.report["expert_shares"]
        if len(shares[0]) > 1:  # one expert has no choice
            rows.append([run.name, *(f"{max(layer):.0%} {min(layer):.0%}" for layer in shares)])
    layers = max((len(row) - 1 for row in rows), default=0)
    return markdown(["run", *(f"layer {i}" for i in range(layers))], rows)


def draw(runs: list[Run], out: Path) -> None:
    """A panel for each of PANELS, side by side. Raises ValueError where matplotlib is missing."""
    figure = new_figure(out, figsize=(10, 3.2))
    kinds = [*dict.fromkeys(run.kind for run in runs)]
    for axes, (column, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for run in runs:
            if column == "held_out_loss" or min(run.log["min_share"]) < 1:  # one expert: no choice
                kind = kinds.index(run.kind)
                millions = [tokens / 1e6 for tokens in run.log["tokens"]]
                style = "--" if run.name.endswith("-1") else "-"
                axes.plot(millions, run.log[column], style, label=run.name, color=f"C{kind}")
        axes.set(title=title, xlabel="million tokens")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = Parser(description="Compare trainings.")
    parser.add_argument("runs", nargs="*", type=file_name, help="folders (default: lessons/runs/*)")
    parser.add_argument(
        "--train", type=file_name, metavar="FOLDER", help="train the six there first"
    )
    parser.add_argument("--plot", type=new_file_name, metavar="FILE", help="draw the logs")
    args = parser.parse_args()
    if args.train and args.plot:
        new_figure(args.plot)  # what is missing is told before the work
    folders = train(args.train) if args.train else args.runs
    if not folders:
        folders = [RUNS / f"{kind}-{seed}" for kind in KINDS for seed in SEEDS]
    runs = [read_run(folder) for folder in folders]
    tokens = " or ".join(dict.fromkeys(f"{run.report['tokens_seen']:,.0f}" for run in runs))
    print(f"Loss after {tokens} tokens, nats a token of held-out files\n\n{loss_table(runs)}")
    even = "Largest and smallest share of a layer's choices that an expert got"
    print(f"\n{even}\n\n{share_table(runs)}")
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    command(main)
