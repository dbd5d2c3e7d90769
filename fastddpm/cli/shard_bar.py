"""ShardBar: one progress bar over all pictures of a set of shards, whoever draws them."""

from __future__ import annotations

from types import TracebackType

from fastddpm.common.progress import progress_bar
from fastddpm.common.terminal import on_terminal, tell
from fastddpm.common.wording import counted


class ShardBar:
    """Counts the pictures that are there, on standard error, for terminals; elsewhere it says only why it waits."""

    def __init__(self, pictures: int, *, quiet: bool) -> None:
        """Make the bar.

        Args:
            pictures: of the whole set.
            quiet: whether nothing is said.
        """
        self._visible, self._quiet = on_terminal() and not quiet, quiet
        self._bar = progress_bar("{task.description}", unit="pictures", visible=self._visible)
        self._task = self._bar.add_task("drawing shards", total=pictures)
        self._waits = False

    def there(self, pictures: int) -> None:
        """So many pictures more are there."""
        self._bar.update(self._task, advance=pictures, description="drawing shards")

    def waiting(self, shards: int) -> None:
        """So many shards are still being drawn by others."""
        words = f"waiting for {counted(shards, 'shard')} that others draw"
        self._bar.update(self._task, description=words)
        if not (self._waits or self._visible or self._quiet):
            tell(f"{words} …")
        self._waits = True

    def __enter__(self) -> ShardBar:
        """Show the bar."""
        if self._visible:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down."""
        if self._visible:
            self._bar.stop()
