"""Workers from the parent's side: in processes of their own, or, for one alone, in this one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fastddpm.bench.worker import Answer, Request, Worker

PAUSE_S = 0.005
"""Between waking a worker and asking it, for its threads to settle."""


class WorkerError(RuntimeError):
    """A worker could not answer; the message is a line that says why."""


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

    def send(self, request: Request) -> None:
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

    def poll(self) -> Answer | None:
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
        answer: Answer = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, request: Request, timeout_s: float) -> Answer:
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


class LocalWorker:
    """A worker in this very process, for one that is alone in it.

    Args:
        peer: the peer's name.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._worker = Worker(peer)

    def ask(self, request: Request, timeout_s: float) -> Answer:
        """Answer a request; nothing ends it when the time is up.

        Raises:
            WorkerError: a failure.
        """
        answer = self._worker.answer(request)
        if not answer["ok"]:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Let go of the peer."""
        self._worker.release()


AnyWorker = WorkerProcess | LocalWorker
