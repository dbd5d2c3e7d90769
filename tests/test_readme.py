"""Every command and every line of Python in the README runs, and the files that it names exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pages import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


COMMANDS = [command for block in blocks(ROOT / "README.md", "sh") for command in block.commands]
PYTHON = [block.text for block in blocks(ROOT / "README.md", "python")]


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make sample", "make test"]


@pytest.fixture
def place(tmp_path):
    """A working folder with pictures in MNIST's format in `mnist/`, as the README has it."""
    (tmp_path / "mnist").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    labels = np.arange(200, dtype=np.uint8) % 10
    for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / "mnist" / f"train-{kind}-ubyte").write_bytes(header + array.tobytes())
    return tmp_path


# What other tests do with smaller networks, or more closely: test_engine.py, kernels/test_report.py.
SLOW = ("fastddpm compile", "python -m fastddpm.kernels.report")


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) if c.startswith(SLOW) else c for c in COMMANDS]
)
def test_command(command, place):
    words = shlex.split(command)
    if words[0] == "make":  # these install and test everything: here it is enough that make knows them
        done = subprocess.run([*words[:1], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if words[:2] == ["pip", "install"]:  # tests/test_packaging.py builds and looks into what this installs
        assert words[2:] == ["."] and (ROOT / "pyproject.toml").exists()
        return
    program = BIN / words[0] if (BIN / words[0]).exists() else shutil.which(words[0])
    extra = ["--stop-after", "2", "--no-grids"] if words[:2] == ["fastddpm", "train"] else []
    done = subprocess.run([program, *words[1:], *extra], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag, path in zip(words, words[1:], strict=False):
        if flag in ("--grid", "--gif", "--npz", "--folder", "--out"):
            assert (place / path).exists()


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:30])
def test_python(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_network_of_one_s_own_may_have_any_shape(tmp_path):
    [code] = [code for code in PYTHON if "ModelSpec(shape=(3, 16, 16))" in code]
    test_python(code.replace("3, 16, 16", "3, 7, 9"), tmp_path)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        headings = re.findall(r"^## (.*)$", README, re.M)
        anchors = ["#" + heading.lower().replace(" ", "-") for heading in headings]
        assert target.startswith("https://") or target in anchors or (ROOT / target).exists(), target
