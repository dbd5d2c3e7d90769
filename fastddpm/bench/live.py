"""What people see while the benchmark runs: a table that fills up on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastddpm.bench import bars
from fastddpm.bench.entrants import LABELS
from fastddpm.bench.figures import BatchResult, WorkloadResult
from fastddpm.bench.report import COLUMNS, cells, in_order
from fastddpm.common.terminal import clean

WIDE = 170
"""Columns of a terminal from which on the whole table is shown."""
NARROW = (0, 1, 2, 5)
"""The columns that a narrower one gets; the rest stands in results.md."""


class View:
    """Shows a run; a context.

    Args:
        console: where; a terminal gets a live table of the batch size that is being measured.
        quiet: shows nothing at all.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._status: dict[str, str] = {}
        self._place = ("", -1)
        is_live = console.is_terminal and not quiet
        self._live = Live(console=console, refresh_per_second=4, transient=True) if is_live else None

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, workload: str, batch: int, peer: str, what: str) -> None:
        """Something goes on."""
        if (workload, batch) != self._place:
            self._place, self._status = (workload, batch), {}
        self._status[peer] = what
        if self._live is not None:
            table = Table("peer", "now", title=clean(f"{workload}, B = {batch}" if batch else workload))
            for name, status in self._status.items():
                table.add_row(LABELS.get(name, name), clean(status))
            self._live.update(table)

    def on_result(self, workload: WorkloadResult, one: BatchResult) -> None:
        """A batch size is done."""
        if self.quiet:
            return
        title = clean(f"{workload.name}, B = {one.batch} ({one.rounds} rounds of {one.steps} steps)")
        shown = range(len(COLUMNS)) if self.console.width >= WIDE else NARROW
        table = Table(title=title, title_justify="left")
        for i in shown:
            table.add_column(COLUMNS[i], no_wrap=True)
        for peer in in_order(one):
            if peer.ms_per_step is not None:
                row = cells(one, peer)
                table.add_row(*(row[i] for i in shown))
        if table.row_count:
            self.console.print(table)
        for peer in one.peers:
            if peer.note:
                self.say(f"not timed: {LABELS.get(peer.peer, peer.peer)}: {peer.note}")

    def bars(self, found: Sequence[bars.Bar]) -> None:
        """The project's targets."""
        if self.quiet or not found:
            return
        table = Table("target", "ours", "other", "ratio", "limit", "met", title="targets", title_justify="left")
        for bar in found:
            table.add_row(bar.what, bar.ours, bar.other, f"{bar.value:.3g}", bar.wanted, "yes" if bar.met else "no")
        self.console.print(table)

    def say(self, text: str) -> None:
        """A line."""
        if not self.quiet:
            self.console.print(clean(text), soft_wrap=True)
