"""Measured seconds on a tape that pytest-benchmark plays: it keeps and compares results, and times nothing itself."""

from collections.abc import Iterator, Sequence


class Tape:
    """A clock that is moved on by what was measured; pytest-benchmark takes it for its timer."""

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        """The time on the tape."""
        return self._now

    def load(self, seconds: Sequence[float]) -> None:
        """Take what was measured."""
        self._seconds = iter(seconds)

    def play(self) -> None:
        """Move on by the next measured seconds."""
        self._now += next(self._seconds)


TAPE = Tape()
