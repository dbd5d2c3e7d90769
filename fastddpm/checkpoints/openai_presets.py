"""The flags of OpenAI's published networks, as the READMEs of the two repositories state them.

The names are those of the files, without the suffix. Flags that the weights determine are left out.
"""

from __future__ import annotations

_IMPROVED: dict[str, object] = {
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "num_heads": 4,
    "predict_xstart": False,
    "rescale_timesteps": True,
    "sigma_small": False,
    "use_new_attention_order": False,
}
_IMPROVED_LSUN = {
    **_IMPROVED,
    "image_size": 256,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "num_heads": 1,
    "rescale_timesteps": False,
}
_GUIDED: dict[str, object] = {
    "image_size": 256,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "num_head_channels": 64,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "use_new_attention_order": False,
}
_UPSAMPLER = {name: value for name, value in _GUIDED.items() if name != "image_size"}

# Published with them, but not networks that sample.
RELATIVES = {
    f"{size}x{size}_classifier": "a classifier, which fastddpm.load_classifier reads" for size in (64, 128, 256, 512)
}

PRESETS: dict[str, dict[str, object]] = {
    "imagenet64_uncond_100M_1500K": {**_IMPROVED, "image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": {**_IMPROVED, "image_size": 64},
    "imagenet64_cond_270M_250K": {**_IMPROVED, "image_size": 64, "rescale_timesteps": False},
    "cifar10_uncond_50M_500K": {**_IMPROVED, "image_size": 32},
    "cifar10_uncond_vlb_50M_500K": {**_IMPROVED, "image_size": 32},
    "lsun_uncond_100M_1200K_bs128": _IMPROVED_LSUN,
    "lsun_uncond_100M_2400K_bs64": _IMPROVED_LSUN,
    "64x64_diffusion": {**_GUIDED, "image_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True},
    "128x128_diffusion": {**_GUIDED, "image_size": 128, "num_head_channels": -1, "num_heads": 4},
    "256x256_diffusion": _GUIDED,
    "256x256_diffusion_uncond": _GUIDED,
    "512x512_diffusion": {**_GUIDED, "image_size": 512},
    "lsun_bedroom": _GUIDED,
    "lsun_cat": _GUIDED,
    "lsun_horse": _GUIDED,
    "lsun_horse_nodropout": _GUIDED,
    "64_256_upsampler": {**_UPSAMPLER, "large_size": 256, "small_size": 64, "num_head_channels": -1, "num_heads": 4},
    "128_512_upsampler": {**_UPSAMPLER, "large_size": 512, "small_size": 128},
    "upsample_cond_500K": {
        **{name: value for name, value in _IMPROVED.items() if name != "image_size"},
        "large_size": 256,
        "small_size": 64,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
    },
}
