"""The pages of the documentation, and what is fenced in them."""

import dataclasses
import re
from pathlib import Path

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
