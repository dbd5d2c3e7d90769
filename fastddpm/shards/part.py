"""Part: where a worker begins, given or read from the environment that its launcher made."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence

_TEXT = re.compile(r"(\d+)/(\d+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of one worker: the shards k with k mod count = index come first, then those of the others.

    It is where a worker begins, not a fence: a set is finished by whoever is there, be the number of parts right or
    not.

    Attributes:
        index: which part, from 0.
        count: how many there are; None where only the index is known.
    """

    index: int = 0
    count: int | None = 1

    def __post_init__(self) -> None:
        if self.count is not None and not 0 <= self.index < self.count:
            raise ValueError(
                f"--part must be I/N with I in 0 … N − 1, got {self.index}/{self.count}; the first part is 0/N"
            )

    @property
    def name(self) -> str:
        """What tells it from the other parts; "" if there are none."""
        if self.count == 1:
            return ""
        return str(self.index) if self.count is None else f"{self.index}/{self.count}"

    def order(self, shards: int, rng: random.Random) -> tuple[Sequence[int], Sequence[int]]:
        """The numbers of all shards: one's own in the order in which they are drawn, and then the others'.

        Where the number of parts is not known, part i begins at the fraction of the way that is i's binary digits in
        reverse (van der Corput 1935): 0, 1/2, 1/4, 3/4 …, which is even for any number of parts, and all are one's own.

        Args:
            shards: how many there are.
            rng: shuffles the others', so that two that help do not meet.
        """
        if self.count is None:
            start = int(_reversed_bits(self.index) * shards)
            return [*range(start, shards), *range(start)], []
        others = [k for k in range(shards) if k % self.count != self.index]
        rng.shuffle(others)
        return range(self.index, shards, self.count), others


def _reversed_bits(index: int) -> float:
    """Van der Corput's sequence in base 2, in [0, 1)."""
    digits = f"{index:b}"[::-1]
    return int(digits, 2) / (1 << len(digits))


def parse_part(text: str) -> Part:
    """The part that "I/N" names.

    Raises:
        ValueError: it is not of this form.
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"--part must be I/N, got {text!r}; write 0/8 for the first of eight")
    return Part(int(found[1]), int(found[2]))


def part_of(environment: Mapping[str, str]) -> Part:
    """The part that a launcher has given to this process; the whole where none has.

    Read are, in this order, what torchrun sets (RANK, WORLD_SIZE), Slurm's array jobs (SLURM_ARRAY_TASK_ID with _MIN,
    _STEP and _COUNT), and Kubernetes' Indexed Jobs (JOB_COMPLETION_INDEX, which comes without a count).

    Raises:
        ValueError: a variable is no whole number, or they contradict each other.
    """

    def value(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name} must be a whole number, got {text!r}; mend the launcher, or give --part I/N")
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _checked("RANK", value("RANK"), value("WORLD_SIZE"))
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = max(1, value("SLURM_ARRAY_TASK_STEP", 1))
        index = (value("SLURM_ARRAY_TASK_ID") - value("SLURM_ARRAY_TASK_MIN", 0)) // step
        count = value("SLURM_ARRAY_TASK_COUNT") if "SLURM_ARRAY_TASK_COUNT" in environment else None
        # An array such as 1,5,7 has gaps: only the spread matters then.
        return Part() if count == 1 else Part(index, count if count and 0 <= index < count else None)
    if "JOB_COMPLETION_INDEX" in environment:
        return Part(value("JOB_COMPLETION_INDEX"), None)
    return Part()


def _checked(name: str, index: int, count: int) -> Part:
    if not 0 <= index < count:
        raise ValueError(f"{name} must be in 0 … {count - 1}, got {index}; mend the launcher, or give --part I/N")
    return Part(index, count)


def local_gpu(environment: Mapping[str, str], gpus: int) -> str | None:
    """The GPU that LOCAL_RANK picks, as a device's name; None where nothing is picked.

    A process that sees one GPU takes that: then its launcher has given each process its own.

    Args:
        environment: of the process.
        gpus: how many it sees.

    Raises:
        ValueError: LOCAL_RANK is no whole number, or there are fewer GPUs than processes.
    """
    text = environment.get("LOCAL_RANK")
    if text is None or gpus < 2:
        return None
    if not (text.isascii() and text.isdigit() and int(text) < gpus):
        raise ValueError(
            f"LOCAL_RANK must be in 0 … {gpus - 1} (the GPUs of this machine), got {text!r}; start a process a GPU"
        )
    return f"cuda:{int(text)}"
