"""denoising-diffusion-pytorch: a Trainer's model-N.pt, or the state dict of a GaussianDiffusion or of its U-Net.

The network is the package's own (`fastddpm[lucidrains]`); its arguments follow from the weights' names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, check_weights
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains_package import Module, PackageUNet
from fastddpm.checkpoints.lucidrains_schedule import (
    BUFFERS,
    OBJECTIVES,
    SCHEDULES,
    RoundedSchedule,
    find_objective,
    named_schedule,
    read_schedule,
)
from fastddpm.checkpoints.lucidrains_unet import ENTRY, structure, unseen_arguments
from fastddpm.checkpoints.reading import as_state_dict
from fastddpm.spec import ModelSpec, Prediction

NAME = "lucidrains"
REASON = "keys init_conv and time_mlp"
PREDICTIONS: dict[str, Prediction] = {"pred_noise": "eps", "pred_x0": "x_start", "pred_v": "v"}

# What the weights tell: accepted, and compared with them.
_DERIVED = ("dim", "init_dim", "out_dim", "dim_mults", "channels", "self_condition", "learned_variance", "num_classes",
            "learned_sinusoidal_dim", "full_attn", "timesteps")  # fmt: skip
# What has no part in sampling.
_TRAINING = ("dropout", "flash_attn", "cond_drop_prob", "min_snr_loss_weight", "min_snr_gamma", "offset_noise_strength",
             "immiscible", "vb_loss_weight", "learned_sinusoidal_cond", "random_fourier_features")  # fmt: skip
_SAMPLING = ("image_size", "objective", "beta_schedule", "schedule_fn_kwargs", "auto_normalize", "sampling_timesteps",
             "ddim_sampling_eta", "attn_heads", "attn_dim_head", "sinusoidal_pos_emb_theta", "model")  # fmt: skip
FLAGS = (*_SAMPLING, *_DERIVED, *_TRAINING)
_MODELS = ("ema_model", "online_model")


def detect(values: object) -> bool:
    """Whether the contents of a file are such a checkpoint, or one of its networks alone."""
    return any(_is_network(state) for state in _networks(values).values())


def load(path: Path, values: object, given: Mapping[str, object]) -> Checkpoint:
    """Make the network, its schedule and conventions from a file's contents and the flags.

    Flags have the names of the arguments of the package's Unet and GaussianDiffusion. `image_size` is asked for always,
    `objective` where the loss weights do not show it, `attn_heads` (or `attn_dim_head`) for class-conditional networks,
    and `timesteps` and `beta_schedule` for a U-Net's weights alone. Nothing in a file shows `auto_normalize`,
    `sinusoidal_pos_emb_theta` and `ddim_sampling_eta`: unless given, they are the package's own defaults (True, 10000,
    and 0, or 1 for class-conditional networks). `sampling_timesteps` is the number of steps of DDIM runs that do not
    say it. All other flags follow from the weights and are compared with them, or matter for training alone. `model`
    picks the averaged weights ("ema_model", which the package samples from) or "online_model".

    A network of learned variance is LearnedGaussianDiffusion's, which predicts the noise whatever its objective says.
    Guidance of class-conditional networks is that of the engine, out_u + w (out_c − out_u): the package's projection
    (remove_parallel_component) and rescaling (rescaled_phi) on top of it are not applied.

    Raises:
        CheckpointError: If the package is missing, the weights are not whole, or flags are missing, unknown or wrong.
    """
    source = f"{path}, taken for {NAME} ({REASON})"
    # None is the default of many of the package's arguments.
    flags = Flags(source, {name: flag for name, flag in given.items() if flag is not None or name not in FLAGS}, FLAGS)
    model, state = _choose(values, flags)
    buffers = {name: state[name] for name in BUFFERS if name in state}
    weights = _weights(state, source)
    module, arguments = structure(weights, flags)
    _require(flags, arguments, module, bool(buffers))
    schedule = _schedule(buffers, flags)
    flags.agree(timesteps=schedule.T)
    spec = _spec(flags, arguments, schedule)
    network = PackageUNet(module, {**arguments, **unseen_arguments(weights, flags, module, arguments)})
    network.load(check_weights(network.shapes(), weights, source))
    training: dict[str, object] = {"model": model} if model else {}
    if isinstance(values, Mapping) and isinstance(values.get("step"), int):
        training["steps"] = values["step"]
    if isinstance(values, Mapping) and isinstance(values.get("version"), str):
        training["package"] = f"denoising-diffusion-pytorch {values['version']}"
    settings = flags.settings()
    return Checkpoint(network, schedule, spec, NAME, path, training, reason=REASON, settings=settings)


def _require(flags: Flags, arguments: Mapping[str, Any], module: Module, has_buffers: bool) -> None:
    """Ask for all that is missing at once; the objective is asked for later, where it does not show."""
    needed = ["image_size"]
    if not has_buffers:
        needed += ["timesteps", "beta_schedule"]
        if not arguments["learned_variance"]:
            needed.append("objective")
    if module == "classifier_free_guidance" and "attn_dim_head" not in flags:
        needed.append("attn_heads (or attn_dim_head)")
    flags.require(*needed)


# ------------------------------------------------------------------ what the file holds


def _networks(values: object) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file; a bare one stands under the empty name."""
    bare = as_state_dict(values)
    if bare is not None and ENTRY not in bare and f"model.{ENTRY}" not in bare:
        parts = {f"{name}.": name for name in _MODELS}  # an EMA's own state dict
        found = {name: _part(bare, prefix) for prefix, name in parts.items()}
        return {name: state for name, state in found.items() if state}
    if bare is not None:
        return {"": bare}
    if not isinstance(values, Mapping):
        return {}
    ema, online = as_state_dict(values.get("ema")), as_state_dict(values.get("model"))
    found = {}
    if ema is not None:
        found["ema_model"] = _part(ema, "ema_model.")
        found["online_model"] = _part(ema, "online_model.")
    if online is not None:
        found["online_model"] = online
    return {name: state for name, state in found.items() if state}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_network(state: Mapping[str, Tensor]) -> bool:
    return any(f"{prefix}{ENTRY}" in state and f"{prefix}time_mlp.1.weight" in state for prefix in ("", "model."))


def _choose(values: object, flags: Flags) -> tuple[str, dict[str, Tensor]]:
    """The network of the file that is asked for, under its name."""
    networks = _networks(values)
    name = flags.choice("model", _MODELS, "ema_model")
    if "" in networks and "model" not in flags:
        name = ""
    if name not in networks or not _is_network(networks[name]):
        there = ", ".join(name for name in networks if name and _is_network(networks[name])) or "one without a name"
        raise CheckpointError(f"{flags.source}: model must be a network of the file ({there}), got {name}; change it")
    return name, networks[name]


def _weights(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The U-Net's weights, of which nothing of the diffusion around it is left over."""
    inside = f"model.{ENTRY}" in state
    weights = _part(state, "model.") if inside else dict(state)
    left = [name for name in state if inside and not name.startswith("model.") and name not in BUFFERS]
    if left:
        raise CheckpointError(
            f"{source}: buffers must be those of GaussianDiffusion, got {', '.join(left[:3])}; other diffusions of the "
            "package (continuous time, elucidated, 1-D) are not supported"
        )
    return {name: value for name, value in weights.items() if inside or name not in BUFFERS}


# ------------------------------------------------------------------ the diffusion


def _schedule(buffers: Mapping[str, Tensor], flags: Flags) -> RoundedSchedule:
    """From the file's buffers, or, where it has none, from the flags."""
    name = flags.choice("beta_schedule", SCHEDULES) if "beta_schedule" in flags else None
    options = flags.given(("schedule_fn_kwargs",)).get("schedule_fn_kwargs", {})
    if not isinstance(options, Mapping) or not all(
        isinstance(key, str) and isinstance(value, (int, float)) for key, value in options.items()
    ):
        raise flags.wrong("schedule_fn_kwargs", "named numbers")
    if buffers:
        if "betas" not in buffers:
            raise CheckpointError(f"{flags.source}: betas is missing; give the whole checkpoint")
        return read_schedule(buffers, name, options, flags.source)
    T = flags.integer("timesteps")
    if T > 1_000_000:
        raise flags.wrong("timesteps", "at most 1,000,000")
    try:
        return RoundedSchedule.of(named_schedule(str(name), T, options))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{flags.source}: {error}") from error


def _spec(flags: Flags, arguments: Mapping[str, Any], schedule: RoundedSchedule) -> ModelSpec:
    """The conventions of GaussianDiffusion, or of the one beside the class-conditional U-Net."""
    learned, classes = arguments["learned_variance"], arguments.get("num_classes")
    if learned and classes is not None:
        raise CheckpointError(
            f"{flags.source}: a class-conditional U-Net must return as many channels as it takes, got twice as many; "
            "the package has no diffusion for it"
        )
    prediction = "eps" if learned else PREDICTIONS[_objective(flags, schedule)]
    size = _image_size(flags, len(arguments["dim_mults"]))
    steps = flags.integer("sampling_timesteps", schedule.T)
    if steps > schedule.T:
        raise flags.wrong("sampling_timesteps", f"at most {schedule.T}, the steps of training")
    eta = flags.number("ddim_sampling_eta", 0.0 if classes is None else 1.0)
    if not 0 <= eta <= 1:
        raise flags.wrong("ddim_sampling_eta", "in [0, 1]")
    normalizes = flags.boolean("auto_normalize", True)
    if classes is not None and not normalizes:
        raise flags.wrong("auto_normalize", "True for class-conditional networks, which know nothing else")
    return ModelSpec(
        (arguments["channels"], *size),
        prediction=prediction,
        variance="learned_range" if learned else "fixed_small",
        num_classes=classes,
        null_class=classes,
        # Beside the classes, ε is not derived anew from the clipped x_0.
        clipped_eps="raw" if classes is not None and prediction == "eps" else "rederive",
        spacing="linspace_x0",
        to_unit="affine" if normalizes else "identity",
        self_condition=arguments.get("self_condition", False),
        ddim_steps=steps if steps < schedule.T else None,
        ddim_eta=eta,
    )


def _objective(flags: Flags, schedule: RoundedSchedule) -> str:
    """What the network predicts: the flag, or what the weights of the losses show."""
    weight = getattr(schedule, "loss_weight", None)
    found = None if weight is None else find_objective(weight, schedule.alphas_cumprod_exact)
    if found is None:
        flags.require("objective")
        return flags.choice("objective", OBJECTIVES)
    flags.choice("objective", OBJECTIVES, found)
    flags.agree(objective=found)
    return found


def _image_size(flags: Flags, levels: int) -> tuple[int, int]:
    """(H, W), which the U-Net must be able to halve."""
    pair = flags.given(("image_size",)).get("image_size")
    if isinstance(pair, (list, tuple)):
        if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair):
            raise flags.wrong("image_size", "one integer or two, (height, width)")
        size = (pair[0], pair[1])
    else:
        size = (flags.integer("image_size"),) * 2
    factor = 2 ** (levels - 1)
    if min(size) < 1 or any(side % factor for side in size):
        raise flags.wrong("image_size", f"divisible by {factor}, the U-Net's downsampling")
    return size
