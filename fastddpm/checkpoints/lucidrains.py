"""denoising-diffusion-pytorch: a Trainer's model-N.pt, or the state dict of a GaussianDiffusion or of its U-Net.

The network's configuration follows from the weights' names and shapes (`lucidrains_unet`), but for what older versions
of the package compute otherwise (`lucidrains_versions`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, load_weights
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains_schedule import (
    BUFFERS,
    OBJECTIVES,
    SCHEDULES,
    RoundedSchedule,
    find_objective,
    named_schedule,
    read_schedule,
)
from fastddpm.checkpoints.lucidrains_unet import ENTRY, refuse_relatives, structure, unseen
from fastddpm.checkpoints.lucidrains_versions import (
    Version,
    is_wrapped,
    older_options,
    read_version,
    standardised,
    unwrapped,
)
from fastddpm.checkpoints.networks import behind, choose_network, prefixes, state_dicts, training_of
from fastddpm.nets.lucidrains import LucidrainsConfig, LucidrainsUNet
from fastddpm.nets.lucidrains_config import Arguments
from fastddpm.process.spec import ModelSpec, Prediction

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
             "ddim_sampling_eta", "attn_heads", "attn_dim_head", "sinusoidal_pos_emb_theta", "resnet_block_groups",
             "version", "model")  # fmt: skip
FLAGS = (*_SAMPLING, *_DERIVED, *_TRAINING)
_TIME = "time_mlp.1.weight"
_FOURIER = "time_mlp.0.weights"
# What GaussianDiffusion calls its network, today and in 0.x.
_ATTRIBUTES = ("model.", "denoise_fn.")
# Where a Trainer's file has its networks, and the names of these; "ema" alone was the averaged diffusion in 0.x.
_MODELS = {"ema.ema_model": "ema_model", "ema": "ema_model", "ema.online_model": "online_model",
           "model": "online_model"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Found:
    """A network in a file.

    Args:
        weights: The U-Net's, under the file's names.
        beside: What stands beside the U-Net: the arrays of its diffusion, if it is in one.
    """

    weights: dict[str, Tensor]
    beside: dict[str, Tensor]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The arrays of a GaussianDiffusion."""
        return {name: value for name, value in self.beside.items() if name in BUFFERS}


def detect(values: object) -> bool:
    """Whether the contents of a file are such a checkpoint, or one of its networks alone."""
    return bool(_networks(values))


def load(path: Path, values: object, given: Mapping[str, object]) -> Checkpoint:
    """Make the network, its schedule and conventions from a file's contents and the flags.

    Flags have the names of the arguments of the package's Unet and GaussianDiffusion. `image_size` is asked for always,
    `objective` where the loss weights do not show it, `attn_heads` (or `attn_dim_head`) for class-conditional networks
    and those of 1.8, `version` for those of versions before 1.8 whose file does not say it, and `timesteps` and
    `beta_schedule` for a U-Net's weights alone. Nothing in a file shows `auto_normalize`, `sinusoidal_pos_emb_theta`,
    `resnet_block_groups` and `ddim_sampling_eta`: unless given, they are the package's own defaults (True, 10000, 8,
    and 0, or 1 for class-conditional networks and before 1.0). `sampling_timesteps` is the number of steps of DDIM runs
    that do not say it. All other flags follow from the weights and are compared with them, or matter for training
    alone. `model` picks the averaged weights ("ema_model", which the package samples from) or "online_model".

    A network of learned variance is LearnedGaussianDiffusion's, which predicts the noise whatever its objective says.
    Guidance of class-conditional networks is that of the engine, out_u + w (out_c − out_u): the package's projection
    (remove_parallel_component) and rescaling (rescaled_phi) on top of it are not applied.

    Raises:
        CheckpointError: If the weights are not whole, or flags are missing, unknown or wrong.
    """
    source = f"{path}, taken for {NAME} ({REASON})"
    # None is the default of many of the package's arguments.
    flags = Flags(source, {name: flag for name, flag in given.items() if flag is not None or name not in FLAGS}, FLAGS)
    model, found = choose_network(_networks(values), flags)
    source = flags.source
    _refuse_relatives(found, source)
    by_file = values.get("version") if isinstance(values, Mapping) else None
    version = read_version(found.weights, flags, by_file)
    older = older_options(found.weights, flags, version)
    weights = unwrapped(standardised(found.weights, version))
    arguments = structure(weights, flags)
    heads = 4 if is_wrapped(found.weights) and "num_classes" not in arguments or _before(version, (1, 8, 6)) else None
    _require(flags, arguments, found, heads)
    schedule = _schedule(found.buffers, flags)
    flags.agree(timesteps=schedule.T)
    spec = _spec(flags, arguments, schedule, version)
    network = make_network(arguments | unseen(weights, flags, arguments, heads) | older, weights, source)
    training = training_of(values, model)
    if isinstance(by_file, str):
        training["package"] = f"denoising-diffusion-pytorch {by_file}"
    settings = flags.settings()
    return Checkpoint(network, schedule, spec, NAME, path, training, reason=REASON, settings=settings)


def make_network(arguments: Arguments, weights: Mapping[str, Tensor], source: str) -> LucidrainsUNet:
    """The network of a configuration and weights, in evaluation mode.

    Args:
        arguments: Fields of `LucidrainsConfig`.
        weights: Under today's names.
        source: The file's name for messages.

    Raises:
        CheckpointError: If the arguments do not fit each other, or the weights do not fit them.
    """
    try:
        with torch.device("meta"):
            network = LucidrainsUNet(LucidrainsConfig(**arguments))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    load_weights(network, weights, source)
    return network.eval()


def _before(version: Version | None, limit: Version) -> bool:
    return version is not None and version < limit


def _require(flags: Flags, arguments: Arguments, found: _Found, heads: int | None) -> None:
    """Ask for all that is missing at once; the objective is asked for later, where it does not show."""
    needed = ["image_size"]
    if not found.buffers:
        needed += ["timesteps", "beta_schedule"]
        if not arguments["learned_variance"]:
            needed.append("objective")
    if "attn_heads" not in arguments and heads is None and "attn_dim_head" not in flags:
        needed.append("attn_heads (or attn_dim_head)")
    flags.require(*needed)


# ------------------------------------------------------------------ what the file holds


def _networks(values: object) -> dict[str, _Found]:
    """The networks in a file, by where they stand; a bare one has the empty name."""
    found = {}
    for where, state in state_dicts(values).items():
        for prefix in prefixes(state, ENTRY):
            weights = behind(state, prefix)
            if _TIME not in weights:
                continue
            outer = next((prefix.removesuffix(name) for name in _ATTRIBUTES if prefix.endswith(name)), prefix)
            beside = behind(state, outer) if outer != prefix else {}
            beside = {name: value for name, value in beside.items() if not name.startswith(_ATTRIBUTES)}
            if not prefix:  # nothing but a diffusion has these arrays
                beside = {name: weights.pop(name) for name in BUFFERS if name in weights}
            name = ".".join(filter(None, (where, outer[:-1])))
            found[_MODELS.get(name, name)] = _Found(weights, beside)
    return found


def _refuse_relatives(found: _Found, source: str) -> None:
    """Refuse other diffusions and other U-Nets of the package by name."""
    # No GaussianDiffusion takes networks with such an embedding.
    is_continuous = _FOURIER in found.weights and not found.buffers
    left = [name for name in found.beside if name not in BUFFERS and ("." not in name or name.startswith("log_snr."))]
    if is_continuous or any(name.startswith("log_snr.") for name in left):
        raise CheckpointError(
            f"{source}: the network is fed the log SNR by a diffusion of continuous time "
            "(ContinuousTimeGaussianDiffusion, VParamContinuousTimeGaussianDiffusion or ElucidatedDiffusion), which "
            "is not supported; give a GaussianDiffusion's file"
        )
    if left:
        raise CheckpointError(
            f"{source}: buffers must be those of GaussianDiffusion, got {', '.join(left[:3])}; other diffusions of the "
            "package are not supported"
        )
    refuse_relatives(found.weights, source)


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


def _spec(flags: Flags, arguments: Arguments, schedule: RoundedSchedule, version: Version | None) -> ModelSpec:
    """The conventions of GaussianDiffusion, or of the one beside the class-conditional U-Net."""
    learned, classes = arguments["learned_variance"], arguments.get("num_classes")
    old = _before(version, (1, 4, 2))
    if learned and classes is not None:
        raise CheckpointError(
            f"{flags.source}: a class-conditional U-Net must return as many channels as it takes, got twice as many; "
            "the package has no diffusion for it"
        )
    prediction = "eps" if learned else PREDICTIONS[_objective(flags, schedule)]
    size = flags.size(("image_size",), len(arguments["dim_mults"]))
    steps = flags.integer("sampling_timesteps", schedule.T)
    if steps > schedule.T:
        raise flags.wrong("sampling_timesteps", f"at most {schedule.T}, the steps of training")
    eta = flags.number("ddim_sampling_eta", 1.0 if classes is not None or _before(version, (1, 0, 0)) else 0.0)
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
        # Beside the classes, and in older versions, ε is not derived anew from the clipped x_0.
        clipped_eps="raw" if prediction == "eps" and (classes is not None or old) else "rederive",
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
