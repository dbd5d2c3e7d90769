"""The pages of the documentation, what is fenced in them, and how it is run."""

import dataclasses
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import Result

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
_FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: where it stands.
        line: of its fence, for messages.
        language: as the fence says.
        text: between the fences.
        why_not: why it is not run, from the comment before it; "" if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    why_not: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without the comments behind them."""
        return [line.split("   #")[0].strip() for line in self.text.splitlines() if line.strip()]

    def __str__(self) -> str:
        """Names the block in a test's id."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, language, found["text"], found["why"] or "")
        for found in _FENCE.finditer(text)
        if found["language"] == language
    ]


def run_python(code: str, page: str) -> dict[str, object]:
    """Run a block as a script of its own, in this process; returns its names."""
    module = types.ModuleType("__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", module)  # where classes of a script live
        exec(compile(code, page, "exec"), vars(module))
    return vars(module)


def run_command(command: str, fastddpm: Callable[..., Result]) -> None:
    """Run a command, `fastddpm …` in this process, and see that the files it names are there; training is cut short.

    `make` and `pip` would install everything: it is enough that make knows its target, and tests/test_packaging.py
    looks into what pip installs.
    """
    program, *words = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert words == ["install", "."]
    elif program == "python":
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
    else:
        assert program == "fastddpm"
        little = ["--batch-size", "8", "--stop-after", "1", "--no-grids"] if words[0] == "train" else []
        done = fastddpm(*words, *little)
        assert done.code == 0, done.err
        for flag, path in zip(words, words[1:], strict=False):
            if flag in ("--grid", "--gif", "--npz", "--folder", "--out"):
                assert Path(path).exists()


def save_mnist(folder: Path, n: int = 32) -> None:
    """Random pictures in MNIST's format, which the pages train on."""
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for kind, array in (("images-idx3", pictures), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"train-{kind}-ubyte").write_bytes(header + array.tobytes())
