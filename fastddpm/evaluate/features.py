"""Features: what of a picture is compared, by the network of the FID, a TorchScript file or a class of one's own."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.common.wording import first_line, named
from fastddpm.engines.devices import pick_device
from fastddpm.engines.weights import weights_hash
from fastddpm.files import check_regular, sha256

INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of weights-inception-2015-12-05-6726825d.pth, which pytorch-fid publishes as pt_inception-2015-12-05-6726825d.pth."""
_OWN = "not resized, given as bytes"


@dataclasses.dataclass(frozen=True)
class Features:
    """A function of pictures, and what it is.

    Args:
        name: "inception", or as the user named it.
        digest: SHA-256 of the weights, or of the code where there are none, as hexadecimal digits.
        network: uint8 pictures [B, C, H, W] on the device → features [B, D], or a tuple that begins with them.
        device: where it runs.
        channels: C that it takes; None takes the pictures'.
        preprocessing: what is done to the pictures before, for people.
    """

    name: str
    digest: str
    network: Callable[[Tensor], object]
    device: torch.device
    channels: int | None = None
    preprocessing: str = _OWN

    @property
    def is_inception(self) -> bool:
        """Whether this is the network of the FID, with its weights."""
        return self.name == INCEPTION and self.digest == INCEPTION_SHA256

    @property
    def distance(self) -> str:
        """What the Fréchet distance of these features is called: FID with the network of the FID, and only then."""
        return "FID" if self.is_inception else f"FD ({self.name})"

    def seeing(self, channels: int | None) -> Features:
        """The same for pictures of so many channels, 1 or 3; None leaves it open.

        Raises:
            ValueError: it takes others.
        """
        if channels not in (None, 1, 3) or self.channels not in (None, channels or self.channels):
            expected = f"{self.channels} for {self.name}" if self.channels else "1 or 3"
            raise ValueError(f"evaluate: channels must be {expected}, got {channels}; leave it out")
        return dataclasses.replace(self, channels=channels or self.channels)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """The features of a batch.

        Args:
            pictures: uint8 [B, C, H, W].

        Returns:
            float32 [B, D], on the CPU.

        Raises:
            ValueError: the network refuses such pictures, or returns something else, or NaN or infinity.
        """
        try:
            out = self.network(pictures.to(self.device))
        except Exception as error:  # a foreign network raises what it pleases
            raise ValueError(
                f"{self.name}: the features' network must take uint8 pictures {tuple(pictures.shape)}, but it raised "
                f"{type(error).__name__}: {_last_line(error)}"
            ) from error
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(pictures) or out.is_complex():
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name}: features must be numbers [{len(pictures)}, D], got {got}; flatten them")
        if not bool(out.isfinite().all()):
            raise ValueError(f"{self.name}: features must be finite, got NaN or infinity; mend the network")
        return out.to("cpu", torch.float32)


def _last_line(error: BaseException) -> str:
    """What TorchScript says last is what went wrong; before it stands where."""
    return (str(error).strip().splitlines() or ["nothing"])[-1][:200]


def load_features(
    name: str, *, weights: str | os.PathLike[str] | None = None, device: torch.device | str | None = None
) -> Features:
    """Load what maps pictures to features.

    Args:
        name: "inception": the network of the FID, in torch-fidelity's port, with its 2,048 pooled features. The path of
            a TorchScript file, which runs no Python. Or "module:Class", which is imported, also from the working
            folder, and made without arguments: that runs the code of the module.
        weights: for inception only: the file of weights. None takes the one that torch-fidelity publishes, from
            PyTorch's cache or downloaded into it. Its SHA-256 is checked either way.
        device: where the network runs; None takes the GPU if there is one.

    Returns:
        The features.

    Raises:
        ValueError: there is nothing of that name, it cannot be loaded, the weights are others, or inception is asked
            for and torch-fidelity is not installed.
        OSError: a file cannot be read.
    """
    target = pick_device(device)
    if name == INCEPTION:
        from fastddpm.evaluate.inception import load_inception  # late: it needs an optional package

        network, digest = load_inception(None if weights is None else Path(weights))
        how = "resized to 299×299 by the network, bilinear as in TensorFlow 1, no antialiasing"
        return Features(INCEPTION, digest, network.to(target), target, channels=3, preprocessing=how)
    if weights is not None:
        raise ValueError(f"load_features: weights must be left out, got {weights}; {name} brings its own")
    if Path(name).exists():
        return _load_torchscript(Path(name), target)
    module, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"load_features: features must be inception, a TorchScript file that exists or module:Class, got {name!r}"
        )
    return _load_class(name, module, attribute, target)


def _load_torchscript(path: Path, device: torch.device) -> Features:
    check_regular(path)
    if path.is_dir():
        raise ValueError(f"{path}: features must be a TorchScript file, got a folder; name the file")
    try:
        network = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        why = first_line(error)
        raise ValueError(
            f"{path}: must be a TorchScript file, but is none ({why}); save it by torch.jit.save"
        ) from error
    call: Callable[[Tensor], object] = network
    if "return_features" in [argument.name for argument in network.forward.schema.arguments]:

        def call(pictures: Tensor) -> object:  # NVIDIA's networks return classes otherwise
            return network(pictures, return_features=True)

    return Features(path.name, sha256(path), call, device)


def _load_class(name: str, module: str, attribute: str, device: torch.device) -> Features:
    """The user's own class, whose module may stand in the working folder."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        kind = getattr(importlib.import_module(module), attribute)
        made = kind()
    except Exception as error:  # the user's code raises what it pleases
        raise ValueError(
            f"{name}: features must be a class that can be imported and made without arguments, but that raised "
            f"{named(error)}"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(made):
        raise ValueError(f"{name}: features must be callable, got {type(made).__name__}; give it __call__ or forward")
    digest = hashlib.sha256()
    source = inspect.getsourcefile(kind)
    if source is not None:
        digest.update(Path(source).read_bytes())
    if isinstance(made, nn.Module):
        made = made.eval().to(device)
        digest.update(weights_hash(made).encode())
    return Features(name, digest.hexdigest(), made, device)
