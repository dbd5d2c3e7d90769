"""State dicts as other projects would have them, made from our own networks: any configuration, without their code."""

import torch

from fastddpm.checkpoints import diffusers_unet, openai, pesser, renaming, w86763777
from fastddpm.nets.blocks import timestep_embedding
from fastddpm.nets.unet import UNet, UNetConfig

NAMES = {
    "openai": openai.names_of,
    "pesser": pesser.names_of,
    "w86763777": w86763777.names_of,
    "diffusers": diffusers_unet.names_of,
}
CONVENTIONS = {
    "openai": {"embedding": "cos_sin", "embedding_shift": 0.0, "norm_eps": 1e-5, "attention_order": "heads_qkv"},
    "pesser": {"downsample_padding": "asymmetric"},
    "w86763777": {"embedding": "interleaved", "embedding_shift": 0.0, "norm_eps": 1e-5},
    "diffusers": {"embedding": "cos_sin", "embedding_shift": 0.0, "norm_eps": 1e-5},
}


def foreign_network(dialect, **structure):
    """One of our networks in a dialect's conventions, with random weights everywhere."""
    given = {"sample_size": (8, 8), "channels": (32, 64), "layers": 1, "attention": (False, True)}
    config = UNetConfig(**{**given, **CONVENTIONS[dialect], **structure})
    generator = torch.Generator().manual_seed(0)
    network = UNet(config).eval()
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def foreign_state(dialect, network):
    """Its weights under the dialect's names, the fused layers in parts."""
    ours, state = network.state_dict(), {}
    for name, piece in renaming.pieces_of(network, NAMES[dialect](network.config)).items():
        rows = piece.rows or (len(ours[name]) // len(piece.theirs),) * len(piece.theirs)
        for theirs, part in zip(piece.theirs, ours[name].split(rows), strict=True):
            # As copies: a file keeps what tensors share. Attention is made of convolutions in three of the dialects.
            is_linear = part.ndim == 2 and (".qkv." in name or ".out." in name) and dialect != "diffusers"
            ones = (1,) * {"openai": 1}.get(dialect, 2) if is_linear else ()
            state[theirs] = part.reshape(*part.shape, *ones).clone()
    if dialect == "w86763777":
        width = network.config.sinusoids
        table = timestep_embedding(torch.arange(1000), width, order="interleaved", shift=0.0)
        state["time_embedding.timembedding.0.weight"] = table
    return state


FLAGS = {
    "openai": {
        "image_size": 8,
        "diffusion_steps": 100,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
        "predict_xstart": False,
        "sigma_small": False,
        "num_heads": 1,
    },
    "pesser": {
        "resolution": 8,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
        "model_var_type": "fixedsmall",
    },
    "w86763777": {"img_size": 8, "beta_1": 1e-4, "beta_T": 0.02, "mean_type": "epsilon", "var_type": "fixedsmall"},
}


def diffusers_config(config):
    """What config.json would say of one of our configurations."""
    levels = range(len(config.channels))

    def kind(level, direction, attends):
        in_block = config.changes_in_resblock(level, direction)
        if attends:
            return f"Attn{direction.title()}Block2D"
        return f"Resnet{direction.title()}sampleBlock2D" if in_block else f"{direction.title()}Block2D"

    ups = config.up_attention or config.attention
    return {
        "_class_name": "UNet2DModel",
        "sample_size": list(config.sample_size),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "down_block_types": [kind(level, "down", config.attention[level]) for level in levels],
        "up_block_types": [kind(level, "up", ups[level]) for level in reversed(levels)],
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": config.num_classes,
    }
