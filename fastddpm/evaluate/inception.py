"""The network of the FID: Inception v3 of 2015 as TensorFlow had it, in torch-fidelity's port, its weights checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import urllib.error
from pathlib import Path

import torch
from torch import nn

from fastddpm.evaluate.features import INCEPTION_SHA256
from fastddpm.files import check_regular, sha256

LAYER = "2048"
_PACKAGE = "torch_fidelity"


def load_inception(weights: Path | None = None) -> tuple[nn.Module, str]:
    """The network, which takes uint8 pictures [B, 3, H, W] and returns a tuple of features [B, 2048].

    Args:
        weights: the file; None takes it from PyTorch's cache, and downloads it there if need be.

    Returns:
        The network on the CPU, and the SHA-256 of its weights.

    Raises:
        ValueError: torch-fidelity is not installed, or the file is not there, is another one, or cannot be downloaded.
        OSError: it cannot be read.
    """
    module = extractor()
    path = _downloaded(module.URL_INCEPTION_V3) if weights is None else weights
    check_regular(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: inception's weights must be a file, got none; mend the path, or leave it out to download them"
        )
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        raise ValueError(
            f"{path}: inception's weights must have the SHA-256 {INCEPTION_SHA256}, got {digest}; fetch the file again"
        )
    # The library unpickles the file, which is safe with these bytes and no others.
    network: nn.Module = module.FeatureExtractorInceptionV3(
        "inception", [LAYER], feature_extractor_weights_path=str(path)
    )
    return network, digest


def extractor() -> types.ModuleType:
    """torch-fidelity's module with the network, without what the package imports besides.

    Its other extractors need torchvision, which does not import beside each build of torch. So a bare package of that
    name stands in while the one module is imported, and leaves no trace.
    """
    name = f"{_PACKAGE}.feature_extractor_inceptionv3"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(
            "inception: the package torch-fidelity must be installed; run pip install 'fastddpm[evaluate]'"
        )
    bare = types.ModuleType(_PACKAGE)
    bare.__path__ = list(spec.submodule_search_locations)
    before = set(sys.modules)
    sys.modules[_PACKAGE] = bare
    try:
        return importlib.import_module(name)
    finally:
        for added in set(sys.modules) - before:
            if added.partition(".")[0] == _PACKAGE:
                del sys.modules[added]


def _downloaded(url: str) -> Path:
    """The library's file in PyTorch's cache, where the library itself looks for it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
    except (urllib.error.URLError, TimeoutError, ConnectionError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"inception: weights must be downloaded from {url}, but that failed ({reason}); fetch and name the file"
        ) from error
    return path
