"""denoising-diffusion-pytorch, imported whether or not what only its trainer needs is installed."""

from __future__ import annotations

import importlib
import sys
import types
from unittest.mock import MagicMock

from fastddpm.bench.peers import MissingError

_TRAINER_ONLY = ("torchvision", "accelerate", "ema_pytorch", "pytorch_fid", "pytorch_fid.inception",
                 "pytorch_fid.fid_score", "scipy", "scipy.optimize")  # fmt: skip


def package_module(name: str) -> types.ModuleType:
    """A module of the package, with its U-Nets and diffusions; what its trainer lacks here is a placeholder in it.

    Raises:
        MissingError: the package is not installed, or cannot be imported.
    """
    missing = []
    for part in _TRAINER_ONLY:
        try:
            importlib.import_module(part)
        except Exception:  # noqa: BLE001 - a broken package fails in any way it likes
            sys.modules[part] = MagicMock()
            missing.append(part)
    try:
        return importlib.import_module(f"denoising_diffusion_pytorch.{name}")
    except ImportError as error:
        raise MissingError(f"denoising-diffusion-pytorch cannot be imported ({error}); install it") from error
    finally:
        for part in missing:
            del sys.modules[part]
