"""`fastddpm doctor`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastddpm.common.terminal import NARROW, clean, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastddpm.doctor.checks import Result

FAILED = 1


def doctor(
    device: Annotated[
        str, typer.Option(help="Where: auto (the GPU if there is one), cpu, cuda or cuda:N.", metavar="DEVICE")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove that the installation works on this machine: kernels, engines, compilers, cache, and what a GPU must do.

    Takes less than a minute; the first time a step is compiled. The exit code is 1 where something fails. Put the
    output into reports of bugs.

    Examples:
    - `fastddpm doctor`

    - `fastddpm doctor --device cuda:1 --json`
    """
    from fastddpm.doctor.checks import examine  # late, for --help: see `sample`
    from fastddpm.engines.devices import pick_device

    chosen = pick_device(None if device == "auto" else device)
    console = Console(stderr=True, highlight=False)
    results: list[Result] = []
    with console.status("") as status:
        for result in examine(chosen, say=lambda name: status.update(escape(f"{name} …"))):
            results.append(result)
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        show(results)
    if not all(result.ok for result in results):
        raise typer.Exit(FAILED)


def show(results: Sequence[Result]) -> None:
    """Print results as a table, on narrow terminals as lines, with a last line that sums up."""
    console = Console(highlight=False)
    if console.width < NARROW:
        say(as_lines(results))
    else:
        console.print(table(results))
    say(summary(results))


def as_lines(results: Sequence[Result]) -> str:
    """Results, a line for each."""
    return "\n".join(f"- {r.check}: {'ok' if r.ok else 'FAILED'}, {r.seconds:.1f} s: {r.detail}" for r in results)


def table(results: Sequence[Result]) -> Table:
    """Results as a table."""
    made = Table("check", "", "s", title="fastddpm doctor", title_justify="left", title_style="bold")
    made.add_column("detail", overflow="fold")
    for result in results:
        word, style = ("ok", "") if result.ok else ("FAILED", "bold red")
        cells = (result.check, word, f"{result.seconds:.1f}", result.detail)
        made.add_row(*(escape(clean(cell)) for cell in cells), style=style)
    return made


def summary(results: Sequence[Result]) -> str:
    """How many checks passed, and the names of those that did not."""
    failed = [result.check for result in results if not result.ok]
    if failed:
        return f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
    return f"all {len(results)} checks passed"
