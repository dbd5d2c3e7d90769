"""Workers from the parent's side: started, asked, stopped while others compute, and ended."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE_S = 0.005
"""Between waking a worker and asking it, for its threads to settle."""


class WorkerError(RuntimeError):
    """A worker could not answer; the message is a line that says why."""

    def __init__(self, message: str, *, missing: bool = False, postponed: bool = False) -> None:
        """Keep the line, whether the peer can never take part here, and whether its turn only did not come."""
        super().__init__(message)
        self.missing, self.postponed = missing, postponed


class WorkerProcess:
    """A process that runs one peer.

    Between its answers it is stopped (SIGSTOP), because thread pools go on spinning after their work is done.

    Args:
        peer: the peer's name.
        folder: where its messages go.
        threads: CPU threads.
        environment: added to the environment.
    """

    def __init__(self, peer: str, folder: Path, threads: int, environment: Mapping[str, str]) -> None:
        self.peer = peer
        self._messages = folder / f"{peer}.log"
        self._buffer = b""
        self._stopped = False
        with open(self._messages, "wb") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastddpm.bench.worker", peer],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,  # Ctrl-C is the parent's affair
                env={**os.environ, **environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("the process has no pipes")
        self._requests, self.answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        """Wake the worker and hand it a request.

        Raises:
            WorkerError: it is gone.
        """
        self._wake()
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except (OSError, ValueError) as error:  # a ValueError where the pipe is closed on our side
            raise WorkerError(self._last_words()) from error

    def poll(self) -> dict[str, Any] | None:
        """The answer, if it is there; None if not yet.

        Raises:
            WorkerError: the worker failed or is gone.
        """
        while b"\n" not in self._buffer:
            if not select.select([self.answers], [], [], 0)[0]:
                return None
            piece = os.read(self.answers.fileno(), 1 << 16)
            if not piece:
                raise WorkerError(self._last_words())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        self._stop()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["error"], missing=answer.get("missing", False))
        return answer

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            WorkerError: no answer in time, a failure, or the worker is gone.
        """
        self.send(request)
        end = time.monotonic() + timeout_s
        while True:
            answer = self.poll()
            if answer is not None:
                return answer
            left = end - time.monotonic()
            if left <= 0:
                raise WorkerError(f"no answer to {request['do']!r} within {timeout_s:.0f} s")
            select.select([self.answers], [], [], min(left, 1.0))

    def close(self) -> None:
        """End the process, and the compilers that it may have started: they would go on computing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._requests, self.answers):
            with contextlib.suppress(OSError):
                stream.close()

    def _wake(self) -> None:
        if self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGCONT)
            self._stopped = False
            time.sleep(PAUSE_S)

    def _stop(self) -> None:
        if not self._stopped and hasattr(signal, "SIGSTOP"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGSTOP)
            self._stopped = True

    def _last_words(self) -> str:
        """Why the process ended: its last line, or the signal."""
        self.close()
        code = self._process.returncode
        text = self._messages.read_text(encoding="utf-8", errors="replace").strip()
        line = text.splitlines()[-1][:200] if text else "no message"
        return f"the process ended ({f'signal {-code}' if code < 0 else f'exit code {code}'}): {line}"


def side_by_side(
    workers: Sequence[WorkerProcess],
    requests: Sequence[Mapping[str, Any]],
    jobs: int,
    until: float,
    on_answer: Callable[[WorkerProcess, list[dict[str, Any]] | WorkerError], None],
    on_start: Callable[[WorkerProcess], None] = lambda _: None,
) -> None:
    """Put the same requests to all workers, several workers at a time, each its requests in order.

    Args:
        workers: the workers, the most important first.
        requests: asked of each; an "out" that holds "{peer}" gets its name.
        jobs: how many work at a time.
        until: `time.monotonic()` at which those that have not answered are given up.
        on_answer: is called with all answers of a worker, or with its error; the worker is closed then.
        on_start: is called when a worker's turn comes.
    """
    waiting = collections.deque(workers)
    active: dict[WorkerProcess, list[dict[str, Any]]] = {}
    while waiting or active:
        while waiting and len(active) < jobs and time.monotonic() < until:
            worker = waiting.popleft()
            on_start(worker)
            active[worker] = []
            _attempt(worker, active, on_answer, functools.partial(worker.send, _named(requests[0], worker.peer)))
        if time.monotonic() >= until:
            for worker in active:
                worker.close()
                on_answer(worker, WorkerError("left out: not ready within the time allowed"))
            for worker in waiting:
                on_answer(worker, WorkerError("left out: no time was left for it", postponed=True))
            return
        if active:
            select.select([worker.answers for worker in active], [], [], 0.5)
        for worker in list(active):
            _attempt(worker, active, on_answer, functools.partial(_go_on, worker, active, requests, on_answer))


def _go_on(
    worker: WorkerProcess,
    active: dict[WorkerProcess, list[dict[str, Any]]],
    requests: Sequence[Mapping[str, Any]],
    on_answer: Callable[[WorkerProcess, list[dict[str, Any]] | WorkerError], None],
) -> None:
    answer = worker.poll()
    if answer is None:
        return
    answers = active[worker]
    answers.append(answer)
    if len(answers) < len(requests):
        worker.send(_named(requests[len(answers)], worker.peer))
        return
    del active[worker]
    on_answer(worker, answers)


def _attempt(
    worker: WorkerProcess,
    active: dict[WorkerProcess, list[dict[str, Any]]],
    on_answer: Callable[[WorkerProcess, list[dict[str, Any]] | WorkerError], None],
    action: Callable[[], None],
) -> None:
    try:
        action()
    except WorkerError as error:
        active.pop(worker, None)
        worker.close()
        on_answer(worker, error)


def _named(request: Mapping[str, Any], peer: str) -> dict[str, Any]:
    return {key: value.format(peer=peer) if key == "out" else value for key, value in request.items()}
