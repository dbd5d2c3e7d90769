"""The same network for two libraries: random networks, and our U-Net as one of diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fastddpm.checkpoints import Checkpoint, native
from fastddpm.checkpoints.diffusers_unet import network_from, unet_config
from fastddpm.common.packages import require
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec, Variance

_PREDICTIONS = {"eps": "epsilon", "x_start": "sample", "v": "v_prediction"}


class NoTwinError(ValueError):
    """A network that diffusers cannot run; the message says why."""


def random_checkpoint(folder: Path, config: Mapping[str, object], variance: Variance) -> Path:
    """Write a checkpoint with a seeded random network whose outputs are about 1.

    Args:
        folder: where.
        config: arguments of diffusers' UNet2DModel, which need not be installed.
        variance: of the steps.

    Returns:
        The folder.
    """
    structure = unet_config(config, "random_checkpoint")
    network = random_unet(structure)
    shape = (structure.in_channels, *structure.sample_size)
    native.save(folder, network, NoiseSchedule.linear(), ModelSpec(shape, variance=variance))
    return folder


def random_unet(structure: UNetConfig, T: int = 1000) -> UNet:
    """A seeded random network without classes whose outputs are about 1; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        network = UNet(structure).eval()
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()  # training starts some at zero
        example = torch.randn(1, structure.in_channels, *structure.sample_size)
        network.conv_out.weight /= network(example, torch.tensor([T // 2])).std()
        nn.init.zeros_(network.conv_out.bias)  # type: ignore[arg-type]
    return network


def import_diffusers() -> ModuleType:
    """The library diffusers.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    diffusers = require("diffusers", "diffusers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def twin_folder(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as a diffusers pipeline that computes the same.

    Args:
        folder: where.
        checkpoint: the checkpoint.

    Returns:
        The folder.

    Raises:
        NoTwinError: diffusers has no such network or no such scheduler.
        ImportError: diffusers is not installed.
    """
    diffusers = import_diffusers()
    network, spec, structure = checkpoint.network, checkpoint.spec, checkpoint.network.config
    if not isinstance(structure, UNetConfig):
        raise NoTwinError(f"the network is a {type(network).__name__}, which diffusers has not")
    config = diffusers_config(structure)
    if spec.prediction not in _PREDICTIONS or spec.time_scale != 1.0 or spec.self_condition:
        raise NoTwinError("diffusers has no scheduler for the network's conventions")
    with torch.device("meta"):
        twin = diffusers.UNet2DModel(**config)
    twin.load_state_dict(unfused(config, network.state_dict(), twin), assign=True)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=checkpoint.schedule.T,
        trained_betas=[float(beta) for beta in checkpoint.schedule.betas],
        variance_type=spec.variance,
        clip_sample=spec.clip is not None,
        clip_sample_range=spec.clip or 1.0,
        prediction_type=_PREDICTIONS[spec.prediction],
        thresholding=spec.threshold is not None,
        **({} if spec.threshold is None else _threshold(*spec.threshold)),
    )
    diffusers.DDPMPipeline(twin, scheduler).save_pretrained(folder)
    return folder


def _threshold(ratio: float, most: float) -> dict[str, float]:
    return {"dynamic_thresholding_ratio": ratio, "sample_max_value": most}


def diffusers_config(config: UNetConfig) -> dict[str, object]:
    """The arguments of the UNet2DModel with this structure.

    Raises:
        NoTwinError: there is none.
    """
    plain = (
        config.embedding != "interleaved"
        and config.attention_order == "qkv_heads"
        and config.conv_resample
        and config.stem == config.channels[0] == config.sinusoids
        and (config.head_channels is not None or (config.num_heads == 1 and config.up_num_heads in (None, 1)))
        and not config.resblock_updown
        and not any(config.resblock_down or ())
        and not any(config.resblock_up or ())
    )
    if not plain:
        raise NoTwinError("diffusers has no network of that structure")
    up = tuple(reversed(config.attention if config.up_attention is None else config.up_attention))
    height, width = config.sample_size
    groups = (config.mid_attention_groups or config.norm_groups) if config.mid_attention_norm else None
    return {
        "sample_size": height if height == width else (height, width),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "center_input_sample": config.center_input,
        "time_embedding_dim": config.time_channels,
        "freq_shift": int(config.embedding_shift),
        "flip_sin_to_cos": config.embedding == "cos_sin",
        "down_block_types": tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in up),
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "mid_block_scale_factor": config.mid_scale,
        "downsample_padding": 0 if config.downsample_padding == "asymmetric" else 1,
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": groups if config.scale_shift or config.mid_attention_groups else None,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.mid_attention,
        "num_class_embeds": config.num_classes,
    }


def unfused(config: Mapping[str, object], weights: Mapping[str, Tensor], twin: nn.Module) -> dict[str, Tensor]:
    """Our U-Net's weights under diffusers' names.

    Each of their tensors is filled with a number of its own and loaded as a checkpoint of theirs: where that number
    turns up in ours is where the tensor's values are.

    Args:
        config: their configuration.
        weights: ours.
        twin: theirs, for names and shapes; it may be on the meta device.

    Returns:
        Their state dict.
    """
    shapes = {name: value.shape for name, value in twin.state_dict().items()}
    marks = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    marked = network_from(config, marks).state_dict()
    names = list(shapes)
    found: dict[str, Tensor] = {}
    for ours, value in weights.items():
        rows = marked[ours].flatten(1)[:, 0] if value.ndim > 1 else marked[ours]
        for mark in rows.unique().tolist():
            name = names[int(mark)]
            found[name] = value[rows == mark].reshape(shapes[name]).clone()
    return found
