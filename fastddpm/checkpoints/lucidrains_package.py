"""The U-Nets of denoising-diffusion-pytorch, run as that package has them, whatever else of it can be imported here.

The package imports as a whole: its trainer's needs (torchvision, accelerate, ema-pytorch, pytorch-fid) with it, none of
which a U-Net uses. Where one of them is missing or broken, only the module with the U-Net is executed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.lucidrains_versions import make_older

PACKAGE = "denoising_diffusion_pytorch"
Module = Literal["denoising_diffusion_pytorch", "classifier_free_guidance", "learned_gaussian_diffusion"]

# What the package's modules import at their top and use in the trainer alone, or not at all.
_TRAINER_ONLY = ("torchvision", "accelerate", "ema_pytorch", "pytorch_fid")
# What its U-Nets do use.
_NEEDED = ("einops.layers.torch", "packaging.version", "tqdm.auto", "PIL.Image")
_PRIVATE = "fastddpm.checkpoints._lucidrains_"
_LOCK = threading.RLock()


class PackageUNet(nn.Module):
    """A U-Net of the package behind the call that samplers make.

    Args:
        module: The module of the package that defines it.
        arguments: The keyword arguments of its class, as plain JSON data; "older" among them holds those of
            `make_older`, for networks of older versions of the package.

    Attributes:
        unet: The package's own network. With classes, one more row of its embedding stands for "no class".

    Raises:
        CheckpointError: If the package is not there, is too old, or does not take the arguments.
    """

    def __init__(self, module: Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments = module, dict(arguments)
        self.unet = _make(module, arguments)
        self.classes: int | None = arguments.get("num_classes")
        self.takes_x_start = bool(arguments.get("self_condition", False))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, x_self_cond: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: float [B, C, H, W]; H and W divisible by the U-Net's downsampling.
            t: int64 [B], training steps.
            y: int64 [B] in 0 … num_classes, of which the last is "no class"; for class-conditional networks only.
            x_self_cond: float [B, C, H, W], the estimate of x_0 that a self-conditioned network is fed; None is zeros.

        Returns:
            float [B, C or 2C, H, W].
        """
        out: Tensor
        if self.classes is not None:
            # The label decides, so nothing is dropped at random.
            out = self.unet(x, t, y, cond_drop_prob=0.0)
        elif self.takes_x_start:
            out = self.unet(x, t, x_self_cond)
        else:
            out = self.unet(x, t)
        return out

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights as the package's files have them."""
        return {name: tuple(value.shape) for name, value in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """The weights as the package's files have them; the inverse of `load`."""
        own = dict(self.unet.state_dict())
        rows = own.get("classes_emb.weight")
        if self.classes is not None and rows is not None and len(rows) == self.classes + 1:
            own["classes_emb.weight"], own["null_classes_emb"] = rows[:-1], rows[-1]
        return own

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the package's weights, all of those that `shapes` names and in these shapes, as float32."""
        self.unet.load_state_dict(weights, strict=True, assign=True)
        if self.classes is not None:
            # A label of its own instead of a mask: the package's choice between the two rows, made by the lookup.
            rows = torch.cat((weights["classes_emb.weight"], weights["null_classes_emb"][None]))
            embedding = nn.Embedding(rows.shape[0], rows.shape[1], device="meta")
            embedding.load_state_dict({"weight": rows}, assign=True)
            self.unet.classes_emb = embedding
            del self.unet.null_classes_emb
        self.eval()


def package_module(name: Module) -> types.ModuleType:
    """A module of the package: imported as usual if that works here, else executed by itself.

    In the second case the modules that it imports but does not need for its networks are replaced by placeholders while
    it runs, and `sys.modules` is as before afterwards, but for private names of ours.

    Args:
        name: The module's name within the package.

    Returns:
        The module, with its classes `Unet` and `GaussianDiffusion`.

    Raises:
        CheckpointError: If the package is not installed, or cannot be read.
    """
    full, private = f"{PACKAGE}.{name}", _PRIVATE + name
    for known in (full, private):
        if known in sys.modules:
            return sys.modules[known]
    folder = _folder()
    if all(_is_installed(dependency) for dependency in _TRAINER_ONLY):
        before = set(sys.modules)
        try:
            return importlib.import_module(full)
        except Exception:  # noqa: BLE001 - a broken dependency fails in any way it likes
            _forget(set(sys.modules) - before)
    return _execute(name, folder)


def _folder() -> Path:
    places = list(getattr(sys.modules.get(PACKAGE), "__path__", ()))
    if not places:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(PACKAGE)
            places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise CheckpointError(
            "lucidrains networks need the package denoising-diffusion-pytorch, which is not installed; "
            "install fastddpm[lucidrains]"
        )
    return Path(places[0])


def _is_installed(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _forget(names: set[str]) -> None:
    for name in names:
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            sys.modules.pop(name, None)


def _execute(name: Module, folder: Path) -> types.ModuleType:
    """Run one module's file under a private name, and whatever else of the package it imports likewise."""
    with _LOCK:
        try:
            for needed in _NEEDED:  # beforehand: none of them may meet a placeholder
                importlib.import_module(needed)
            with _stand_ins(folder):
                return _load(name, folder)
        except Exception as error:
            _drop_private()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"lucidrains networks need the module {name} of denoising-diffusion-pytorch, which fails to import "
                f"({type(error).__name__}: {reason}); install fastddpm[lucidrains] anew"
            ) from error


def _load(name: str, folder: Path) -> types.ModuleType:
    private, path = _PRIVATE + name, folder / f"{name}.py"
    if private in sys.modules:
        return sys.modules[private]
    # Compilers look a function's module up by name, so the private names stay.
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path.name} is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module
    spec.loader.exec_module(module)
    return module


def _drop_private() -> None:
    for name in [name for name in sys.modules if name.startswith(_PRIVATE)]:
        del sys.modules[name]


class _Nothing(types.ModuleType):
    """A module whose every name is a class that does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # so that its submodules are looked for

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - anything that is asked for
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the submodules of the stand-in package in its folder, under private names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for the submodules of the package and of what stands in for others, None for everything else."""
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name:
            return importlib.machinery.ModuleSpec(fullname, _Alias(name, self.folder))
        stands_in = isinstance(sys.modules.get(package), _Nothing)
        return importlib.machinery.ModuleSpec(fullname, _Placeholder()) if stands_in else None


class _Alias(importlib.abc.Loader):
    """Gives the import system the privately named module under the package's own name."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder

    def exec_module(self, module: types.ModuleType) -> None:
        """Load the private module and let it take the place of `module`."""
        # `import` hands out what stands in sys.modules once this returns.
        sys.modules[module.__name__] = _load(self._name, self._folder)


class _Placeholder(importlib.abc.Loader):
    """Makes modules whose every name is a class that does nothing."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """One under the name that is asked for."""
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing has to be done."""


@contextlib.contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """Placeholders in `sys.modules` for the package and what only its trainer uses; all is put back at the end."""
    unused = [*_TRAINER_ONLY]
    if not _is_installed("scipy"):
        unused += ["scipy", "scipy.optimize"]
    names = [PACKAGE, *unused]

    def ours() -> list[str]:
        mine = [name for name in sys.modules if name.startswith(tuple(f"{name}." for name in names))]
        return [*mine, *(name for name in names if name in sys.modules)]

    saved = {name: sys.modules.pop(name) for name in ours()}
    finder, package = _Finder(folder), types.ModuleType(PACKAGE)
    package.__path__ = []
    sys.modules[PACKAGE] = package
    for name in unused:
        sys.modules[name] = _Nothing(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(saved)


def _make(module: Module, arguments: Mapping[str, Any]) -> nn.Module:
    """The package's network on the meta device."""
    unet = package_module(module).Unet
    known = inspect.signature(unet.__init__).parameters
    if "resnet_block_groups" in known:
        raise CheckpointError(
            "lucidrains networks need denoising-diffusion-pytorch 2.0 or later, also those of 1.x, but the one that is "
            "installed is older; update the package"
        )
    older = arguments.get("older") or {}
    arguments = {name: value for name, value in arguments.items() if name != "older"}
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise CheckpointError(
            f"lucidrains: the installed denoising-diffusion-pytorch must know {', '.join(unknown)}, but does not; "
            "update the package"
        )
    try:
        with torch.device("meta"):
            network: nn.Module = unet(**{key: _tuples(value) for key, value in arguments.items()})
            make_older(network, **older)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"lucidrains: the arguments of its U-Net must fit each other, got {dict(arguments)} ({reason}); "
            "give the whole checkpoint"
        ) from error
    return network


def _tuples(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
