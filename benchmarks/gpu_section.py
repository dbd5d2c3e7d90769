"""One section of `benchmarks.gpu` in its own process: `python -m benchmarks.gpu_section NAME OUT SECONDS`.

It writes OUT/NAME.json with {"ok", "says", …} and OUT/NAME.txt for people, the steps also as far as they have come.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import PRECISIONS, ROOT, SHARES, write

PROCESSES = {"tests": 8, "compile": 12}
"""That test or compile at once."""
SLOW_CHECKS = ("engine compiled",)
"""Of the doctor's, left out of a dry run: on a CPU a compiler takes half a minute."""
SPEED_CHECKS = ("copy", "speed of p_sample", "speed of q_sample", "speed of add_group_norm")
"""Of the doctor's, left to the section that has the machine to itself."""
_COMPILE_ONE = """
import json, sys
from fastddpm.bench.sections import compile_ahead
device, network, peer, batch, dry = sys.argv[1:]
print(json.dumps(compile_ahead(device, network, peer, int(batch), dry == "1")))
"""
DRY_TESTS = ("tests/kernels/test_gpu.py",)


@dataclasses.dataclass(frozen=True)
class Section:
    """How a section is run.

    Attributes:
        name: as in `SHARES`.
        out: the folder for results.
        seconds: that it may take.
        dry: whether it runs in miniature on the CPU.
        chosen: all sections of the run.
        precisions: of the networks that are timed.
    """

    name: str
    out: Path
    seconds: float
    dry: bool
    chosen: Sequence[str] = tuple(SHARES)
    precisions: Sequence[str] = tuple(PRECISIONS.split(","))

    @property
    def device(self) -> str:
        """Where."""
        return "cpu" if self.dry else "cuda"

    def keep(self, ok: bool, says: str, text: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Write what is known now."""
        found = {"section": self.name, "dry": self.dry, "ok": ok, "says": says, **values}
        write(self.out / f"{self.name}.txt", text)
        write(self.out / f"{self.name}.json", json.dumps(found, indent=2))


def doctor(section: Section) -> None:
    """`fastddpm doctor`."""
    import torch

    from fastddpm.cli.doctor import as_lines, summary
    from fastddpm.doctor.checks import Result, examine

    device, results = torch.device("cpu" if section.dry else "cuda:0"), list[Result]()

    def keep(done: bool) -> None:
        checks = [dataclasses.asdict(result) for result in results]
        ok = done and all(result.ok for result in results)
        section.keep(ok, summary(results), as_lines(results), checks=checks)

    for result in examine(device, leave_out=SLOW_CHECKS if section.dry else SPEED_CHECKS):
        results.append(result)
        keep(False)
    keep(True)


def tests(section: Section) -> None:
    """The tests marked `gpu`, in processes side by side where pytest-xdist is there."""
    report, output = section.out / "tests.xml", section.out / "pytest.txt"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider",
             f"--junitxml={report}"]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(2 if section.dry else PROCESSES["tests"])]
    files = DRY_TESTS if section.dry else marked_files()
    with open(output, "wb") as written:  # as they go on: what there is no time for must not take the others with it
        code = subprocess.run([*words, *files], cwd=ROOT, stdout=written, stderr=written, check=False).returncode
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = text.strip().splitlines() or ["no message"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    says = lines[-1].strip("= ")
    ok = code == 0 and (section.dry or " passed" in says)  # where all are skipped there was no GPU
    section.keep(ok, says, text, exit_code=code, failed=failed)


def marked_files() -> tuple[str, ...]:
    """The files with tests marked `gpu`: to import all others could ask for packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return tuple(str(f.relative_to(ROOT)) for f in files if re.search(r"mark\.gpu\b", f.read_text(encoding="utf-8")))


def compile_all(section: Section) -> None:
    """Fill Inductor's cache with what the benchmarks need, in processes side by side."""
    end, done = time.monotonic() + section.seconds, list[dict[str, Any]]()
    wanted = compilations(section.dry, section.chosen, section.precisions)

    def one(arguments: tuple[str, str, int]) -> dict[str, Any]:
        network, peer, batch = arguments
        left = end - time.monotonic()
        known = {"network": network, "peer": peer, "batch": batch}
        if left < 1:
            return {**known, "seconds": None, "error": "no time was left"}
        words = [sys.executable, "-c", _COMPILE_ONE, section.device, network, peer, str(batch), str(int(section.dry))]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        try:
            ended = subprocess.run(words, capture_output=True, text=True, timeout=left, env=environment, check=True)
            found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            return {**known, "seconds": None, "error": "no time was left"}
        except subprocess.CalledProcessError as error:
            return {**known, "seconds": None, "error": (error.stderr.strip().splitlines() or ["no message"])[-1]}
        return found

    def keep() -> None:
        made = [found for found in done if not found["error"]]
        text = "".join(
            f"{f['network']}, B = {f['batch']}, {f['peer']}: {f['error'] or format(f['seconds'], '.1f') + ' s'}\n"
            for f in done
        )
        section.keep(len(made) == len(wanted), f"{len(made)} of {len(wanted)} compiled", text, compiled=done)

    with concurrent.futures.ThreadPoolExecutor(2 if section.dry else PROCESSES["compile"]) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, arguments) for arguments in wanted]):
            done.append(future.result())
            keep()


def compilations(
    dry: bool, chosen: Sequence[str] = tuple(SHARES), precisions: Sequence[str] = Section.precisions
) -> list[tuple[str, str, int]]:
    """What is compiled ahead, the dear ones first: graphs hold what the compiled engine compiles, so one is enough."""
    from fastddpm.bench import sections

    found = [entry for entry in sections.compilations(dry, precisions) if not entry[1].startswith("fastddpm-graph")]
    found = [entry for entry in found if dry or entry[0] in chosen]
    if importlib.util.find_spec("diffusers") is None:
        found = [entry for entry in found if not entry[1].startswith("diffusers")]
    return found[:2] if dry else sorted(found, key=lambda entry: entry[0])  # celebahq256 before cifar10


def ceiling(section: Section) -> None:
    """A large copy, and the fastest matrix products."""
    from fastddpm.bench import sections

    found = sections.measure_peaks(section.device, section.dry)
    section.keep(True, found["text"].strip(), **found)


def kernels(section: Section) -> None:
    """The kernels beside what they replace."""
    from fastddpm.bench import sections

    def keep(found: sections.KernelsFound, done: bool) -> None:
        failed, count = found["failed"], len(found["cases"])
        says = f"{count} cases" + (f", {len(failed)} failed: {failed[0]}" if failed else "")
        section.keep(done and not failed and count > 0, says, **found)

    keep(sections.measure_kernels(section.device, section.dry, _say, lambda so_far: keep(so_far, False)), True)


def steps(section: Section) -> None:
    """A step of one network, in all engines and precisions, beside the others; kept after each batch size."""
    from fastddpm.bench import sections

    place = [workload.name for workload in sections.networks()].index(section.name)
    chosen = sections.networks(section.dry, section.precisions)[place : place + 1]

    def keep(found: sections.StepsFound, done: bool) -> None:
        left_out = found["left_out"]
        batches = sum(len(network["batches"]) for network in found["networks"])
        timed = sum(bool(p["seconds"]) for n in found["networks"] for one in n["batches"] for p in one["peers"])
        says = f"{timed} timed at {batches} batch sizes, {len(left_out)} left out"
        text = "\n".join((found["text"], *left_out, ""))
        section.keep(done and timed > 0, says, text, **{key: value for key, value in found.items() if key != "text"})

    found = sections.measure_steps(
        section.device, chosen, section.dry, 0.9 * section.seconds / 60, _say, lambda so_far: keep(so_far, False)
    )
    keep(found, True)


def trace(section: Section) -> None:
    """A Chrome trace of replays, the dearest kernels, and what the host does between replays."""
    from fastddpm.bench import sections

    found = sections.take_apart(section.device, section.out, section.dry)
    text = str(found.pop("text"))
    section.keep(True, text.splitlines()[0], text, **found)


def _say(what: str) -> None:
    print(what, flush=True)


RUN: dict[str, Callable[[Section], None]] = {
    "doctor": doctor, "tests": tests, "compile": compile_all, "ceiling": ceiling, "kernels": kernels, "cifar10": steps,
    "celebahq256": steps, "trace": trace,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=tuple(SHARES))
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--of", default=",".join(SHARES))
    parser.add_argument("--precisions", default=PRECISIONS)
    given = parser.parse_args(arguments)
    RUN[given.name](
        Section(given.name, given.out, given.seconds, given.dry, given.of.split(","), given.precisions.split(","))
    )


if __name__ == "__main__":
    main()
