"""What these tests share: small checkpoints as bytes, ways to change them, an audit, forked cases.

Every case writes a checkpoint of its own, so that none of them needs a download. All run in one
thread; a test of threads asks for its own. What is long by nature is marked thorough, runs with
`pytest --thorough`, and has a short representative in the default run.
"""

import itertools
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in forked cases
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that a test starts
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU: asked for before any is imported
torch.set_num_threads(1)
with suppress(ImportError):  # which Windows lacks
    import resource

import generate  # noqa: E402
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM  # noqa: E402

END, START, ROLE_END = "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"
CONFIG = {
    "model_type": "granitemoe", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 5, "num_experts_per_tok": 3, "max_position_embeddings": 64,
    "rope_theta": 1000, "rms_norm_eps": 1e-6, "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 3.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "float32", "attention_bias": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PROMPT = "ab 12 é"  # what the command continues where the text does not matter
IDS = [64, 7, 299, 0, 31, 200, 5]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Files = dict[str, bytes]

LINUX = hasattr(os, "fork") and Path("/proc/self/clear_refs").exists()
on_linux = pytest.mark.skipif(not LINUX, reason="needs a system with fork and /proc")
on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CC", "cc").split()[0]), reason="needs a C compiler"
)
thorough = pytest.mark.thorough


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also what is long by nature")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: long by nature; runs with --thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is thorough where it is not asked for, with --thorough or by its name."""
    if not (config.getoption("--thorough") or any("::" in arg for arg in config.args)):
        long = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=long)


def representing(names: Collection, *kept: object) -> list:
    """All names for parametrize, of which those that are not kept are thorough."""
    assert all(name in names for name in kept)
    return [name if name in kept else pytest.param(name, marks=thorough) for name in names]


@cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE in Granite's form, of fewer ids than the model has."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    made.pre_tokenizer = pre_tokenizers.Sequence(list(split))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=280, **options)
    made.train_from_iterator(["the theory of the other thing is in the string"] * 3, trainer)
    made.add_special_tokens([START, ROLE_END])
    return made


def make_tensors(**changes) -> dict[str, Tensor]:
    """Random weights, exact in all three dtypes, under which every block moves the logits."""
    config = GraniteMoeConfig.from_dict({**CONFIG, **changes})
    rng = torch.Generator().manual_seed(7)
    tensors = {}
    for name, like in GraniteMoeForCausalLM(config).state_dict().items():
        gain = 2.0 if name != EMBED else 0.5
        spread = gain * like.shape[-1] ** -0.5 if like.dim() > 1 else 0.2
        values = (like.dim() == 1) + torch.randn(like.shape, generator=rng) * spread
        tensors[name] = (values.clamp(-2, 2) * 64).round() / 64
    return tensors


@cache
def checkpoint() -> Files:
    """The files that most cases begin with; not to be changed."""
    return {
        "config.json": json.dumps(CONFIG, indent=1).encode(),
        WEIGHTS: save(make_tensors(), {"format": "pt"}),
        "tokenizer.json": tokenizer().to_str().encode(),
    }


def scripted(ids: list[int], **changes) -> Files:
    """A model that says ids[1:] after ids[0] and then id 0, its end. No id may come twice."""
    tensors = make_tensors(tie_word_embeddings=False)
    for name, tensor in tensors.items():
        if "norm" not in name:
            tensor.zero_()
    for place, (this, following) in enumerate(zip(ids, [*ids[1:], 0], strict=True)):
        tensors[EMBED][this, place] = tensors[HEAD][following, place] = 1.0
    config = {**CONFIG, "tie_word_embeddings": False, **changes}
    return {**checkpoint(), "config.json": json.dumps(config).encode(), WEIGHTS: save(tensors)}


def write_files(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def unpack(raw: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and its data."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def pack(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(tok: Tokenizer) -> Files:
    """The files that stand in for tokenizer.json in some released checkpoints."""
    model = json.loads(tok.to_str())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    added = {name: tok.token_to_id(name) for name in (START, ROLE_END)}
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
        "added_tokens.json": json.dumps(added).encode(),
    }


def logits_of(folder: Path, **options) -> Tensor:
    model = generate.load_model(folder, **{"dtype": "float32", **options})
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def collect(model: GraniteMoeForCausalLM, prompts: list, n: int = 20, **options) -> list:
    return list(generate.generate(model, prompts, n, **options))


# -------------------------------------------------------------------------------------- the audit

_watching: list[list] = []  # a hook cannot be removed: it appends to what is in here
_hooked: list[bool] = []


def _hook(event: str, args: tuple) -> None:
    for events in _watching:
        events.append((event, args))


@contextmanager
def audited(folder: Path) -> Iterator[list[str]]:
    """Collects what the interpreter reports and loading must never do: sockets, processes, pickles,
    writes, and files opened outside the folder that are not Python's own."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    events: list[tuple[str, tuple]] = []
    found: list[str] = []
    _watching.append(events)
    try:
        yield found
    finally:
        _watching.remove(events)
        found += [f"{event} {args!a:.200}" for event, args in events if _bad(event, args, folder)]


def _bad(event: str, args: tuple, folder: Path) -> bool:
    if event != "open":
        harmful = ("socket.", "subprocess.", "pickle.", "os.system", "os.exec", "os.posix_spawn")
        changing = ("os.remove", "os.rename", "os.mkdir", "os.chmod", "shutil.")
        return event.startswith((*harmful, *changing))
    path, _, flags = args
    if isinstance(path, int):
        return False
    path, own = Path(os.fsdecode(path)), [Path(p) for p in {sys.prefix, sys.base_prefix, ROOT}]
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    inside = path.is_relative_to(folder) and path.suffix in (
        ".json",
        ".txt",
        ".jinja",
        ".safetensors",
    )
    code = path.suffix in (".py", ".pyc", ".so") and any(path.is_relative_to(p) for p in own)
    return bool(writes) or not (inside or code)


# ----------------------------------------------------------------------------------- forked cases


class Outcome(NamedTuple):
    """How a forked case ended: its exit status or, negative, the signal that killed it."""

    status: int
    out: str
    err: str
    growth: int  # bytes of memory at the peak over what it began with
    below: int  # bytes of memory at the peak of a process that it started
    read: int  # bytes
    calls: int  # of functions, Python's and C's, if they were counted


def rss(field: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def forked(
    act: Callable[[], int | None], seconds: int = 60, memory: int = 4 * 2**30, count: bool = False
) -> Outcome:
    """Run act in a process of its own, with limits. Fork from a process without busy threads."""
    if not LINUX:
        pytest.skip("needs a system with fork and /proc")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        peak, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                status, work = 70, b""
                status, work = measured(act, seconds, memory, count, out.fileno(), err.fileno())
                os.write(told, work)
            except BaseException:  # in the bookkeeping; act's own are told by measured()
                os.write(err.fileno(), traceback.format_exc().encode())
            finally:  # whatever happens: or it would go on as a second pytest
                os._exit(status if isinstance(status, int) else 70)
        os.close(told)
        _, ended = os.waitpid(pid, 0)
        work = struct.unpack("4q", os.read(peak, 32) or bytes(32))
        os.close(peak)
        texts = [os.pread(file.fileno(), 2**20, 0).decode(errors="replace") for file in (out, err)]
    return Outcome(os.waitstatus_to_exitcode(ended), *texts, *work)


def measured(
    act: Callable[[], int | None], seconds: int, memory: int, count: bool, *outputs: int
) -> tuple[int, bytes]:
    """In a forked process: act's exit status, and its work as an Outcome has it, packed."""
    status, calls = 70, itertools.count()
    signal.alarm(seconds)
    limit = rss("VmSize") + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, read = rss(), bytes_read()
    for fd, output in enumerate(outputs, 1):
        os.dup2(output, fd)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    sys.setprofile((lambda *_: next(calls)) if count else None)
    try:
        status = act() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.setprofile(None)
    for file in (sys.stdout, sys.stderr):
        file.flush()
    below = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    work = (rss("VmHWM") - before, below, bytes_read() - read, next(calls))
    return status, struct.pack("4q", *work)


def command(*args: str) -> Callable[[], int]:
    """generate.py's command as something to run in a forked case."""

    def act() -> int:
        sys.argv = ["generate.py", *args]
        return generate.main()

    return act


NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def same_output(old: str, new: str) -> bool:
    """Line for line, but for rounding, which another processor may do otherwise: a number may be
    off by one and a half in its last place, or by 0.001."""
    words = [[NUMBER.sub("#", x).split() for x in y.rstrip().splitlines()] for y in (old, new)]
    if words[0] != words[1]:
        return False
    for x, y in zip(*(NUMBER.findall(text.replace(",", "")) for text in (old, new)), strict=True):
        places = len(x.partition(".")[2])
        if abs(float(x) - float(y)) > max(1.5 * 10**-places, 0.001):
            return False
    return True


def problem(outcome: Outcome, status: int) -> str:
    """What is wrong with how a command ended in an error, or nothing: one line, of one form."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("[")]
    if outcome.status != status:
        return f"status {outcome.status}, not {status}: {outcome.err[-800:]}"
    if len(lines) != 1 or not lines[0].startswith("generate.py: error: "):
        return f"not one line of error: {outcome.err[-800:]}"
    if len(lines[0]) > 200 or not lines[0].isprintable():
        return f"{len(lines[0])} characters, or not printable: {lines[0]!a}"
    return ""


def sparse(folder: Path, **changes) -> Path:
    """A checkpoint of zeros in bfloat16, of any size at once: the file is a hole."""
    config = {**CONFIG, "dtype": "bfloat16", **changes}
    with torch.device("meta"):
        parameters = GraniteMoeForCausalLM(GraniteMoeConfig.from_dict(config)).named_parameters()
    header, end = {}, 0
    for name, like in parameters:
        offsets = [end, end := end + 2 * like.numel()]
        header[name] = {"dtype": "BF16", "shape": [*like.shape], "data_offsets": offsets}
    raw = pack(header, b"")
    write_files(folder, {**checkpoint(), "config.json": json.dumps(config).encode(), WEIGHTS: raw})
    os.truncate(folder / WEIGHTS, len(raw) + end)
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    """Weights of 165 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6}
    return sparse(tmp_path_factory.mktemp("large"), **sizes, vocab_size=8192, num_local_experts=16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint, for the test to damage."""
    return write_files(tmp_path / "model", checkpoint())


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> GraniteMoeForCausalLM:
    return generate.load_model(write_files(tmp_path_factory.mktemp("good"), checkpoint()))
