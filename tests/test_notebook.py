"""The course as a notebook: current, complete, valid, small, and true when it is executed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, same_output, thorough

sys.path.insert(0, str(ROOT / "lessons"))

from lessons import notebook, quotes  # noqa: E402

PAGE = quotes.COURSE.read_text(encoding="utf-8")
FILE = quotes.COURSE.with_name("course.ipynb")
TEXT = FILE.read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS]
CODE = [source for source, cell in zip(SOURCES, CELLS, strict=True) if cell["cell_type"] == "code"]
DEFINED = re.compile(r"def (\w+)\(")
TRIED = re.compile(r"check\((\w+)\);")
ANEW = "course.ipynb is old; run: python lessons/quotes.py"
SLOW = re.compile(r"x\.py --measure")  # of the pages below


def printed(cell: dict) -> str:
    """What a cell shows of its standard output. A command after ! thinks that it has a terminal:
    its lines end in two characters, and a note of progress stands before a lone return."""
    outputs = [x for x in cell.get("outputs", []) if x.get("name") == "stdout"]
    text = "".join("".join(x["text"]) for x in outputs).replace("\r\n", "\n")
    return re.sub(r".*\r", "", text)


def make(page: str) -> list[dict]:
    made = json.loads(notebook.make(f"# Title\n\n{page}", SLOW))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in made[2:]]


def test_it_is_current():
    assert notebook.make(PAGE, quotes.MEASURED) == TEXT, ANEW


def test_nothing_of_the_course_is_missing():
    """Word for word and in its order: text, drawings, commands, outputs. The rest is known."""
    words, own = [], False
    for cell, source in zip(CELLS, SOURCES, strict=True):
        if cell["cell_type"] == "markdown":
            own = source in (notebook.FILL_IN, notebook.ALL)
            source = source.replace(notebook.ABOUT, "")
            words += [] if own else source.split()
        elif command := re.match(r"(%run|!|%%bash\n)\s*(.*)", source, re.DOTALL):
            python = ["python"] if command[1] == "%run" else []
            words += ["$", *python, *command[2].split(), *printed(cell).split()]
        else:
            assert own or cell is CELLS[1], source
    page = notebook.jump(PAGE)
    fences = r"^```(?:console)?$"
    words = re.sub(fences, "", " ".join(words).replace("```console ", ""), flags=re.MULTILINE)
    page = re.sub(fences, "", page, flags=re.MULTILINE)
    assert [x for x in words.split() if x != "```"] == page.split()


def test_each_puzzle_has_a_cell_and_its_trial():
    """As it stands in its file, with an empty body; nothing of an answer."""
    names = [name for text in re.findall(r"^\$ cp .*", PAGE, re.M) for name in
             re.findall(r"lessons/(\w+)\.py", text)]  # fmt: skip
    assert "puzzles" in names
    for name in names:
        source = (ROOT / "lessons" / f"{name}.py").read_text(encoding="utf-8")
        stubs = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)]
        stubs = [x for x in stubs if len(x.body) == 1 and ast.get_docstring(x)]
        assert len(stubs) >= 3
        for stub in stubs:
            (at,) = [n for n, cell in enumerate(CODE) if cell.startswith(f"def {stub.name}(")]
            assert ast.dump(ast.parse(CODE[at])) == ast.dump(ast.Module([stub], []))
            assert CODE[at + 1] == f"check({stub.name});"
        every = f"check_all({', '.join(stub.name for stub in stubs)});"
        assert CODE.count(every) == (name == "puzzles")  # which are put into the model


def test_scripts_leave_the_readers_functions_alone():
    """%run puts what a script has at its top level into the notebook."""
    own = {name for cell in CODE for name in DEFINED.findall(cell)} | {"check"}
    scripts = {cell.split()[1] for cell in CODE if cell.startswith("%run ")}
    assert len(own) > 10 and len(scripts) > 3
    for script in scripts:
        left = set()
        for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
            aliases = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
            left |= {alias.asname or alias.name for alias in aliases}
            left |= {x.id for x in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign)
                     and isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}  # fmt: skip
            left |= {getattr(node, "name", "")}
        assert not left & own, (script, left & own)


def test_it_is_a_notebook():
    """Of format 4.5, as Jupyter writes it; small, and nothing in it was run by hand."""
    made = json.loads(TEXT)
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5) and len(TEXT.encode()) < 150_000
    ids = [cell["id"] for cell in CELLS]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", x) for x in ids)
    for cell in CELLS:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert {*cell} == {"cell_type", "id", "metadata", "source"} | more
        assert "".join(cell["source"]).strip() and not cell.get("execution_count")
        assert all(x["output_type"] == "stream" for x in cell.get("outputs", []))
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.reads(TEXT, as_version=4))


def test_links_lead_somewhere():
    """From lessons/, where the notebook lies; those within it to its headings."""
    text = "\n".join(SOURCES)
    links = re.findall(r"\]\(([^):]+)\)", text)
    headings = {x.replace(" ", "-") for x in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert {"model.svg", "README.md"} < {*links}
    for link in links:
        file, _, place = link.partition("#")
        assert (FILE.parent / file).exists() and (file or place in headings), link


# ---------------------------------------------------------------- how cells are made


def test_commands_become_cells():
    """%run where it does what a shell does; what IPython would fill in goes to a shell as it is."""
    for line, cell in {
        'python lessons/a.py "b (c" --d': '%run lessons/a.py "b (c" --d',
        "python a.py | head -3": "!python a.py | head -3",
        "python a.py > b": "!python a.py > b",
        "python a.py *.txt": "!python a.py *.txt",
        "python -m a": "!python -m a",
        "cp -n a b": "!cp -n a b",
        "python a.py $HOME": "%%bash\npython a.py $HOME",
        "python a.py '{b}'": "%%bash\npython a.py '{b}'",
    }.items():
        assert notebook.as_cell(line) == cell


def test_outputs_and_tables():
    """A table after a command that printed nothing else is its output; another is text."""
    table = "| a |\n| --- |\n"
    page = f"```console\n$ ls\n$ python a.py\n```\n\n{table}\nText.\n"
    first, second, text = make(page)
    assert (first["outputs"], printed(second), text["source"]) == ([], table, "Text.")
    page = f"```console\n$ python a.py\nx\n\ny\n```\n\n{table}\n## 1. Now\n\nText.\n"
    first, text, now = make(page)
    assert printed(first) == "x\n\ny\n" and text["source"] == table.strip()
    assert now["source"] == "## 1. Now\n\nText."
    assert "[a](#1.-Now-it)" in notebook.jump("[a](#1-now-it)\n\n# 1. Now it\n")


def test_what_takes_long_is_marked():
    """What measures, what prints nothing (it may train), and what reads what these write."""
    lines = ["a.py\nx", "x.py --measure\nx", "a.py --out /tmp/a", "b.py /tmp/a/log\nx", "c.py\nx"]
    page = "".join(f"$ python {line}\n" for line in lines)
    tags = [cell["metadata"].get("tags") for cell in make(f"```console\n{page}```\n")]
    skip = ["skip-execution"]
    assert tags == [None, skip, skip, skip, None]


def test_a_readers_own_file_is_left_to_text():
    block = "```console\n$ python lessons/puzzles.py my_puzzles.py\nx\n```\n"
    (text,) = make(block)
    assert text["cell_type"] == "markdown" and text["source"] == block.strip()
    copying = make("```console\n$ cp -n lessons/puzzles.py my_puzzles.py\n```\n")
    assert copying[1]["source"] == notebook.FILL_IN and "check(rms_norm);" in [
        cell["source"] for cell in copying
    ]


@pytest.mark.parametrize("place", ("lessons", ".", "elsewhere", "again"))
def test_the_first_cell_finds_the_top_folder(place, tmp_path):
    """From lessons/ and from the top; from elsewhere it clones and installs, but not twice."""
    top, tools = tmp_path / "top", tmp_path / "tools"
    for folder in (top / "lessons", tools, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (top / "granitemoe.py").touch()
    address = f"file://{top.as_posix()}"
    cell = re.sub(r'ADDRESS = "[^"]+"', f'ADDRESS = "{address}"', CODE[0])
    fake = (
        "import shutil, subprocess, sys\n"
        "def run(line, check):\n"
        "    print(*line[1:3])\n"
        "    line[0] == 'git' and shutil.copytree(line[-2].removeprefix('file://'), line[-1])\n"
        "subprocess.run = run\n"
    )
    cells = (
        f"{cell}\nos.chdir({str(tmp_path / 'elsewhere')!r})\n{cell}" if place == "again" else cell
    )
    code = (
        f"{fake}{cells}\nprint(os.getcwd(), os.environ['PATH'].split(os.pathsep)[0], sys.path[-1])"
    )
    folder = tmp_path / "elsewhere" if place == "again" else top / place
    folder = folder if folder.exists() else tmp_path / "elsewhere"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *did, last = done.stdout.splitlines()
    away = place in ("elsewhere", "again")
    found = folder / "granitemoe" if away else top
    assert did == (["clone --depth", "-m pip"] if away else [])
    assert last == f"{found} {Path(sys.executable).parent} {found / 'lessons'}"


# ---------------------------------------------------------------- executed


def right(source: str, bodies: dict[str, str]) -> str:
    """A puzzle's cell with the right body."""
    body = bodies[DEFINED.match(source)[1]]
    body = re.sub("^    ", "", body.strip("\n"), flags=re.M) if "\n" in body else f"    {body}"
    return f"{source}\n{body}"


@thorough
def test_it_runs_from_top_to_bottom(tmp_path):
    """In a kernel that starts in lessons/, in a copy of the repository. What takes long is left
    out. The outputs are those that are kept. Each puzzle is tried empty, then with a right body."""
    reason = "executing the notebook needs: pip install nbclient ipykernel"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    from test_puzzles import RIGHT

    ignored = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".venv", "my_*.py")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    whole, cells, kept = nbformat.reads(TEXT, as_version=4), [], []
    for cell in whole.cells:
        kept.append(printed(cell))
        cell.outputs, cell.source = [], cell.source.replace("/tmp/", f"{tmp_path}/")
        cells.append(cell)
        if (name := TRIED.match(cell.source)) and name[1] in RIGHT:
            again = (right(cells[-2].source, RIGHT), cell.source)
            cells += [nbformat.v4.new_code_cell(source) for source in again]
            kept += ["", f"{name[1]}: solved. Compare with "]
    whole.cells = [cell for cell in cells if cell.cell_type == "code"]
    kept = [x for x, cell in zip(kept, cells, strict=True) if cell.cell_type == "code"]
    where = {"metadata": {"path": str(copy / "lessons")}}
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "SOURCE_DATE_EPOCH": "0"}
    client = nbclient.NotebookClient(whole, timeout=600, kernel_name="python3", resources=where)
    client.execute(env=env)
    wrong, ran = [], 0
    for cell, before in zip(whole.cells, kept, strict=True):
        if "skip-execution" in cell.metadata.get("tags", []):
            continue
        out = printed(cell).replace(f"{tmp_path}/", "/tmp/")
        if name := TRIED.match(cell.source):
            same = out.startswith(before or f"{name[1]}: not written yet")
        elif cell.source.startswith("check_all("):  # of right bodies, by now
            wrote = "wrote this with your rms_norm, rotary, attention, route, expert, top_p."
            same = out.count(": solved. ") == len(RIGHT) and wrote in out
        else:
            same = same_output(before, out)
        errors = [x for x in cell.outputs if x.output_type == "error"]
        wrong += [] if same and not errors else [(cell.source, out, errors)]
        ran += 1
    assert not wrong, ANEW
    assert ran > 0.8 * len(whole.cells)
