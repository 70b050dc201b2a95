"""Make anew what the READMEs quote, after tiny/ or a lesson has changed.

    python lessons/quotes.py

Runs each command of a console block that has output below it, or a table after the block, and puts
the new output in its place. It also makes the pictures, three.html, the tables between
<!-- marks --> and the lines that links to granitemoe.py name; then course.ipynb, from the course's
page. These stay as they are: what measures speed, what needs a reader's own file or a training,
quotes that differ in times only, and, with a note, commands that fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import notebook
import three
from common import Parser, command, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "lessons/README.md", "tiny/README.md")]
COURSE = ROOT / "lessons" / "README.md"
QUOTE = re.compile(r"^\$ (.+)\n(?:((?:(?!\$ |```).*\n)+)|```\n\n((?:\|.*\n)+))", re.MULTILINE)
# or need a reader's own file, or a training
MEASURED = re.compile(r"pytest|ladder\.py|bench\.py|my_puzzles|my_faster|/tmp/runs")
TIMES = re.compile(r"[\d.]+ s\b|[\d.]+ (?:tokens|GB)/s")
LINK = re.compile(r"(\[`(\w+)[^`]*`\]\(\.\./granitemoe\.py#L)\d+\)")
SHOT = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1200,1690", "--run-all-compositor-stages-before-draw",
]  # fmt: skip


def find_quotes(page: str) -> list[tuple[str, str, slice]]:
    """Commands of a page, the output that it quotes of each, and where; not those that measure."""
    found = [(m, 2 if m[2] else 3) for m in QUOTE.finditer(page) if not MEASURED.search(m[1])]
    return [(m[1].rpartition("&& ")[2], m[part], slice(*m.span(part))) for m, part in found]


def run(line: str) -> str | None:
    """What a command prints, or None with a note; pictures that it makes go into lessons/."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    same = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "0"}
    env = {**os.environ, "PATH": path, **same}
    how = {"shell": True, "cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE}
    plain = line.removesuffix(" | cat")  # what it prints goes into a pipe anyway
    done = subprocess.run(plain, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **how)
    if done.returncode:
        print(f"left as it was: {line}: {done.stdout.strip()}")
        return None
    for picture in re.findall(r"/tmp/\S+\.svg", line):
        shutil.copy(picture, ROOT / "lessons")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    for page in re.findall(r"/tmp/\S+\.html", line) if browser else []:
        shot = f"--screenshot=lessons/{Path(page).stem}.png"
        with tempfile.TemporaryDirectory() as profile:
            how = [*SHOT, f"--user-data-dir={profile}", shot, page]
            subprocess.run([browser, *how], cwd=ROOT, capture_output=True, check=True)
    return done.stdout.rstrip() + "\n"


def line_of(name: str) -> int:
    """Where granitemoe.py defines a class, a function or a table."""
    lines = (ROOT / "granitemoe.py").read_text(encoding="utf-8").splitlines()
    return next(n for n, x in enumerate(lines, 1) if re.match(rf"(class |def |){name}\b", x))


def tables() -> dict[str, str]:
    """What tiny/report.json says, by the names of the marks."""
    report = json.loads((ROOT / "tiny" / "report.json").read_text(encoding="utf-8"))
    loss = {name: f"{report[f'{name}_held_out_loss']:.2f}" for name in ("unigram", "bigram")}
    bits, train = report["held_out_bits_per_byte"], report["train_loss"]
    ours = f"**{report['held_out_loss']:.2f}** ({bits:.2f} bits a byte; training text: {train:.2f})"
    rows = [[f"{name} counts", value] for name, value in loss.items()] + [["**this model**", ours]]
    shares = [[str(i), *(f"{x:.1%}" for x in row)] for i, row in enumerate(report["expert_shares"])]
    experts = ["layer", *(f"expert {e}" for e in range(len(shares[0]) - 1))]
    losses = markdown(["", "nats a token on held-out files"], rows)
    return {"losses": losses, "shares": markdown(experts, shares)}


def renew(page: str) -> str:
    """A page with its tables and links made anew, without running anything."""
    for name, made in tables().items():
        mark = f"<!-- {name} -->"
        before, *old = page.split(mark)
        page = f"{before}{mark}\n\n{made}\n\n{mark}{old[1]}" if len(old) == 2 else page
    return LINK.sub(lambda m: f"{m[1]}{line_of(m[2])})", page)


def main() -> None:
    Parser(description=__doc__.splitlines()[0]).parse_args()
    for path in PAGES:
        page = renew(old := path.read_text(encoding="utf-8"))
        for line, shown, where in reversed(find_quotes(page)):  # so that places stay true
            print(line, flush=True)
            made = run(line)
            if made and TIMES.sub("", made) != TIMES.sub("", shown):
                page = page[: where.start] + made + page[where.stop :]
        path.write_text(page, encoding="utf-8")
        if path == COURSE:
            made = notebook.make(page, MEASURED)
            path.with_name("course.ipynb").write_text(made, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'as before' if page == old else 'made anew'}")
    three.OUT.write_text(three.page(), encoding="utf-8")
    print(f"{three.OUT.name}: made anew")


if __name__ == "__main__":
    command(main)
