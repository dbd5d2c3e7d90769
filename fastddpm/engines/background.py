"""Background: a package compiled in a process of its own, of low priority, while the run goes on.

    python -m fastddpm.engines.background PARENT ORDER

is that process. It makes the package as any other does, under the same lock, whole or not at all, and finds its layers
chosen: they are measured in the run's process, where nothing else computes meanwhile. It ends when its parent does.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.common.wording import first_line
from fastddpm.engines import cache
from fastddpm.engines.ahead_of_time import AheadOfTime, quicker_layers
from fastddpm.engines.contest import Contestant
from fastddpm.kernels.kept import private_folder
from fastddpm.step.book import Book
from fastddpm.step.state import State
from fastddpm.step.step import Call

NICENESS = 10
_LOOK_S = 0.5
_ERRORS = "errors"


@dataclasses.dataclass
class _Pages:
    """What a step reads of a book."""

    rows: Tensor
    timesteps: Tensor
    conditions: Tensor


@dataclasses.dataclass
class Order:
    """What is to be compiled.

    Attributes:
        key: of the package.
        weights: the digest of the network's weights.
        threads: of the steps.
        layers: those that run the other way; see `fastddpm.engines.fast_layers`.
        step: the step.
        state: an example of the samples.
        pages: rows, timesteps and conditions of the book.
        noise: as in `Call`.
    """

    key: str
    weights: str
    threads: int
    layers: Sequence[str]
    step: nn.Module
    state: State
    pages: _Pages
    noise: Tensor | None

    @classmethod
    def of(cls, one: Contestant, weights: str) -> Order:
        """The order for a contestant; its network's layers are measured now."""
        call = one.call
        pages = _Pages(call.book.rows, call.book.timesteps, call.book.conditions)
        layers = quicker_layers(call)
        return cls(one.key, weights, torch.get_num_threads(), layers, call.step, call.state, pages, call.noise)

    def carry_out(self) -> None:
        """Make the package.

        Raises:
            CompileError: the step does not compile.
            RuntimeError: this process would make another package.
        """
        torch.set_num_threads(self.threads)
        call = Call(cast(Any, self.step), self.state, cast(Book, self.pages), self.noise)
        way = AheadOfTime(lambda: self.weights, layers=self.layers)
        if way.key(call) != self.key:
            raise RuntimeError("the package that would be made is another one; sources or versions have changed")
        with torch.no_grad():
            way.prepare(call, lambda _: None)


class Job:
    """One package that is being made."""

    def __init__(self, order: Order) -> None:
        """Start the process.

        Raises:
            OSError: it cannot be started.
        """
        self.key = order.key
        self.folder = private_folder() / f"background-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        path = self.folder / "order"
        torch.save(order, path)
        environment = {**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": _import_path()}
        # A session of its own: Ctrl-C is for the run, which then ends this process.
        with (self.folder / _ERRORS).open("wb") as errors:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command(path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._failure = ""
        atexit.register(self.stop)

    def is_done(self) -> bool:
        """Whether the process has ended; its files are gone then."""
        if self.process is not None and self.process.poll() is not None:
            if self.process.returncode:
                self._failure = _last_line(self.folder / _ERRORS) or f"exit code {self.process.returncode}"
            self._clear()
        return self.process is None

    @property
    def failure(self) -> str:
        """Why there is no package, in one line; "" where there is one, or may be."""
        return self._failure

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._failure = self._failure or "it was stopped"
            self._clear()

    def _clear(self) -> None:
        self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)


class Background:
    """Makes packages for one engine, one at a time."""

    def __init__(self, weights: Callable[[], str]) -> None:
        """Nothing is being made.

        Args:
            weights: tells the digest of the network's weights as they are now.
        """
        self._weights = weights
        self.job: Job | None = None

    def takes(self, contestants: Sequence[Contestant]) -> list[str]:
        """The keys of those that can be made here: packages that another process can put where this one finds them."""
        return [
            one.key
            for one in contestants
            if isinstance(one.way, AheadOfTime) and one.way.is_kept(one.call) and not cache.no_cache()
        ]

    def begin(self, one: Contestant) -> str:
        """Start to make a package, unless that is under way.

        Returns:
            Why it is not being made, in one line; "" where it is.
        """
        if self.job is not None and not self.job.is_done():
            return "" if self.job.key == one.key else "another one is being compiled"
        try:
            self.job = Job(Order.of(one, self._weights()))
        except (OSError, RuntimeError, TypeError, AttributeError, pickle.PicklingError) as error:
            return first_line(error)  # no room, or a network that holds what cannot be handed over
        return ""

    def is_done(self, key: str) -> bool:
        """Whether a package is no longer being made."""
        return self.job is None or self.job.key != key or self.job.is_done()

    def failure(self, key: str) -> str:
        """Why a package could not be made."""
        return self.job.failure if self.job is not None and self.job.key == key else ""

    def stop(self) -> None:
        """End what is under way."""
        if self.job is not None:
            self.job.stop()


def command(order: Path) -> list[str]:
    """The command line of a process that carries out the order in a file."""
    return [sys.executable, "-P", "-m", "fastddpm.engines.background", str(os.getpid()), str(order)]


def _import_path() -> str:
    """Where this package is, before what the variable holds already."""
    home = Path(__file__).parents[2]
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def end_with(parent: int, folder: Path) -> None:
    """End this process, and all that it has started, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(parent: int, path: Path) -> None:
    """Carry out the order in a file."""
    threading.Thread(target=end_with, args=(parent, path.parent), daemon=True).start()
    os.nice(NICENESS)
    order: Order = torch.load(path, weights_only=False)  # written by our parent, where only this user can write
    path.unlink()
    order.carry_out()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
