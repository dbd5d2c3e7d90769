"""diffusers' scheduler_config.json: the noise schedule and the conventions of sampling that it stands for."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypedDict, cast

import torch

from fastddpm.checkpoints.base import CheckpointError, blamed_on
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.native import read_json
from fastddpm.common.records import Record, Within, read_record
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import Prediction, Variance

SCHEDULER_NAME = "scheduler_config.json"
_NEEDED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "variance_type", "clip_sample",
           "prediction_type")  # fmt: skip
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x_start", "v_prediction": "v"}


class Conventions(TypedDict):
    """The conventions of sampling that a scheduler stands for, as arguments of `ModelSpec`."""

    prediction: Prediction
    variance: Variance
    clip: float | None
    threshold: tuple[float, float] | None
    clipped_eps: Literal["raw"]
    noise_gate: Literal["t0"]
    prev_timestep: Literal["stride"]
    final_alpha_to_one: bool
    spacing: Literal["leading", "trailing", "linspace"]
    steps_offset: int
    dpmpp_clips: bool
    lower_order_final: Literal["never", "short", "always"]
    second_difference: Literal["half"]


@dataclasses.dataclass(frozen=True)
class DDPMConfig(Record):
    """What DDPMScheduler's configuration holds, in the library's names and with its defaults; None is null."""

    REMEDY = "nothing else is supported"

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    # Only DDPMScheduler has a variance; where another one says "fixed_large", DDPMScheduler.from_config would take it.
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"] | None
    ) = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def schedule(self) -> NoiseSchedule:
        """The noise schedule in float32, in which the library computes.

        Raises:
            TypeError: A number is none that a schedule takes.
            ValueError: A number is out of range.
        """
        T = self.num_train_timesteps
        if self.trained_betas is None:
            name = "logistic" if self.beta_schedule == "sigmoid" else self.beta_schedule
            ends = {"beta_start": self.beta_start, "beta_end": self.beta_end}
            options = {} if name in ("squaredcos_cap_v2", "laplace") else ends
            schedule = NoiseSchedule.by_name(name, T, dtype=torch.float32, **options)
        elif len(self.trained_betas) == T:
            schedule = NoiseSchedule.from_betas(self.trained_betas, dtype=torch.float32)
        else:
            raise ValueError(
                f"trained_betas must be a list of {T} numbers or null, got {len(self.trained_betas)}; mend the file"
            )
        return schedule.rescale_zero_terminal_snr() if self.rescale_betas_zero_snr else schedule

    def conventions(self) -> Conventions:
        """What the options say of sampling."""
        threshold = (self.dynamic_thresholding_ratio, self.sample_max_value)
        return {
            "prediction": _PREDICTIONS[self.prediction_type],
            # fixed_large_log gives NaN in the library, which takes the root of a logarithm; it means the large one.
            "variance": cast(Variance, (self.variance_type or "fixed_small").removesuffix("_log")),
            "clip": self.clip_sample_range if self.clip_sample else None,
            "threshold": threshold if self.thresholding else None,
            "clipped_eps": "raw",
            "noise_gate": "t0",
            "prev_timestep": "stride",
            "final_alpha_to_one": True,
            "spacing": self.timestep_spacing,
            "steps_offset": self.steps_offset,
            "dpmpp_clips": False,
            "lower_order_final": "short",
            "second_difference": "half",
        }


@dataclasses.dataclass(frozen=True)
class DDIMConfig(DDPMConfig):
    """What DDIMScheduler's configuration holds."""

    set_alpha_to_one: bool = True

    def conventions(self) -> Conventions:
        """As `DDPMConfig.conventions`."""
        return {**super().conventions(), "final_alpha_to_one": self.set_alpha_to_one}


@dataclasses.dataclass(frozen=True)
class DPMSolverConfig(DDPMConfig):
    """What DPMSolverMultistepScheduler's configuration holds."""

    timestep_spacing: Literal["leading", "trailing", "linspace"] = "linspace"
    lower_order_final: bool = True
    euler_at_final: bool = False
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"
    solver_order: Literal[2, 3] = 2
    solver_type: Literal["midpoint"] = "midpoint"
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    use_lu_lambdas: Literal[False] | None = False
    use_flow_sigmas: Literal[False] | None = False
    use_dynamic_shifting: Literal[False] | None = False
    lambda_min_clipped: Annotated[float, Within(-math.inf, -math.inf)] | Literal["-Infinity"] | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def conventions(self) -> Conventions:
        """As `DDPMConfig.conventions`."""
        return {
            **super().conventions(),
            "final_alpha_to_one": self.final_sigmas_type == "zero",
            "lower_order_final": "always" if self.euler_at_final else "short" if self.lower_order_final else "never",
        }


SCHEDULER_FLAGS = tuple(field.name for field in dataclasses.fields(DDPMConfig))
SCHEDULERS: dict[str, type[DDPMConfig]] = {
    "DDPMScheduler": DDPMConfig,
    "DDPMParallelScheduler": DDPMConfig,
    "DDIMScheduler": DDIMConfig,
    "DDIMParallelScheduler": DDIMConfig,
    "DPMSolverMultistepScheduler": DPMSolverConfig,
}
# Other ways through the same forward process: their betas and their prediction hold for our solvers too.
_RELATIVES = (
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
# Networks that were trained for these are no DDPMs, and no other scheduler makes them one.
_OTHERS = {
    "CMStochasticIterativeScheduler": "consistency models",
    "EDMDPMSolverMultistepScheduler": "EDM",
    "EDMEulerScheduler": "EDM",
    "FlowMatchEulerDiscreteScheduler": "flow matching",
    "FlowMatchHeunDiscreteScheduler": "flow matching",
    "KarrasVeScheduler": "Karras et al.'s variance-exploding models",
    "LCMScheduler": "latent consistency models",
    "ScoreSdeVeScheduler": "score-SDE's variance-exploding models",
    "ScoreSdeVpScheduler": "score-SDE's models of continuous time",
    "TCDScheduler": "trajectory consistency models",
}


def read_scheduler(path: Path, flags: Flags) -> tuple[NoiseSchedule, Conventions]:
    """Find and read the scheduler of a checkpoint folder.

    Args:
        path: The folder of the pipeline or of the network.
        flags: May name another scheduler, or hold the options of one where there is no file.

    Returns:
        The schedule, and the conventions of sampling.

    Raises:
        CheckpointError: If there is none, or its kind or an option is not supported.
    """
    file = _find(path, flags)
    if file is not None:
        extra = [name for name in SCHEDULER_FLAGS if name in flags]
        if extra:
            raise CheckpointError(f"{flags.source}: {', '.join(extra)} stand in {file}; leave the flags out")
        values, source, origin = read_json(file), str(file), "file"
        kind = _kind(values.get("_class_name"), file)
    else:
        flags.require(*_NEEDED)
        values, source, origin = flags.given(SCHEDULER_FLAGS), flags.source, "flag"
        kind = "DDPMScheduler"
    with blamed_on(source):
        config = read_record(SCHEDULERS[kind], values, more=True)
        told = {name: value for name, value in vars(config).items() if name != "lambda_min_clipped"}
        flags.note_all(told, values, origin)
        if file is not None:
            flags.note("scheduler", values["_class_name"], "flag" if "scheduler" in flags else origin)
        schedule = config.schedule()
    return schedule, config.conventions()


def conventions_of(kind: str, config: Mapping[str, object]) -> Conventions:
    """The conventions of sampling that a scheduler in memory stands for, apart from its betas and timesteps.

    Args:
        kind: The name of its class: DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler.
        config: Its `config`; what is left out is the library's default.

    Raises:
        CheckpointError: If an option is not supported; it is named.
    """
    # Betas and timesteps may be of any type; lambda_min_clipped only says where timesteps end.
    elsewhere = {"num_train_timesteps", "lambda_min_clipped", *(name for name in config if "beta" in name)}
    with blamed_on(kind):
        given = {name: value for name, value in config.items() if name not in elsewhere}
        found = read_record(SCHEDULERS[kind], given, more=True)
    return found.conventions()


def _kind(name: object, file: Path) -> str:
    """The scheduler that is meant by a class's name: itself, or DDIM for those that only walk another way."""
    own = name.removeprefix("Fast") if isinstance(name, str) else ""  # our drop-ins have their parents' options
    if own in SCHEDULERS:
        return own
    if name in _RELATIVES:
        warnings.warn(
            f"{file}: {name} is no solver of fastddpm; its betas and its prediction hold, and the rest is as in "
            "DDIMScheduler.from_config: choose solver ddim, ddpm, dpmpp_2m or dpmpp_3m",
            stacklevel=2,
        )
        return "DDIMScheduler"
    if isinstance(name, str) and name in _OTHERS:
        raise CheckpointError(f"{file}: {name} is of {_OTHERS[name]}, not of a DDPM: not supported")
    raise CheckpointError(
        f"{file}: the scheduler must be one of {', '.join((*SCHEDULERS, *_RELATIVES))}, got {name}, which is not "
        "supported; give scheduler=… another scheduler_config.json"
    )


def _find(path: Path, flags: Flags) -> Path | None:
    wanted = flags.path("scheduler")
    if wanted is None:
        found = [place for place in (path / "scheduler" / SCHEDULER_NAME, path / SCHEDULER_NAME) if place.is_file()]
        return found[0] if found else None
    for place in (path / wanted, Path(wanted)):
        file = place / SCHEDULER_NAME if place.is_dir() else place
        if file.is_file():
            return file
    raise CheckpointError(f"{flags.source}: scheduler must be a {SCHEDULER_NAME} or its folder, got {wanted}")
