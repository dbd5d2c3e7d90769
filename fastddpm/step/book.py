"""Book: the rows of several runs, one after the other in static tensors, so that one compiled step serves them all.

A chapter is one run for one class: its S rows and the identity row that it ends with. A sample's clock starts at its
chapter's first row and stops at its last. So one batch may mix solvers, numbers of steps and starting points, and a new
run needs no new tensors: its rows are copied in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastddpm.kernels.operands import COLUMNS
from fastddpm.process.likelihood_table import LikelihoodTable
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.network import Network, rows_hold_classes
from fastddpm.step.state import Places

LEAST_ROWS = 1024
"""Rows that a book has room for at first."""


@dataclasses.dataclass
class Chapter:
    """One run's rows for one class: `begin` … `end`, the last being the identity."""

    begin: int
    end: int
    readers: int = 0


_Key = tuple[bytes, int | None]
Table = StepTable | LikelihoodTable
"""What a chapter holds: the rows of a run, or those of a bound."""


class Book:
    """The rows of several runs, and what the network has to know of each.

    Attributes:
        rows: float32 [capacity, len(COLUMNS)], the coefficients of solvers' rows and of bounds'.
        timesteps: int64 [capacity], each row's noise counter: its training timestep, and more where a run comes back to
            one.
        conditions: [capacity, …], what the network is told in each row (`Network.tabulate`).
        holds_classes: whether each class has chapters of its own; otherwise the network is told of it in each step.
    """

    def __init__(
        self, network: Network, spec: ModelSpec, T: int, device: torch.device, *, capacity: int | None = None
    ) -> None:
        """An empty book.

        Args:
            network: fills in `conditions`.
            spec: its conventions.
            T: training steps.
            device: where the tensors live.
            capacity: rows that there is room for at first; None is room for all training steps of all classes. It
                doubles when chapters in use need more.
        """
        self._network, self._spec, self.device = network, spec, device
        self.holds_classes = rows_hold_classes(network, spec, T)
        if capacity is None:
            classes = (spec.num_classes or 0) + 1 if self.holds_classes else 1
            capacity = max(LEAST_ROWS, (T + 1) * (classes + 1))
        self._chapters: dict[_Key, Chapter] = {}  # the one that was opened longest ago first
        self._lock = threading.Lock()
        self.rows = torch.zeros(capacity, len(COLUMNS), device=device)
        self.timesteps = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.conditions = self._room(capacity)

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return len(self.rows)

    def forget(self, network: Network) -> None:
        """Tabulate anew from now on, because the network has changed; runs under way keep their rows."""
        with self._lock:
            self._network = network
            # Chapters that are being read keep their place under a key that nobody asks for.
            self._chapters = {
                (b"", -1 - i): c for i, c in enumerate(c for c in self._chapters.values() if c.readers)
            }  # fmt: skip

    @contextlib.contextmanager
    def open(self, table: Table, labels: Sequence[int | None], uncond: int | None = None) -> Iterator[Places]:
        """Have a run's chapters in the book for the length of the block.

        Args:
            table: the run.
            labels: the class of each sample whose rows hold it, or None.
            uncond: the label of "no class", if the run asks for its rows too.

        Yields:
            Where each sample begins and ends.
        """
        digest = table_digest(table)
        wanted = list(dict.fromkeys(labels if uncond is None else (*labels, uncond)))
        with self._lock:
            chapters = {label: self._opened(table, (digest, label)) for label in wanted}
        try:
            begins = torch.tensor([chapters[label].begin for label in labels])
            shift = None if uncond is None else (chapters[uncond].begin - begins).to(self.device)
            yield Places(begins.to(self.device), (begins + table.S).to(self.device), shift)
        finally:
            with self._lock:
                for chapter in chapters.values():
                    chapter.readers -= 1

    def _opened(self, table: Table, key: _Key) -> Chapter:
        """A chapter, written if it is not there, with one reader more."""
        chapter = self._chapters.pop(key, None)
        if chapter is None:
            chapter = Chapter(*self._place(table.S + 1))
            self._write(chapter, table, key[1])
        chapter.readers += 1
        self._chapters[key] = chapter
        return chapter

    def _place(self, length: int) -> tuple[int, int]:
        """Begin and end of room for so many rows: chapters that nobody reads make way, the oldest first."""
        while True:
            begin = 0
            for chapter in sorted(self._chapters.values(), key=lambda c: c.begin):
                if chapter.begin - begin >= length:
                    break
                begin = chapter.end + 1
            else:
                if self.capacity - begin < length:
                    self._make_way()
                    continue
            return begin, begin + length - 1

    def _make_way(self) -> None:
        """Forget one chapter, or double the room where all are being read."""
        for key, chapter in self._chapters.items():
            if not chapter.readers:
                del self._chapters[key]
                return
        old, capacity = (self.rows, self.timesteps, self.conditions), 2 * self.capacity
        # Runs under way go on with the old tensors; new ones find the same rows in the new.
        self.rows = torch.zeros(capacity, len(COLUMNS), device=self.device)
        self.timesteps = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        self.conditions = self._room(capacity)
        for new, before in zip((self.rows, self.timesteps, self.conditions), old, strict=True):
            new[: len(before)] = before

    def _write(self, chapter: Chapter, table: Table, label: int | None) -> None:
        place = slice(chapter.begin, chapter.end + 1)
        timesteps = table.timesteps.to(self.device)
        self.rows[place] = table.rows.to(self.device)
        self.timesteps[place] = table.counters.to(self.device)
        # One class at a time: what a row holds must not depend on which others are asked for.
        self.conditions[place] = self._network.tabulate(self._spec.times_fed(timesteps), label)

    def _room(self, capacity: int) -> Tensor:
        """Room for what the network has to know of so many rows."""
        fed = self._spec.times_fed(torch.zeros(1, dtype=torch.int64, device=self.device))
        row = self._network.tabulate(fed, 0 if self.holds_classes else None)
        return torch.zeros((capacity, *row.shape[1:]), dtype=row.dtype, device=self.device)


def table_digest(table: Table) -> bytes:
    """Tells tables apart by their numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (table.rows, table.timesteps, table.counters):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()
