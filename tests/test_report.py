"""`python test_granitemoe.py FOLDER`: a checkpoint of one's own against transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, checkpoint, write_files

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
def test_a_wrong_model_is_named(tmp_path):
    """A multiplier is left out in a copy: the layer that it belongs to is named."""
    for name in ("granitemoe.py", "generate.py", "test_granitemoe.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("files", "fast", "tiny"):
        shutil.copytree(ROOT / name, tmp_path / name)
    text = (tmp_path / "granitemoe.py").read_text(encoding="utf-8")
    right = "x = x + y * self.residual_multiplier"
    assert text.count(right) == 1
    (tmp_path / "granitemoe.py").write_text(text.replace(right, "x = x + y"), encoding="utf-8")
    status, out, _ = report("tiny", cwd=tmp_path)
    assert status == 1 and out.endswith("NOT equal\n") and "EXCEEDED" in out
    assert "first module that differs: layers.0.post_attention_layernorm\n" in out, out
