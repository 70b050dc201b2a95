"""The names and comments of granitemoe.py, executed.

Its header gives every dimension one letter. A tracer follows every line of a forward and compares
with the sizes of the config and the inputs, of which no two are equal: each local with a shape
suffix (`x_ND`), each assignment with a shape comment (`# (B, H, T, C)`) and each integer named by
one letter. Guards against names that lie: a reader who trusts `rows_MD` must not be misled.
"""

import ast
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import granitemoe  # noqa: E402

FILE = ROOT / "granitemoe.py"
SUFFIX = re.compile(r"[A-Za-z0-9_]*_([A-Z]+)")
COMMENT = re.compile(r"# (\((?:[A-Z1]|layers)[^()]*\))(?:$|[ ,;])")
FORMS = ("experts_loop", "experts_grouped", "experts_gathered")
WIDTHS = {"V": 97, "D": 84, "H": 6, "G": 2, "C": 14, "E": 13, "K": 4, "F": 20, "P": 40, "layers": 5}
BATCH, CHUNKS = 3, (9, 8, 1)  # a prefill, a second chunk of it, one step of decoding
CONFIG = {
    "vocab_size": WIDTHS["V"], "hidden_size": WIDTHS["D"], "intermediate_size": WIDTHS["F"],
    "num_hidden_layers": WIDTHS["layers"], "num_attention_heads": WIDTHS["H"],
    "num_key_value_heads": WIDTHS["G"], "num_local_experts": WIDTHS["E"],
    "num_experts_per_tok": WIDTHS["K"], "max_position_embeddings": 64, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "embedding_multiplier": 12.0, "attention_multiplier": 0.1,
    "residual_multiplier": 0.22, "logits_scaling": 6.0,
}  # fmt: skip


def step_sizes(T: int, S: int) -> dict[str, int]:
    """What each letter stands for while T new tokens are read, S counting the cached ones too."""
    N = BATCH * T
    return WIDTHS | {"B": BATCH, "T": T, "S": S, "N": N, "M": N * WIDTHS["K"]}


@functools.cache
def dimension_key() -> set[str]:
    """The letters that the file's header defines."""
    section = re.search(r"Dimension key.*?\n(.*?)\n\n", granitemoe.__doc__, re.DOTALL)[1]
    return {entry[0] for entry in re.split(r"\s{2,}", section) if re.match(r"[A-Z] ", entry)}


class Shapes:
    """A trace function that compares the locals of one file's functions with the sizes it is given.

    `seen` collects what was compared, `wrong` what differs: (function, name or line), and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.comments = {
            number: (targets, text)
            for number, targets, text in shape_comments(path.read_text(encoding="utf-8"))
        }
        self.sizes: dict[str, int] = {}
        self.last: dict[FrameType, int] = {}
        self.seen: set[tuple[str, str | int]] = set()
        self.wrong: dict[tuple[str, str | int], str] = {}

    def __call__(self, frame: FrameType, event: str, _) -> "Shapes | None":
        if frame.f_code.co_filename != self.path:
            return None
        if event in ("line", "return"):
            self.look(frame, self.last.pop(frame, 0))
        if event == "line":
            self.last[frame] = frame.f_lineno
        return self

    def look(self, frame: FrameType, line: int) -> None:
        where, found = frame.f_code.co_qualname, frame.f_locals
        for name, value in found.items():
            if match := SUFFIX.fullmatch(name):
                self.compare((where, name), value, [[letter] for letter in match[1]])
            elif len(name) == 1 and name in dimension_key() and type(value) is int:
                self.compare((where, name), torch.empty(value, device="meta"), [[name]])
        targets, text = self.comments.get(line, ((), ""))
        for name in targets:
            if name in found:
                dims = [dim.split(" or ") for dim in text.strip("()").split(", ")]
                self.compare((where, line), found[name], dims)

    def compare(self, key: tuple[str, str | int], value: object, dims: list[list[str]]) -> None:
        self.seen.add(key)
        if not isinstance(value, torch.Tensor):
            self.wrong[key] = f"{type(value).__name__}, not a tensor"
            return
        shape = tuple(value.shape)
        try:
            sizes = [{eval(dim, {}, self.sizes) for dim in choices} for choices in dims]
        except NameError as error:
            self.wrong[key] = f"{error}: not in the dimension key"
            return
        good = len(shape) == len(sizes) and all(a in b for a, b in zip(shape, sizes, strict=True))
        if not good:
            self.wrong[key] = f"{shape} is not {dims} = {sizes}"


def shape_comments(source: str) -> Iterator[tuple[int, list[str], str]]:
    """(line, assigned names, comment) of the functions' assignments that end in a shape comment."""
    lines, tree = source.splitlines(), ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.Assign) and (match := COMMENT.search(lines[node.end_lineno - 1])):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            yield node.lineno, names, match[1]


def suffixed_names(source: str) -> set[tuple[str, str]]:
    """(function, name) of every suffixed argument and local in a file."""
    found = set()

    def visit(node: ast.AST, scope: str, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                path = f"{scope}.<locals>.{child.name}" if inside else f"{scope}.{child.name}"
                visit(child, path.lstrip("."), isinstance(child, ast.FunctionDef))
                continue
            name = child.arg if isinstance(child, ast.arg) else getattr(child, "id", "")
            stored = isinstance(child, ast.arg) or isinstance(
                getattr(child, "ctx", None), ast.Store
            )
            if inside and stored and SUFFIX.fullmatch(name):
                found.add((scope, name))
            visit(child, scope, inside)

    visit(ast.parse(source), "", False)
    return found


def trace_model(module: ModuleType, attention: str, experts: str, form: str | None) -> Shapes:
    """Run every kind of forward under the tracer; `form` stands in for the backend `experts`."""
    shapes = Shapes(Path(module.__file__))
    kept = dict(module.EXPERTS)
    config = module.GraniteMoeConfig(
        **CONFIG, attention_backend=attention, experts_backend=experts, output_router_logits=True
    )
    model = module.GraniteMoeForCausalLM(config).eval()
    ids = torch.randint(WIDTHS["V"], (BATCH, sum(CHUNKS)))
    cache = module.KVCache(config, BATCH, 30)
    previous = sys.gettrace()
    try:
        if form is not None:
            module.EXPERTS[experts] = getattr(module, form)
        sys.settrace(shapes)
        with torch.no_grad():
            for T, chunk in zip(CHUNKS, ids.split(CHUNKS, dim=1), strict=True):
                shapes.sizes = step_sizes(T, cache.length + T)
                model(chunk, cache=cache)
            T = CHUNKS[0]
            shapes.sizes = step_sizes(T, T)
            model(ids[:, :T], labels=ids[:, :T])
            S, (B, H, G, C) = cache.length, (shapes.sizes[letter] for letter in "BHGC")
            shapes.sizes = step_sizes(1, S)  # what CUDA does with one query
            k = torch.randn(B, G, S, C)
            module.attend_one(torch.randn(B, G, H // G, C), k, k, None, 1.0, 0.0)
            shapes.sizes = step_sizes(1, 1) | {"B": 1, "N": 1, "M": WIDTHS["K"]}
            model(ids[:1, :1])
            shapes.sizes = step_sizes(T, T)
            model(ids[:, :T], position_ids=torch.arange(T).expand(BATCH, T))
            if attention != "flash":  # which takes no mask
                mask = torch.ones(BATCH, T, dtype=torch.long)
                mask[0, 0] = 0
                model(ids[:, :T], attention_mask=mask, labels=ids[:, :T])
    finally:
        sys.settrace(previous)
        module.EXPERTS.update(kept)
    return shapes


def load_copy(path: Path, source: str) -> ModuleType:
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_are_told_apart():
    """Two letters of one size could stand in for each other unnoticed."""
    sizes = step_sizes(CHUNKS[1], CHUNKS[0] + CHUNKS[1])
    assert len(set(sizes.values())) == len(sizes)
    assert dimension_key() == set(sizes) - {"layers"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ("eager", "sdpa", "flash"))
def test_every_name_has_the_shape_it_says(attention, form):
    shapes = trace_model(granitemoe, attention, "loop", form)
    assert shapes.wrong == {}
    used = {where for where, _ in shapes.seen}
    assert form in used and not used & set(FORMS) - {form}, "another form ran"


def test_no_name_goes_unchecked():
    """Each suffixed name and each shape comment of the file is met in one of these runs."""
    runs = [("eager", "loop"), ("sdpa", "batched")]
    seen = set().union(*(trace_model(granitemoe, *run, None).seen for run in runs))
    source = FILE.read_text(encoding="utf-8")
    expected = suffixed_names(source)
    assert len(expected) > 40 and expected - seen == set()
    lines = {number for number, _, _ in shape_comments(source)}
    assert len(lines) > 3 and lines - {what for _, what in seen} == set()


LIES = {  # what to replace, and by what
    "one letter": (r"\brows_MD\b", "rows_ND"),
    "order of letters": (r"\bout_NKD\b", "out_KND"),
    "one letter too few": (r"\bexpert_ids_NK\b", "expert_ids_N"),
    "unknown letter": (r"\bends_E\b", "ends_Z"),
    "comment": (r"# \(B, H, T, S\)", "# (B, T, H, S)"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(lie, tmp_path):
    old, new = LIES[lie]
    source, count = re.subn(old, new, FILE.read_text(encoding="utf-8"))
    assert count > 0
    module = load_copy(tmp_path / f"lying_{lie.replace(' ', '_')}.py", source)
    runs = [("eager", "loop"), ("eager", "batched")]
    assert {
        **trace_model(module, *runs[0], None).wrong,
        **trace_model(module, *runs[1], None).wrong,
    }


def test_reading_order():
    """The sections that the header lists are there, in that order."""
    listed = re.search(r"Read in order: (.*?)\.\n", inspect.getdoc(granitemoe), re.DOTALL)[1]
    titles = re.findall(r"^# -{10,} (.*)$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == re.split(r",\s+", listed) and len(titles) == 7
