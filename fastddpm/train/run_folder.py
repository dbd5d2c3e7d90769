"""RunFolder: what a training run leaves on the disk, and how the next session finds its place in it.

    config.json, model.safetensors   the checkpoint to sample from (fastddpm's own format)
    train_state.safetensors          weights, averaged weights, AdamW's moments, the step, the run's settings
    metrics.jsonl                    a line for each saved state

The state is written last: where it stands, all that belongs to its step stands too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from filelock import FileLock, Timeout
from torch import Tensor

from fastddpm.checkpoints import native
from fastddpm.checkpoints.base import CheckpointError, check_file, check_weights
from fastddpm.files import check_replaceable, make_folder, remove_leftovers, write_tensors, write_text
from fastddpm.nets.config import UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.train.config import TrainConfig

STATE_NAME = "train_state.safetensors"
METRICS_NAME = "metrics.jsonl"
LOCK_NAME = ".fastddpm.lock"
PARTS = ("model", "ema", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on.

    Args:
        step: Optimiser steps done.
        parts: For each of `PARTS` a tensor per parameter: the weights, their average, and AdamW's two moments.
    """

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]


class Metrics(TypedDict):
    """A line of metrics: what is known when a state is saved."""

    step: int
    loss: float
    images_per_second: float | None
    time: float


class RunFolder:
    """The folder of one training run; one process at a time may write to it, which `locked` sees to."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is made or read yet."""
        self.path = path

    @contextlib.contextmanager
    def locked(self, step: int) -> Iterator[None]:
        """Be the only process that trains in the folder; what a killed one left half-written is removed.

        Args:
            step: Of the state that was loaded, 0 if there was none.

        Raises:
            ValueError: If another process trains there, or has since the state was loaded.
            OSError: If the folder cannot be made or written.
        """
        for name in ("config.json", "model.safetensors", STATE_NAME, METRICS_NAME):
            check_replaceable(self.path / name)
        make_folder(self.path)
        lock = FileLock(self.path / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"{self.path} must be trained in by one process, got another one that does; wait for it or use another "
                "folder"
            ) from error
        try:
            remove_leftovers(self.path, alone=True)
            there = self._saved_step()
            if there != step:
                raise ValueError(
                    f"{self.path} must stand at step {step}, as when it was read, got {there}: another process trained "
                    "in it meanwhile; start again"
                )
            yield
        finally:
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            lock.release()

    def _saved_step(self) -> int:
        path = self.path / STATE_NAME
        return int(json.loads(native.read_metadata(path)["step"])) if path.exists() else 0

    def save_state(self, state: TrainState, settings: Mapping[str, object]) -> None:
        """Write the state, atomically.

        Args:
            state: What to resume from.
            settings: What must not change between the sessions of a run, as JSON-ready values.

        Raises:
            OSError: If the file cannot be written.
        """
        tensors = {f"{part}.{name}": value for part, named in state.parts.items() for name, value in named.items()}
        facts = {"step": state.step, "fingerprint": settings}
        write_tensors(self.path / STATE_NAME, tensors, {key: json.dumps(value) for key, value in facts.items()})

    def load_state(self, settings: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> TrainState | None:
        """Read the state; None if there is none yet.

        Args:
            settings: Those of this session.
            shapes: Shape of each parameter.

        Returns:
            The state, float32 on the CPU.

        Raises:
            ValueError: If the state belongs to a run with other settings.
            CheckpointError: If the state or the metrics are damaged.
        """
        path = self.path / STATE_NAME
        self._metrics()
        if not path.exists():
            return None
        tensors, metadata = native.read_safetensors(path), native.read_metadata(path)
        try:
            step, theirs = json.loads(metadata["step"]), _completed(json.loads(metadata["fingerprint"]))
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"step {step!r}")
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a training state ({error!r}); remove it to start afresh") from error
        different = _differences(*(json.loads(json.dumps(both)) for both in (theirs, dict(settings))))
        if different:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(different)}; "
                "give the same options to resume it, or another folder to start a new run"
            )
        parts = {
            part: {name.partition(".")[2]: v for name, v in tensors.items() if name.startswith(f"{part}.")}
            for part in PARTS
        }
        return TrainState(step, {part: check_weights(shapes, named, str(path)) for part, named in parts.items()})

    def append_metrics(self, line: Metrics) -> None:
        """Add a line; lines of the same step or later ones, which a kill has undone, are dropped.

        Raises:
            CheckpointError: If the file holds something else.
            OSError: If the file cannot be written.
        """
        kept = [old for old in self._metrics() if old["step"] < line["step"]]
        write_text(self.path / METRICS_NAME, "".join(json.dumps(entry) + "\n" for entry in [*kept, dict(line)]))

    def _metrics(self) -> list[Metrics]:
        path = self.path / METRICS_NAME
        check_file(path)
        if not path.exists():
            return []
        entries: list[Metrics] = []
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if not isinstance(entry["step"], int):
                    raise ValueError(f"step {entry['step']!r}")
                entries.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: line {len(entries) + 1} must be a JSON object with a step ({error}); move the file away"
            ) from error
        return entries


def _completed(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings that an older fastddpm wrote, with the defaults of the options that it did not have yet.

    Raises:
        KeyError: If a part is missing.
        TypeError: If a part is of another kind.
        ValueError: If a newer fastddpm wrote them, or nothing of the kind.
    """
    return {
        **settings,
        "unet": UNetConfig.from_dict(settings["unet"]).to_dict(),
        "schedule": NoiseSchedule.from_config(settings["schedule"]).to_config(),
        "spec": ModelSpec.from_dict(settings["spec"]).to_dict(),
        "config": TrainConfig.from_dict(settings["config"]).lasting(),
    }


def _differences(theirs: object, mine: object, name: str = "") -> list[str]:
    """What differs between two nested settings, as readable phrases."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted({*theirs, *mine})
        return [d for key in keys for d in _differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip("."))]
    return [] if theirs == mine else [f"{name} was {theirs!r}, is {mine!r}"]
