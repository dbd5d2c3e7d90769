"""Progress bars: the one of a sampling run, and what others are made of."""

from __future__ import annotations

import time
from contextvars import ContextVar, Token
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fastddpm.common.terminal import NARROW, on_terminal
from fastddpm.common.wording import counted

_REDRAW_S = 0.05  # telling the bar of each step would take longer than a small network's update


def progress_bar(caption: str, news: str = "", *, unit: str = "steps", visible: bool) -> Progress:
    """A bar of steps for standard error; on narrow terminals the count alone.

    Args:
        caption: before the bar, as `rich.progress.TextColumn` takes it.
        news: behind the count, likewise.
        unit: what is counted.
        visible: whether it is shown at all.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    columns: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn(unit))
    if console.width >= NARROW:
        columns = (TextColumn(caption), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}{news}"),
                   TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
    return Progress(*columns, console=console, disable=not visible)


class StepProgress:
    """A bar over all steps of a run, on standard error, for terminals; silent elsewhere, and where there is none.

    Within another one's block it shows nothing and adds its steps to that one, which is how several runs share a bar.
    """

    def __init__(self, total: int, samples: int, show: bool | None = None, *, doing: str = "sampling") -> None:
        """Make the bar.

        Args:
            total: steps of all batches together.
            samples: pictures that it is about, for the caption.
            show: whether to show it; None shows it if standard error is a terminal.
            doing: what is done with them.
        """
        visible = on_terminal() if show is None else show
        self._caption = f"{doing} {counted(samples, 'picture')}"
        self._shown: tuple[Progress, TaskID] | None = None  # making one takes as long as a small network's step
        if visible:
            made = progress_bar("{task.description}", visible=True)
            self._shown = made, made.add_task(self._caption, total=total)
        self._total, self._done, self._in_batch = total, 0, 0
        self._drawn = 0.0
        self._outer: StepProgress | None = None
        self._token: Token[StepProgress | None] | None = None

    def advance_to(self, step: int) -> None:
        """So many steps of the batch under way are done."""
        made, self._in_batch = step - self._in_batch, step
        bar = self._outer or self
        bar._done += made
        if bar._shown is not None:
            now = time.monotonic()
            if now - bar._drawn > _REDRAW_S or bar._done >= bar._total:
                bar._drawn = now
                shown, task = bar._shown
                shown.update(task, completed=bar._done)

    def batch_done(self) -> None:
        """The next step is the first of another batch."""
        self._in_batch = 0

    def compiling(self, under_way: bool) -> None:
        """Say that the step is being compiled, or no longer is."""
        bar = self._outer or self
        caption = "compiling the step (once, about a minute)" if under_way else bar._caption
        if bar._shown is not None:
            shown, task = bar._shown
            shown.update(task, description=caption)

    def __enter__(self) -> StepProgress:
        """Show the bar, unless another one is shown around it."""
        self._outer = _SHOWN.get()
        if self._outer is None:
            self._token = _SHOWN.set(self)
            if self._shown is not None:
                self._shown[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down, leaving the terminal as it was, also on Ctrl-C."""
        if self._token is not None:
            _SHOWN.reset(self._token)
            self._token = None
            if self._shown is not None:
                self._shown[0].stop()


_SHOWN: ContextVar[StepProgress | None] = ContextVar("fastddpm_step_progress", default=None)
