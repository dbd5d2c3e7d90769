"""Puts the tables of the last run into docs/benchmarks and the README: ``python benchmarks/publish.py``.

``make bench`` leaves table-cpu.md or table-gpu.md in benchmarks/results: a table, an empty line, and a line that says
what machine, versions and commit it holds for. This copies it to docs/benchmarks/cpu.md or gpu.md, and to the README
between the lines that name that file. A test compares the two.
"""

import re
import sys
from pathlib import Path

from fastddpm.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("cpu", "gpu")
END = "<!-- end of the table -->"


def committed(kind: str) -> str:
    """The committed file of a kind of device, as the README names it."""
    return f"docs/benchmarks/{kind}.md"


def shown(readme: str, kind: str) -> str | None:
    """What the README shows between the lines for a kind of device; None where it has no such lines."""
    found = re.search(rf"^<!-- {re.escape(committed(kind))} -->\n(.*?)^{END}$", readme, re.S | re.M)
    return found[1] if found else None


def publish(results: Path = RESULTS, root: Path = ROOT) -> list[str]:
    """Copy what tables there are.

    Args:
        results: where the last run left its tables.
        root: of the repository.

    Returns:
        The committed files that were written.

    Raises:
        ValueError: there is no table, or the README has no place for one.
    """
    tables = {kind: results / f"table-{kind}.md" for kind in KINDS if (results / f"table-{kind}.md").is_file()}
    if not tables:
        raise ValueError(f"publish: {results} must hold a table, got none; run make bench")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for kind, path in tables.items():
        before = shown(readme, kind)
        if before is None:
            raise ValueError(f"publish: README.md must have a line <!-- {committed(kind)} --> and {END}, got none")
        start = f"<!-- {committed(kind)} -->\n"
        readme = readme.replace(f"{start}{before}{END}", f"{start}{path.read_text(encoding='utf-8')}{END}")
    for kind, path in tables.items():
        write_text(root / committed(kind), path.read_text(encoding="utf-8"))
    write_text(root / "README.md", readme)
    return [committed(kind) for kind in tables]


if __name__ == "__main__":
    try:
        print(f"wrote {', '.join(publish())} and README.md")
    except ValueError as error:
        sys.exit(str(error))
