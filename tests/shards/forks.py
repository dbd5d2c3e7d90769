"""Commands that are killed: a process that has imported everything forks a child for each command that it is told.

Run as a script, it reads JSON lists. [bytes, arguments …] starts `fastddpm arguments …`, whose files are at most so
large (0: any size), and prints its process number; [number] waits for that process, and prints how it ended.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.tiny import environment

ROOT = Path(__file__).parents[2]


class Forks:
    """The parent of such children, as seen by a test."""

    def __init__(self, cwd: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.shards.forks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment(PYTHONPATH=str(ROOT)),
        )  # fmt: skip
        self._ask(["ready"])

    def start(self, arguments: Sequence[object], *, largest_file: int = 0) -> int:
        """Start a command; returns its process number. `largest_file`: the bytes after which its disk is full."""
        return int(self._ask([largest_file, *map(str, arguments)]))

    def end(self, child: int) -> tuple[int, str]:
        """Wait for a child: its exit code, −N for signal N, and what it printed."""
        code, text = json.loads(self._ask([child]))
        return code, text

    def run(self, arguments: Sequence[object], **options: int) -> tuple[int, str]:
        """Start a command and wait for it."""
        return self.end(self.start(arguments, **options))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, words: list[object]) -> str:
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.startswith("> "):
            raise RuntimeError(answer + self._process.stdout.read())
        return answer[2:]


def serve() -> None:
    import torch

    import fastddpm.cli.sharding  # noqa: F401 - so that no child needs to
    from fastddpm.sampler import Sampler  # noqa: F401

    torch.set_num_threads(1)
    outputs: dict[int, str] = {}
    for line in sys.stdin:
        words = json.loads(line)
        if words == ["ready"]:
            print("> ", flush=True)
        elif len(words) == 1:
            print("> " + json.dumps(_ended(words[0], outputs.pop(words[0]))), flush=True)
        else:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                _become(words, write)
            os.close(write)
            outputs[child] = read
            print(f"> {child}", flush=True)


def _ended(child: int, read: int) -> tuple[int, str]:
    with open(read, encoding="utf-8") as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), text


def _become(words: list[object], write: int) -> None:
    largest, *arguments = words
    os.dup2(write, 1)
    os.dup2(write, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["fastddpm", *arguments]
    from fastddpm.cli import main

    code = 1
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
