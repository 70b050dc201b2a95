"""`python test_granitemoe.py FOLDER`: a checkpoint of one's own against transformers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIG, ROOT, checkpoint, write_files

GOOD = "equal within the bounds"


def report(*args: object, cwd: Path = ROOT) -> tuple[int, str, str]:
    line = [sys.executable, "test_granitemoe.py", *map(str, args), "--device", "cpu"]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_tiny_is_equal():
    status, out, err = report("tiny")
    assert (status, err) == (0, "") and out.endswith(GOOD + "\n"), (out, err)
    for what in ("tokenizing", "decoding", "32 greedy ids"):
        assert f"{what} ".ljust(17) in out and "DIFFERENT" not in out
    assert len(out.splitlines()) <= 24


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_16_bits_are_as_far_from_float32_as_theirs(dtype):
    status, out, err = report("tiny", "--dtype", dtype)
    assert status == 0 and out.count("bound 1.5 x theirs") == 3, (out, err)


@pytest.mark.thorough
@pytest.mark.parametrize("leave_out", ("", "x = x + y * self.residual_multiplier"))
def test_16_bits_without_room_for_float32(tmp_path, leave_out):
    """The bounds are coarse then, and a multiplier that is left out still exceeds them."""
    folder = copy(tmp_path, leave_out, "x = x + y")
    text = (folder / "test_granitemoe.py").read_text(encoding="utf-8")
    none = re.sub("def room.*\n", r"\g<0>    return 0.0\n", text)
    (folder / "test_granitemoe.py").write_text(none, encoding="utf-8")
    status, out, err = report("tiny", "--dtype", "bfloat16", cwd=folder)
    assert "no room for a float32 run" in out and out.count("bound 1e-01") == 3, (out, err)
    assert status == bool(leave_out) and out.count("EXCEEDED") == 3 * bool(leave_out), out


@pytest.mark.thorough
def test_a_folder_without_a_tokenizer(tmp_path):
    folder = write_files(tmp_path / "model", checkpoint())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    status, out, err = report(folder)
    assert status == 0 and "no tokenizer" in out and out.endswith(GOOD + "\n"), (out, err)


@pytest.mark.thorough
def test_what_cannot_be_opened(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        status, _, err = report(folder)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.thorough
@pytest.mark.parametrize("field", ({"padding_side": "up"}, {"model_max_length": "x"}), ids=str)
def test_what_only_transformers_refuses_is_one_line(tmp_path, field):
    """While it opens its tokenizer, and while it uses it."""
    raw = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **field}).encode()
    folder = write_files(tmp_path / "model", checkpoint() | {"tokenizer_config.json": raw})
    status, _, err = report(folder)
    assert status == 1 and err.startswith("error: transformers: "), err
    assert err.count("\n") == 1, err


@pytest.mark.thorough
def test_a_context_shorter_than_the_ids_that_are_asked_for(tmp_path):
    """Ours stops where the context ends, theirs goes on: both are asked for what it holds."""
    config = json.dumps(CONFIG | {"max_position_embeddings": 32}).encode()
    folder = write_files(tmp_path / "model", checkpoint() | {"config.json": config})
    status, out, err = report(folder)
    assert (status, err) == (0, "") and "21 greedy ids    equal" in out, (out, err)


TEMPLATE = "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>{% endif %}"


@pytest.mark.thorough
def test_where_chats_part_is_shown(tmp_path):
    """Beyond what fits a line: with a copy whose chats lack their last id."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    raw = json.dumps(config).encode()
    folder = write_files(tmp_path / "model", checkpoint() | {"tokenizer_config.json": raw})
    status, out, err = report(folder)
    assert status == 0 and "chat template    equal" in out, (out, err)
    right = "rendered = generate.load_chat_template(folder, ours)(messages)"
    project = copy(tmp_path, right, right + "[:-1]", file="test_granitemoe.py")
    status, out, err = report(folder, cwd=project)
    assert status == 1 and "chat template    DIFFERENT" in out, (out, err)
    assert re.search(r"from \[\d+\] on: ours \[\]\n    theirs \[\d+\]\n", out), out


def copy(tmp_path: Path, right: str, wrong: str, file: str = "granitemoe.py") -> Path:
    """The project, in which a file's `right`, if any, is replaced."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("granitemoe.py", "generate.py", "test_granitemoe.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("files", "fast", "tiny"):
        shutil.copytree(ROOT / name, folder / name)
    if right:
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(right) == 1
        (folder / file).write_text(text.replace(right, wrong), encoding="utf-8")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    "right, wrong, module",
    (
        (
            "x = x + y * self.residual_multiplier",
            "x = x + y",
            "layers.0.post_attention_layernorm",
        ),
        (" * self.config.embedding_multiplier", "", "embedding"),
        ("config.attention_multiplier, drop", "0.3, drop", "layers.0.self_attn"),
    ),
)
def test_a_wrong_model_is_named(tmp_path, right, wrong, module):
    """A multiplier is left out in a copy: the module that it belongs to is named."""
    status, out, _ = report("tiny", cwd=copy(tmp_path, right, wrong))
    assert status == 1 and out.endswith("NOT equal\n") and "EXCEEDED" in out
    assert f"first module that differs: {module}\n" in out, out
