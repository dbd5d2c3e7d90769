"""`python -m fastddpm.kernels.report`: what the kernels compile to, and the times which that bounds.

Nothing runs on a GPU here. The times are bounds, not measurements: bytes moved over a bandwidth, instructions over an
issue rate.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .aot import TARGETS, VARIANTS, Compiled, Variant, measure, missed_bars

_WIDTH = 100

DEFAULT_BANDWIDTH = 3.0
"""TB/s: what an H100's memory was measured to give."""

DEFAULT_ISSUE_RATE = 29.0
"""10¹² lane-instructions/s: 132 multiprocessors × 128 lanes × 1.7 GHz, an H100."""

DEFAULT_ELEMENTS = 64 * 3 * 32 * 32
"""A batch of 64 CIFAR-10 pictures."""


def bound_microseconds(measured: Compiled, elements: int, bandwidth: float, issue_rate: float) -> tuple[float, float]:
    """The least time that memory and instruction issue allow, each taken alone.

    Args:
        measured: a compiled kernel.
        elements: elements of the whole batch.
        bandwidth: of the memory, in TB/s.
        issue_rate: in 10¹² lane-instructions/s.

    Returns:
        Microseconds bound by memory and by issue; a kernel can be no faster than the larger.
    """
    by_memory = measured.bytes_per_element * elements / (bandwidth * 1e6)
    return by_memory, measured.sass_per_element * elements / (issue_rate * 1e6)


def build_table(rows: Sequence[Compiled], elements: int, bandwidth: float, issue_rate: float) -> Table:
    """The report as a table, one line per compiled kernel."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0),
        title="Kernels compiled ahead of time",
        caption=(
            f"Times are bounds for {elements:,} elements at {bandwidth:g} TB/s and {issue_rate:g}·10¹² "
            "lane-instructions/s, not measurements: nothing ran on a GPU. Instructions are those of one thread per "
            "element it owns (SASS; AMDGCN on gfx942), without the padding behind the last exit."
        ),
    )
    for name in ("kernel", "variant", "target"):
        table.add_column(name, no_wrap=name != "variant")
    titles = (
        "instr/\nelem",
        "regis-\nters",
        "spill\nB",
        "shared\nB",
        "vector\nbits",
        "B/\nelem",
        "memory\n≥ µs",
        "issue\n≥ µs",
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        memory, issue = bound_microseconds(row, elements, bandwidth, issue_rate)
        table.add_row(
            row.kernel,
            row.variant,
            row.target,
            f"{row.sass_per_element:.1f}",
            str(row.registers),
            str(row.spill_bytes),
            str(row.shared_bytes),
            str(row.vector_bits),
            f"{row.bytes_per_element:g}",
            f"{memory:.3f}",
            f"{issue:.3f}",
        )
    return table


def measure_all(variants: Sequence[Variant], targets: Sequence[str]) -> list[tuple[Variant, Compiled]]:
    """Compile every variant for every target, with a bar on terminals.

    Most of the time goes into processes that take the machine code apart, of which as many run as there are cores.

    Args:
        variants: the kernels and their options.
        targets: some of `TARGETS`.

    Returns:
        Each variant with what was read, by target and then by variant.

    Raises:
        RuntimeError: as `measure`.
    """
    wanted = [(variant, target) for target in targets for variant in variants]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = pool.map(lambda pair: measure(*pair), wanted)
        bar = Console(stderr=True)
        rows = track(
            running, "compiling kernels", len(wanted), console=bar, transient=True, disable=not bar.is_terminal
        )
        return [(variant, row) for (variant, _), row in zip(wanted, rows, strict=True)]


def _is_plain(variant: Variant) -> bool:
    """Whether README's table has the variant: in the type that is used most, without options."""
    return variant.dtype in ("bf16", "u8") and not variant.options


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastddpm.kernels.report", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument(
        "--all", action="store_true", help="in the table too, every type and option, not only those of README's"
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this GPU; may be repeated")
    parser.add_argument("--bandwidth", type=_positive, default=DEFAULT_BANDWIDTH, help="TB/s, for the bounds")
    parser.add_argument(
        "--issue-rate",
        type=_positive,
        default=DEFAULT_ISSUE_RATE,
        help="10^12 lane-instructions/s, for the bounds",
    )
    parser.add_argument("--elements", type=_positive_integer, default=DEFAULT_ELEMENTS, help="B·C·H·W, for the bounds")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: the command line, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 if a static bar is missed, 2 if the kernels cannot be compiled here.
    """
    options = _parser().parse_args(arguments)
    shown = [variant for variant in VARIANTS if options.json or options.all or _is_plain(variant)]
    try:
        pairs = measure_all(shown, options.target or TARGETS)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    rows = [row for _, row in pairs]
    missed = [line for variant, row in pairs for line in missed_bars(variant, row)]
    if options.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        console = Console()
        console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
        console.print(build_table(rows, options.elements, options.bandwidth, options.issue_rate))
        if not missed:
            rest = "" if len(shown) == len(VARIANTS) else " --all shows the other variants."
            console.print(f"All static bars are met.{rest}")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding without µ is no reason to print nothing
    sys.exit(main())
