"""Compiled steps: `advance` as one ahead-of-time compiled package per (network, batch), kept on disk.

`torch.export` captures `advance` as a whole, the network and the update in one graph, and Inductor compiles it with the
weights as constants: convolution weights are re-packed once for the processor, and a call has no Python in it. The rows
of the solver's table are arguments, so one package serves any solver and any number of steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.denoiser import Denoiser
from fastddpm.fast_convs import with_fast_convs
from fastddpm.files import atomic_path, make_folder
from fastddpm.kernels._native import cache_folder, processor
from fastddpm.state import State, advance
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

CACHE_BYTES = 4 << 30
"""Most that the packages on disk may take; the ones that were used longest ago go first."""


CHANGED = ("x", "step", "history")
"""The tensors of a `State` that `advance` changes."""


class CompileError(RuntimeError):
    """A step could not be compiled; the message says why and what to do."""


class StepModule(nn.Module):
    """`advance` as a function of all tensors that it reads, in the order of `names`, with the network inside.

    With `in_place` it changes its arguments, as a CUDA graph needs. Otherwise it returns what `advance` changes and
    changes nothing itself: ahead-of-time packages were seen to lose changes that are made to an argument.
    """

    def __init__(self, denoiser: Denoiser, table: StepTable, names: Sequence[str], *, in_place: bool) -> None:
        """Keep what is not a tensor of a denoiser and a table; the network becomes a sub-module."""
        super().__init__()
        network = denoiser.unet if denoiser.unet is not None else denoiser.model
        self.network = network if isinstance(network, nn.Module) else None
        self._denoiser, self._table, self._names = denoiser, table, tuple(names)
        self._in_place = in_place

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """One step; returns the new values of `CHANGED`, or nothing where they are changed in place."""
        values = dict(zip(self._names, tensors, strict=True))
        if not self._in_place:
            values |= {name: values[name].clone() for name in CHANGED}
        network: Any = self._denoiser.model if self.network is None else self.network
        denoiser = dataclasses.replace(
            self._denoiser,
            model=network,
            unet=network if self._denoiser.unet is not None else None,
            times=values["times"],
            projections=values.get("projections"),
            slots=values.get("slots"),
        )
        table = dataclasses.replace(self._table, rows=values["rows"], timesteps=values["timesteps"])
        state = State(*(values.get(field.name) for field in dataclasses.fields(State)))  # type: ignore[arg-type]
        advance(denoiser, table, state, noise=values.get("noise"))
        return () if self._in_place else tuple(values[name] for name in CHANGED)


@dataclasses.dataclass(frozen=True)
class StepCall:
    """One batch's step as a function of named tensors: what is exported, and what a package is called with.

    Attributes:
        denoiser: the network at the table's rows.
        table: the rows; noise is always taken to be used, so that a package serves every solver.
        state: the samples. A history is kept always, for the same reason.
        noise: float32 [N, B, C, H, W], or None for Philox.
    """

    denoiser: Denoiser
    table: StepTable
    state: State
    noise: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The arguments by name, without those that are None."""
        values: dict[str, Tensor | None] = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(State)}
        values |= {"rows": self.table.rows, "timesteps": self.table.timesteps, "times": self.denoiser.times}
        values |= {"projections": self.denoiser.projections, "slots": self.denoiser.slots, "noise": self.noise}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def in_place(self) -> bool:
        """Whether the step changes the state's own tensors."""
        return self.state.x.device.type == "cuda"

    def bound(self, step: Callable[..., Any]) -> Callable[[Tensor | None], None]:
        """A compiled step on these samples: a function of the noise, if there is any.

        On a CPU the state gets new tensors for those that change, which is quicker than to copy into the old ones.
        """
        tensors = self.tensors()
        supplied = tensors.pop("noise", None) is not None
        arguments = list(tensors.values())
        in_place = self.in_place
        places = [(list(tensors).index(name), name) for name in CHANGED]

        def run(noise: Tensor | None) -> None:
            changed = step(*arguments, noise) if supplied else step(*arguments)
            if in_place:
                return
            for (place, name), value in zip(places, changed, strict=True):
                arguments[place] = value
                setattr(self.state, name, value)

        return run

    def module(self) -> StepModule:
        """The step as a module over these tensors; on a CPU its convolutions run the quicker way for this batch."""
        step = self._module()
        if self.state.x.device.type == "cpu" and step.network is not None:
            copy = dataclasses.replace(self, state=self.state.copy())
            tensors = tuple(copy.tensors().values())

            def run(network: nn.Module) -> None:
                step.network = network
                step(*tensors)

            with torch.no_grad():
                step.network, _ = with_fast_convs(step.network, run)
        return step

    def _module(self) -> StepModule:
        table = dataclasses.replace(self.table, uses_noise=True, uses_history=True)
        return StepModule(self.denoiser, table, list(self.tensors()), in_place=self.in_place)

    def dynamic_shapes(self) -> tuple[dict[int, Any] | None, ...]:
        """Which sizes may differ between calls: the number of rows."""
        rows = torch.export.Dim("rows", min=2, max=1 << 20)
        dynamic: dict[str, dict[int, Any]] = {name: {0: rows} for name in ("rows", "timesteps", "times")}
        dynamic["projections"] = {0: torch.export.Dim("projections", min=2)}
        if self.noise is not None and len(self.noise) > 1:
            dynamic["noise"] = {0: torch.export.Dim("noise", min=2)}
        return tuple(dynamic.get(name) for name in self.tensors())

    def signature(self) -> dict[str, Any]:
        """All that a package depends on, apart from the weights: two calls with the same one can share it."""
        shapes = {
            name: [str(value.dtype), list(value.shape[1:] if given else value.shape)]
            for (name, value), given in zip(self.tensors().items(), self.dynamic_shapes(), strict=True)
        }
        return {
            "tensors": shapes,
            "network": _describe(self.denoiser),
            "null class": self.denoiser.null_class,
            "self condition": self.denoiser.self_condition,
            "learned variance": self.table.variance == "learned_range",
            "threshold": None if self.table.threshold is None else dataclasses.astuple(self.table.threshold),
            "device": str(self.state.x.device),
            "threads": torch.get_num_threads(),
            "processor": f"{processor()} {torch.backends.cpu.get_cpu_capability()}",
            "versions": [fastddpm.__version__, torch.__version__],
        }


def is_cacheable(denoiser: Denoiser) -> bool:
    """Whether the network is known by its configuration and weights alone, so that a package of it may be kept."""
    return isinstance(denoiser.unet, UNet)


def weights_hash(network: nn.Module) -> str:
    """A digest of all parameters and buffers, with their names and types."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def package_path(call: StepCall, weights: str) -> Path:
    """Where the package for such calls is or would be."""
    text = json.dumps(call.signature() | {"weights": weights}, sort_keys=True)
    return cache_folder() / f"{weights[:8]}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.pt2"


def compile_step(call: StepCall, path: Path) -> float:
    """Compile a step and write its package.

    Args:
        call: example of the calls; sizes other than the number of rows are fixed by it.
        path: where the package goes; it is whole or absent.

    Returns:
        Seconds that it took.

    Raises:
        CompileError: the network cannot be captured as one graph, or there is no working C++ compiler.
        OSError: the package cannot be written.
    """
    began = time.perf_counter()
    # Exporting runs the step on fake tensors, so the state stays as it is.
    try:
        with torch.no_grad(), warnings.catch_warnings(), atomic_path(path) as temporary:
            warnings.simplefilter("ignore")
            program = torch.export.export(
                call.module().eval(),
                tuple(call.tensors().values()),
                dynamic_shapes={"tensors": call.dynamic_shapes()},
                strict=False,
            )
            # `freezing` lays the weights out for the processor at compile time.
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(temporary), inductor_configs={"freezing": True}
            )
    except OSError:
        raise
    except Exception as error:  # whatever the exporter, the compiler or the C++ compiler raise
        raise not_one_graph(error) from error
    _prune(path.parent, keep=path)
    _give_memory_back()
    return time.perf_counter() - began


def not_one_graph(error: Exception) -> CompileError:
    """The error for a network that an exporter or compiler stumbled over, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return CompileError(
        f"engine: the network must compile as one graph, got {type(error).__name__}: {reason}; use engine='eager'"
    )


def load_step(path: Path) -> Callable[..., Any]:
    """Load a package: a function of the tensors of a `StepCall`, in order, to those of `CHANGED`, one step later.

    Raises:
        CompileError: the file is no package that runs here; it is removed.
    """
    try:
        os.utime(path)
        loader = torch._inductor.aoti_load_package(str(path)).loader
    except Exception as error:
        path.unlink(missing_ok=True)
        raise CompileError(f"engine: {path} must be a compiled step, got one that does not load; run again") from error

    def call(*tensors: Tensor) -> list[Tensor]:
        # The package's own call would flatten its arguments first, which takes longer than a small update.
        changed: list[Tensor] = loader.boxed_run(list(tensors))
        return changed

    return call


def _give_memory_back() -> None:
    """Hand what compiling took back to the system, where its C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _prune(folder: Path, keep: Path) -> None:
    """Remove the packages that were used longest ago until all fit."""
    files = sorted((f for f in folder.glob("*.pt2") if f != keep), key=lambda f: f.stat().st_mtime, reverse=True)
    total = keep.stat().st_size
    for file in files:
        total += file.stat().st_size
        if total > CACHE_BYTES:
            file.unlink(missing_ok=True)


def _describe(denoiser: Denoiser) -> str:
    network = denoiser.unet if denoiser.unet is not None else denoiser.model
    return repr(network.config) if isinstance(network, UNet) else type(network).__qualname__


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a (network, batch, device): times of a step, and what it took to compile.

    Attributes:
        eager_ms: a step without compiling.
        compiled_ms: a compiled step, or None if that was never tried.
        compile_s: seconds that compiling took, or None.
        label: what it is, for people.
    """

    eager_ms: float
    compiled_ms: float | None = None
    compile_s: float | None = None
    label: str = ""


def remembered() -> dict[str, Measured]:
    """All measurements on disk, by package name; an unreadable file counts as none."""
    try:
        values = json.loads((cache_folder() / "measured.json").read_text(encoding="utf-8"))
        return {name: Measured(**fields) for name, fields in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(name: str, measured: Measured) -> None:
    """Add a measurement to those on disk; where that is not possible, it is forgotten."""
    values = remembered() | {name: measured}
    try:
        make_folder(cache_folder())
        with atomic_path(cache_folder() / "measured.json") as temporary:
            temporary.write_text(json.dumps({k: dataclasses.asdict(v) for k, v in values.items()}, indent=1))
    except OSError:
        pass
