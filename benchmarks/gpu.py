"""All that a GPU can tell in one go: `python -m benchmarks.gpu OUT`, which `benchmarks/gpu.sh` calls.

Each section runs in a process of its own with a time limit; one that fails or takes too long stops no other. Those that
time nothing run side by side, then the others one after the other. Nothing has to be installed but PyTorch and what
this package imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddpm.files import atomic_path
from fastddpm.kernels.kept import cache_folder

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 10.0
SHARES = {
    "doctor": 0.05, "tests": 0.07, "compile": 0.22, "ceiling": 0.03, "kernels": 0.11, "cifar10": 0.24,
    "celebahq256": 0.21, "trace": 0.07,
}  # fmt: skip
"""Sections in their order, and the part of the whole time that each may take; what one leaves over is the next's."""
SIDE_BY_SIDE = ("doctor", "tests", "compile")
"""Those that time nothing: they run at once, each in the time of all of them."""
PRECISIONS = "bf16"
"""One at a time: what both need compiled takes more than the ten minutes."""
FAILED = 1
GRACE_S = 5.0
POLL_S = 0.05
_TAIL = 2000


@dataclasses.dataclass
class Outcome:
    """How a section ended.

    Attributes:
        section: its name.
        ok: whether it came to its end and found nothing wrong.
        seconds: that it took.
        says: one line.
    """

    section: str
    ok: bool
    seconds: float
    says: str


def limits(chosen: Sequence[str], minutes: float) -> dict[str, float]:
    """Seconds that are kept for each section."""
    total = sum(SHARES[name] for name in chosen)
    return {name: 60 * minutes * SHARES[name] / total for name in chosen}


def run(chosen: Sequence[str], out: Path, minutes: float, dry: bool, precisions: str = PRECISIONS) -> list[Outcome]:
    """Run sections one after the other and print a line for each.

    Args:
        chosen: their names.
        out: a folder; each section writes NAME.json and NAME.txt there, and its messages go to NAME.log.
        minutes: for all of them.
        dry: whether they run in miniature on the CPU.
        precisions: of the networks that are timed, with commas, besides the textbook's float32.

    Returns:
        How each ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept, end = limits(chosen, minutes), time.monotonic() + 60 * minutes
    outcomes, begun = list[Outcome](), 0
    for stage in stages(chosen):
        begun += len(stage)
        seconds = max(end - time.monotonic() - sum(kept[later] for later in chosen[begun:]), GRACE_S)
        print(f"{', '.join(stage)}: up to {seconds:.0f} s", flush=True)
        commands = {name: command(name, out, seconds, dry, chosen, precisions) for name in stage}
        for outcome in run_stage(commands, out, seconds):
            word = "ok" if outcome.ok else "FAILED"
            print(f"{outcome.section}: {word}, {outcome.seconds:.0f} s: {outcome.says}", flush=True)
            outcomes.append(outcome)
    return outcomes


def stages(chosen: Sequence[str]) -> list[list[str]]:
    """The sections that run at once, stage by stage."""
    together = [name for name in chosen if name in SIDE_BY_SIDE]
    return [*([together] if together else []), *([name] for name in chosen if name not in SIDE_BY_SIDE)]


def command(name: str, out: Path, seconds: float, dry: bool, chosen: Sequence[str], precisions: str) -> list[str]:
    """The command that runs a section, one of those that are chosen."""
    words = [sys.executable, "-m", "benchmarks.gpu_section", name, str(out), f"{max(seconds - GRACE_S, 1):.1f}"]
    words += ["--of", ",".join(chosen), "--precisions", precisions]
    return [*words, "--dry"] if dry else words


def run_stage(commands: Mapping[str, Sequence[str]], out: Path, seconds: float) -> list[Outcome]:
    """Run sections' commands at once; they and all that they have started end with the time."""
    began, spent = time.monotonic(), dict[str, float]()
    processes = dict[str, subprocess.Popen[bytes]]()
    try:
        for name, words in commands.items():
            processes[name] = _started(words, name, out)
        while len(spent) < len(processes) and time.monotonic() - began < seconds:
            for name in [name for name in processes if name not in spent and processes[name].poll() is not None]:
                spent[name] = time.monotonic() - began
            time.sleep(POLL_S)
    finally:
        for process in processes.values():
            _end(process)
    codes = {name: processes[name].returncode if name in spent else None for name in processes}
    return [_outcome(name, out, code, spent.get(name, seconds)) for name, code in codes.items()]


def _started(words: Sequence[str], name: str, out: Path) -> subprocess.Popen[bytes]:
    for kind in ("json", "txt", "log"):
        (out / f"{name}.{kind}").unlink(missing_ok=True)
    with open(out / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )


def _outcome(name: str, out: Path, code: int | None, spent: float) -> Outcome:
    found = _read(out / f"{name}.json")
    says = str(found.get("says", ""))
    if code is None:
        so_far = f"; by then: {says}" if says else ""
        return Outcome(name, False, spent, f"stopped after the {spent:.0f} s that it may take{so_far}")
    if code == 0 and found:
        return Outcome(name, bool(found.get("ok")), spent, says)
    return Outcome(name, False, spent, f"exit code {code}: {_last_line(out / f'{name}.log')}")


def environment() -> Mapping[str, str]:
    """The tree on PYTHONPATH, few threads for each of many compilers, and one folder for what they keep."""
    kept = cache_folder()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    chosen = {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"), "TRITON_CACHE_DIR": str(kept / "triton"),
              "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # fmt: skip
    return {**chosen, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def report(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| section | | s | |", "|---|---|---|---|"]
    for one in outcomes:
        says = " ".join(one.says.split()).replace("|", r"\|")
        lines.append(f"| {one.section} | {'ok' if one.ok else 'FAILED'} | {one.seconds:.0f} | {says} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where a section failed, 2 where an option is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the results")
    parser.add_argument(
        "--only", metavar="SECTIONS", default=",".join(SHARES), help="with commas; default: %(default)s"
    )
    parser.add_argument("--precisions", default=PRECISIONS, help="of the steps, with commas; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of them; default: %(default)g")
    parser.add_argument("--dry", action="store_true", help="run in miniature on the CPU: the figures say nothing")
    given = parser.parse_args(arguments)
    chosen = [name.strip() for name in given.only.split(",")]
    wrong = [name for name in chosen if name not in SHARES]
    if wrong:
        parser.error(f"--only must name sections among {', '.join(SHARES)}, got {wrong[0]!r}; correct it")
    if not 0.1 <= given.minutes <= 600:
        parser.error(f"--minutes must be in 0.1 … 600, got {given.minutes:g}; leave it out for {MINUTES:g}")
    if not given.dry:
        why = _no_gpu()
        if why:
            parser.error(f"{why}; --dry runs in miniature on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the section would go on without us
    outcomes = run(
        [name for name in SHARES if name in chosen], given.out.absolute(), given.minutes, given.dry, given.precisions
    )
    table = report(outcomes)
    write(given.out / "summary.json", json.dumps([dataclasses.asdict(one) for one in outcomes], indent=2))
    write(given.out / "summary.txt", table)
    print("\n" + table, end="", flush=True)
    return 0 if all(one.ok for one in outcomes) else FAILED


def _no_gpu() -> str:
    """Why there is no GPU to measure; "" if there is one."""
    import torch

    from fastddpm.engines.no_gpu import why_no_gpu

    return "" if torch.cuda.is_available() else why_no_gpu() or "there is no GPU"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section's process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return text[-_TAIL:].splitlines()[-1][:300] if text else "no message"


if __name__ == "__main__":
    sys.exit(main())
