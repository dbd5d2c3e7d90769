"""diffusers' scheduler_config.json: the noise schedule and the conventions of sampling that it stands for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.native import read_json
from fastddpm.process.schedule import NoiseSchedule

SCHEDULER_NAME = "scheduler_config.json"
_NEEDED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "variance_type", "clip_sample",
           "prediction_type")  # fmt: skip
_DDPM = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
SCHEDULER_FLAGS = tuple(_DDPM)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _DDPM,
    "DDIMScheduler": {**_DDPM, "set_alpha_to_one": True},
    "DPMSolverMultistepScheduler": {
        **_DDPM,
        "timestep_spacing": "linspace",
        "lower_order_final": True,
        "euler_at_final": False,
    },
}
_DEFAULTS["DDPMParallelScheduler"] = _DEFAULTS["DDPMScheduler"]
_DEFAULTS["DDIMParallelScheduler"] = _DEFAULTS["DDIMScheduler"]
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
_SOLVER_ONLY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2, 3),
    "solver_type": ("midpoint",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "lambda_min_clipped": (float("-inf"), None, "-Infinity"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x_start", "v_prediction": "v"}
# fixed_large_log gives NaN in the library, which takes the root of a logarithm; what it means is the large variance.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "logistic",
    "laplace": "laplace",
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler's configuration says.

    Args:
        schedule: In float32, in which the library computes.
        conventions: Arguments of `ModelSpec`.
    """

    schedule: NoiseSchedule
    conventions: Mapping[str, Any]


def read_scheduler(path: Path, flags: Flags) -> Scheduler:
    """Find and read the scheduler of a checkpoint folder.

    Args:
        path: The folder of the pipeline or of the network.
        flags: May name another scheduler, or hold the options of one where there is no file.

    Raises:
        CheckpointError: If there is none, or its kind or an option is not supported.
    """
    file = _find(path, flags)
    if file is not None:
        extra = [name for name in SCHEDULER_FLAGS if name in flags]
        if extra:
            raise CheckpointError(f"{flags.source}: {', '.join(extra)} stand in {file}; leave the flags out")
        values = read_json(file)
        kind = _kind(values.get("_class_name"), file)
        defaults = _DEFAULTS[kind]
        for name, default in defaults.items():
            flags.note(name, values.get(name, default), "file" if name in values else "default")
        flags.note("scheduler", values["_class_name"], "flag" if "scheduler" in flags else "file")
        return _scheduler(kind, {**defaults, **values}, str(file))
    flags.require(*_NEEDED)
    given = flags.given(SCHEDULER_FLAGS)
    for name, default in _DDPM.items():
        if name not in given:
            flags.note(name, default, "default")
    return _scheduler("DDPMScheduler", {**_DDPM, **given}, flags.source)


def conventions_of(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The conventions of sampling that a scheduler in memory stands for, apart from its betas and timesteps.

    Args:
        kind: The name of its class: DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler.
        config: Its `config`; what is left out is the library's default.

    Returns:
        Arguments of `ModelSpec`.

    Raises:
        CheckpointError: If an option is not supported; it is named.
    """
    values = {**_DEFAULTS[kind], **config, "lambda_min_clipped": None}  # which only says where timesteps end
    return _conventions(kind, values, kind)


def _kind(name: object, file: Path) -> str:
    """The scheduler that is meant by a class's name: itself, or DDIM for those that only walk another way."""
    if isinstance(name, str) and name.removeprefix("Fast") in _DEFAULTS:  # our own drop-ins have their parents' options
        return name.removeprefix("Fast")
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
        f"{file}: the scheduler must be one of {', '.join((*_DEFAULTS, *_RELATIVES))}, got {name}, which is not "
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


def _scheduler(kind: str, values: Mapping[str, Any], source: str) -> Scheduler:
    try:
        return Scheduler(_schedule(values, source), _conventions(kind, values, source))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{source}: {error}") from error


def _choice(values: Mapping[str, Any], name: str, choices: Mapping[str, str], source: str) -> Any:  # noqa: ANN401
    value = values[name]
    if not isinstance(value, str) or value not in choices:
        raise CheckpointError(f"{source}: {name} must be one of {', '.join(choices)}, got {value!r}: not supported")
    return choices[value]


def _schedule(values: Mapping[str, Any], source: str) -> NoiseSchedule:
    name = _choice(values, "beta_schedule", _SCHEDULES, source)
    T, ends = values["num_train_timesteps"], {key: values[key] for key in ("beta_start", "beta_end")}
    for key, value in {"num_train_timesteps": T, **ends}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{source}: {key} must be a number, got {value!r}; mend the file")
    betas = values["trained_betas"]
    if betas is not None:
        if not isinstance(betas, list) or not all(type(beta) in (int, float) for beta in betas) or len(betas) != T:
            raise CheckpointError(f"{source}: trained_betas must be a list of {T} numbers or null; mend the file")
        schedule = NoiseSchedule.from_betas(betas, dtype=torch.float32)
    else:
        options = {} if name in ("cosine", "laplace") else ends
        schedule = NoiseSchedule.by_name(name, T, dtype=torch.float32, **options)
    return schedule.rescale_zero_terminal_snr() if _flag(values, "rescale_betas_zero_snr", source) else schedule


def _flag(values: Mapping[str, Any], name: str, source: str) -> bool:
    value = values[name]
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {name} must be true or false, got {value!r}; mend the file")
    return value


def _conventions(kind: str, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    clip = values["clip_sample_range"] if _flag(values, "clip_sample", source) else None
    threshold = (values["dynamic_thresholding_ratio"], values["sample_max_value"])
    conventions = {
        "prediction": _choice(values, "prediction_type", _PREDICTIONS, source),
        "variance": "fixed_small",
        "clip": clip,
        "threshold": threshold if _flag(values, "thresholding", source) else None,
        "clipped_eps": "raw",
        "noise_gate": "t0",
        "prev_timestep": "stride",
        "spacing": values["timestep_spacing"],
        "steps_offset": values["steps_offset"],
        "dpmpp_clips": False,
        "lower_order_final": "short",
    }
    if kind.startswith("DDIM"):
        conventions["final_alpha_to_one"] = _flag(values, "set_alpha_to_one", source)
    if kind == "DPMSolverMultistepScheduler":
        _check_solver(values, source)
        conventions["final_alpha_to_one"] = values.get("final_sigmas_type", "zero") == "zero"
        short = "short" if _flag(values, "lower_order_final", source) else "never"
        conventions["lower_order_final"] = "always" if _flag(values, "euler_at_final", source) else short
    # Only DDPMScheduler has a variance; where another one says "fixed_large", DDPMScheduler.from_config would take it.
    if values["variance_type"] is not None:
        conventions["variance"] = _choice(values, "variance_type", _VARIANCES, source)
    return conventions


def _check_solver(values: Mapping[str, Any], source: str) -> None:
    for name, allowed in _SOLVER_ONLY.items():
        if name in values and values[name] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed if type(value) is type(allowed[0]))
            raise CheckpointError(f"{source}: {name} must be {wanted}, got {values[name]!r}: not supported")
